"""Data added to a layer posterior, taken out of it, and two posteriors made one: sums of sums."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from nullbayes.certificate.verdict import ALLOWED_DIVERGENCE
from nullbayes.common.processes import Processes
from nullbayes.common.progress import Laps, Stages, stages
from nullbayes.errors import InputError, ModelError
from nullbayes.likelihood import Likelihood
from nullbayes.model.batch import Inputs, batch_size, select, tensor_leaves
from nullbayes.model.loader import check_reusable
from nullbayes.model.shares import Share
from nullbayes.moments.factor import nearly_positive
from nullbayes.moments.gather import KEPT_EXAMPLES, Gathered, drawn, unlabelled
from nullbayes.moments.members import Members, digests
from nullbayes.moments.products import working_dtype
from nullbayes.moments.sketch import Sketch
from nullbayes.posterior.layer_certificate import ALLOWED_CHANGE, HALF_CHANGE
from nullbayes.posterior.layer_fit import INPUTS, LayerFit, Source, collect, concluded
from nullbayes.posterior.layer_guarantee import guarded_precision, targets_for
from nullbayes.posterior.layer_state import LayerState

# Negative eigenvalues, beside the largest, that rounding leaves of a removal, by the dtype of the products.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}


def fresh(likelihood: Likelihood) -> Likelihood:
    """A likelihood of one's own to write to; a callable loss shares its record of structures on purpose."""
    return likelihood if likelihood.layouts is not None else copy.copy(likelihood)


def updated(fit: LayerFit, more: Any, prior: float | None, *, progress: bool) -> LayerFit:
    """The posterior of the old data and ``more``."""
    with stages(show=progress) as stage:
        laps, added = Laps(), _added(fit, more, "more", stage)
        laps.lap(INPUTS)
        return _concluded(fit, _plus(fit.gathered, added), prior, stage, laps)


def removed(fit: LayerFit, some: Any, prior: float | None, *, progress: bool) -> LayerFit:
    """The posterior of the old data without ``some``. Raises `InputError` for data that cannot have been there."""
    if not isinstance(some, (torch.Tensor, tuple)):
        check_reusable(some.loader if isinstance(some, Share) else some, "some")
    members, gone = _discarded(fit, some)
    with stages(show=progress) as stage:
        laps, taken = Laps(), _added(fit, some, "some", stage)
        laps.lap(INPUTS)
        left = fit.gathered.examples - taken.examples
        if left < 1:
            raise InputError(
                "`some` holds all examples of this posterior; nothing would be left, and nothing was removed. Fit anew "
                "on other data instead."
            )
        pairs = zip(fit.gathered.sums, taken.sums, strict=True)
        sums = [mine.plus(other, -1) for mine, other in pairs]
        state = fit.state
        rounding = ROUNDING[working_dtype(state.functional.dtype, state.delta)]
        for block, result in zip(fit.state.blocks.blocks, sums, strict=True):
            negative = result.rows is not None and bool((result.rows < 0).any())
            if negative or result.count < 0 or not nearly_positive(result, rounding):
                raise InputError(
                    f"without `some`, the second moments of the layer with {block.name!r} would not be positive: "
                    "these inputs were never added in this form. Pass them exactly as they were fitted (padding too); "
                    "nothing was removed."
                )
        kept = [group for group in (_without(g, gone) for g in fit.gathered.kept) if group]
        rest = Gathered(sums, members, left, kept)
        return _concluded(fit, rest, prior, stage, laps)


def _discarded(fit: LayerFit, some: Any) -> tuple[Members, torch.Tensor]:
    """Who is left without ``some``, and hashes of those. Raises `InputError` for examples that are not there."""
    functional = fit.state.functional
    batches = drawn(functional, unlabelled(some, functional.device, "some"))
    if isinstance(some, Share):
        return _discarded_together(fit, (inputs for _, inputs, _ in batches), some.processes)
    members = fit.gathered.members.copy()
    hashes = [torch.zeros(0, dtype=torch.int64)]
    for index, inputs, _ in batches:
        missing = members.discard(inputs)
        if missing:
            raise _not_there(f"some, batch {index}", missing, batch_size(inputs))
        hashes.append(digests(inputs))
    return members, torch.cat(hashes)


def _discarded_together(
    fit: LayerFit, batches: Iterable[Inputs], processes: Processes
) -> tuple[Members, torch.Tensor]:
    """The same of data of which each process reads a part."""
    taken, hashes = Members(), torch.zeros(0, dtype=torch.int64)
    for inputs in batches:
        taken.add(inputs)
        hashes = torch.cat([hashes, digests(inputs)])
    gone = processes.joined(hashes, 0)
    processes.sum_(taken.counts)
    members = fit.gathered.members.minus(taken)
    missing = members.overdrawn(gone)
    if missing:
        raise _not_there("some", missing, len(gone))
    return members, gone


def _not_there(where: str, missing: int, examples: int) -> InputError:
    return InputError(
        f"{where}: {missing} of {examples} examples are not in this posterior: they were never added, were removed "
        "before, or their inputs differ (padding, augmentation, scaling). Pass the inputs exactly as they were fitted; "
        "nothing was removed."
    )


def merged(fit: LayerFit, other: LayerFit, prior: float | None) -> LayerFit:
    """The posterior of the data of both."""
    mine, theirs = fit.state, other.state
    if fit.fingerprint != other.fingerprint:
        raise InputError(
            "the two posteriors are around different weights; only those of one trained network can be merged."
        )
    if mine.functional.randomness != theirs.functional.randomness:
        raise InputError(
            "the two posteriors freeze the model's randomness in different ways; fit both with one `randomness=` and "
            "`draws=`."
        )
    if mine.delta != theirs.delta or mine.blocks.blocks != theirs.blocks.blocks:
        raise InputError(
            f"the two posteriors differ in `delta` ({mine.delta:g} and {theirs.delta:g}) or in the weights that take "
            "part; fit both with the same arguments."
        )
    sketched = [
        isinstance(a.inputs, Sketch) != isinstance(b.inputs, Sketch)
        for a, b in zip(fit.gathered.sums, other.gathered.sums, strict=True)
    ]
    if any(sketched):
        raise InputError(
            "one posterior sketched layers that the other kept whole; fit both with the same `memory=`."
        )
    with stages(show=False) as stage:
        return _concluded(fit, _plus(fit.gathered, other.gathered), prior, stage, Laps())


def followed(fit: LayerFit, prior: float | None) -> LayerFit:
    """The same sums around the model's present weights. Raises `ModelError` where training outputs did not stand."""
    state, likelihood = fit.state, fit.likelihood
    if not state.checked:
        raise InputError(
            "this posterior was loaded from a file, which holds no training examples to check the moved network on; "
            "fit it here, and train inside its null space after that."
        )
    moved, divergence, count = 0.0, 0.0, 0
    for inputs, targets, before in state.checked:
        now = state.functional.outputs(inputs)
        moved = max(moved, float((now - before).norm() / before.norm().clamp_min(1e-30)))
        labels = targets_for(likelihood, before, targets, inputs)
        values = likelihood.divergence(before, now[None], labels)
        divergence, count = divergence + float(values.double().sum()), count + values.numel()
    allowed = ALLOWED_CHANGE.get(str(state.functional.dtype), HALF_CHANGE)
    exact = state.delta == 0.0
    # Not a number: they did not stand either.
    if (exact and not moved <= allowed) or (
        not exact and not divergence / count <= ALLOWED_DIVERGENCE
    ):
        raise ModelError(
            f"the network's outputs on its training examples moved by {moved:.1e} of their size "
            f"({divergence / count:.2g} nats), so its weights did not move inside the null space alone and the sums "
            "are those of another network. Attach `posterior.projector()` to the optimiser before the first step, keep "
            "batch normalisation in evaluation mode, or fit anew."
        )
    with stages(show=False) as stage:
        return _concluded(fit, fit.gathered, prior, stage, Laps())


def guarded(fit: LayerFit) -> float:
    """The least prior precision from that of the fit on at which training predictions stand."""
    samples = fit.certificate.checked_samples
    return max(fit.alpha, guarded_precision(fit.state, fit.likelihood, fit.left_out, samples))


def _added(fit: LayerFit, loader: Any, name: str, stage: Stages) -> Gathered:
    ranks = [s.inputs.rank if isinstance(s.inputs, Sketch) else None for s in fit.gathered.sums]
    state = fit.state
    source = Source(loader, name, state.seed, working_dtype(state.functional.dtype, state.delta))
    return collect(state.functional, None, source, stage, 0, (state.blocks, ranks))[1]


def _concluded(
    fit: LayerFit, gathered: Gathered, prior: float | None, stage: Stages, laps: Laps
) -> LayerFit:
    old = fit.state
    state = LayerState(old.functional, old.blocks, gathered, old.delta, old.seed, old.num_samples)
    if not gathered.kept:
        state.references = old.references  # from a file: there is nothing to measure them on anew
    return concluded(state, fit.likelihood, prior, stage, laps)


def _plus(mine: Gathered, other: Gathered) -> Gathered:
    sums = [a.plus(b) for a, b in zip(mine.sums, other.sums, strict=True)]
    examples = mine.examples + other.examples
    kept = _share(mine, examples) + _share(other, examples)
    return Gathered(sums, mine.members.plus(other.members), examples, kept)


def _share(part: Gathered, examples: int) -> list[tuple[Any, Any]]:
    """As many of the kept examples as its share of all data."""
    held = sum(batch_size(inputs) for inputs, _ in part.kept)
    room = min(held, max(1, round(KEPT_EXAMPLES * part.examples / examples)))
    if not held or room == held:
        return list(part.kept)
    chosen = set(torch.randperm(held, generator=torch.Generator().manual_seed(0))[:room].tolist())
    out, at = [], 0
    for inputs, targets in part.kept:
        size = batch_size(inputs)
        index = [i for i in range(size) if at + i in chosen]
        at += size
        if index:
            out.append(_selected(inputs, targets, index))
    return out


def _without(group: tuple[Any, Any], gone: torch.Tensor) -> tuple[Any, Any] | None:
    inputs, targets = group
    here = digests(inputs)
    index = (~torch.isin(here, gone)).nonzero()[:, 0].tolist()
    return _selected(inputs, targets, index) if index else None


def _selected(inputs: Any, targets: Any, index: list[int]) -> tuple[Any, Any]:
    size = batch_size(inputs)
    at = torch.tensor(index, device=tensor_leaves(inputs)[0].device)
    labels = targets
    leaves = [] if targets is None else tensor_leaves(targets)
    if leaves and leaves[0].ndim and len(leaves[0]) == size:
        labels = select(targets, at)
    return select(inputs, at), labels
