"""Captured rows, checked against plain automatic differentiation, and the plan mended until they agree.

Every batch of a fit is checked: a rule that holds on the first examples may fail on others (examples sorted by
length, experts, a mask as long as the batch). What a rule gets wrong goes to the generic path by name; what is then
still wrong is a :class:`ModelError` with the parameter and the batch. Internal exceptions end here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nullbayes.audit.batches import (
    check_separate,
    counter_generator,
    gradient_by_examples,
    gradient_by_outputs,
    gradient_mismatches,
    plain_gradient,
    random_weights,
)
from nullbayes.audit.route import Route
from nullbayes.audit.signatures import Signature
from nullbayes.errors import ModelError, NullBayesError
from nullbayes.jacobian.block import Block
from nullbayes.jacobian.capture.capture import (
    Misplaced,
    capture,
    check_places,
    with_tags,
)
from nullbayes.jacobian.capture.mending import mend, other_way
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.capture.single_module import LocalFailed
from nullbayes.model.batch import Inputs, batch_size, select
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.size import is_large

Make = Callable[[Tensor], Any]
Scales = dict[str, float] | None

# One thread at a time may mend a plan: predictions in several threads share it.
_MENDING = threading.RLock()
# Batches of several examples at most whose rows are also proved in reverse order, of each way through the network one,
# and how many of the examples.
TURNED, TURNED_EXAMPLES = 4, 64
# Of large networks, each pass of which is dear, fewer.
TURNED_OF_LARGE, TURNED_EXAMPLES_OF_LARGE = 2, 2
# Examples of a batch at most that are evaluated in other company at use, where no rows are captured.
SEPARATED_EXAMPLES = 64
# What a step of the plan may fail with, to be tried in another way; a lack of memory is none.
_MEMORY = (MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Taken:
    """What one capture of a piece gave: its block, what ``make`` returned, and the way that the network took."""

    block: Block
    made: Any
    routes: tuple[Route, ...]


@dataclass(frozen=True)
class Capturing:
    """How one piece is captured; calling it does, by the plan as it is then.

    Attributes:
        make: outputs to cotangents; ``scales``: of columns, by parameter; ``where``: what messages call the piece.
    """

    functional: FunctionalModel
    plan: CapturePlan
    inputs: Inputs
    make: Make
    scales: Scales = None
    where: str = "the inputs"

    def __call__(self) -> Taken:
        """Raises as `captured`."""
        routes: list[Route] = []
        block, made = captured(
            self.functional, self.plan, self.inputs, self.make, self.scales, self.where, routes
        )
        return Taken(block, made, tuple(routes))


def captured(
    functional: FunctionalModel,
    plan: CapturePlan,
    inputs: Inputs,
    make: Make,
    scales: Scales = None,
    where: str = "the inputs",
    routes: list[Route] | None = None,
) -> tuple[Block, Any]:
    """The rows of one piece, without a check; where the plan does not run it is mended.

    Args:
        routes: takes the way that the network took.

    Raises:
        ModelError: no way of the plan's runs on these inputs.
    """
    while True:
        try:
            return capture(functional, plan, inputs, make, scales, routes)
        except Exception as error:  # noqa: PERF203 - each failure changes the plan
            if isinstance(error, (NullBayesError, LocalFailed, Misplaced, *_MEMORY)):
                raise
            with _MENDING:
                other_way(functional, plan, inputs, error, where)


def checked(capturing: Capturing, index: int = 0, first: Taken | None = None) -> tuple[Block, Any]:
    """The rows of one piece, equal to plain automatic differentiation.

    Args:
        index: of the piece, decides the weights of its rows.
        first: what ``capturing`` gave already, if it was asked.

    Raises:
        ModelError: a parameter's rows differ on every path; names it and the piece.
    """
    functional, plan, inputs = capturing.functional, capturing.plan, capturing.inputs
    scales, where = capturing.scales, capturing.where
    taken = first
    while True:
        taken = taken or capturing()
        block, made, routes = taken.block, taken.made, taken.routes
        since = time.perf_counter()
        gradient, bad = _compared(functional, inputs, block, made.values, scales, index)
        turning = _turns(functional, plan, inputs, routes)
        if not bad and turning:
            bad = _in_other_order(functional, plan, inputs, made.values, where)
        with _MENDING:
            plan.checking_seconds += time.perf_counter() - since
            _note_reached(functional, plan, inputs, gradient)
            if not bad:
                if batch_size(inputs) > 1:
                    plan.compared += 1
                    for site in plan.sites:
                        site.axis_proved = True
                if turning:
                    plan.turned += 1
                    plan.turned_routes.update(routes)
                plan.proved.add(Signature.of(inputs))
                plan.routes.update(routes)
                return block, made
            mend(plan, bad, where)
        # By the plan as it is now; what was captured can go before that.
        del block, made
        taken = first = None


def _turns(
    functional: FunctionalModel, plan: CapturePlan, inputs: Inputs, routes: Sequence[Route]
) -> bool:
    """Whether rows of this batch are also proved in reverse order: not where others were that came the same way."""
    most = TURNED_OF_LARGE if is_large(functional.model) else TURNED
    known = bool(routes) and routes[0] in plan.turned_routes
    return batch_size(inputs) > 1 and plan.turned < most and not known


def _compared(
    functional: FunctionalModel,
    inputs: Inputs,
    block: Block,
    values: Tensor,
    scales: Scales,
    index: int,
) -> tuple[Tensor, list[str]]:
    """A gradient ``(P,)`` by plain differentiation, and the parameters whose rows add up to another."""
    weights, total = random_weights(values, 0, index)
    expected = plain_gradient(functional, inputs, total)
    found = summed_rows(functional, block, weights.to(expected), scales)
    space, rounding = functional.space, functional.rounding
    bad = gradient_mismatches(space, expected, found, rounding=rounding)
    if bad and len(total) > 1:
        # Where differentiating examples one by one gives the same as all at once no more closely, rounding is why.
        noise = (gradient_by_examples(functional, inputs, total) - expected).abs()
        bad = gradient_mismatches(space, expected, found, rounding=rounding, noise=noise)
    # Or outputs one by one: each may be large where their sum is nothing.
    if bad and len(values) > 1:
        noise = (gradient_by_outputs(functional, inputs, values, weights) - expected).abs()
        bad = gradient_mismatches(space, expected, found, rounding=rounding, noise=noise)
    return expected, bad


def _in_other_order(
    functional: FunctionalModel, plan: CapturePlan, inputs: Inputs, values: Tensor, where: str
) -> list[str]:
    """Parameters whose rows are wrong when the examples come in reverse, or whose layers have them out of place.

    A network that sorts its examples has the rows of its layers in place where they happen to come in order; and a
    layer that does nothing on these examples, such as a `PReLU` of positive numbers, has right rows in any order.
    """
    size = batch_size(inputs)
    generator = counter_generator(0, size)
    most = TURNED_EXAMPLES_OF_LARGE if is_large(functional.model) else TURNED_EXAMPLES
    index = torch.arange(min(size, most))
    shape = (1, len(index), *values.shape[2:])
    cotangents = torch.randn(shape, generator=generator, dtype=torch.float64).to(values)
    tags = (torch.rand(len(index), generator=generator, dtype=torch.float64) + 0.5).to(values)
    made, activations = (
        SimpleNamespace(values=with_tags(cotangents, tags), tags=tags),
        plan.activations,
    )
    try:
        # As they come, their rows have just been compared, with all others of the batch.
        some = select(inputs, index.to(functional.device))
        check_places(functional, plan, some, cotangents[0], tags)
        some = select(inputs, index.flip(0).to(functional.device))
        block, _ = captured(functional, plan, some, lambda _: made, None, where)
        return _compared(functional, some, block, made.values, None, 0)[1]
    except Misplaced as found:
        return found.names
    finally:
        plan.activations = activations


def captured_at_use(
    functional: FunctionalModel,
    plan: CapturePlan,
    inputs: Inputs,
    make: Make,
    scales: Scales = None,
    where: str = "the inputs",
) -> tuple[Block, Any]:
    """The rows of one piece, equal to plain automatic differentiation.

    A batch unlike those that were proved is also evaluated in parts. One like them may still take another way through
    the network (experts, exits, sorted examples), which the comparison of each piece finds. A way that was compared is
    not compared again where examples cannot change places on it unseen: one alone, or `Route.in_place`.

    Raises:
        ModelError: examples depend on one another; rows that differ on every path.
    """
    taken = None
    if plan.proved.covers(Signature.of(inputs)):
        taken = Capturing(functional, plan, inputs, make, scales, where)()
        block, made, routes = taken.block, taken.made, taken.routes
        known = batch_size(inputs) == 1 or (bool(routes) and routes[0].in_place)
        if known and not plan.routes.isdisjoint(routes):
            return block, made
        if not _compared(functional, inputs, block, made.values, scales, 0)[1]:
            plan.routes.update(routes)
            return block, made
    outputs = functional.outputs(inputs, where)
    if not bool(outputs.isfinite().all()):  # an error of its own where they are used
        return captured(functional, plan, inputs, make, scales, where)
    found = inputs
    if functional.randomness is None:
        found = separate(functional, inputs, outputs, where, 0)
    capturing = Capturing(functional, plan, found, make, scales, where)
    return checked(capturing, 0, taken if found is inputs else None)


def separate_at_use(
    functional: FunctionalModel, inputs: Inputs, where: str = "the inputs"
) -> tuple[Inputs, Tensor]:
    """``inputs`` with their axes and their outputs, where no rows are captured but products along weight changes.

    Up to :data:`SEPARATED_EXAMPLES` of them are evaluated in other company, by one more forward pass.

    Raises:
        ModelError: an example depends on the others, on chance or on a state.
    """
    inputs = functional.batch(inputs)
    outputs = functional.outputs(inputs, where)
    if functional.randomness is not None:
        return inputs, outputs
    found = separate(functional, inputs, outputs, where, 0, SEPARATED_EXAMPLES)
    return found, outputs if found is inputs else functional.outputs(found, where)


def separate(
    functional: FunctionalModel,
    inputs: Inputs,
    outputs: Tensor,
    where: str,
    index: int,
    most: int | None = None,
) -> Inputs:
    """``inputs`` with their axes as the model takes them, each example shown to be a function of itself.

    Args:
        outputs: of the whole batch, without gradients.
        index: which batch this is.
        most: examples that are evaluated once more, spread over the batch; None: all.

    Raises:
        ModelError: examples depend on one another, on chance, on a state, or on whether gradients are recorded.
    """
    try:
        _check_some(functional, inputs, outputs, where, index, most)
    except ModelError:
        other = inputs
        if not functional.mend_padding(inputs):
            found = None if functional.randomness is not None else functional.axes.again(inputs)
            if found is None:
                raise
            other = found
        _check_some(functional, other, functional.outputs(other, where), where, index, most)
        return other
    return inputs


def _check_some(
    functional: FunctionalModel,
    inputs: Inputs,
    outputs: Tensor,
    where: str,
    index: int,
    most: int | None,
) -> None:
    size = len(outputs)
    if most is not None and size > most:
        chosen = torch.linspace(0, size - 1, most).long()
        inputs, outputs = select(inputs, chosen.to(functional.device)), outputs[chosen]
    check_separate(functional, inputs, outputs, where, index)


def summed_rows(
    functional: FunctionalModel, block: Block, weights: Tensor, scales: Scales
) -> Tensor:
    """``weights (B*C,)`` times the rows of a block, without the ``scales`` of their columns: ``(P,)``."""
    rows = weights.new_zeros(1, functional.space.total)
    for factor in block.factors.values():
        factor.rmatvec(weights[None], rows)
    if scales:
        for name, scale in scales.items():
            slot = functional.space.by_name[name]
            rows[0, slot.start : slot.stop] /= scale
    return rows[0]


def _note_reached(
    functional: FunctionalModel, plan: CapturePlan, inputs: Inputs, gradient: Tensor
) -> None:
    """Strike off the parameters that this piece has a gradient path to."""
    space = functional.space
    for name in list(plan.unreached):
        slot = space.by_name[name]
        if bool((gradient[slot.start : slot.stop] != 0).any()):
            plan.unreached.discard(name)
    if plan.unreached:  # a path may lead to zero, as from weights that are zero
        plan.unreached -= reached(functional, inputs, sorted(plan.unreached))
    if rest := sorted(plan.unreached - plan.felt):
        plan.felt |= felt(functional, inputs, rest)


def reached(functional: FunctionalModel, inputs: Inputs, names: Sequence[str]) -> set[str]:
    """Which parameters the outputs have a gradient path to, whatever its value."""
    weights = functional.weights(requires_grad=True)
    with torch.enable_grad():
        outputs = functional(weights, inputs)
        if not outputs.requires_grad:
            return set()
        grads = torch.autograd.grad(outputs.sum(), [weights[n] for n in names], allow_unused=True)
    return {name for name, g in zip(names, grads, strict=True) if g is not None}


def felt(functional: FunctionalModel, inputs: Inputs, names: Sequence[str]) -> set[str]:
    """Which parameters the outputs depend on, by other values of them, whether there is a gradient path or not."""
    weights = functional.weights()
    with torch.no_grad():
        before = functional(weights, inputs)
        other = {n: weights[n] * 1.1 + 0.1 for n in names}
        if not _differs(functional, weights | other, inputs, before):
            return set()
        alone = [{n: other[n]} for n in names]
        found = {
            n
            for n, one in zip(names, alone, strict=True)
            if _differs(functional, weights | one, inputs, before)
        }
        if found:
            return found
        # Each needs others: a product of two.
        rest = [{n: w for n, w in other.items() if n != name} for name in names]
        return {
            n
            for n, most in zip(names, rest, strict=True)
            if not _differs(functional, weights | most, inputs, before)
        }


def _differs(
    functional: FunctionalModel, weights: dict[str, Tensor], inputs: Inputs, before: Tensor
) -> bool:
    return not torch.equal(functional(weights, inputs), before)
