"""Data in, operator out: capture every batch of a loader in pieces that fit in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nullbayes.common.memory import times_on, working_bytes
from nullbayes.jacobian.block import Block
from nullbayes.jacobian.capture.checking import captured_at_use
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.capture.spot_checks import checked_in_part, shown_or_separate
from nullbayes.jacobian.capture.verify import prove
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.model.batch import Inputs, batch_size, take
from nullbayes.model.functional import FunctionalModel

# Rows of one capture.
CAPTURE_ROWS = 1024


def examples_per_capture(
    functional: FunctionalModel,
    plan: CapturePlan,
    cotangents: int,
    temporaries: int | None = None,
) -> int:
    """How many examples one backward pass may carry, with so many bytes of ``temporaries`` (None: what work may)."""
    device = functional.device
    fits = (temporaries or working_bytes(device)) // capture_bytes(functional, plan, cotangents)
    return max(1, min(fits, CAPTURE_ROWS * times_on(device) // max(1, cotangents)))


def capture_bytes(functional: FunctionalModel, plan: CapturePlan, cotangents: int) -> int:
    """What the capture of one example takes for a while, counted from what passed through the layers."""
    per_example = plan.activations * (cotangents + 2)
    per_example += cotangents * sum(functional.space.by_name[n].numel for n in plan.generic)
    return max(1, 2 * functional.dtype.itemsize * per_example)


def capture_batch(
    functional: FunctionalModel,
    plan: CapturePlan,
    inputs: Inputs,
    make: Callable[[Tensor, slice], Any],
    cotangents: int,
    scales: dict[str, float] | None = None,
    temporaries: int | None = None,
) -> Iterator[tuple[Block, Inputs, Any]]:
    """One batch, cut into pieces: the block of each, checked, its inputs, and its cotangents.

    Args:
        make: ``(outputs, piece) -> `` the cotangents of a piece.

    Raises:
        ModelError: rows that differ from plain automatic differentiation on every path.
    """
    inputs = functional.batch(inputs)
    size = batch_size(inputs)
    step = examples_per_capture(functional, plan, cotangents, temporaries)
    for start in range(0, size, step):
        piece = slice(start, min(start + step, size))
        some = take(inputs, piece.start, piece.stop)

        def made_of(outputs: Tensor, piece: slice = piece) -> Any:
            return make(outputs, piece)

        block, made = checked_in_part(functional, plan, some, made_of, scales, start)
        yield block, some, made


def ready(
    functional: FunctionalModel,
    plan: CapturePlan | None,
    inputs: Inputs,
    outputs: Tensor,
    where: str,
    index: int,
) -> tuple[CapturePlan, Inputs]:
    """A batch of training data, ready to be captured: its plan, and its inputs as the model takes them.

    Args:
        plan: None for the first batch, on which it is made.
        outputs: of the batch, without gradients.

    Raises:
        ModelError: no rows of single examples exist: examples that depend on one another, on chance or on a state, and
            what `prove` refuses.
    """
    if plan is None:
        plan = prove(functional, inputs)
        functional.remember(inputs, outputs)
    plan.where = where
    since = time.perf_counter()
    plan.shown, taken = shown_or_separate(functional, plan, inputs, outputs, index)
    plan.checking_seconds += time.perf_counter() - since
    return plan, taken


def output_operators(
    functional: FunctionalModel,
    plan: CapturePlan,
    inputs: Inputs,
    outputs: int,
    scales: dict[str, float] | None = None,
) -> Iterator[JacobianOperator]:
    """All rows ``J_n`` of the ``outputs`` numbers of each example, a piece of the batch at a time."""
    inputs = functional.batch(inputs)
    size = batch_size(inputs)
    step = examples_per_capture(functional, plan, outputs)
    for start in range(0, size, step):
        piece = take(inputs, start, min(start + step, size))
        block, _ = captured_at_use(functional, plan, piece, _identity, scales)
        yield JacobianOperator(functional.space, [block])


def _identity(outputs: Tensor) -> SimpleNamespace:
    """One cotangent per output number: ``(O, B, *out)``."""
    size = outputs[0].numel()
    eye = torch.eye(size, dtype=outputs.dtype, device=outputs.device)
    values = eye[:, None].expand(size, len(outputs), size)
    return SimpleNamespace(values=values.reshape(size, *outputs.shape))
