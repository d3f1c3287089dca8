"""The three networks of the demonstration: small, smooth, and with far more weights than constraints."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def digits_net(classes: int) -> nn.Module:
    """Two convolutions and two dense layers for 8 × 8 images: about 38,000 weights.

    Strided instead of pooled and tanh instead of ReLU: with few weights for many constraints, or with gradients that
    switch off, little of the null space is left to tell new inputs from old ones.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.Tanh(),
        nn.Flatten(),
        nn.Linear(512, 64), nn.Tanh(),
        nn.Linear(64, classes),
    )  # fmt: skip


def lenet(classes: int) -> nn.Module:
    """LeNet-5 for 28 × 28 images: 61,706 weights (LeCun, Bottou, Bengio, Haffner, 1998)."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120), nn.Tanh(),
        nn.Linear(120, 84), nn.Tanh(),
        nn.Linear(84, classes),
    )  # fmt: skip


def curve_net(width: int = 50) -> nn.Module:
    """A smooth function of one variable: 1 → width → width → 1 with tanh."""
    return nn.Sequential(
        nn.Linear(1, width), nn.Tanh(),
        nn.Linear(width, width), nn.Tanh(),
        nn.Linear(width, 1),
    )  # fmt: skip


def seeded(make: Callable[..., nn.Module], *args: int, seed: int) -> nn.Module:
    """Build ``make(*args)`` with initial weights that depend on ``seed`` alone.

    torch's global random state stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*args)
