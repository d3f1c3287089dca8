"""What a fit would cost, before it runs: sizes by counting, speed by trying a few examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from nullbayes.common.arguments import check_count
from nullbayes.common.memory import available_bytes, format_bytes, parse_bytes
from nullbayes.common.progress import ROWS
from nullbayes.constraints.directions import Directions, resolve_directions
from nullbayes.constraints.memory_budget import FitMemory, default_budget
from nullbayes.constraints.preserve import Preserve, resolve_preserve
from nullbayes.constraints.training_rows import CHECK_EXAMPLES, row_groups
from nullbayes.errors import MemoryBudgetError, NotFittedError
from nullbayes.fit.timing import Trial, settled
from nullbayes.jacobian.block import Block
from nullbayes.jacobian.block_storage import fits_on_disk, merge_blocks
from nullbayes.jacobian.capture.batches import capture_batch, capture_bytes, examples_per_capture
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.capture.verify import prove
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.likelihood import Likelihood, LossFunction, Regression, resolve_loss
from nullbayes.model.batch import Inputs, batch_size, take, tensor_leaves
from nullbayes.model.checks import check_mode
from nullbayes.model.functional import Forward, FunctionalModel, undisturbed, unwrapped
from nullbayes.model.loader import check_reusable, limited
from nullbayes.model.parameters import ParameterChoice, ParameterSpace
from nullbayes.model.randomness import FrozenRandomness, resolve_randomness
from nullbayes.solvers import Size, Solver, choose

TRIED_EXAMPLES = 96


@dataclass(frozen=True)
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

    @property
    def fits(self) -> bool:
        """Whether the fit stays inside the budget."""
        return self.solver is not None

    def as_dict(self) -> dict[str, Any]:
        """All fields; JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            "Plan",
            f"  constraints × weights  {self.rows:,} × {self.parameters:,}"
            f"  ({self.examples:,} examples, {self.rows_per_example} rows each)",
            f"  solver                 {self.solver or 'none fits'}: {self.reason}",
        ]
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
        for name, why in self.unsupported.items():
            lines.append(f"  generic path           {name}: {why}")
        return "\n".join([*lines, *(f"  → {text}" for text in self.advice)])


def plan(
    model: nn.Module,
    train_loader: Iterable[Any],
    likelihood: str | Likelihood | LossFunction = "classification",
    preserve: str | Preserve = "predictions",
    *,
    loss: LossFunction | None = None,
    parameters: ParameterChoice = None,
    solver: str | Solver = "auto",
    directions: Directions = None,
    forward: Forward | None = None,
    memory: str | int | None = None,
    randomness: str | FrozenRandomness | None = None,
    draws: int | None = None,
    num_samples: int = 30,
    max_examples: int | None = None,
) -> Plan:
    """Predict sizes, memory and time of ``fit`` with the same arguments, from a trial on a few examples.

    Raises:
        InputError, ModelError, NonFiniteError: what ``fit`` would raise on the first batch.
    """
    model = unwrapped(model)
    for what, count in (("num_samples", num_samples), ("max_examples", max_examples)):
        if count is not None:
            check_count(count, what)
    check_reusable(train_loader, "train_loader")
    frozen = resolve_randomness(randomness, draws)
    check_mode(model, frozen is not None)
    likelihood = resolve_loss(likelihood, loss, "classification")
    preserve = resolve_preserve(preserve)
    directions = resolve_directions(directions)
    space = ParameterSpace.from_model(model, parameters)
    space.check_finite(model)
    functional = FunctionalModel(model, space, forward, likelihood.layouts, frozen)
    budget = (
        default_budget(available_bytes(space.device)) if memory is None else parse_bytes(memory)
    )
    with undisturbed(space.device):
        return _try(
            functional,
            train_loader,
            likelihood,
            preserve,
            directions,
            solver,
            budget,
            num_samples,
            max_examples,
        )


def _try(
    functional: FunctionalModel,
    train_loader: Iterable[Any],
    likelihood: Likelihood,
    preserve: Preserve,
    directions: Directions,
    solver: str | Solver,
    budget: int,
    num_samples: int,
    max_examples: int | None,
) -> Plan:
    """Count the loader, and capture and solve a few of its examples."""
    space = functional.space
    examples, largest, first = 0, 0, None
    for index, inputs, targets in limited(functional, train_loader, "train_loader", max_examples):
        examples += batch_size(inputs)
        largest = max(largest, batch_size(inputs))
        if first is None:
            few = take(targets, 0, TRIED_EXAMPLES, batch_size(inputs))
            first = (take(inputs, 0, TRIED_EXAMPLES), few, index)
    assert first is not None
    inputs, targets, index = first
    where = f"train_loader, batch {index}"
    outputs = functional.outputs(inputs, where)
    likelihood.validate(outputs, targets, where)
    targets = likelihood.prepare_targets(outputs, targets)
    try:
        rows = preserve.rows(likelihood, tuple(outputs.shape[1:]), directions)
        preserve.cotangents(likelihood, outputs, targets, directions)
    except NotFittedError:  # noise that only a fit estimates: its value changes no cost
        likelihood = Regression(1.0)

    proving, proven = settled(lambda: prove(functional, inputs))
    size = batch_size(inputs)
    room = FitMemory.of(budget, num_samples, space.total, space.dtype)

    def captured() -> list[Block]:
        groups = row_groups(likelihood, preserve, directions, inputs, outputs, targets, rows)
        return [
            block
            for some, make, count, _ in groups
            for block, _, _ in capture_batch(
                functional, proven, some, make, count, None, room.temporaries
            )
        ]

    capturing, blocks = settled(captured)
    per_example = capturing / size
    operator = JacobianOperator(space, merge_blocks(blocks))
    trial = operator.shape[0]
    m = -(-trial * examples // size)
    factors = operator.nbytes * examples // size
    sized = Size(
        m,
        space.total,
        num_samples,
        operator.product_flops * m / trial,
        operator.gram_flops * (m / trial) ** 2,
        space.dtype.itemsize,
    )
    nbytes = {
        ROWS: min(factors, room.rows),
        "temporaries": _temporaries(functional, proven, largest, rows, room)
        + _checked(outputs, inputs, num_samples, examples, room),
    }
    seconds = {ROWS: proving + per_example * examples}
    advice: list[str] = []
    chosen: str | None = None
    try:
        held = min(factors, room.rows)
        movable = held if fits_on_disk(factors, space.device) else 0
        choice = choose(solver, sized, budget - held + movable)
        needed = choice.solver.cost(sized).nbytes
        chosen, reason = choice.solver.name, choice.why
        nbytes[ROWS] = max(0, min(held, budget - needed))
        nbytes["solver"] = needed
        seconds |= (
            Trial(
                functional,
                proven,
                likelihood,
                preserve,
                inputs,
                targets,
                operator,
                size,
                examples,
                m,
                num_samples,
                room.block,
                room.check,
            )
            .tiled()
            .seconds(choice.solver)
        )
        elsewhere = factors - nbytes[ROWS]
        if elsewhere > 0:
            where = "go to disk" if fits_on_disk(elsewhere, space.device) else "are recomputed"
            advice.append(
                f"{format_bytes(elsewhere)} of rows {where}, which makes each pass slower; raise `memory=`, or "
                "keep less of each example (`directions='auto'`, `preserve='loss'`)."
            )
    except MemoryBudgetError as error:
        reason = "the memory budget is too small"
        advice.append(str(error))
    if proven.generic and space.total:
        numel = sum(space.by_name[n].numel for n in proven.generic)
        if numel > 0.05 * space.total:
            advice.append(
                f"{100 * numel / space.total:.0f} % of the weights have no layer rule and take the "
                "slower generic path; write a rule (`nb.jacobian.register`) or leave them out "
                "(`parameters=`)."
            )
    reasons = {name: proven.reasons.get(name, "") for name in proven.generic}
    return Plan(
        examples,
        -(-m // examples),
        m,
        space.total,
        chosen,
        reason,
        nbytes,
        seconds,
        budget,
        reasons,
        advice,
    )


def _temporaries(
    functional: FunctionalModel, proven: CapturePlan, batch: int, rows: int, room: FitMemory
) -> int:
    """Bytes that the capture of one batch takes."""
    per_example = capture_bytes(functional, proven, rows)
    step = examples_per_capture(functional, proven, rows, room.temporaries)
    return min(batch, step) * per_example


def _checked(
    outputs: Tensor, inputs: Inputs, num_samples: int, examples: int, room: FitMemory
) -> int:
    """Bytes of the examples that the certificate holds on to, and of what samples do to their outputs."""
    inside = sum(t.nbytes for t in tensor_leaves(inputs)) // max(1, len(outputs))
    each = num_samples * outputs[0].nbytes + inside
    return min(room.check, each * min(examples, CHECK_EXAMPLES))
