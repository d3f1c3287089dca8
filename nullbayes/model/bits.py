"""The bits of tensors as integers, and sums of them."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of a tensor that sums hold a 64-bit copy of at a time.
_CHUNK = 2**20


def digest(tensor: Tensor) -> int:
    """One number from every bit of a tensor."""
    return sum(read(weighted_sums(tensor)))


def weighted_sums(tensor: Tensor) -> list[Tensor]:
    """Sums ``()`` of a tensor's bits, weighted by their places, one for each part of it."""
    out = []
    with torch.no_grad():
        words = bits_of(tensor)
        for start in range(0, words.numel(), _CHUNK):
            part = words[start : start + _CHUNK].to(torch.int64)
            # Sums of integers wrap around and are the same in any order; the weights tell places apart.
            at = torch.arange(start + 1, start + len(part) + 1, device=part.device)
            out.append((part * (2 * at + 1)).sum())
    return out


def read(values: list[Tensor]) -> list[int]:
    """Integers of tensors without axes, by one copy from each device, not one for each."""
    places: dict[torch.device, list[int]] = {}
    for i, value in enumerate(values):
        places.setdefault(value.device, []).append(i)
    out = [0] * len(values)
    for which in places.values():
        for i, value in zip(which, torch.stack([values[i] for i in which]).tolist(), strict=True):
            out[i] = value
    return out


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers, flat: one for each number, two for a complex one."""
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    if not flat.is_floating_point():
        return flat
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.contiguous().view(kinds[flat.element_size()])
