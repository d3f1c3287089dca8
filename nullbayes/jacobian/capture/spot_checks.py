"""Later batches of large networks: some neighbouring examples of each are looked at, one pass answers both questions.

Are examples functions of themselves, and are their rows those of automatic differentiation? The first batches are
evaluated, and their rows compared, in full. Of a later one that took a way through the network on which all rows were
right (:mod:`nullbayes.audit.route`), a few examples are evaluated in other company, with gradients; the backward pass
from the same outputs gives what their rows must add up to. On any other way, and where something differs, the whole
batch is compared.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nullbayes.audit.batches import (
    counter_generator,
    gradient_mismatches,
    gradient_of_parts,
    plain_gradient,
    random_weights,
    shown_separate,
)
from nullbayes.audit.signatures import Signature
from nullbayes.errors import ModelError
from nullbayes.jacobian.block import Block
from nullbayes.jacobian.capture.checking import (
    Capturing,
    Make,
    Scales,
    checked,
    separate,
    summed_rows,
)
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.model.batch import Inputs, batch_size, take
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.size import is_large

# Batches of several examples whose rows are compared in full before others are in part.
IN_FULL = 2
# Of a later batch, and of each piece of it that is captured by itself, one example in so many is looked at.
ONE_IN = 4


@dataclass(frozen=True)
class Shown:
    """Neighbouring examples that were shown to be functions of themselves, and how.

    Attributes:
        size: examples of the batch; ``numbers``: those that were looked at.
        parts: places in the batch and outputs there with their graph, whose leaves are ``weights``.
    """

    size: int
    numbers: range
    parts: list[tuple[list[int], Tensor]]
    weights: dict[str, Tensor]


def shown_or_separate(
    functional: FunctionalModel, plan: CapturePlan, inputs: Inputs, outputs: Tensor, index: int
) -> tuple[Shown | None, Inputs]:
    """Batch ``index`` of examples that are functions of themselves, with its axes as the model takes them.

    Args:
        outputs: ``(B, *out)`` of the batch, without gradients.

    Returns:
        Those of a later batch of a large network that were looked at; None: all were.

    Raises:
        ModelError: an example depends on others, on chance, on a state, or on whether gradients are recorded.
    """
    if not _in_part(functional, plan, inputs):
        return None, separate(functional, inputs, outputs, plan.where, index)
    numbers, weights = _some(len(outputs), index), functional.weights(requires_grad=True)
    try:
        parts = shown_separate(functional, weights, inputs, outputs, numbers, plan.where)
    except ModelError:
        padded = functional.padded
        taken = separate(functional, inputs, outputs, plan.where, index)
        if taken is inputs and functional.padded == padded:  # not mended
            raise
        return None, taken
    return Shown(len(outputs), numbers, parts, weights), inputs


def _in_part(functional: FunctionalModel, plan: CapturePlan, inputs: Inputs) -> bool:
    """Whether batches like this one were compared in full, and a pass is dear."""
    known = plan.compared >= IN_FULL and bool(plan.routes) and not plan.unreached
    known = known and batch_size(inputs) > ONE_IN and is_large(functional.model)
    return known and plan.proved.covers(Signature.of(inputs))


def _some(size: int, index: int) -> range:
    """Neighbours, drawn: as rows of a block they need no copy."""
    count = -(-size // ONE_IN)
    generator = counter_generator(1, index, size)
    start = int(torch.randint(0, size - count + 1, (1,), generator=generator))
    return range(start, start + count)


def checked_in_part(
    functional: FunctionalModel,
    plan: CapturePlan,
    inputs: Inputs,
    make: Make,
    scales: Scales = None,
    index: int = 0,
) -> tuple[Block, Any]:
    """The rows of one piece of training data, equal to plain automatic differentiation.

    In part where ``plan.shown`` says that the batch may be, and the piece took a known way; otherwise, and where
    anything differs, in full (`checked`, which see for what it raises).
    """
    capturing, taken = Capturing(functional, plan, inputs, make, scales, plan.where), None
    if plan.shown is not None:
        taken = capturing()
        since = time.perf_counter()
        if plan.routes.issuperset(taken.routes[:1]) and taken.routes:
            values = taken.made.values
            right = _some_agree(functional, plan, inputs, taken.block, values, scales, index)
            if right:
                plan.checking_seconds += time.perf_counter() - since
                return taken.block, taken.made
        plan.checking_seconds += time.perf_counter() - since
    # Captured once: on an unknown way the rows may be right all the same.
    return checked(capturing, index, taken)


def _some_agree(
    functional: FunctionalModel,
    plan: CapturePlan,
    inputs: Inputs,
    block: Block,
    values: Tensor,
    scales: Scales,
    index: int,
) -> bool:
    """Whether rows of some examples of a piece add up to a plain gradient.

    Args:
        values: cotangents ``(C, B, *out)``.
    """
    found, size = plan.shown, block.examples
    assert found is not None
    numbers = found.numbers if found.size == size and found.parts else _some(size, index)
    start, stop = numbers.start, numbers.stop
    weights, total = random_weights(values[:, start:stop], 0, start)
    if numbers is found.numbers:
        cotangents = values.new_zeros(values.shape[1:])
        cotangents[start:stop] = total
        expected = gradient_of_parts(functional, found.weights, found.parts, cotangents)
        found.parts.clear()  # the graph is gone
    else:
        expected = plain_gradient(functional, take(inputs, start, stop), total)
    ours = summed_rows(functional, block.narrow(start, stop), weights.to(expected), scales)
    space, rounding = functional.space, functional.rounding
    return not gradient_mismatches(space, expected, ours, rounding=rounding)
