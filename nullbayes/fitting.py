"""One pass over the training data: validate, prove the rows on a probe batch, capture them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nullbayes.constraints import Cotangents, Directions, Preserve
from nullbayes.errors import InputError, MemoryBudgetError
from nullbayes.jacobian.build import capture_batch
from nullbayes.jacobian.capture import Block, CapturePlan
from nullbayes.jacobian.functional import (
    FunctionalModel,
    Inputs,
    batch_size,
    batches,
    take,
    tensor_leaves,
)
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.jacobian.probe import prove
from nullbayes.likelihood import Likelihood
from nullbayes.memory import format_bytes
from nullbayes.progress import Stages

# Bytes of inputs and function draws that the certificate may hold on to.
CHECK_BYTES = 2**29


@dataclass
class TrainingRows:
    """The constraint matrix of a training set, with what was seen on the way."""

    operator: JacobianOperator
    plan: CapturePlan
    examples: int
    discarded_trace: float
    kept: list[tuple[Inputs, Tensor]] = field(default_factory=list)  # examples for the certificate


def check_reusable(loader: Iterable[Any], name: str) -> None:
    """Training data is read more than once: refuse what can be read only once."""
    if not isinstance(loader, Iterable):
        raise InputError(
            f"`{name}` is {type(loader).__name__}, expected an iterable of (inputs, targets) batches, "
            "e.g. a DataLoader."
        )
    if isinstance(loader, Iterator):
        raise InputError(
            f"`{name}` is an iterator ({type(loader).__name__}), which can be read only once; pass a "
            "DataLoader or a list of batches."
        )


def limited(
    functional: FunctionalModel, loader: Iterable[Any], name: str, limit: int | None
) -> Iterator[tuple[int, Inputs, Tensor]]:
    """Batches on the model's device, cut off after ``limit`` examples."""
    seen = 0
    for index, inputs, targets in batches(loader, functional.device, name):
        size = batch_size(inputs, f"{name}, batch {index}")
        if limit is not None and seen + size > limit:
            inputs, targets = take(inputs, 0, limit - seen), targets[: limit - seen]
            size = limit - seen
        if size:
            yield index, inputs, targets
        seen += size
        if limit is not None and seen >= limit:
            return
    if not seen:
        raise InputError(f"`{name}` holds no examples: every batch is empty. Pass a filled loader.")


def first_inputs(functional: FunctionalModel, loader: Iterable[Any], name: str) -> Inputs:
    """The inputs of the first batch, to prove rows on."""
    return next(limited(functional, loader, name, None))[1]


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
    budget: int,
    draws: int,
    stage: Stages,
) -> TrainingRows:
    """Rows of all training examples, in the order of the loader.

    The first examples are kept aside for the certificate, as many as ``draws`` function draws can be
    held for: a second pass over a shuffled or augmented loader would not see the same ones.

    Raises:
        MemoryBudgetError: the factors of the rows outgrow ``budget`` bytes.
    """
    plan: CapturePlan | None = None
    blocks: list[Block] = []
    examples, trace, discarded, nbytes = 0, 0.0, 0.0, 0
    kept: list[tuple[Inputs, Tensor]] = []
    room = CHECK_BYTES
    track = stage.track(loader, "Jacobian rows")
    for index, inputs, targets in limited(functional, track, "train_loader", limit):
        where = f"train_loader, batch {index}"
        outputs = functional.outputs(inputs, where)
        likelihood.validate(outputs, targets, where)
        targets = likelihood.prepare_targets(outputs, targets)
        if plan is None:
            plan = prove(functional, inputs)
        rows = preserve.rows(likelihood, tuple(outputs.shape[1:]), directions)

        def cotangents(out: Tensor, piece: slice, targets: Tensor = targets) -> Cotangents:
            return preserve.cotangents(likelihood, out, targets[piece], directions)

        new, made = capture_batch(
            functional,
            plan,
            inputs,
            cotangents,
            rows,
            scales,
        )
        blocks += new
        examples += batch_size(inputs)
        for m in made:
            trace += float(m.trace.double().sum())
            discarded += float(m.discarded.double().sum())
        size = batch_size(inputs)
        each = draws * outputs[0].nbytes + sum(t.nbytes for t in tensor_leaves(inputs)) // size
        fits = min(size, room // max(1, each))
        if fits:
            kept.append((take(inputs, 0, fits), targets[:fits]))
        room = room - fits * each if fits == size else 0
        nbytes += sum(block.nbytes for block in new)
        if nbytes > budget:
            raise MemoryBudgetError(
                f"the Jacobian rows of {examples} examples take {format_bytes(nbytes)}, more than "
                f"the budget of {format_bytes(budget)}. Fit fewer examples (`max_examples=`), keep "
                "fewer directions (`directions='auto'`), preserve each example's loss only "
                "(`preserve='loss'`), or raise `memory=`."
            )
    assert plan is not None
    operator = JacobianOperator(functional.space, blocks)
    operator.check_finite()
    share = discarded / trace if trace > 0 else 0.0
    return TrainingRows(operator, plan, examples, share, kept)


def default_budget(available: int) -> int:
    """What a fit may take of the memory that is free: leave room for the user's own work."""
    return int(0.7 * available)
