"""What a fit would cost, before it runs: sizes by counting, speed by trying a few examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

import torch
from torch import Tensor

from nullbayes.audit.examples import prior_vectors
from nullbayes.common.memory import format_bytes
from nullbayes.common.processes import Processes
from nullbayes.common.progress import AUDIT, COMMUNICATION, FACTORISATION, ROWS
from nullbayes.constraints.memory_budget import FitMemory
from nullbayes.constraints.problem import Problem
from nullbayes.constraints.training_rows import CHECK_EXAMPLES, row_groups
from nullbayes.errors import MemoryBudgetError, NotFittedError
from nullbayes.fit.result import Settings
from nullbayes.fit.room import divided
from nullbayes.fit.timing import Trial, settled
from nullbayes.fit.together import own_budget
from nullbayes.jacobian.block import Block
from nullbayes.jacobian.block_storage import fits_on_disk, merge_blocks
from nullbayes.jacobian.capture.batches import capture_batch, capture_bytes, examples_per_capture
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.capture.verify import prove
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.likelihood import Regression
from nullbayes.model.batch import Inputs, batch_size, take, tensor_leaves
from nullbayes.model.loader import limited
from nullbayes.model.sharded import held_bytes
from nullbayes.solvers import choose

TRIED_EXAMPLES = 96
# Vectors of the weights that the audit holds for each prior vector: that, a sample, both side by side and as tangents.
AUDIT_COPIES = 6


@dataclass(frozen=True, repr=False)
class Plan:
    """Sizes, memory and time of a fit; ``print`` it.

    Attributes:
        examples, rows_per_example: counted over the whole loader; ``rows`` (M) is their product.
        parameters: P.
        solver, reason: what ``solver="auto"`` would take and why; ``solver`` is None where nothing fits.
        bytes: by stage; ``seconds``: by stage, extrapolated from a short trial on this machine.
        budget: bytes that the fit may take.
        unsupported: parameters without a layer rule, and why: they take the slower generic path.
        advice: the mend, where something does not fit or is slow.
        processes: that share the work: bytes and seconds are those of one of them.
        sent: bytes that one process sends; their seconds are the stage "communication".
    """

    examples: int
    rows_per_example: int
    rows: int
    parameters: int
    solver: str | None
    reason: str
    bytes: dict[str, int]
    seconds: dict[str, float]
    budget: int
    unsupported: dict[str, str]
    advice: list[str]
    processes: int = 1
    sent: int = 0

    @property
    def fits(self) -> bool:
        """Whether the fit stays inside the budget."""
        return self.solver is not None

    def as_dict(self) -> dict[str, Any]:
        """All fields; JSON-able."""
        return asdict(self)

    def __repr__(self) -> str:
        return (
            f"Plan({self.rows:,} × {self.parameters:,}, solver={self.solver!r}, fits={self.fits})"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        lines = [
            "Plan",
            f"  constraints × weights  {self.rows:,} × {self.parameters:,}"
            f"  ({self.examples:,} examples, {self.rows_per_example} rows each)",
            f"  solver                 {self.solver or 'none fits'}: {self.reason}",
        ]
        if self.processes > 1:
            lines.append(f"  of each of             {self.processes} processes")
        for stage, size in self.bytes.items():
            lines.append(f"  {stage:<22} {format_bytes(size)}")
        total = sum(self.bytes.values())
        lines.append(
            f"  in all                 {format_bytes(total)} of {format_bytes(self.budget)}"
        )
        if self.seconds:
            stages = ", ".join(f"{stage} {s:.1f}" for stage, s in self.seconds.items())
            total_seconds = sum(self.seconds.values())
            lines.append(f"  time                   about {total_seconds:.1f} s ({stages})")
            if self.processes > 1:
                share = 100 * self.seconds.get(COMMUNICATION, 0.0) / max(total_seconds, 1e-9)
                lines.append(
                    f"  communication          {format_bytes(self.sent)} sent, {share:.0f} % of the time"
                )
        for name, why in self.unsupported.items():
            lines.append(f"  generic path           {name}: {why}")
        return "\n".join([*lines, *(f"  → {text}" for text in self.advice)])


@dataclass(frozen=True)
class Few:
    """The first examples of a loader, and how many it has.

    Attributes:
        examples, largest: in all, and in the largest batch.
        where: which batch these are from.
    """

    examples: int
    largest: int
    inputs: Inputs
    targets: Any
    where: str


def counted(problem: Problem, loader: Iterable[Any], limit: int | None = None) -> Few:
    """Read the loader once, and hold on to a few of its examples. Raises `InputError` where it has none."""
    examples, largest, first = 0, 0, None
    for index, inputs, targets in limited(problem.functional, loader, "train_loader", limit):
        size = batch_size(inputs)
        examples, largest = examples + size, max(largest, size)
        if first is None:
            few = take(targets, 0, TRIED_EXAMPLES, size)
            first = (take(inputs, 0, TRIED_EXAMPLES), few, index)
    assert first is not None
    inputs, targets, index = first
    return Few(examples, largest, inputs, targets, f"train_loader, batch {index}")


def plan_fit(
    problem: Problem,
    settings: Settings,
    few: Few,
    num_samples: int,
    processes: Processes | None = None,
) -> Plan:
    """Capture and solve a few of the examples.

    Args:
        processes: those that the rows are to be spread over; bytes and seconds are those of one of them, without what
            they send (``plan_many.py``).
    """
    parts = 1 if processes is None else processes.size
    budget = settings.memory or own_budget(problem.device, processes)
    memory = divided(settings, problem.space, num_samples, budget)
    problem, rows, outputs, targets = _tried(problem, few)
    proving, proven = settled(lambda: prove(problem.functional, few.inputs))
    size = batch_size(few.inputs)

    capturing, blocks = settled(lambda: _captured(problem, few, outputs, targets, proven, memory))
    checking = proven.checking_seconds
    operator = JacobianOperator(problem.space, merge_blocks(blocks))
    m = -(-operator.shape[0] * few.examples // size)
    of_all = few.examples, m, few.largest
    trial = Trial(problem, proven, few.inputs, targets, operator, size, *of_all, memory)
    draft = _Draft(
        {
            ROWS: min(trial.factor_bytes // parts, memory.rows),
            "temporaries": _temporaries(problem, proven, few.largest, rows, memory)
            + _checked(outputs, few, memory)
            + _audited(problem, num_samples),
            "libraries": memory.libraries,
        },
        {
            ROWS: proving + (capturing - checking) / size * few.examples / parts,
            AUDIT: checking / size * few.examples / parts,
        },
        [],
    )
    _solve(draft, trial, settings, budget - memory.beside, parts)
    draft.advice += _on_generic(problem, proven) + _on_copy(problem)
    return Plan(
        few.examples,
        -(-m // few.examples),
        m,
        problem.space.total,
        draft.solver,
        draft.reason,
        draft.bytes,
        draft.seconds,
        budget,
        {name: proven.reasons.get(name, "") for name in proven.generic},
        draft.advice,
        parts,
    )


def _captured(
    problem: Problem,
    few: Few,
    outputs: Tensor,
    targets: Any,
    proven: CapturePlan,
    memory: FitMemory,
) -> list[Block]:
    """Rows of a few examples, as a fit captures them."""
    proven.checking_seconds = 0.0  # that of the last run counts
    return [
        block
        for group in row_groups(problem, few.inputs, outputs, targets)
        for block, _, _ in capture_batch(
            problem.functional,
            proven,
            group.inputs,
            group.make,
            group.count,
            None,
            memory.temporaries,
        )
    ]


@dataclass
class _Draft:
    """A plan under way."""

    bytes: dict[str, int]
    seconds: dict[str, float]
    advice: list[str]
    solver: str | None = None
    reason: str = ""


def _tried(problem: Problem, few: Few) -> tuple[Problem, int, Tensor, Any]:
    """The problem as it can be tried, its rows an example, and outputs and targets of the few."""
    outputs = problem.functional.outputs(few.inputs, few.where)
    targets = problem.checked_targets(outputs, few.targets, few.where)
    rows = problem.rows_per_example(outputs)
    try:
        problem.cotangents(outputs, targets)
    except NotFittedError:  # noise that only a fit estimates: its value changes no cost
        problem = problem.explained_by(Regression(1.0))
        rows = problem.rows_per_example(outputs)
    return problem, rows, outputs, targets


def _solve(draft: _Draft, trial: Trial, settings: Settings, budget: int, parts: int) -> None:
    """What the solver takes, or why none fits."""
    factors, device = trial.factor_bytes // parts, trial.problem.device
    size = replace(trial.solved_size, written_over=settings.target.numerical)
    try:
        resident = min(factors, trial.memory.rows)
        movable = resident if fits_on_disk(factors, device) else 0
        choice = choose(settings.solver, size, budget - resident + movable, settings.tolerance)
        needed = choice.solver.cost(size).nbytes
    except MemoryBudgetError as error:
        draft.reason = "the memory budget is too small"
        draft.advice.append(str(error))
        return
    draft.solver, draft.reason = choice.solver.name, choice.why
    draft.bytes[ROWS] = max(0, min(resident, budget - needed))
    draft.bytes["solver"] = needed
    for stage, more in trial.seconds(choice.solver).items():
        if stage != FACTORISATION:  # done once
            more /= parts
        draft.seconds[stage] = draft.seconds.get(stage, 0.0) + more
    elsewhere = factors - draft.bytes[ROWS]
    if elsewhere > 0:
        where = "go to disk" if fits_on_disk(elsewhere, device) else "are recomputed"
        draft.advice.append(
            f"{format_bytes(elsewhere)} of rows {where}, which makes each pass slower; raise `memory=`, or "
            "constrain less of each example (`directions='auto'`, `preserve='loss'`)."
        )


def _on_generic(problem: Problem, proven: CapturePlan) -> list[str]:
    space = problem.space
    numel = sum(space.by_name[n].numel for n in proven.generic)
    if numel <= 0.05 * space.total:
        return []
    return [
        f"{100 * numel / space.total:.0f} % of the weights have no layer rule and take the "
        "slower generic path; write a rule (`nb.jacobian.register`) or leave them out "
        "(`parameters=`)."
    ]


def _on_copy(problem: Problem) -> list[str]:
    held = held_bytes(problem.functional.model)
    if not held:
        return []
    return [
        f"the full copy of the sharded parameters takes {format_bytes(held)} in each process, beside this."
    ]


def _temporaries(
    problem: Problem, proven: CapturePlan, batch: int, rows: int, memory: FitMemory
) -> int:
    """Bytes that the capture of one batch takes."""
    per_example = capture_bytes(problem.functional, proven, rows)
    step = examples_per_capture(problem.functional, proven, rows, memory.temporaries)
    return min(batch, step) * per_example


def _audited(problem: Problem, samples: int) -> int:
    """Bytes of the weight changes that the audit moves examples by, and of what derivatives along them hold."""
    space = problem.space
    vectors = torch.empty(samples, space.total, dtype=space.dtype, device="meta")
    count = prior_vectors(vectors, problem.functional.model)
    return AUDIT_COPIES * count * space.total * space.dtype.itemsize


def _checked(outputs: Tensor, few: Few, memory: FitMemory) -> int:
    """Bytes of the examples that the certificate holds on to, and of what samples do to their outputs."""
    inside = sum(t.nbytes for t in tensor_leaves(few.inputs)) // max(1, len(outputs))
    each = memory.samples * outputs[0].nbytes + inside
    return min(memory.check, each * min(few.examples, CHECK_EXAMPLES))
