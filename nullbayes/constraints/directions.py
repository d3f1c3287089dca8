"""Cotangents of one batch, and the leading eigen-directions of each example's output Hessian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nullbayes.common.decompositions import eigh
from nullbayes.errors import InputError
from nullbayes.likelihood.helpers import to_float64

Directions = int | Literal["auto"] | None

AUTO_SHARE = 0.999  # share of each Hessian's trace that directions="auto" keeps

# Elements of the float64 copy of the factors that `leading_directions` holds at a time (128 MB).
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Cotangents:
    """Cotangents of one batch: B examples, C rows each. All detached; read-only (may be expanded)."""

    values: Tensor  # (C, B, *out): row (n, c) of A is values[c, n]ᵀ J_n
    discarded: Tensor  # (B,) part of `trace` that `directions` left out; 0 where all is kept
    trace: Tensor  # (B,) trace of H_n; for other modes the sum of squares of example n's cotangents

    def cut(self, _: Tensor, piece: slice) -> Cotangents:
        """Those of some examples, whatever their outputs: for rows that were settled beforehand."""
        return Cotangents(self.values[:, piece], self.discarded[piece], self.trace[piece])


def resolve_directions(directions: Any) -> Directions:
    """Check ``directions``: None (all), ``"auto"`` or a whole number >= 1. Raises `InputError`."""
    if directions is None or directions == "auto":
        return directions
    if isinstance(directions, int) and not isinstance(directions, bool) and directions >= 1:
        return directions
    raise InputError(
        f"directions is {directions!r}, expected None (keep all), 'auto' (keep {AUTO_SHARE:.1%} of "
        f"each Hessian's trace) or a whole number >= 1 of directions per example."
    )


def leading_directions(factor: Tensor, directions: int | Literal["auto"]) -> Cotangents:
    """Keep the leading eigen-directions of each ``H_n = Σ_c l_c l_cᵀ``, scaled by √eigenvalue.

    ``factor`` ``(C, B, *out)`` holds the l_c. An integer keeps that many per example; ``"auto"`` the
    fewest that reach `AUTO_SHARE` of the example's trace, with zero rows up to the most that any
    example of the batch needs (at least one row). The kept part is the best approximation of H_n at
    that rank (Eckart & Young 1936), and below H_n in the positive semi-definite order.
    """
    count, batch, *shape = factor.shape
    width = math.prod(shape)
    flat = factor.reshape(count, batch, width)
    keep = min(count, width) if directions == "auto" else min(directions, count, width)
    step = max(1, _BLOCK // max(1, count * width))
    kept, trace, discarded = [], [], []
    for start in range(0, batch, step):
        scaled, eigenvalues = _eigen(
            to_float64(flat[:, start : start + step]).transpose(0, 1), keep
        )
        # The whole trace comes from the same decomposition, so that keeping all discards exactly 0.
        total = eigenvalues.sum(-1, keepdim=True)
        # What is left after r directions, summed from the small end: total - kept cancels.
        tail = torch.cat(
            [eigenvalues.flip(-1).cumsum(-1).flip(-1), torch.zeros_like(total)], dim=-1
        )
        if directions == "auto":
            number = (tail[:, :-1] > (1 - AUTO_SHARE) * total).sum(-1)  # (b,)
            wanted = torch.arange(keep, device=scaled.device) < number.unsqueeze(-1)
            longest = max(1, int(number.max()))
            scaled = (scaled * wanted.unsqueeze(-1))[:, :longest]
        else:
            number = torch.full_like(total[:, 0], keep, dtype=torch.int64)
        kept.append(scaled.to(factor))
        trace.append(total[:, 0].to(factor))
        discarded.append(tail.gather(-1, number.unsqueeze(-1))[:, 0].to(factor))
    most = max((block.shape[1] for block in kept), default=1)
    values = factor.new_zeros(batch, most, width)
    for index, block in enumerate(kept):
        values[index * step : index * step + block.shape[0], : block.shape[1]] = block
    empty = factor.new_zeros(0)
    return Cotangents(
        values.transpose(0, 1).reshape(most, batch, *shape).contiguous(),
        torch.cat([empty, *discarded]),
        torch.cat([empty, *trace]),
    )


def _eigen(factor: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors of ``Σ_c l_c l_cᵀ`` times √eigenvalue, and all its eigenvalues.

    ``factor`` ``(b, C, D)``, float64 -> ``(b, keep, D)`` and ``(b, min(C, D))``, both in descending
    order. Works on the smaller of the C×C and D×D Gram matrices.
    """
    _, count, width = factor.shape
    if count <= width:
        gram = factor @ factor.mT
        eigenvalues, vectors = eigh(gram)
        scaled = vectors.mT.flip(-2)[:, :keep] @ factor
    else:
        eigenvalues, vectors = eigh(factor.mT @ factor)
        eigenvalues = eigenvalues.clamp_min(0)
        scaled = (vectors * eigenvalues.sqrt().unsqueeze(-2)).mT.flip(-2)[:, :keep]
    return scaled, eigenvalues.clamp_min(0).flip(-1)


def trace_of(values: Tensor) -> Tensor:
    """Sum of squares of each example's cotangents ``(C, B, *out)``: ``(B,)``."""
    count, batch = values.shape[:2]
    norms = torch.linalg.vector_norm(values.reshape(count, batch, -1), dim=(0, 2))
    return norms.square()
