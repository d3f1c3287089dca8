"""One pass over the training data: validate, prove the rows on a probe batch, capture them."""

from __future__ import annotations

import copy
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nullbayes.audit.outputs import Probabilities
from nullbayes.audit.sampling import Drawn, Reservoir
from nullbayes.audit.screening import MOST
from nullbayes.common.progress import ROWS, Stages
from nullbayes.constraints.directions import Cotangents
from nullbayes.constraints.memory_budget import FitMemory
from nullbayes.constraints.problem import Problem
from nullbayes.constraints.screening import Screening
from nullbayes.constraints.shared_rows import APART, everyones, is_probe, start_of, together
from nullbayes.jacobian.block_storage import Keeper
from nullbayes.jacobian.capture.batches import capture_batch, ready
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.live_tokens import by_length
from nullbayes.jacobian.operator import JacobianOperator, check_block
from nullbayes.likelihood import Regression
from nullbayes.model.batch import Inputs, batch_size, select, take, tensor_leaves
from nullbayes.model.last_layer import check_last_layer
from nullbayes.model.shares import share_of

# Examples at most: predicting them linearised costs as much as capturing their rows.
CHECK_EXAMPLES = 10_000
# Numbers in the output of an example up to which they are held on to.
FEW_OUTPUTS = 256


@dataclass(frozen=True)
class Stretch:
    """Consecutive examples, as one process got them in one call.

    Attributes:
        first: the number of the first among all; ``count``: how many.
        relabelled: what to add to a number for the one that its rows were made under.
    """

    first: int
    count: int
    relabelled: int = 0


@dataclass
class TrainingRows:
    """The constraint matrix of a training set, with what was seen on the way."""

    operator: JacobianOperator
    plan: CapturePlan
    examples: int
    discarded_trace: float
    checked: list[tuple[Inputs, Any]] = field(default_factory=list)  # examples for the certificate
    checked_numbers: list[range] = field(default_factory=list)  # which of the data set's those are
    # Outputs of those, where they are few numbers an example; none for rows of several calls.
    checked_outputs: list[Tensor | None] = field(default_factory=list)
    spans: list[slice] = field(default_factory=list)  # by example: its rows
    audited: list[Drawn] = field(default_factory=list)  # drawn from all examples, for the audit
    batches: int = 0  # batches whose rows were proved
    loss: float = 0.0  # summed over the examples: minus their log likelihood
    least_loss: float = 0.0  # the same if every target were the output itself (regression)
    observed: int = 0  # numbers that the targets consist of
    trace: float = 0.0  # of all output Hessians
    problem: Problem | None = None
    stretches: list[Stretch] = field(default_factory=list)  # the examples that this process has
    chances: list[float] = field(default_factory=list)  # by which those that are audited were drawn

    # What to say of outputs that do not look like what the likelihood takes.
    doubtful: str | None = None

    def span(self, number: int) -> slice:
        """The rows of an example that this process has."""
        before = 0
        for stretch in self.stretches:
            if 0 <= number - stretch.first < stretch.count:
                return self.spans[before + number - stretch.first]
            before += stretch.count
        raise KeyError(number)

    def label(self, number: int) -> int:
        """What an example of this process was numbered when its rows were made."""
        for stretch in self.stretches:
            if 0 <= number - stretch.first < stretch.count:
                return number + stretch.relabelled
        raise KeyError(number)

    def checked_places(self) -> tuple[list[int], int]:
        """For each batch of ``checked``, how many of all examples that are looked at come before it; and how many all
        processes have.
        """
        own = [(r.start, len(r)) for r in self.checked_numbers]
        processes = self.operator.processes
        found = [own] if processes is None else processes.gather(own)
        everyone = sorted(pair for part in found for pair in part)
        starts = [start for start, _ in everyone]
        before = [0, *itertools.accumulate(count for _, count in everyone)]
        return [before[bisect_left(starts, start)] for start, _ in own], before[-1]

    @property
    def asked(self) -> Problem:
        """The question that these rows belong to, with observation noise as it was when they were captured."""
        assert self.problem is not None
        return self.problem

    def joined(self, more: TrainingRows, audited: int) -> TrainingRows:
        """These rows followed by those of further examples, which are numbered on.

        Args:
            audited: examples that are drawn for the audit at most.
        """
        m, n = self.operator.shape[0], self.examples
        trace = self.trace + more.trace
        discarded = self.trace * self.discarded_trace + more.trace * more.discarded_trace
        before, _ = more.checked_places()
        room = CHECK_EXAMPLES - self.checked_places()[1] - min(before, default=0)
        checked, numbers = _first(more, max(0, room))
        drawn, chances = self._drawn(more, min(audited, n + more.examples))
        return TrainingRows(
            self.operator.followed_by(more.operator),
            more.plan,
            n + more.examples,
            discarded / trace if trace > 0 else 0.0,
            [*self.checked, *checked],
            [*self.checked_numbers, *(range(r.start + n, r.stop + n) for r in numbers)],
            [],
            [*self.spans, *(slice(s.start + m, s.stop + m) for s in more.spans)],
            drawn,
            self.batches + more.batches,
            self.loss + more.loss,
            self.least_loss + more.least_loss,
            self.observed + more.observed,
            trace,
            self.problem,
            [*self.stretches, *(replace(s, first=s.first + n) for s in more.stretches)],
            chances=chances,
            doubtful=self.doubtful,
        )

    def _drawn(self, more: TrainingRows, count: int) -> tuple[list[Drawn], list[float]]:
        """``count`` examples of both, in proportion to how many there are, and by which chances they were drawn."""
        n = self.examples
        parts = [
            list(zip(self.chances, self.audited, strict=True)),
            [
                (chance, replace(d, number=d.number + n))
                for chance, d in zip(more.chances, more.audited, strict=True)
            ],
        ]
        known = [self._of_all([chance for chance, _ in part]) for part in parts]
        share = round(count * n / (n + more.examples))
        share = min(len(known[0]), max(share, count - len(known[1])))
        kept = [
            pair
            for part, chances, wanted in zip(parts, known, (share, count - share), strict=True)
            for pair in part
            if pair[0] in chances[:wanted]
        ]
        return [d for _, d in kept], [chance for chance, _ in kept]

    def _of_all(self, chances: list[float]) -> list[float]:
        """Those of all processes, the smallest first."""
        processes = self.operator.processes
        found = [chances] if processes is None else processes.gather(chances)
        return sorted(chance for part in found for chance in part)


def _first(rows: TrainingRows, room: int) -> tuple[list[tuple[Inputs, Any]], list[range]]:
    """The first ``room`` of the examples that the certificate looks at, and their numbers."""
    checked: list[tuple[Inputs, Any]] = []
    numbers: list[range] = []
    for (inputs, targets), which in zip(rows.checked, rows.checked_numbers, strict=True):
        count = min(len(which), room)
        if count:
            checked.append((take(inputs, 0, count), take(targets, 0, count, len(which))))
            numbers.append(which[:count])
        room -= count
    return checked, numbers


def with_fitted_noise(
    problem: Problem, loader: Iterable[Any], limit: int | None, stage: Stages
) -> Problem:
    """The problem with observation noise as training residuals have it, where its likelihood estimates that."""
    # On a copy: an error later on leaves the likelihood of an earlier fit as it was.
    likelihood, functional = copy.deepcopy(problem.likelihood), problem.functional
    problem = problem.explained_by(likelihood)
    if not likelihood.needs_noise_fit:
        return problem

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        tracked = share_of(functional, loader, "train_loader", limit)
        for index, inputs, targets in stage.track(tracked, "observation noise"):
            where = f"train_loader, batch {index}"
            outputs = functional.outputs(inputs, where)
            likelihood.validate(outputs, targets, where)
            yield outputs, targets

    likelihood.fit_noise(everyones(pairs(), loader))
    return problem


def capture_training(
    problem: Problem,
    loader: Iterable[Any],
    limit: int | None,
    memory: FitMemory,
    stage: Stages,
    audited: int = 0,
    plan: CapturePlan | None = None,
) -> TrainingRows:
    """Rows of all training examples, in the order of the loader.

    With ``directions="auto"`` examples need different numbers of rows: those of a batch that need as
    many are captured together, so no row is stored in vain.

    Args:
        memory: what rows may take (more goes elsewhere, see ``block_storage.py``), and temporaries.
        audited: examples that are drawn for the audit.
        plan: of earlier rows, which these are to be joined with.

    Raises:
        MemoryBudgetError: what has to stay in memory outgrows ``memory.rows``.
    """
    functional = problem.functional
    capturing: _Capturing | None = None
    start = start_of(problem, loader)
    name = "train_loader" if plan is None else "more"
    track = stage.track(loader, ROWS)
    for index, inputs, targets in share_of(functional, loader, name, limit, track, probe=True):
        where = f"{name}, batch {index}"
        outputs = functional.outputs(inputs, where)
        targets = problem.checked_targets(outputs, targets, where)
        padded = functional.padded
        plan, taken = ready(functional, plan, inputs, outputs, where, index)
        if taken is not inputs or functional.padded != padded:  # with other axes, or mended
            inputs, outputs = taken, functional.outputs(taken, where)
        if capturing is None:
            problem.likelihood.check_reach(outputs, targets)
            if functional.last_layer:
                check_last_layer(functional, inputs)
            drawing = Reservoir(audited, 0, memory.check, start)
            capturing = _Capturing(problem, plan, memory, drawing, start)
        if not is_probe(loader):
            capturing.add(inputs, outputs, targets)
    assert capturing is not None
    capturing.plan.shown = None
    return together(capturing.finish, capturing.plan, loader, audited)


class _Capturing:
    """One pass over the training data: rows so far, and the examples that the certificate will look at.

    These are the first ones, as many as their sampled outputs can be held for: a second pass over a shuffled or
    augmented loader would not see the same ones.
    """

    def __init__(
        self,
        problem: Problem,
        plan: CapturePlan,
        memory: FitMemory,
        audited: Reservoir,
        start: int,
    ) -> None:
        self.problem, self.plan, self.memory = problem, plan, memory
        # Behind the examples of earlier calls, whose rows these will join, and of other processes.
        self.numbered = plan.numbered + start
        self.audited, self.batches = audited, 0
        self.keeper = Keeper(
            problem.functional,
            plan,
            problem.scale_by_name,
            memory.rows,
            memory.block,
            problem.in_coordinates,
        )
        self.examples, self.captured = 0, 0
        self.screening = Screening(problem, wanted=audited.count > 0)
        self.suspected: dict[int, float] = {}  # of the batch that is added, by place
        # Summed where they are: read once, at the end.
        self.trace, self.discarded = self._zero(), self._zero()
        self.checked: list[tuple[Inputs, Any]] = []
        self.checked_numbers: list[range] = []
        self.checked_outputs: list[Tensor | None] = []
        # The first of all examples, of which those before ``start`` are other processes'.
        self.left, self.count = memory.check, min(start % APART, CHECK_EXAMPLES)
        self.loss, self.least_loss, self.observed = self._zero(), self._zero(), 0
        self.outputs = Probabilities(problem.likelihood)

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.problem.device)

    def add(self, inputs: Inputs, outputs: Tensor, targets: Any) -> None:
        """The rows of one batch, of which the examples are numbered on."""
        first = self.numbered + self.examples
        self.suspected = {}
        for group in row_groups(self.problem, inputs, outputs, targets, first):
            self._add_group(group)
        for place, share in self.suspected.items():
            self.audited.suspect(inputs, targets, place, share, MOST)
        self._check_later(inputs, outputs, targets)
        self.audited.offer(inputs, targets)
        self.outputs.look(self.problem.functional, inputs, outputs)
        likelihood = self.problem.likelihood
        with torch.no_grad():
            self.loss += likelihood.loss(outputs, targets).double().sum()
            if isinstance(likelihood, Regression):
                self.least_loss += likelihood.loss(outputs, outputs).double().sum()
                self.observed += outputs.numel()
        self.batches += 1
        self.examples += batch_size(inputs)

    def _add_group(self, group: RowGroup) -> None:
        memory, numbers = self.memory, group.which + self.examples
        scales = self.problem.scale_by_name
        pieces = capture_batch(
            self.problem.functional,
            self.plan,
            group.inputs,
            group.make,
            group.count,
            scales,
            memory.temporaries,
        )
        for block, piece, made in pieces:
            check_block(block, self.captured)
            block = self.problem.in_coordinates(block)
            mine, numbers = numbers[: block.examples], numbers[block.examples :]
            for place, share in self.screening.look(block, piece, made).items():
                self.suspected[int(mine[place]) - self.examples] = share
            for index, some, length in by_length(block):
                if index is None:
                    self.keeper.add(some, piece, made.values, mine, length)
                    continue
                their, these = made.values[:, index], mine[index.to(mine.device)]
                self.keeper.add(some, select(piece, index), their, these, length)
            self.captured += 1
            self.trace += made.trace.double().sum()
            self.discarded += made.discarded.double().sum()

    def _check_later(self, inputs: Inputs, outputs: Tensor, targets: Any) -> None:
        size = batch_size(inputs)
        inside = sum(t.nbytes for t in tensor_leaves(inputs)) // size
        each = self.memory.samples * outputs[0].nbytes + inside
        fits = min(size, self.left // max(1, each), CHECK_EXAMPLES - self.count)
        if fits:
            self.checked.append((take(inputs, 0, fits), take(targets, 0, fits, size)))
            self.checked_numbers.append(range(self.examples, self.examples + fits))
            few = outputs[0].numel() <= FEW_OUTPUTS
            self.checked_outputs.append(outputs[:fits].clone() if few else None)
            self.count += fits
        self.left = self.left - fits * each if fits == size else 0

    def finish(self) -> TrainingRows:
        operator = JacobianOperator(self.problem.space, self.keeper.finish())
        trace, loss, least_loss = float(self.trace), float(self.loss), float(self.least_loss)
        share = float(self.discarded) / trace if trace > 0 else 0.0
        spans = _spans(operator, self.keeper.numbers, self.examples)
        return TrainingRows(
            operator,
            self.plan,
            self.examples,
            share,
            self.checked,
            self.checked_numbers,
            self.checked_outputs,
            spans,
            self.audited.drawn,
            self.batches,
            loss,
            least_loss,
            self.observed,
            trace,
            self.problem,
            [Stretch(0, self.examples)],
            chances=self.audited.chances,
            doubtful=self.outputs.note,
        )


def _spans(operator: JacobianOperator, numbers: list[Tensor], examples: int) -> list[slice]:
    """The rows of each example: blocks hold them in the order in which they were captured."""
    spans, at, done = [slice(0, 0)] * examples, 0, 0
    order = torch.cat(numbers).tolist() if numbers else []
    for block in operator.blocks:
        for number in order[done : done + block.examples]:
            spans[number] = slice(at, at + block.cotangents)
            at += block.cotangents
        done += block.examples
    return spans


Make = Callable[[Tensor, slice], Cotangents]


@dataclass(frozen=True)
class RowGroup:
    """Examples of a batch that have the same number of rows.

    Attributes:
        make: ``(outputs, piece) ->`` the cotangents of a piece of them.
        count: rows of each; ``which (k,)``: their places in the batch.
    """

    inputs: Inputs
    make: Make
    count: int
    which: Tensor


def row_groups(
    problem: Problem, inputs: Inputs, outputs: Tensor, targets: Any, first: int = 0
) -> Iterator[RowGroup]:
    """The examples of a batch, numbered from ``first``, by how many rows they need."""
    if problem.directions != "auto":

        def computed(out: Tensor, piece: slice) -> Cotangents:
            some = take(targets, piece.start, piece.stop, len(outputs))
            numbers = torch.arange(first + piece.start, first + piece.stop)
            return problem.cotangents(out, some, numbers)

        count = problem.rows_per_example(outputs)
        yield RowGroup(inputs, computed, count, torch.arange(len(outputs)))
        return
    made = problem.cotangents(outputs, targets)
    rows = made.values.reshape(*made.values.shape[:2], -1)
    used = (rows != 0).any(2).sum(0).clamp(min=1)  # (B,)
    for count in used.unique().tolist():
        index = (used == count).nonzero()[:, 0]
        some = Cotangents(made.values[:count, index], made.discarded[index], made.trace[index])
        yield RowGroup(select(inputs, index), some.cut, count, index.cpu())
