"""One pass over the training data: validate, prove the rows on a probe batch, capture them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nullbayes.common.progress import ROWS, Stages
from nullbayes.constraints.directions import Cotangents, Directions
from nullbayes.constraints.memory_budget import FitMemory
from nullbayes.constraints.preserve import Preserve
from nullbayes.jacobian.block_storage import Keeper
from nullbayes.jacobian.capture.batches import capture_batch
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.capture.verify import prove
from nullbayes.jacobian.operator import JacobianOperator, check_block
from nullbayes.likelihood import Likelihood
from nullbayes.model.batch import Inputs, batch_size, select, take, tensor_leaves
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.loader import limited

# Examples at most: predicting them linearised costs as much as capturing their rows.
CHECK_EXAMPLES = 10_000


@dataclass
class TrainingRows:
    """The constraint matrix of a training set, with what was seen on the way."""

    operator: JacobianOperator
    plan: CapturePlan
    examples: int
    discarded_trace: float
    kept: list[tuple[Inputs, Any]] = field(default_factory=list)  # examples for the certificate
    kept_numbers: list[range] = field(default_factory=list)  # which of the data set's those are
    spans: list[slice] = field(default_factory=list)  # by example: its rows


def fit_noise(
    functional: FunctionalModel,
    likelihood: Likelihood,
    loader: Iterable[Any],
    limit: int | None,
    stage: Stages,
) -> None:
    """Let the likelihood estimate its observation noise from training residuals."""
    if not likelihood.needs_noise_fit:
        return

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        tracked = limited(functional, loader, "train_loader", limit)
        for index, inputs, targets in stage.track(tracked, "observation noise"):
            where = f"train_loader, batch {index}"
            outputs = functional.outputs(inputs, where)
            likelihood.validate(outputs, targets, where)
            yield outputs, targets

    likelihood.fit_noise(pairs())


def capture_training(
    functional: FunctionalModel,
    likelihood: Likelihood,
    preserve: Preserve,
    directions: Directions,
    loader: Iterable[Any],
    limit: int | None,
    scales: dict[str, float] | None,
    memory: FitMemory,
    draws: int,
    stage: Stages,
) -> TrainingRows:
    """Rows of all training examples, in the order of the loader.

    With ``directions="auto"`` examples need different numbers of rows: those of a batch that need as
    many are captured together, so no row is stored in vain.

    The first examples are kept aside for the certificate, as many as ``draws`` function draws can be
    held for: a second pass over a shuffled or augmented loader would not see the same ones.

    Args:
        memory: what rows may take (more goes elsewhere, see ``block_storage.py``), and temporaries.

    Raises:
        MemoryBudgetError: what has to stay in memory outgrows ``memory.rows``.
    """
    plan: CapturePlan | None = None
    keeper: Keeper | None = None
    examples, trace, discarded, captured = 0, 0.0, 0.0, 0
    kept: list[tuple[Inputs, Any]] = []
    kept_numbers: list[range] = []
    left, checked = memory.check, 0
    track = stage.track(loader, ROWS)
    for index, inputs, targets in limited(functional, track, "train_loader", limit):
        where = f"train_loader, batch {index}"
        outputs = functional.outputs(inputs, where)
        likelihood.validate(outputs, targets, where)
        targets = likelihood.prepare_targets(outputs, targets)
        if plan is None or keeper is None:
            plan = prove(functional, inputs)
            likelihood.check_reach(outputs, targets)
            keeper = Keeper(functional, plan, scales, memory.rows, memory.block)
        rows = preserve.rows(likelihood, tuple(outputs.shape[1:]), directions)
        for some, make, count, which in row_groups(
            likelihood, preserve, directions, inputs, outputs, targets, rows
        ):
            pieces = capture_batch(functional, plan, some, make, count, scales, memory.temporaries)
            numbers = which + examples
            for block, piece, made in pieces:
                check_block(block, captured)
                mine, numbers = numbers[: block.examples], numbers[block.examples :]
                keeper.add(block, piece, made.values, mine)
                captured += 1
                trace += float(made.trace.double().sum())
                discarded += float(made.discarded.double().sum())
        size = batch_size(inputs)
        each = draws * outputs[0].nbytes + sum(t.nbytes for t in tensor_leaves(inputs)) // size
        fits = min(size, left // max(1, each), CHECK_EXAMPLES - checked)
        if fits:
            kept.append((take(inputs, 0, fits), take(targets, 0, fits, size)))
            kept_numbers.append(range(examples, examples + fits))
            checked += fits
        left = left - fits * each if fits == size else 0
        examples += size
    assert plan is not None and keeper is not None
    operator = JacobianOperator(functional.space, keeper.finish())
    share = discarded / trace if trace > 0 else 0.0
    spans = _spans(operator, keeper.numbers, examples)
    return TrainingRows(operator, plan, examples, share, kept, kept_numbers, spans)


def _spans(operator: JacobianOperator, numbers: list[Tensor], examples: int) -> list[slice]:
    """The rows of each example: blocks hold them in the order in which they were captured."""
    spans, order, at, done = [slice(0, 0)] * examples, torch.cat(numbers).tolist(), 0, 0
    for block in operator.blocks:
        for number in order[done : done + block.examples]:
            spans[number] = slice(at, at + block.cotangents)
            at += block.cotangents
        done += block.examples
    return spans


Make = Callable[[Tensor, slice], Cotangents]


def row_groups(
    likelihood: Likelihood,
    preserve: Preserve,
    directions: Directions,
    inputs: Inputs,
    outputs: Tensor,
    targets: Any,
    rows: int,
) -> Iterator[tuple[Inputs, Make, int, Tensor]]:
    """Examples of a batch that have the same number of rows: what makes their cotangents, and which they are."""
    if directions != "auto":

        def computed(out: Tensor, piece: slice) -> Cotangents:
            some = take(targets, piece.start, piece.stop, len(outputs))
            return preserve.cotangents(likelihood, out, some, directions)

        yield inputs, computed, rows, torch.arange(len(outputs))
        return
    made = preserve.cotangents(likelihood, outputs, targets, directions)
    used = (made.values.flatten(2) != 0).any(2).sum(0).clamp(min=1)  # (B,)
    for count in used.unique().tolist():
        index = (used == count).nonzero()[:, 0]
        values = made.values[:count, index]
        discarded, trace = made.discarded[index], made.trace[index]

        def stored(
            _: Tensor,
            piece: slice,
            values: Tensor = values,
            discarded: Tensor = discarded,
            trace: Tensor = trace,
        ) -> Cotangents:
            return Cotangents(values[:, piece], discarded[piece], trace[piece])

        yield select(inputs, index), stored, count, index.cpu()
