"""The log marginal likelihood of the training data, from the spectrum of their rows; differentiable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.constraints.problem import check_curvature
from nullbayes.constraints.training_rows import TrainingRows
from nullbayes.errors import InputError, NotFittedError
from nullbayes.fit.layer_evidence import grouped_evidence
from nullbayes.fit.result import Fit
from nullbayes.jacobian.columns import rescaled
from nullbayes.likelihood import Regression


@dataclass(frozen=True)
class Evidence:
    """At which prior precision and noise the evidence is asked for: numbers, tensors, or None as they are."""

    prior_precision: float | Tensor | Mapping[str, float | Tensor] | None = None
    noise_factor: float | Tensor | None = None


def log_marginal_likelihood(fit: Fit, asked: Evidence) -> Tensor:
    """See `nullbayes.Posterior.log_marginal_likelihood`."""
    rows, state = fit.rows, fit.state
    spectrum = None if state is None else state.exact_spectrum()
    if rows is None or spectrum is None:
        raise NotFittedError(
            "the log marginal likelihood needs the factorisation of all training rows: fit here, with "
            "`solver=nb.solvers.DualCholesky()` or `PrimalQR()`."
        )
    problem = rows.asked
    check_curvature(problem.preserve, problem.directions, "the log marginal likelihood")
    if isinstance(asked.prior_precision, Mapping):
        return _by_name(rows, asked.prior_precision, asked.noise_factor)
    alpha = _positive(asked.prior_precision, fit.alpha, "prior_precision")
    noise = _positive(asked.noise_factor, 1.0, "noise_factor")
    values = spectrum.values.cpu() / noise
    theta = problem.isotropic(problem.departure()).double().cpu()
    likelihood = _log_likelihood(rows, noise, scaled=asked.noise_factor is not None)
    return likelihood - 0.5 * alpha * theta.square().sum() - 0.5 * torch.log1p(values / alpha).sum()


def _by_name(
    rows: TrainingRows, asked: Mapping[str, float | Tensor], factor: float | Tensor | None
) -> Tensor:
    """With one prior precision for each parameter tensor, whatever the fit's prior was."""
    problem, space = rows.asked, rows.operator.space
    if set(asked) != set(space.names):
        raise InputError(
            f"`prior_precision` names {sorted(asked)[:6]}; expected one value for each of {list(space.names)[:6]}."
        )
    noise = _positive(factor, 1.0, "noise_factor")
    alphas = [_positive(asked[n], 1.0, f"prior_precision[{n!r}]") for n in space.names]
    operator = rows.operator
    scales = problem.scale_by_name
    if scales is not None:  # the rows are in units of another prior
        operator = rescaled(operator, {name: 1 / scale for name, scale in scales.items()})
    groups = {name: [name] for name in space.names}
    # Rows of a regression are over the root of its noise.
    evidence = grouped_evidence(operator, groups, problem.departure()).cooled(noise)
    likelihood = _log_likelihood(rows, noise, scaled=factor is not None)
    return likelihood + evidence.penalty(torch.stack(alphas).to(evidence.squares)).cpu()


def _positive(value: float | Tensor | None, default: float, name: str) -> Tensor:
    found = torch.as_tensor(default if value is None else value).to("cpu", torch.float64)
    if found.numel() != 1 or not bool((found > 0).all() and found.isfinite().all()):
        raise InputError(f"`{name}` is {value!r}; expected one positive, finite number.")
    return found.reshape(())


def _log_likelihood(rows: TrainingRows, noise: Tensor, *, scaled: bool) -> Tensor:
    """Of the training data at the trained weights, with the observation variance times ``noise``."""
    likelihood = rows.asked.likelihood
    total = torch.tensor(-rows.loss, dtype=torch.float64)
    if not scaled:
        return total
    if not isinstance(likelihood, Regression):
        raise InputError(
            f"`noise_factor` is given, but {likelihood!r} has no observation noise; leave it out."
        )
    # loss = Q / 2 + N: Q the squared residuals in units of the noise, N what the noise alone adds.
    alone = torch.tensor(rows.least_loss, dtype=torch.float64)
    squares = 2 * (-total - alone)
    return -(squares / (2 * noise) + alone + 0.5 * rows.observed * noise.log())
