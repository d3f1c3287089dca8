"""The two posteriors around a trained network: in the null space of its training rows, and full Laplace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from nullbayes.common.arguments import PriorPrecision, check_delta
from nullbayes.common.deprecation import warn_deprecated
from nullbayes.constraints.directions import Directions
from nullbayes.constraints.fisher import with_curvature
from nullbayes.constraints.preserve import Preserve
from nullbayes.constraints.problem import PriorMean, Problem
from nullbayes.errors import InputError
from nullbayes.fit.plan import Plan
from nullbayes.fit.result import Settings
from nullbayes.fit.target import FullLaplace, NullSpace
from nullbayes.likelihood import Likelihood, LossFunction, resolve_loss
from nullbayes.model.functional import Forward, FunctionalModel, functional_model, unwrapped
from nullbayes.model.last_layer import resolved
from nullbayes.model.parameters import ParameterChoice
from nullbayes.model.randomness import FrozenRandomness, resolve_randomness
from nullbayes.posterior.base import Posterior
from nullbayes.posterior.layers import LayerNullSpacePosterior
from nullbayes.solvers import Solver


class NullSpacePosterior(Posterior):
    """``N(θ̂, Π Λ⁻¹)`` with ``Π`` the projection onto the null space of the constraint rows.

    Every sample preserves the training predictions of the linearised network, so the Bayesian prediction
    does not underfit (Miani, Roy & Hauberg 2025).

    The null space of a trained network's rows has no sharp edge: their spectrum decays over twenty
    decades. ``delta`` says where it ends. A direction counts as free if moving along it as far as the
    prior allows changes what is preserved, over the whole training set, by less than ``√delta`` (for
    predictions in Fisher units: by less than ``delta / 2`` nats of Kullback-Leibler divergence). Much
    smaller values freeze directions that no prediction notices, and with them the uncertainty off
    the data; see the page on the guarantee for measurements.

    Args:
        model: the trained network, in evaluation mode. It is never written to.
        likelihood: ``"classification"``, ``"binary"``, ``"regression"``, a likelihood object, or a callable
            ``loss(outputs, targets) -> (B,)`` of whatever the model returns; ``loss=`` is another name for it.
        preserve: ``"predictions"``, ``"outputs"``, ``"loss"``, or an object.
        parameters: which weights take part: all that require a gradient (None), names, a
            filter ``(name, parameter) -> bool``, ``"last-layer"``: the module that was registered last; ``fit``
            makes sure that outputs are linear in it; or single weights, ``{name: boolean tensor of its shape}``
            (True for a whole tensor).
        prior_precision: ``"evidence"``, a number, one for each parameter tensor ``{name: value}``, or
            ``"evidence-by-layer"``: one for each layer (a module's weight and bias), by the evidence; for problems
            whose Gram matrix of each layer fits into memory.
        solver: ``"auto"``, the name of a registered solver, or an object from ``nb.solvers``.
        directions: None (all), a number or ``"auto"``: how many of the leading eigen-directions of
            each example's output Hessian are constrained.
        forward: ``forward(model, inputs) -> outputs`` where ``model(inputs)`` does not do.
        tolerance: relative residual asked for; None: 1e-5 (float32), 1e-10 (float64), and 5e-2 for
            data sets that only an iterative solver can take.
        row_drift: an iterative solver stops at this RMS change of an example's row (``certificate.row_drift``)
            even if the tolerance is not reached by then.
        memory: what a fit may take beside what the process holds already, e.g. ``"8GB"``; None: 70 % of
            what is free. Rows that do not fit go to disk, or are computed anew for each pass.
        randomness: None: the model must not draw random numbers. ``"frozen"`` (or ``nb.FrozenRandomness(seed)``):
            an example gets the same ones in every batch, order and call; they follow from its content.
        draws: how many draws of that noise each example is constrained for (as many times the rows).
        delta: the edge of the null space, relative to the prior precision; 0: the exact projection,
            refined until ``tolerance``.
        drift: the former name of ``row_drift``.
        within: a fitted `LayerNullSpacePosterior` of the same network with ``delta`` above 0, whose covariance is the
            prior: all data through the moments of its layers, and those of ``fit`` through their rows.
        curvature: which rows stand for the output Hessian of ``preserve="predictions"``: ``"gauss-newton"`` the
            Hessian itself; ``"empirical-fisher"`` each example's gradient at its label; ``"sampled-fisher"`` (or
            ``nb.SampledFisher(samples, seed)``) gradients at labels drawn from the prediction. The latter two take
            fewer rows and preserve less; the certificate says what that costs.
        prior_mean: the mean of the prior ``N(m, Λ⁻¹)``: ``"zero"``, a number, a vector ``(P,)``, or a tensor for each
            name; the weights before fine-tuning, say. It enters the evidence alone, and with it the prior precision:
            the posterior's own mean is the trained network, which stands for the maximum under that prior.
        process_group: the processes that work together: None: all of `torch.distributed`'s default group, where one is
            initialised; False: this one alone; a group, or a device mesh of one dimension. All of them make the same
            calls.
        device_mesh: instead, a mesh with the dimensions ``"data"`` and ``"samples"``: examples are split over the
            first, and weight samples over the second, where ``S × P`` numbers do not fit one process.

    Raises:
        InputError: an argument that cannot be used.
        ModelError: a model whose training mode or layers rule out per-example predictions.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | LossFunction = "classification",
        preserve: str | Preserve = "predictions",
        *,
        loss: LossFunction | None = None,
        parameters: ParameterChoice = None,
        prior_precision: PriorPrecision = "evidence",
        solver: str | Solver = "auto",
        directions: Directions = None,
        forward: Forward | None = None,
        tolerance: float | None = None,
        row_drift: float | None = None,
        memory: str | int | None = None,
        randomness: str | FrozenRandomness | None = None,
        draws: int | None = None,
        delta: float = 1e-4,
        drift: float | None = None,
        within: LayerNullSpacePosterior | None = None,
        curvature: str | Preserve = "gauss-newton",
        prior_mean: PriorMean = "zero",
        process_group: Any = None,
        device_mesh: Any = None,
    ) -> None:
        target = NullSpace(check_delta(delta))
        explained = resolve_loss(likelihood, loss, "classification")
        frozen = resolve_randomness(randomness, draws)
        functional = _functional(model, parameters, forward, explained, frozen)
        if within is not None and not hasattr(within, "as_prior"):
            raise InputError(
                f"`within` is {within!r}; expected None or a fitted `nb.LayerNullSpacePosterior` of the same model."
            )
        prior = None if within is None else within.as_prior(functional)
        rows = with_curvature(preserve, curvature, directions)
        problem = Problem.of(
            functional, explained, rows, directions, prior_precision, prior, prior_mean
        )
        row_drift = _row_drift(row_drift, drift)
        super().__init__(problem, Settings.of(target, solver, tolerance, row_drift, memory))
        self._shared_by(process_group, device_mesh)


class LaplacePosterior(Posterior):
    """The full linearised Laplace posterior ``(Λ + G)⁻¹``: the sibling that does not preserve predictions.

    The same rows, solvers and methods, with a shift of one. ``calibrate`` and ``prior_precision = ...``
    rescale its covariance as a whole (a tempered posterior); fit anew for another prior.

    Args:
        tolerance: of an iterative solver: a bound on a sample's error beside the sample itself.
        model, likelihood, preserve, loss, parameters, prior_precision, solver, directions, forward, row_drift, memory,
            randomness, draws, drift, curvature, prior_mean, process_group, device_mesh: as those of
            :class:`NullSpacePosterior`.

    Raises:
        InputError: an argument that cannot be used.
        ModelError: a model whose training mode or layers rule out per-example predictions.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | LossFunction = "classification",
        preserve: str | Preserve = "predictions",
        *,
        loss: LossFunction | None = None,
        parameters: ParameterChoice = None,
        prior_precision: PriorPrecision = "evidence",
        solver: str | Solver = "auto",
        directions: Directions = None,
        forward: Forward | None = None,
        tolerance: float | None = None,
        row_drift: float | None = None,
        memory: str | int | None = None,
        randomness: str | FrozenRandomness | None = None,
        draws: int | None = None,
        drift: float | None = None,
        curvature: str | Preserve = "gauss-newton",
        prior_mean: PriorMean = "zero",
        process_group: Any = None,
        device_mesh: Any = None,
    ) -> None:
        explained = resolve_loss(likelihood, loss, "classification")
        frozen = resolve_randomness(randomness, draws)
        functional = _functional(model, parameters, forward, explained, frozen)
        rows = with_curvature(preserve, curvature, directions)
        problem = Problem.of(
            functional, explained, rows, directions, prior_precision, prior_mean=prior_mean
        )
        row_drift = _row_drift(row_drift, drift)
        target = FullLaplace(1.0)
        super().__init__(problem, Settings.of(target, solver, tolerance, row_drift, memory))
        self._shared_by(process_group, device_mesh)


def _functional(
    model: nn.Module,
    parameters: ParameterChoice,
    forward: Forward | None,
    likelihood: Likelihood,
    randomness: FrozenRandomness | None,
) -> FunctionalModel:
    """The network as a function of the chosen weights."""
    whole = unwrapped(model, frozen=parameters is not None)
    chosen = resolved(whole, parameters)
    functional = functional_model(whole, chosen, forward, likelihood.layouts, randomness)
    functional.last_layer = chosen is not parameters
    return functional


def _row_drift(row_drift: float | None, drift: float | None) -> float | None:
    if drift is None:
        return row_drift
    warn_deprecated("`drift=`", "`row_drift=`")
    return drift


def plan(
    model: nn.Module,
    train_loader: Iterable[Any],
    likelihood: str | Likelihood | LossFunction = "classification",
    preserve: str | Preserve = "predictions",
    *,
    loss: LossFunction | None = None,
    parameters: ParameterChoice = None,
    prior_precision: PriorPrecision = "evidence",
    solver: str | Solver = "auto",
    directions: Directions = None,
    forward: Forward | None = None,
    tolerance: float | None = None,
    row_drift: float | None = None,
    memory: str | int | None = None,
    randomness: str | FrozenRandomness | None = None,
    draws: int | None = None,
    delta: float = 1e-4,
    within: LayerNullSpacePosterior | None = None,
    curvature: str | Preserve = "gauss-newton",
    prior_mean: PriorMean = "zero",
    process_group: Any = None,
    device_mesh: Any = None,
    num_samples: int = 30,
    max_examples: int | None = None,
) -> Plan:
    """Sizes, memory and time of ``NullSpacePosterior(...).fit`` with the same arguments, before it runs.

    Args:
        train_loader, num_samples, max_examples: as those of ``fit``; the others as those of `NullSpacePosterior`.

    Raises:
        InputError, ModelError, NonFiniteError: what ``fit`` would raise on the first batch.
    """
    posterior = NullSpacePosterior(
        model,
        likelihood,
        preserve,
        loss=loss,
        parameters=parameters,
        prior_precision=prior_precision,
        solver=solver,
        directions=directions,
        forward=forward,
        tolerance=tolerance,
        row_drift=row_drift,
        memory=memory,
        randomness=randomness,
        draws=draws,
        delta=delta,
        within=within,
        curvature=curvature,
        prior_mean=prior_mean,
        process_group=process_group,
        device_mesh=device_mesh,
    )
    return posterior.plan(train_loader, num_samples=num_samples, max_examples=max_examples)
