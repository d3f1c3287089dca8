"""Every example at capture: which of them would move otherwise than their rows say, at first sight?

The audit at the end looks at a few examples, each for itself and to the last digit (``examples.py``). A way past the
gradient that one example in a thousand takes (`.detach()` in a branch, a custom backward pass of an expert) is not
among those by chance. So all examples of a batch take one short step of the weights, and those that disagree with
their rows by far are audited before others. That accuses nobody: kinks and rounding look the same here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.audit.batches import counter_generator
from nullbayes.model.batch import Inputs, select
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.size import is_large

# Half a step, relative to the weights, by precision; and how much shorter the second one is.
STEPS = {torch.float64: 3e-7, torch.float32: 1e-3}
SHORTER = 0.3
# Disagreement, as a share of what the step does to an example of the batch, from which on one is suspected.
SUSPECT = 0.1
# Examples that are audited for that, at most.
MOST = 2


@dataclass(frozen=True)
class Step:
    """One direction in which all examples are moved: ``isotropic (P,)`` in the solver's coordinates, and as weights."""

    isotropic: Tensor
    weights: Mapping[str, Tensor]
    size: float

    @classmethod
    def of(cls, functional: FunctionalModel, isotropic: Tensor, changes: Tensor) -> Step:
        """Of a vector of the prior, and of the weight change ``(P,)`` that it stands for."""
        norm = sum(float(w.double().square().sum()) for w in functional.weights().values())
        reach = math.sqrt(norm) or 1.0
        size = STEPS[functional.rounding] * reach / max(float(changes.double().norm()), 1e-300)
        return cls(isotropic, functional.space.unflatten(changes), size)


def screened(functional: FunctionalModel) -> bool:
    """Whether this network's examples are: where passes are cheap, exact enough, and answers cost no waiting."""
    plain = functional.widened is None and not functional.unrounded
    known, on_processor = functional.rounding in STEPS, functional.device.type == "cpu"
    return plain and known and on_processor and not is_large(functional.model)


def direction(count: int, like: Tensor) -> Tensor:
    """Standard normal numbers ``(1, count)``, always the same."""
    drawn = torch.randn(1, count, generator=counter_generator(0, 3), dtype=torch.float64)
    return drawn.to(like)


def suspects(
    functional: FunctionalModel, inputs: Inputs, cotangents: Tensor, claimed: Tensor, step: Step
) -> dict[int, float]:
    """Places in a batch of examples that disagree with their rows, and by what share of the step's effect.

    None are where the network fails at other weights: what it says then is told where something depends on it.

    Args:
        cotangents: ``(C, B, *out)``; ``claimed (B, C)``: what the rows say of ``step.isotropic``.
    """
    try:
        return _suspects(functional, inputs, cotangents, claimed, step)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        return {}


def _suspects(
    functional: FunctionalModel, inputs: Inputs, cotangents: Tensor, claimed: Tensor, step: Step
) -> dict[int, float]:
    flat = cotangents.reshape(*cotangents.shape[:2], -1)

    def apart(some: Inputs, places: Tensor, by: float) -> Tensor:
        moved = _difference(functional, some, step, by).reshape(len(places), -1)
        found = torch.einsum("cno,no->nc", flat[:, places].to(moved), moved)
        return (found - claimed[places].to(found)).double().norm(dim=1)

    every = torch.arange(len(claimed), device=claimed.device)
    usual = float(claimed.double().square().sum(1).mean().sqrt())
    # Rows of confident examples are small; they are held against themselves.
    size = claimed.double().norm(dim=1).clamp_min(1e-3 * usual)
    away = apart(inputs, every, step.size) / size
    which = (away > SUSPECT).nonzero()[:, 0]
    if not usual > 0 or not len(which):
        return {}
    which = which[away[which].argsort(descending=True)[: 4 * MOST]]
    # A kink that the first step crossed is farther than the second one goes.
    again = apart(select(inputs, which), which, SHORTER * step.size) / size[which]
    pairs = zip(which.tolist(), again.tolist(), strict=True)
    return {place: share for place, share in pairs if share > SUSPECT}


def _difference(functional: FunctionalModel, inputs: Inputs, step: Step, by: float) -> Tensor:
    """Central differences ``(B, *out)`` along the step."""
    weights, ends = functional.weights(), []
    for sign in (by, -by):
        moved = {n: torch.add(w, step.weights[n].to(w), alpha=sign) for n, w in weights.items()}
        with torch.no_grad():
            ends.append(functional(moved, inputs))
    return (ends[0] - ends[1]) / (2 * by)
