"""From training data to samples and a certificate: what ``fit``, ``draw`` and a new prior precision do.

Everything here returns a new :class:`Fit`; a posterior takes it over in one assignment, so an error or an
interrupt on the way leaves what was there before.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nullbayes.certificate.certificate import Certificate
from nullbayes.certificate.leave_one_out import held_out, left_out
from nullbayes.certificate.measure import GuaranteeCheck
from nullbayes.common.memory import (
    available_bytes,
    explained_out_of_memory,
    format_bytes,
    peak_bytes,
)
from nullbayes.common.progress import (
    CERTIFICATE,
    FACTORISATION,
    GRAM,
    PRIOR,
    PROJECTION,
    ROWS,
    Laps,
    Stages,
    stages,
)
from nullbayes.constraints.memory_budget import FitMemory, default_budget
from nullbayes.constraints.training_rows import TrainingRows, capture_training, fit_noise
from nullbayes.errors import MemoryBudgetError
from nullbayes.fit.evidence import apart, fixed_point, interval, null_space_precision
from nullbayes.fit.prior_samples import standard_normal
from nullbayes.fit.projection import Checkpoint, Work, projected
from nullbayes.fit.result import DELTA, LAPLACE, NULL_SPACE, Fit, Settings
from nullbayes.jacobian.block_storage import fits_on_disk
from nullbayes.jacobian.linearise import linearised_outputs
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.likelihood import Likelihood
from nullbayes.model.fingerprint import fingerprint
from nullbayes.model.functional import FunctionalModel
from nullbayes.solvers import Choice, Projection, Size, Solver, Spectrum, State, choose
from nullbayes.solvers.base import relative
from nullbayes.solvers.block_cg import row_norms


def build(
    functional: FunctionalModel,
    likelihood: Likelihood,
    settings: Settings,
    loader: Iterable[Any],
    num_samples: int,
    seed: int,
    max_examples: int | None,
    show: bool,
    checkpoint: Checkpoint | None = None,
) -> Fit:
    """Capture rows, factorise, draw samples, measure.

    Raises:
        MemoryBudgetError: the plan does not fit the budget, or the machine ran out of memory.
    """
    laps = Laps()
    budget = settings.memory or default_budget(available_bytes(functional.device))
    # Noise is fitted on a copy: an error later on leaves the earlier fit as it was.
    likelihood = copy.deepcopy(likelihood)
    with explained_out_of_memory(budget), stages(show) as stage:
        fit_noise(functional, likelihood, loader, max_examples, stage)
        rows = capture_training(
            functional,
            likelihood,
            settings.preserve,
            settings.directions,
            loader,
            max_examples,
            settings.scale_by_name,
            FitMemory.of(budget, num_samples, functional.space.total, functional.dtype),
            num_samples,
            stage,
        )
        laps.lap(ROWS)
        m, p = rows.operator.shape
        theta = functional.space.flatten(functional.weights())
        choice = _chosen(settings, rows.operator, num_samples, budget)
        state, alpha = _factorised(choice.solver, rows, theta, settings, stage, laps)
        noisy = m if settings.kind == LAPLACE else 0
        v, noise = standard_normal(seed, range(num_samples), p, noisy, theta)
        report = stage.towards(PROJECTION) if choice.solver.iterative else None
        work = Work(
            state, rows, v, checkpoint, f"{settings.kind}|{seed}|{theta.norm():.3e}", report
        )
        by_evidence = settings.kind == NULL_SPACE and settings.prior == "evidence"
        held = held_out(rows, likelihood, v) if by_evidence and choice.solver.iterative else []

        def changes(x: Tensor) -> list[Tensor]:
            """What projected vectors do to the outputs of the examples that are held out."""
            moved = _unscaled(x, functional, settings)
            return [linearised_outputs(functional, rows.plan, moved, h.inputs)[1] for h in held]

        done, unseen = projected(work, noise if noisy else None, held, changes)
        laps.lap(PROJECTION)
        gone = float(row_norms(v).square().sum() - row_norms(done.value).square().sum())
        passed = settings.numerical or state.rank is None
        gamma = gone / num_samples if passed else float(state.rank or 0)
        if by_evidence:
            alpha = null_space_precision(gamma, p, theta)
        rank = min(max(round(gamma), 0), m, p)
        unit = _unscaled(done.value, functional, settings)
        check = GuaranteeCheck(
            functional, rows.plan, likelihood, settings.preserve, rows.kept, unit
        )
        if settings.kind == NULL_SPACE:
            check.left_out = [
                (functional.outputs(h.inputs), change, h.targets)
                for h, change in zip(held, unseen, strict=False)
            ] or left_out(state, v, rows, check, likelihood, settings.preserve, settings.directions)
        notes = [*state.notes, *_where_kept(rows.operator), *_not_kept(loader, rows, max_examples)]
        evidence = alpha if by_evidence else None
        if evidence is not None:
            alpha = check.keeping(evidence)
    measured = _measured_rows(rows, done, v, alpha) | check.measure(alpha**-0.5)
    digest = fingerprint(functional.model)
    laps.lap(CERTIFICATE)
    certificate = Certificate(
        method=settings.kind,
        preserve=settings.preserve.describe(),
        delta=settings.delta,
        solver=choice.solver.name,
        reason=choice.why,
        tolerance=choice.solver.tolerance_for(theta.dtype),
        rank=rank,
        null_dim=p - rank,
        prior_precision=alpha,
        evidence=evidence,
        **measured,
        natural_units=settings.preserve.natural_units,
        score_name=likelihood.score_name,
        checked_examples=check.examples,
        num_samples=num_samples,
        notes=tuple(notes),
        stages=laps.seconds,
        seconds=laps.total,
        peak_memory=peak_bytes(functional.device),
    )
    return Fit(likelihood, unit, alpha, seed, certificate, digest, rows.plan, state, check)


def _chosen(
    settings: Settings, operator: JacobianOperator, num_samples: int, budget: int
) -> Choice:
    """A solver that fits beside the rows; rows go to disk where that makes room for it."""
    m, p = operator.shape
    size = Size(
        m, p, num_samples, operator.product_flops, operator.gram_flops, operator.dtype.itemsize
    )
    held = operator.resident
    movable = held if fits_on_disk(held, operator.device) else 0
    choice = choose(settings.solver, size, budget - held + movable, settings.tolerance)
    if choice.nbytes > budget - held + movable:
        raise MemoryBudgetError(
            f"{choice.solver.name} needs {format_bytes(choice.nbytes)} for {m} rows, {p} weights and "
            f"{num_samples} samples, more than the {format_bytes(budget)} of `memory=`. Raise it, draw fewer "
            "samples at a time, or leave the choice to solver='auto'."
        )
    operator.move_out(budget - choice.nbytes)
    return choice


def _not_kept(loader: Iterable[Any], rows: TrainingRows, limit: int | None) -> list[str]:
    """A word on examples that ``max_examples`` left out, where the loader can say how many it has."""
    drawn = getattr(loader, "sampler", None)
    if limit is None or not isinstance(drawn, Sized) or limit >= len(drawn):
        return []
    return [
        f"{rows.examples:,} of {len(drawn):,} examples were kept; the others look newer than they are, so novelty "
        "tells strangers apart less well. Keep all that the network learned from where that fits: `preserve='loss'` "
        "and `directions='auto'` take fewer rows."
    ]


def _where_kept(operator: JacobianOperator) -> list[str]:
    kept = operator.kept()
    if set(kept) <= {"memory"}:
        return []
    text = ", ".join(
        f"{format_bytes(n)} {'in memory' if w == 'memory' else 'on disk' if w == 'disk' else w}"
        for w, n in kept.items()
    )
    return [f"Rows: {text}."]


def _factorised(
    solver: Solver,
    rows: TrainingRows,
    theta: Tensor,
    settings: Settings,
    stage: Stages,
    laps: Laps,
) -> tuple[State, float]:
    """A solver ready to project, and the prior precision that it was made ready for."""
    state = solver.prepare(rows.operator, stage.fraction(GRAM))
    laps.lap(GRAM)
    alpha = 1.0
    if isinstance(settings.prior, float):
        alpha = settings.prior
    elif settings.prior == "evidence" and settings.delta:
        alpha = _evidence(state, theta, settings, stage)
    if settings.drift is not None:
        expected = alpha
        if settings.prior == "evidence" and not settings.delta:
            expected = fixed_point(state.spectrum().upper, theta, DELTA)
        # drift² = mean_n ‖A_n Δ‖² with Δ = x / √α
        state.enough = settings.drift * (rows.examples * expected) ** 0.5
    state.factorise(settings.delta * alpha, settings.numerical, stage.fraction(FACTORISATION))
    laps.lap(FACTORISATION)
    return state, alpha


def _evidence(state: State, theta: Tensor, settings: Settings, stage: Stages) -> float:
    """The prior precision that a solver is made ready for."""
    if settings.kind != LAPLACE:
        # It only sets the edge of the null space, of which the order of magnitude matters; DELTA was chosen so.
        return fixed_point(state.spectrum().upper, theta, settings.delta)
    report = stage.towards(PRIOR)
    looks = itertools.count(1)

    def settled(found: Spectrum) -> bool:
        distance = apart(found, theta, settings.delta)
        if report is not None:
            report(next(looks), distance)
        return distance <= 1

    spectrum = state.spectrum(settled)
    alpha = fixed_point(spectrum, theta, settings.delta)
    if not spectrum.exact:
        low, high = interval(spectrum, theta, settings.delta)
        state.notes = (
            *state.notes,
            f"The evidence's prior precision, {alpha:.3g}, comes from an estimated spectrum: between {low:.3g} and "
            f"{high:.3g}, and a few per cent of chance. `solver=nb.solvers.PrimalQR()` computes it exactly.",
        )
    return alpha


def _measured_rows(
    rows: TrainingRows, done: Projection, prior: Tensor, alpha: float
) -> dict[str, Any]:
    """What the certificate says of the rows: computed once more from them, outside the solver."""
    m, p = rows.operator.shape
    after = rows.operator.matvec(done.value)
    count = len(prior) * rows.examples
    return {
        "residual": _residual(after, rows.operator.matvec(prior)),
        "row_drift": (float(row_norms(after).square().sum()) / count / alpha) ** 0.5,
        "prior_share": float(
            row_norms(done.value).square().sum() / row_norms(prior).square().sum()
        ),
        "constraints": m,
        "parameters": p,
        "discarded_trace": rows.discarded_trace,
        "examples": rows.examples,
        "generic": tuple(rows.plan.generic),
        "status": done.status.value,
        "iterations": done.iterations,
    }


def extended(fit: Fit, functional: FunctionalModel, settings: Settings, count: int) -> Fit:
    """``count`` samples more, continuing the stream of the fit's seed."""
    assert fit.state is not None
    indices = range(len(fit.unit), len(fit.unit) + count)
    operator = fit.state.operator
    m, p = operator.shape
    noisy = m if settings.kind == LAPLACE else 0
    v, noise = standard_normal(fit.seed, indices, p, noisy, fit.unit)
    done = fit.state.project(v, noise if noisy else None)
    residual = _residual(operator.matvec(done.value), operator.matvec(v))
    unit = torch.cat([fit.unit, _unscaled(done.value, functional, settings)])
    certificate = replace(
        fit.certificate,
        residual=max(fit.certificate.residual, residual),
        num_samples=len(unit),
    )
    return replace(fit, unit=unit, certificate=certificate)


def rescaled(fit: Fit, alpha: float) -> Fit:
    """The same samples at another prior precision, with what the certificate says of it."""
    certificate = fit.certificate
    if fit.check is not None:
        certificate = replace(
            certificate,
            prior_precision=alpha,
            evidence=None,
            row_drift=certificate.row_drift * (fit.alpha / alpha) ** 0.5,
            **fit.check.measure(alpha**-0.5),
        )
    return replace(fit, alpha=alpha, certificate=certificate)


def _unscaled(value: Tensor, functional: FunctionalModel, settings: Settings) -> Tensor:
    """From the solver's coordinates, in which the prior is isotropic, to weights."""
    scales = functional.space.scales(settings.precision_by_name)
    return value if scales is None else value * scales


def _residual(after: Tensor, before: Tensor) -> float:
    return float(relative(row_norms(after), row_norms(before)).max())
