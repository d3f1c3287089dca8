"""From training data to samples and a certificate: what ``fit``, ``draw`` and a new prior precision do.

Everything here returns a new :class:`Fit`; a posterior takes it over in one assignment, so an error or an
interrupt on the way leaves what was there before.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nullbayes import draws
from nullbayes.arguments import CheckedPrior
from nullbayes.certificate import Certificate, GuaranteeCheck
from nullbayes.constraints import Directions, Preserve
from nullbayes.evidence import fixed_point, null_space_precision
from nullbayes.fitting import TrainingRows, capture_training, default_budget, fit_noise
from nullbayes.jacobian.capture import CapturePlan
from nullbayes.jacobian.functional import FunctionalModel
from nullbayes.jacobian.operator import RowOperator
from nullbayes.likelihood import Likelihood
from nullbayes.memory import available_bytes, peak_bytes
from nullbayes.progress import Stages, stages
from nullbayes.solvers import Projection, Solver, State, choose
from nullbayes.solvers.base import default_tolerance, relative
from nullbayes.storage import fingerprint

NULL_SPACE, LAPLACE = "null-space", "Laplace"

# Edge of the numerical null space, relative to the prior precision. benchmarks/edge.py: NLL, ECE and
# novelty are all best near 1e-4 on the digits; towards 0 novelty suffers, towards 1 everything does.
DELTA = 1e-4


@dataclass(frozen=True)
class Settings:
    """What a posterior was asked to be."""

    kind: str  # NULL_SPACE or LAPLACE
    preserve: Preserve
    directions: Directions
    prior: CheckedPrior
    delta: float
    solver: str | Solver
    tolerance: float | None
    memory: int | None

    @property
    def numerical(self) -> bool:
        """Whether the null space has an edge on purpose, and is not exact."""
        return self.kind == NULL_SPACE and self.delta > 0

    @property
    def precision_by_name(self) -> dict[str, float] | None:
        """One precision per tensor, where the prior is that."""
        return self.prior if isinstance(self.prior, dict) else None

    @property
    def scale_by_name(self) -> dict[str, float] | None:
        """Prior standard deviations where there is one precision per tensor."""
        by_name = self.precision_by_name
        return by_name and {name: value**-0.5 for name, value in by_name.items()}


@dataclass(frozen=True)
class Fit:
    """What a fit left: samples at prior precision one, and what more of them would take.

    ``plan``, ``state`` and ``check`` are None for a posterior that was loaded from a file.
    """

    likelihood: Likelihood
    unit: Tensor  # (S, P)
    alpha: float
    seed: int
    certificate: Certificate
    fingerprint: dict[str, str]  # of the model that it was fitted around
    plan: CapturePlan | None = None
    state: State | None = None
    check: GuaranteeCheck | None = None

    @property
    def samples(self) -> Tensor:
        """Weight changes ``Δ (S, P)`` at the current prior precision."""
        return self.unit * self.alpha**-0.5


def build(
    functional: FunctionalModel,
    likelihood: Likelihood,
    settings: Settings,
    loader: Iterable[Any],
    num_samples: int,
    seed: int,
    max_examples: int | None,
    show: bool,
) -> Fit:
    """Capture rows, factorise, draw samples, measure."""
    started = time.perf_counter()
    budget = settings.memory or default_budget(available_bytes(functional.device))
    # Noise is fitted on a copy: an error later on leaves the earlier fit as it was.
    likelihood = copy.deepcopy(likelihood)
    with stages(show) as stage:
        fit_noise(functional, likelihood, loader, max_examples, stage)
        rows = capture_training(
            functional,
            likelihood,
            settings.preserve,
            settings.directions,
            loader,
            max_examples,
            settings.scale_by_name,
            budget,
            num_samples,
            stage,
        )
        m, p = rows.operator.shape
        choice = choose(settings.solver, m, p, budget - rows.operator.nbytes, settings.tolerance)
        theta = functional.space.flatten(functional.weights())
        state, alpha = _factorised(choice.solver, rows.operator, theta, settings, stage)
        v, noise = draws.standard_normal(seed, range(num_samples), p, m, theta)
        done = state.project(v, noise)
        gone = float(v.double().square().sum() - done.value.double().square().sum())
        gamma = gone / num_samples if settings.numerical else float(state.rank)
        if settings.kind == NULL_SPACE and settings.prior == "evidence":
            alpha = null_space_precision(gamma, p, theta)
        rank = min(max(round(gamma), 0), m, p)
        unit = _unscaled(done.value, functional, settings)
        check = GuaranteeCheck(
            functional, rows.plan, likelihood, settings.preserve, rows.kept, unit
        )
    certificate = Certificate(
        method=settings.kind,
        preserve=settings.preserve.describe(),
        delta=settings.delta,
        solver=choice.solver.name,
        reason=choice.why,
        tolerance=getattr(choice.solver, "tolerance", None) or default_tolerance(theta.dtype),
        rank=rank,
        null_dim=p - rank,
        prior_precision=alpha,
        **_measured_rows(rows, done, v, alpha),
        natural_units=settings.preserve.natural_units,
        **check.measure(alpha**-0.5),
        score_name=likelihood.score_name,
        checked_examples=check.examples,
        num_samples=num_samples,
        notes=tuple(state.notes),
        seconds=time.perf_counter() - started,
        peak_memory=peak_bytes(functional.device),
    )
    digest = fingerprint(functional.model)
    return Fit(likelihood, unit, alpha, seed, certificate, digest, rows.plan, state, check)


def _factorised(
    solver: Solver, operator: RowOperator, theta: Tensor, settings: Settings, stage: Stages
) -> tuple[State, float]:
    """A solver ready to project, and the prior precision that it was made ready for."""
    state = solver.prepare(operator, stage.fraction("Gram matrix, QR"))
    alpha = 1.0
    if isinstance(settings.prior, float):
        alpha = settings.prior
    elif settings.prior == "evidence" and settings.delta:
        spectrum = state.spectrum()
        alpha = fixed_point(spectrum, theta, settings.delta)
        if settings.kind == LAPLACE and not spectrum.exact:
            state.notes = (
                *state.notes,
                "The evidence's prior precision comes from an estimated spectrum (a few per cent off); "
                "`solver=nb.solvers.PrimalQR()` computes it exactly.",
            )
    state.factorise(settings.delta * alpha, settings.numerical, stage.fraction("factorisation"))
    return state, alpha


def _measured_rows(
    rows: TrainingRows, done: Projection, prior: Tensor, alpha: float
) -> dict[str, Any]:
    """What the certificate says of the rows: computed once more from them, outside the solver."""
    m, p = rows.operator.shape
    after = rows.operator.matvec(done.value)
    count = len(prior) * rows.examples
    return {
        "residual": _residual(after, rows.operator.matvec(prior)),
        "row_drift": (float(after.double().square().sum()) / count / alpha) ** 0.5,
        "prior_share": float(done.value.double().square().sum() / prior.double().square().sum()),
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
    v, noise = draws.standard_normal(fit.seed, indices, p, m, fit.unit)
    done = fit.state.project(v, noise)
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
            row_drift=certificate.row_drift * (fit.alpha / alpha) ** 0.5,
            **fit.check.measure(alpha**-0.5),
        )
    return replace(fit, alpha=alpha, certificate=certificate)


def _unscaled(value: Tensor, functional: FunctionalModel, settings: Settings) -> Tensor:
    """From the solver's coordinates, in which the prior is isotropic, to weights."""
    scales = functional.space.scales(settings.precision_by_name)
    return value if scales is None else value * scales


def _residual(after: Tensor, before: Tensor) -> float:
    return float(relative(after.double().norm(dim=1), before.double().norm(dim=1)).max())
