"""What all examples share, given to each of them: position tables, class tokens.

A position embedding is looked up once for all examples, ``(1, T, D)``; a class token is one parameter, ``(1, 1, D)``;
both join the examples by an addition or a concatenation that repeats them along the batch. Repeated *before* that,
``(B, T, D)``, outputs are the same, and the gradient that arrives there is that of each example by itself: one backward
pass of the whole batch gives it, no example has to be differentiated alone. A network that does anything else with
them gives other rows, or fails; the proof then goes on to the ways that always serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from nullbayes.jacobian.capture.plan import CapturePlan, Site
from nullbayes.model.parameters import ParameterSpace


def candidates(plan: CapturePlan, space: ParameterSpace) -> list[str]:
    """Parameters without a rule that have an axis of length one where the batch would be."""
    slots = space.by_name
    return [
        n
        for n in plan.generic
        if n not in space.masks and len(slots[n].shape) > 1 and slots[n].shape[0] == 1
    ]


def spread_output(site: Site, x: Tensor, out: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Input and output of a layer that all ``size`` examples share, repeated for each; others as they are."""
    shared = x.ndim > 1 and out.ndim > 1 and len(x) == len(out) == 1 < size
    if not shared or site.spread is False:
        return x, out
    site.spread = True
    return x.expand(size, *x.shape[1:]), out.expand(size, *out.shape[1:])


def spread_weights(
    plan: CapturePlan, weights: dict[str, Tensor], size: int
) -> tuple[dict[str, Tensor], list[Any]]:
    """``weights`` with those of ``plan.spread`` repeated for each example, and where their gradients arrive."""
    with torch.enable_grad():
        each = {n: weights[n].expand(size, *weights[n].shape[1:]) for n in plan.spread}
    return {**weights, **each}, [get_gradient_edge(t) for t in each.values()]


def spread_rows(
    plan: CapturePlan, grads: Sequence[Tensor | None], size: int
) -> list[tuple[str, Tensor]]:
    """Rows ``(B, C, numel)`` by parameter, from gradients ``(C, B, ...)``."""
    found = zip(plan.spread, grads, strict=True)
    return [(n, g.transpose(0, 1).reshape(size, len(g), -1)) for n, g in found if g is not None]


def no_longer_spread(plan: CapturePlan) -> bool:
    """Give up what was given to each example, where the network fails on it; whether there was anything."""
    sites = [site for site in plan.sites if site.spread]
    for site in sites:
        site.spread = False
    had, plan.spread = bool(plan.spread), []
    return had or bool(sites)
