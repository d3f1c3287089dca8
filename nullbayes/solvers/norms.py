"""Norms and inner products of samples in float64, a piece of the columns at a time."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns that a float64 product of two blocks of vectors holds at a time.
_COLUMNS = 2**16


def fetched(*values: Tensor) -> list[Tensor]:
    """Small tensors of one dtype on the processor, by one copy: what a search decides by is read once a step.

    (Their decompositions are faster there, too: those of a GPU take a millisecond, whatever the size.)
    """
    if all(map(at_hand, values)):
        return list(values)
    flat = torch.cat([v.flatten() for v in values]).cpu()
    parts = flat.split([v.numel() for v in values])
    return [part.view(v.shape) for part, v in zip(parts, values, strict=True)]


def at_hand(values: Tensor) -> bool:
    """Whether the processor reads it without waiting."""
    return values.device.type == "cpu"


def inner(a: Tensor, b: Tensor) -> Tensor:
    """``a bᵀ`` in float64 for ``(S, P)`` and ``(T, P)``, a piece of the columns at a time."""
    out = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for i in range(0, a.shape[1], _COLUMNS):
        out += a[:, i : i + _COLUMNS].double() @ b[:, i : i + _COLUMNS].double().T
    return out


def blocks(a: Tensor, width: int, b: Tensor | None = None) -> Tensor:
    """Diagonal blocks ``(R / width, width, width)`` of ``aᵀ b (R, R)`` for ``(K, R)``; ``b`` None: of ``aᵀ a``."""
    first = a.T.reshape(a.shape[1] // width, width, len(a))
    second = first if b is None else b.T.reshape(b.shape[1] // width, width, len(b))
    return first @ second.mT


def row_norms(a: Tensor) -> Tensor:
    """``(S, P)`` -> ``(S,)`` float64, without a float64 copy of all of it."""
    out = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    for part in a.split(_COLUMNS, dim=1):
        out += part.double().square().sum(1)
    return out.sqrt()
