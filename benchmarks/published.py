"""The two ways that are in use today, written from the papers: rows by `jacrev`, alternating projections.

They share nothing with the library but the trained network, so that they can be slow in their own way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from nullbayes.demo.running import Clock

#: eigenvalues of a mini-batch's Gram matrix below this share of the largest are taken for zero
CUTOFF = 1e-12

#: told cycle, seconds on the clock and samples; says whether to stop
Watch = Callable[[int, float, Tensor], bool | None]


def softmax_root(logits: Tensor) -> Tensor:
    """``(B, O, O-1)`` with ``L Lᵀ = diag(p) - ppᵀ``, by eigendecomposition in float64."""
    p = logits.double().softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    values, vectors = torch.linalg.eigh(hessian)
    return (vectors * values.clamp(min=0).sqrt()[:, None, :])[..., 1:].to(logits.dtype)


def flat_function(model: nn.Module, x: Tensor):
    """``f(theta) -> (B, O)`` of one flat weight vector, and that vector."""
    named = {n: p.detach() for n, p in model.named_parameters()}
    sizes = [p.numel() for p in named.values()]

    def function(theta: Tensor, images: Tensor = x) -> Tensor:
        parts = theta.split(sizes)
        weights = {n: t.reshape(p.shape) for (n, p), t in zip(named.items(), parts, strict=True)}
        return functional_call(model, weights, (images,))

    return function, torch.cat([p.reshape(-1) for p in named.values()])


def dense_rows(model: nn.Module, x: Tensor, vectorised: bool, batch: int = 25) -> Tensor:
    """``A (N (O-1), P)`` by ``torch.func.jacrev``: row by row, or vectorised over a batch."""
    function, theta = flat_function(model, x)
    rows = []
    for images in x.split(batch):
        with torch.no_grad():
            root = softmax_root(model(images))
        if vectorised:
            per_example = vmap(lambda image: jacrev(lambda t: function(t, image[None])[0])(theta))
            jacobian = per_example(images)
        else:
            jacobian = torch.stack(
                [
                    jacrev(lambda t, i=i: function(t, i[None])[0], chunk_size=1)(theta)
                    for i in images
                ]
            )
        rows.append((root.mT @ jacobian.detach()).flatten(0, 1))
    return torch.cat(rows)


def jacrev_cholesky(
    model: nn.Module, x: Tensor, noise: Tensor, vectorised: bool, refinements: int
) -> tuple[Tensor, Clock]:
    """Null-space samples from the explicit Jacobian and the same Cholesky factorisation as ours."""
    clock = Clock()
    a = dense_rows(model, x, vectorised)
    clock.lap("rows")
    gram = (a @ a.T).double()
    clock.lap("gram")
    scale = gram.diagonal().rsqrt()
    gram.mul_(scale[:, None]).mul_(scale)
    gram.diagonal().add_(0.1 * torch.finfo(a.dtype).eps * len(a) ** 0.5)
    factor = torch.linalg.cholesky(gram)
    clock.lap("factorisation")
    samples = noise
    for _ in range(refinements):
        z = torch.cholesky_solve(((samples @ a.T).double() * scale).T, factor).T * scale
        samples = samples - z.to(a.dtype) @ a
    clock.lap("samples")
    return samples, clock


def _directional(f, theta: Tensor, v: Tensor) -> Tensor:
    return jvp(f, (theta,), (v,))[1]


def _pullback(f, theta: Tensor):
    pull = vjp(f, theta)[1]
    return lambda w: pull(w)[0]


def _worth_watching(cycle: int) -> bool:
    """Every cycle up to the tenth, then 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 120, ..."""
    scale = 10 ** max(0, len(str(cycle)) - 2)
    return cycle < 10 or (
        cycle % scale == 0 and cycle // scale in (10, 12, 15, 20, 25, 30, 40, 50, 60, 80)
    )


def run_cycles(
    advance: Callable[[Any], Any],
    samples: Any,
    to_torch: Callable[[Any], Tensor],
    clock: Clock,
    cycles: int,
    watch: Watch | None,
    max_seconds: float,
) -> Tensor:
    """Repeat ``advance`` on a running clock that stands still while ``watch`` looks at the samples."""
    for cycle in range(1, cycles + 1):
        samples = advance(samples)
        clock.lap("cycles")
        seconds = clock.seconds["precomputation"] + clock.seconds["cycles"]
        last = cycle == cycles or seconds >= max_seconds
        if watch is not None and (last or _worth_watching(cycle)):
            last = bool(watch(cycle, seconds, to_torch(samples))) or last
            clock.lap("watching")
        if last:
            break
    clock.seconds.pop("watching", None)
    return to_torch(samples)


def alternating_projections(
    model: nn.Module,
    x: Tensor,
    noise: Tensor,
    cycles: int,
    batch: int = 16,
    *,
    accelerated: bool = False,
    watch: Watch | None = None,
    max_seconds: float = math.inf,
) -> tuple[Tensor, Clock]:
    """Miani, Roy & Hauberg (2025), algorithm 1: cyclic projections onto each mini-batch's null space.

    The inverse of each mini-batch's Gram matrix is computed once; a projection is then one
    Jacobian-vector and one vector-Jacobian product for each sample.

    Args:
        model: the trained network.
        x: ``(N, ...)``, all training images.
        noise: ``(S, P)``, the samples to project.
        cycles: passes over all mini-batches, at most.
        batch: images in a mini-batch.
        accelerated: after each cycle, the exact line search of Gearhart & Koshy (1989), which the
            authors' code has as an option.
        watch: told cycle, seconds so far and samples after the first cycles, and then ever more
            rarely; its own time is not on the clock. What it returns says whether to stop.
        max_seconds: no cycle begins after so many.
    """
    clock = Clock()
    function, theta = flat_function(model, x)
    pieces = list(x.split(batch))
    inverses, roots = [], []

    def rows_of(t: Tensor, image: Tensor, factor: Tensor) -> Tensor:
        return function(t, image[None])[0] @ factor

    for images in pieces:
        with torch.no_grad():
            root = softmax_root(model(images))
        # Each row sees one image only: far less work than all rows of all images.
        rows = vmap(jacrev(rows_of), in_dims=(None, 0, 0))(theta, images, root)
        rows = rows.detach().flatten(0, 1).double()
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        keep = values > CUTOFF * values.max()  # relative: the published absolute 1e-3 drops rows
        inverses.append((vectors[:, keep] / values[keep]) @ vectors[:, keep].T)
        roots.append(root)
    clock.lap("precomputation")

    def advance(samples: Tensor) -> Tensor:
        projected = samples
        for images, root, inverse in zip(pieces, roots, inverses, strict=True):
            f = functools.partial(function, images=images)
            along = functools.partial(_directional, f, theta)
            moved = vmap(along)(projected)  # (S, B, O)
            u = (moved.unsqueeze(2) @ root).squeeze(2).flatten(1).double() @ inverse
            weights = (root @ u.to(root).reshape(len(u), *root.shape[::2], 1)).squeeze(3)
            projected = (projected - vmap(_pullback(f, theta))(weights)).detach()
        return line_search(samples, projected) if accelerated else projected

    return run_cycles(advance, noise, lambda t: t, clock, cycles, watch, max_seconds), clock


def line_search(before: Tensor, after: Tensor) -> Tensor:
    """The point nearest to the null space on the line through ``before`` and ``after (S, P)``.

    ``x + t (Qx - x)`` with ``t = <x, x - Qx> / ‖x - Qx‖²``, for ``Qx - x`` is orthogonal to the null
    space (Gearhart & Koshy 1989).
    """
    x, change = before.double(), after.double() - before.double()
    length = change.square().sum(1)
    t = torch.where(length > 0, -(x * change).sum(1) / length, 1.0)
    return (x + t[:, None] * change).to(before)
