"""Standard normal numbers of which sample ``s`` depends on ``(seed, s)`` alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def generator_for(seed: int, index: int) -> torch.Generator:
    """The random stream of sample ``index``: independent of all others and of how many there are."""
    words = np.random.SeedSequence([seed, index]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


def standard_normal(
    seed: int, indices: range, columns: int, rows: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """``v (S, columns)`` in the dtype of ``like`` and ``ξ (S, rows)`` float64, on its device."""
    v = torch.empty(len(indices), columns, dtype=like.dtype)
    noise = torch.empty(len(indices), rows, dtype=torch.float64)
    for i, index in enumerate(indices):
        generator = generator_for(seed, index)
        v[i].normal_(generator=generator)
        noise[i].normal_(generator=generator)
    return v.to(like.device), noise.to(like.device)
