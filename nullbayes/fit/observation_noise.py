"""Observation noise of a regression by leave-one-out residuals, from the factorisation of the training rows.

A network's residuals on its training data are smaller than on new data, so their mean square understates the noise.
Linearised, the residual that example ``i`` would have if the network had been trained without it follows from the
inverse that a fit has anyway (Allen 1974; Rasmussen & Williams 2006, eq. 5.12): with rows in units of the noise and
``B_i`` the example's block of ``(A Aᵀ + s)⁻¹``, residual ``r_i`` becomes ``e_i = (s B_i)⁻¹ r_i``. The shift
``s = c α`` is the evidence's prior precision where the variance is ``c`` times that of training residuals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.common.shapes import merged
from nullbayes.constraints.problem import Problem
from nullbayes.constraints.training_rows import TrainingRows
from nullbayes.fit.evidence import fixed_point
from nullbayes.likelihood import Likelihood, Regression
from nullbayes.likelihood.regression import channels_last
from nullbayes.solvers import State
from nullbayes.solvers.base import Spectrum

# Search for the factor on the variance: steps at most, how close two of them agree, and where it ends.
STEPS, AGREED, MOST = 60, 1e-3, 1e4
# Points of the search for the variance that explains the residuals beside the posterior's own.
POINTS = 801


@dataclass(frozen=True)
class LeftOut:
    """Training examples, each as if the network had been trained without it; all in units of the noise assumed.

    Attributes:
        residuals: ``(N, O)`` of training; ``without``: ``(N, O)`` with the example left out.
        variance: ``(N, O)`` under a null-space posterior that has not seen the example.
        shape: of one example's outputs, ``O`` numbers in all.
    """

    residuals: Tensor
    without: Tensor
    variance: Tensor
    shape: tuple[int, ...] = ()

    def factor(self) -> Tensor:
        """Noise variance of each output channel ``(O,)``, as a factor on what was assumed; at least one.

        Two readings of the same residuals, and the lesser: ``mean r_i e_i``, which for a linear model is the noise
        without the error of estimation (Horn, Horn & Duncan 1975); and what explains the ``e_i`` beside the
        posterior's own variance by maximum likelihood, so that nothing is counted twice.
        """
        noise = torch.logspace(0, 4, POINTS, dtype=torch.float64, device=self.variance.device)
        total = noise[:, None, None] + self.variance  # (POINTS, N, O)
        loss = (self.without.square() / total + total.log()).mean(1)
        beside = noise[loss.argmin(0)]
        return torch.minimum((self.residuals * self.without).mean(0), beside).clamp(1.0, MOST)


def with_left_out_noise(
    problem: Problem, rows: TrainingRows, state: State, alpha: float
) -> tuple[Likelihood | None, str | None]:
    """The likelihood with its noise by leave-one-out residuals, and what to say of it in the certificate.

    Args:
        alpha: the prior precision of the null-space posterior.

    Returns:
        None twice where there is no noise to estimate; a note alone where leave-one-out residuals cannot be had.
    """
    likelihood = rows.asked.likelihood
    if not isinstance(likelihood, Regression) or likelihood.estimate != "left-out":
        return None, None
    if not likelihood.needs_noise_fit:
        return None, None
    processes = rows.operator.processes
    found = left_out_residuals(problem, rows, state, alpha)
    if found is None:
        return None, (
            "Observation noise is the mean squared training residual, which understates it where the network fits "
            "training data better than new data: leave-one-out residuals need a factorisation of at most 2,000 rows "
            "or fewer weights than rows, and preserve='predictions'. `calibrate` sets it on validation data."
        )
    factor = _by_channel(found, likelihood)
    if processes is not None:
        factor = processes.shared(lambda: factor)
    shown = ", ".join(f"{value:.3g}" for value in factor[:6].tolist())
    more = ", …" if len(factor) > 6 else ""
    return likelihood.with_noise(factor), (
        f"Observation noise by leave-one-out residuals: {shown}{more} times the mean squared training residual."
    )


def left_out_residuals(
    problem: Problem, rows: TrainingRows, state: State, alpha: float
) -> LeftOut | None:
    """See :class:`LeftOut`; None where the solver or the rows cannot tell."""
    asked, processes = rows.asked, rows.operator.processes
    spectrum = state.exact_spectrum() if asked.preserve.curvature else None
    if spectrum is None or asked.directions is not None:
        return None
    residuals, shape = _residuals(rows)
    spans = [rows.span(number) for numbers in rows.checked_numbers for number in numbers]
    if processes is not None:
        parts = processes.gather((residuals.cpu(), spans, shape))
        shape = next((part[2] for part in parts if part[2]), shape)
        residuals = torch.cat([part[0] for part in parts if len(part[0])]).to(residuals.device)
        spans = [span for part in parts for span in part[1]]
    width = residuals.shape[1]
    if not len(residuals) or any(span.stop - span.start != width for span in spans):
        return None
    theta = problem.isotropic(problem.departure())
    known = Spectrum(spectrum.values, spectrum.weights, exact=True)

    def shift(c: float) -> float:
        if not problem.by_evidence or not bool(theta.any()):
            return c * alpha
        scaled = Spectrum(known.values / c, known.weights, exact=True)
        return c * fixed_point(scaled, theta)

    def without(s: float) -> Tensor | None:
        blocks = state.inverse_blocks(s, spans)
        if blocks is None:
            return None
        return torch.linalg.solve(s * blocks, residuals[:, :, None])[:, :, 0]

    c, size = 1.0, float(residuals.square().mean())
    e = without(shift(c))
    for _ in range(STEPS):
        if e is None:
            return None
        new = min(max(float((residuals * e).mean()) / size, 1.0), MOST)
        if abs(new / c - 1) < AGREED:
            break
        c = (c * new) ** 0.5
        e = without(shift(c))
    edge = state.shift if state.shift > 0 else 1e-12 * float(known.values.max())
    blocks = state.inverse_blocks(edge, spans)
    if e is None or blocks is None:
        return None
    own = torch.linalg.inv(blocks).diagonal(dim1=1, dim2=2) - edge
    return LeftOut(residuals, e, own.clamp(min=0) / alpha, shape)


def _residuals(rows: TrainingRows) -> tuple[Tensor, tuple[int, ...]]:
    """``(N, O)`` float64 of the examples that the certificate looks at, over the root of the noise variance.

    With the shape of one example's outputs; empty where there are no examples.
    """
    problem, found = rows.asked, list[Tensor]()
    shape: tuple[int, ...] = ()
    for inputs, targets in rows.checked:
        outputs = problem.functional.outputs(inputs).detach()
        shape = tuple(outputs.shape[1:])
        wanted = problem.likelihood.prepare_targets(outputs, targets)
        away = problem.likelihood.observed((wanted - outputs)[None])[0].double()
        found.append(merged(away, 1))
    return torch.cat(found) if found else torch.zeros(0, 0, dtype=torch.float64), shape


def _by_channel(found: LeftOut, likelihood: Regression) -> Tensor:
    """The factor for each number of the noise that the likelihood holds."""
    held = likelihood.noise_variance
    assert held is not None
    if held.numel() != found.residuals.shape[1]:
        parts = (found.residuals, found.without, found.variance)
        residuals, without, variance = (
            channels_last(part.reshape(len(part), *found.shape)) for part in parts
        )
        found = LeftOut(residuals, without, variance)
    return found.factor().cpu().reshape(held.shape)
