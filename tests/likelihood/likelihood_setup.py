"""Likelihoods with outputs and targets for each, and dense references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nullbayes.likelihood import (
    Binary,
    Classification,
    Regression,
)

F64 = torch.float64


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=F64).to(dtype)


def labels(classes: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(classes, shape, generator=rng(seed))


def gram(factor: Tensor) -> Tensor:
    """``Σ_c l_c l_cᵀ`` of a factor (C, B, *out): (B, D, D)."""
    flat = factor.flatten(2) if factor.ndim > 2 else factor.unsqueeze(-1)
    return torch.einsum("cni,cnj->nij", flat, flat)


SOFT = normal(3, 5, seed=7).softmax(-1)
WEIGHT = [0.5, 2.0, 0.0, 1.0, 3.0]
IGNORED = torch.tensor([[1, -100, 4, 0], [-100, -100, -100, -100], [2, 3, -100, 1]])
CASES = {
    "classes": (Classification(), normal(3, 5), labels(5, 3)),
    "classes-uint8": (Classification(), normal(3, 5), labels(5, 3).to(torch.uint8)),
    "two-classes-bool": (Classification(), normal(4, 2), labels(2, 4).bool()),
    "soft": (Classification(), normal(3, 5), SOFT),
    "weight": (Classification(weight=WEIGHT), normal(3, 5), labels(5, 3)),
    "soft-weight": (Classification(weight=WEIGHT), normal(3, 5), SOFT),
    "tokens": (Classification(), normal(3, 4, 5), labels(5, 3, 4)),
    "tokens-first": (Classification(), normal(3, 5, 4), labels(5, 3, 4)),
    "tokens-square": (Classification(), normal(3, 5, 5), labels(5, 3, 5)),
    "tokens-axis": (Classification(class_axis=1), normal(3, 5, 5), labels(5, 3, 5)),
    "tokens-ignored": (Classification(), normal(3, 4, 5), IGNORED),
    "tokens-ignored-weight": (Classification(weight=WEIGHT), normal(3, 4, 5), IGNORED),
    "tokens-soft": (Classification(), normal(3, 4, 5), normal(3, 4, 5, seed=8).softmax(-1)),
    "ignore-zero": (Classification(ignore_index=0), normal(6, 5), torch.tensor([0, 1, 0, 2, 3, 4])),
    "pixels": (Classification(), normal(2, 4, 2, 3), labels(4, 2, 2, 3)),
    "pixels-last": (Classification(), normal(2, 2, 3, 4), labels(4, 2, 2, 3)),
    "binary": (Binary(), normal(4, 1), labels(2, 4)),
    "binary-flat": (Binary(), normal(4), labels(2, 4).bool()),
    "binary-column": (Binary(), normal(4), labels(2, 4, 1)),
    "multi-label": (Binary(), normal(4, 3), labels(2, 4, 3)),
    "binary-soft": (Binary(), normal(4, 2, 3), normal(4, 2, 3, seed=3).sigmoid()),
    "gauss": (Regression(0.3), normal(4, 3), normal(4, 3, seed=5)),
    "gauss-flat": (Regression(0.3), normal(4), normal(4, seed=5)),
    "gauss-column": (Regression(0.3), normal(4, 1), normal(4, seed=5)),
    "gauss-channels": (Regression([0.1, 1.0, 9.0]), normal(4, 3), normal(4, 3, seed=5)),
    "gauss-image": (Regression([0.1, 4.0]), normal(3, 2, 2, 2), normal(3, 2, 2, 2, seed=5)),
    "gauss-elements": (
        Regression(normal(2, 3, seed=4).exp()),
        normal(4, 2, 3),
        normal(4, 2, 3, seed=5),
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
