"""Posteriors around a trained network: fit, calibrate, predict, score novelty, sample, save."""

from __future__ import annotations

import copy
import functools
import math
import operator
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from nullbayes import draws, storage
from nullbayes.calibration import METRICS, CalibrationPath, calibration_path
from nullbayes.certificate import Certificate, GuaranteeCheck
from nullbayes.constraints import Directions, Preserve, resolve_directions, resolve_preserve
from nullbayes.errors import InputError, NotFittedError, StorageError
from nullbayes.evidence import fixed_point, null_space_precision
from nullbayes.fitting import capture_training, check_reusable, default_budget, fit_noise, limited
from nullbayes.jacobian.build import examples_per_capture, output_operator
from nullbayes.jacobian.capture import CapturePlan
from nullbayes.jacobian.functional import (
    Forward,
    FunctionalModel,
    Inputs,
    batch_size,
    check_inputs,
    check_mode,
    take,
    to_device,
    undisturbed,
)
from nullbayes.jacobian.parameters import ParameterChoice, ParameterSpace
from nullbayes.jacobian.probe import prove
from nullbayes.likelihood import Likelihood, resolve_likelihood
from nullbayes.memory import available_bytes, parse_bytes, peak_bytes
from nullbayes.prediction import (
    METHODS,
    SCORES,
    Prediction,
    check_choice,
    make_prediction,
    per_example,
)
from nullbayes.progress import stages
from nullbayes.solvers import Solver, State, choose
from nullbayes.solvers.base import default_tolerance, relative

PriorPrecision = str | float | Mapping[str, float]
Self = TypeVar("Self", bound="Posterior")
Method = TypeVar("Method", bound=Callable[..., Any])

# Edge of the numerical null space, relative to the prior precision. benchmarks/edge.py: NLL, ECE and
# novelty are all best near 1e-4 on the digits; towards 0 novelty suffers, towards 1 everything does.
DELTA = 1e-4

# Floating-point operations per example up to which novelty is computed exactly by itself.
EXACT_FLOPS = 3e8


def _undisturbed(method: Method) -> Method:
    """A method that runs the user's model: in any gradient mode, without touching random state."""

    @functools.wraps(method)
    def run(self: Posterior, *args: Any, **kwargs: Any) -> Any:
        with undisturbed(self.functional.device):
            return method(self, *args, **kwargs)

    return cast(Method, run)


class Posterior(ABC):
    """What the null-space and the Laplace posterior share. Use one of those two.

    Args:
        model: the trained network, in evaluation mode. It is never written to.
        likelihood: ``"classification"``, ``"binary"``, ``"regression"``, or a likelihood object.
        parameters: which weights take part: all that require a gradient (None), names, or a
            filter ``(name, parameter) -> bool``.
        prior_precision: ``"evidence"``, a number, or one per parameter tensor ``{name: value}``.
        solver: ``"auto"`` or an object from ``nb.solvers``.
        directions: None (all), a number or ``"auto"``: how many of the leading eigen-directions of
            each example's output Hessian are constrained.
        forward: ``forward(model, inputs) -> outputs`` where ``model(inputs)`` does not do.
        tolerance: relative residual asked for; None: 1e-5 (float32), 1e-10 (float64).
        memory: what a fit may take, e.g. ``"8GB"``; None: 70 % of what is free.

    Raises:
        InputError: an argument that cannot be used.
        ModelError: a model whose training mode or layers rule out per-example predictions.
    """

    kind: ClassVar[str]
    delta: float

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood = "classification",
        preserve: str | Preserve = "predictions",
        *,
        parameters: ParameterChoice = None,
        prior_precision: PriorPrecision = "evidence",
        solver: str | Solver = "auto",
        directions: Directions = None,
        forward: Forward | None = None,
        tolerance: float | None = None,
        memory: str | int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"`model` is {type(model).__name__}, expected a torch.nn.Module.")
        self.model = getattr(
            model, "_orig_mod", model
        )  # torch.compile wraps; hooks need the layers
        self.likelihood = resolve_likelihood(likelihood)
        self.preserve = resolve_preserve(preserve)
        self.directions = resolve_directions(directions)
        if self.directions is not None and not self.preserve.takes_directions:
            self.preserve.rows(self.likelihood, (2,), self.directions)  # raises, saying why
        self.space = ParameterSpace.from_model(self.model, parameters)
        self.functional = FunctionalModel(self.model, self.space, forward)
        self._prior = _check_prior(prior_precision)
        tensorwise = self._prior if isinstance(self._prior, dict) else None
        self._scales = self.space.scales(tensorwise)
        self.solver = solver
        choose(solver, 1, 1, 1 << 62)  # a wrong argument is said now, not after the capture
        if tolerance is not None and isinstance(solver, Solver):
            raise InputError(
                f"`tolerance` is {tolerance!r} beside a solver object, which has its own: say it there, "
                f"`{type(solver).__name__}(tolerance=...)`."
            )
        self.tolerance = None if tolerance is None else _check_positive(tolerance, "tolerance")
        self.memory = None if memory is None else parse_bytes(memory)
        self.calibration: CalibrationPath | None = None
        self._plan: CapturePlan | None = None
        self._unit: Tensor | None = None  # (S, P) samples at prior precision one
        self._alpha = math.nan
        self._state: State | None = None
        self._check: GuaranteeCheck | None = None
        self._certificate: Certificate | None = None
        self._seed = 0

    # -- fit -------------------------------------------------------------------------------------

    @_undisturbed
    def fit(
        self: Self,
        train_loader: Iterable[Any],
        num_samples: int = 30,
        seed: int = 0,
        *,
        max_examples: int | None = None,
        progress: bool = True,
    ) -> Self:
        """Build the posterior from the training data; nothing of an earlier fit is kept until it is done.

        Args:
            train_loader: batches ``(inputs, targets)`` or mappings; read once (twice where the
                observation noise has to be estimated). Every example counts, partial batches too.
            num_samples: weight samples ``S``; ``draw`` adds more later.
            seed: sample ``s`` depends on ``(seed, s)`` alone. Global random state is not touched.
            max_examples: constrain the first so many examples only.
            progress: bars on standard error.

        Raises:
            InputError, ModelError, NonFiniteError, MemoryBudgetError, SolverError: each names what
                was found and the mend; the model and an earlier fit stay as they were.
        """
        started = time.perf_counter()
        num_samples = _check_count(num_samples, "num_samples")
        max_examples = None if max_examples is None else _check_count(max_examples, "max_examples")
        seed = _check_count(seed, "seed", 0)
        check_reusable(train_loader, "train_loader")
        check_mode(self.model)
        self.space.check_finite(self.model)
        budget = self.memory or default_budget(available_bytes(self.functional.device))
        # Noise is fitted on a copy: an error later on leaves the earlier fit as it was.
        likelihood = copy.deepcopy(self.likelihood)
        with stages(progress) as stage:
            fit_noise(self.functional, likelihood, train_loader, max_examples, stage)
            rows = capture_training(
                self.functional,
                likelihood,
                self.preserve,
                self.directions,
                train_loader,
                max_examples,
                self._scale_by_name(),
                budget,
                num_samples,
                stage,
            )
            m, p = rows.operator.shape
            choice = choose(self.solver, m, p, budget - rows.operator.nbytes, self.tolerance)
            state = choice.solver.prepare(rows.operator, stage.fraction("Gram matrix, QR"))
            theta = self.space.flatten(self.space.current(self.model))
            alpha = self._prior_precision(state, theta)
            numerical = self.delta > 0 and self.kind == NullSpacePosterior.kind
            state.factorise(self.delta * alpha, numerical, stage.fraction("factorisation"))
            v, noise = draws.standard_normal(seed, range(num_samples), p, m, theta)
            done = state.project(v, noise)
            gone = float(v.double().square().sum() - done.value.double().square().sum())
            gamma = gone / num_samples if numerical else float(state.rank)
            alpha = self._evidence_after(gamma, theta, alpha)
            rank = min(max(round(gamma), 0), m, p)
            unit = done.value if self._scales is None else done.value * self._scales
            # Once more from the rows, outside the solver: what the certificate states.
            after = rows.operator.matvec(done.value)
            residual = _residual(after, rows.operator.matvec(v))
            row_rms = float(after.double().square().sum() / (num_samples * rows.examples)) ** 0.5
            check = GuaranteeCheck(
                self.functional, rows.plan, likelihood, self.preserve, rows.kept, unit
            )
        solver = choice.solver
        tolerance = getattr(solver, "tolerance", None) or default_tolerance(self.space.dtype)
        device = self.functional.device
        certificate = Certificate(
            method=self.kind,
            preserve=self.preserve.describe(),
            residual=float(residual.max()),
            tolerance=tolerance,
            row_drift=row_rms * alpha**-0.5,
            natural_units=self.preserve.natural_units,
            **check.measure(alpha**-0.5),
            score_name=likelihood.score_name,
            constraints=m,
            parameters=p,
            rank=rank,
            null_dim=p - rank,
            prior_share=float(done.value.double().square().sum() / v.double().square().sum()),
            prior_precision=alpha,
            delta=self.delta,
            discarded_trace=rows.discarded_trace,
            solver=solver.name,
            reason=choice.why,
            status=done.status.value,
            iterations=done.iterations,
            seconds=time.perf_counter() - started,
            peak_memory=peak_bytes(device),
            examples=rows.examples,
            checked_examples=check.examples,
            num_samples=num_samples,
            generic=tuple(rows.plan.generic),
            notes=tuple(state.notes),
        )
        self._plan, self._unit, self._alpha, self._seed = rows.plan, unit, alpha, seed
        self._state, self._check, self.calibration = state, check, None
        self._certificate, self.likelihood = certificate, likelihood
        return self

    def _prior_precision(self, state: State, theta: Tensor) -> float:
        """Prior precision for the factorisation."""
        if isinstance(self._prior, dict):
            return 1.0
        if self._prior == "evidence":
            return fixed_point(state.spectrum(), theta, self.delta) if self.delta else 1.0
        assert isinstance(self._prior, float)
        return self._prior

    @abstractmethod
    def _evidence_after(self, gamma: float, theta: Tensor, alpha: float) -> float:
        """Prior precision once ``gamma``, the number of directions that the data determine, is known."""

    def _options(self) -> dict[str, Any]:
        """Constructor arguments of this class alone, for storage."""
        return {}

    def _scale_by_name(self) -> dict[str, float] | None:
        if not isinstance(self._prior, dict):
            return None
        return {name: value**-0.5 for name, value in self._prior.items()}

    # -- what was fitted -------------------------------------------------------------------------

    def _fitted(self) -> tuple[Tensor, Certificate]:
        if self._unit is None or self._certificate is None:
            raise NotFittedError(
                f"this {type(self).__name__} has not been fitted; call `fit(train_loader)` first, or "
                "`nb.load(path, model)`."
            )
        return self._unit, self._certificate

    @property
    def certificate(self) -> Certificate:
        """The measured guarantee at the current prior precision."""
        return self._fitted()[1]

    @property
    def num_samples(self) -> int:
        """Weight samples held."""
        return len(self._fitted()[0])

    @property
    def prior_precision(self) -> float:
        """``α``. Setting it rescales samples and certificate; the projection does not depend on it."""
        self._fitted()
        return self._alpha

    @prior_precision.setter
    def prior_precision(self, value: float) -> None:
        self._set_prior_precision(value)

    @_undisturbed
    def _set_prior_precision(self, value: float) -> None:
        _, certificate = self._fitted()
        alpha = _check_positive(value, "prior_precision")
        if self._check is not None:
            measured = self._check.measure(alpha**-0.5)
            rows = certificate.row_drift * (self._alpha / alpha) ** 0.5
            certificate = replace(certificate, prior_precision=alpha, row_drift=rows, **measured)
        self._alpha, self._certificate = alpha, certificate

    def _samples(self) -> Tensor:
        """Weight changes ``Δ (S, P)`` at the current prior precision."""
        return self._fitted()[0] * self._alpha**-0.5

    def _capture_plan(self, inputs: Inputs) -> CapturePlan:
        if self._plan is None:  # a loaded posterior proves its rows on the first batch it sees
            self.functional.outputs(inputs, "`x`")  # wrong inputs are said to be that
            self._plan = prove(self.functional, inputs)
        return self._plan

    # -- use -------------------------------------------------------------------------------------

    @_undisturbed
    def calibrate(
        self,
        val_loader: Iterable[Any],
        *,
        ood_loader: Iterable[Any] | None = None,
        metric: str = "nll",
        progress: bool = True,
    ) -> CalibrationPath:
        """Choose the prior precision on validation data: the whole path from one pass.

        Args:
            val_loader: batches that were not trained on.
            ood_loader: optional; adds AUROC of the predictive uncertainty along the path. It is
                reported, never optimised.
            metric: ``"nll"`` or ``"ece"``.

        Warns:
            NullBayesWarning: the best value lies at an edge, or does not beat the trained network.
        """
        unit, _ = self._fitted()
        check_choice(metric, METRICS, "metric")
        if ood_loader is not None and not isinstance(ood_loader, Iterable):
            raise InputError(
                f"`ood_loader` is {type(ood_loader).__name__}, expected an iterable of (inputs, targets) "
                "batches, e.g. a DataLoader."
            )
        check_mode(self.model)
        first = _first_inputs(val_loader, self.functional)
        path = calibration_path(
            self.functional,
            self._capture_plan(first),
            self.likelihood,
            unit,
            self._alpha,
            val_loader,
            ood_loader,
            metric,
            progress,
        )
        self.prior_precision = path.prior_precision[path.chosen]
        self.calibration = path
        return path

    @_undisturbed
    def predict(self, x: Inputs, method: str = "linearised") -> Prediction:
        """Predict a batch ``x`` (tensor, tuple or mapping of tensors).

        Args:
            method: ``"linearised"`` (default; what the guarantee covers) or ``"sampled"``, the
                network with re-weighted parameters.
        """
        check_choice(method, METHODS, "method")
        samples, x = self._samples(), self._inputs(x)
        if method == "sampled":
            point, outputs = draws.sampled(self.functional, samples, x, "`x`")
        else:
            plan = self._capture_plan(x)
            point, change = draws.linearised(self.functional, plan, samples, x, "`x`")
            outputs = point + change
        return make_prediction(self.likelihood, point, outputs, method)

    @_undisturbed
    def novelty(self, x: Inputs, score: str = "variance", exact: bool | None = None) -> Tensor:
        """How much the training data leave open at ``x``: ``(B,)``, larger is less known.

        Args:
            score: ``"variance"``: ``tr J(x) Σ J(x)ᵀ``, the epistemic variance of the raw outputs;
                ``"share"``: its share of the prior's, in [0, 1]; ``"entropy"`` of the mean
                prediction; ``"mutual_information"`` between label and weights.
            exact: variance and share from the factorisation instead of the samples. None: where the
                posterior was fitted here and it costs less than 3e8 operations an example.
        """
        check_choice(score, SCORES, "score")
        self._fitted()
        x = self._inputs(x)
        if score in ("entropy", "mutual_information"):
            prediction = self.predict(x)
            return per_example(prediction.total if score == "entropy" else prediction.epistemic)
        point = self.functional.outputs(x, "`x`")
        plan = self._capture_plan(x)
        size, outputs = len(point), point[0].numel()
        if exact is None:
            exact = self._state is not None and self._exact_flops(outputs) <= EXACT_FLOPS
        if exact and self._state is None:
            raise NotFittedError(
                "exact novelty needs the factorisation, which is not stored in files; fit here, or "
                "use `exact=False`."
            )
        values = []
        step = examples_per_capture(self.functional, plan, outputs)
        for start in range(0, size, step):
            piece = take(x, start, min(start + step, size))
            values.append(self._variance(plan, piece, exact, score == "share", outputs))
        return torch.cat(values)

    def _exact_flops(self, outputs: int) -> float:
        assert self._state is not None
        m, p = self._state.operator.shape
        return 2.0 * outputs * min(m, p) * (p + min(m, p))

    def _variance(
        self, plan: CapturePlan, x: Inputs, exact: bool, share: bool, outputs: int
    ) -> Tensor:
        operator = output_operator(self.functional, plan, x, self._scale_by_name())
        prior: Tensor | None = None
        if exact or share:
            prior = operator.squared_norms()
        if exact:
            assert self._state is not None and prior is not None
            value = (prior - self._state.explained(operator)).clamp(min=0)
        else:
            unit, _ = self._fitted()
            unit = unit if self._scales is None else unit / self._scales
            value = operator.matvec(unit).double().square().mean(0)
        total = value.reshape(-1, outputs).sum(1)
        if share:
            assert prior is not None
            total = relative(total, prior.reshape(-1, outputs).sum(1)).clamp(0, 1)
        else:
            total = total / self._alpha
        return total.to(self.functional.dtype)

    def _inputs(self, x: Inputs) -> Inputs:
        x = to_device(x, self.functional.device)
        check_mode(self.model)
        if not batch_size(x, "`x`"):
            raise InputError(
                "`x` holds no examples: its first axis has length 0. Pass at least one."
            )
        check_inputs(x, "`x`")
        return x

    def sample(self, count: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Yield ``count`` samples (default: all held) as plain state dicts for ``load_state_dict``.

        More than were fitted are drawn first, see :meth:`draw`.
        """
        count = self.num_samples if count is None else _check_count(count, "count")
        if count > self.num_samples:
            self.draw(count - self.num_samples)
        return self._state_dicts(count)

    def _state_dicts(self, count: int) -> Iterator[dict[str, Tensor]]:
        canonical = {id(p): n for n, p in self.model.named_parameters()}
        theta = self.space.current(self.model)
        for delta in self._samples()[:count]:
            moved = {n: theta[n] + d for n, d in self.space.unflatten(delta).items()}
            out = {}
            for key, value in self.model.state_dict(keep_vars=True).items():
                name = canonical.get(id(value), key)
                out[key] = moved[name] if name in moved else value.detach().clone()
            yield out

    @_undisturbed
    def draw(self, count: int) -> None:
        """Add ``count`` samples; they continue the stream of the fit's seed.

        Raises:
            NotFittedError: not fitted, or loaded from a file (which holds no factorisation).
        """
        unit, certificate = self._fitted()
        if self._state is None or self._check is None:
            raise NotFittedError(
                f"this posterior was loaded from a file with {len(unit)} samples; more need the "
                "factorisation, so call `fit` again with a larger `num_samples`."
            )
        count = _check_count(count, "count")
        indices = range(len(unit), len(unit) + count)
        m, p = self._state.operator.shape
        v, noise = draws.standard_normal(self._seed, indices, p, m, unit)
        done = self._state.project(v, noise)
        operator = self._state.operator
        residual = _residual(operator.matvec(done.value), operator.matvec(v))
        new = done.value if self._scales is None else done.value * self._scales
        self._unit = torch.cat([unit, new])
        self._certificate = replace(
            certificate,
            residual=max(certificate.residual, float(residual.max())),
            num_samples=len(self._unit),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write samples, settings, certificate and a fingerprint of the model to one safetensors file."""
        unit, certificate = self._fitted()
        storage.write(
            path,
            model=self.model,
            space=self.space,
            samples=unit,
            settings={
                "class": type(self).__name__,
                "likelihood": self.likelihood.config(),
                "preserve": self.preserve.name,
                "directions": self.directions,
                "options": self._options(),
                "prior": self._prior,
                "prior_precision": self._alpha,
                "seed": self._seed,
                "certificate": certificate.as_dict(),
                "calibration": None if self.calibration is None else self.calibration.as_dict(),
            },
        )

    def _restore(self, samples: Tensor, settings: dict[str, Any]) -> None:
        self._unit, self._alpha = samples, float(settings["prior_precision"])
        self._seed = int(settings["seed"])
        self._certificate = Certificate.from_dict(settings["certificate"])
        path = settings["calibration"]
        self.calibration = None if path is None else CalibrationPath(**path)


class NullSpacePosterior(Posterior):
    """``N(θ̂, Π Λ⁻¹)`` with ``Π`` the projection onto the null space of the constraint rows.

    Every sample keeps the training predictions of the linearised network, so the Bayesian prediction
    does not underfit (Miani, Roy & Hauberg 2025). See :class:`Posterior` for the arguments.

    The null space of a trained network's rows has no sharp edge: their spectrum decays over twenty
    decades. ``delta`` says where it ends. A direction counts as free if moving along it as far as the
    prior allows changes what is preserved, over the whole training set, by less than ``√delta`` (for
    predictions in Fisher units: by less than ``delta / 2`` nats of Kullback-Leibler divergence). Much
    smaller values freeze directions that no prediction notices, and with them the uncertainty off
    the data; see the page on the guarantee for measurements.

    Args:
        preserve: ``"predictions"`` (default), ``"outputs"``, ``"loss"``, or an object.
        delta: the edge of the null space, relative to the prior precision; 0: the exact projection,
            refined until ``tolerance``.
        options: see :class:`Posterior`.
    """

    kind = "null-space"

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood = "classification",
        preserve: str | Preserve = "predictions",
        *,
        delta: float = DELTA,
        **options: Any,
    ) -> None:
        super().__init__(model, likelihood, preserve, **options)
        if not isinstance(delta, (int, float)) or not 0 <= delta < math.inf:
            raise InputError(f"`delta` is {delta!r}; expected a number, 0 (exact) or more.")
        self.delta = float(delta)

    def _options(self) -> dict[str, Any]:
        return {"delta": self.delta}

    def _evidence_after(self, gamma: float, theta: Tensor, alpha: float) -> float:
        return (
            null_space_precision(gamma, len(theta), theta) if self._prior == "evidence" else alpha
        )


class LaplacePosterior(Posterior):
    """The full linearised Laplace posterior ``(Λ + G)⁻¹``: the sibling that does not keep predictions.

    The same rows, solvers and methods, with ``δ = 1``. ``calibrate`` and ``prior_precision = ...``
    rescale its covariance as a whole (a tempered posterior); fit anew for another prior.
    """

    kind = "Laplace"

    delta = 1.0

    def __init__(
        self, model: nn.Module, likelihood: str | Likelihood = "classification", **options: Any
    ) -> None:
        options.setdefault("preserve", "predictions")
        super().__init__(model, likelihood, **options)

    def _evidence_after(self, gamma: float, theta: Tensor, alpha: float) -> float:
        return alpha


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    likelihood: Likelihood | None = None,
    forward: Forward | None = None,
) -> Posterior:
    """A posterior from :meth:`Posterior.save`, around the same trained model.

    Args:
        model: the network that the posterior was fitted for; the file's fingerprint is checked.
            Another device or floating-point dtype is fine, other weights are not.
        likelihood: needed only for a likelihood class that this process does not know.
        forward: as it was given to the posterior.

    Raises:
        StorageError: the file is missing, truncated, not ours, or for another model.
    """
    stored = storage.read(path)
    kinds: dict[str, type[Posterior]] = {
        c.__name__: c for c in (NullSpacePosterior, LaplacePosterior)
    }
    if not isinstance(model, nn.Module):
        raise InputError(f"`model` is {type(model).__name__}, expected a torch.nn.Module.")
    stored.check_model(getattr(model, "_orig_mod", model))
    try:
        settings = stored.settings
        posterior = kinds[settings["class"]](
            model,
            likelihood or stored.likelihood(),
            preserve=settings["preserve"],
            directions=settings["directions"],
            **settings["options"],
            parameters=stored.names,
            prior_precision=settings["prior"],
            forward=forward,
        )
        posterior._restore(stored.samples(posterior.space), settings)
    except InputError as error:  # a likelihood or a preserve mode that this process does not know
        raise StorageError(
            f"{stored.path} holds a setting that cannot be used here: {error} Import the module that "
            "registers it (`@nb.register_likelihood`, `@nb.register_preserve`) before loading."
        ) from error
    except (KeyError, TypeError) as error:
        raise StorageError(
            f"{stored.path} lacks, or does not understand, a setting ({type(error).__name__}: {error}); "
            "it was written by another version of nullbayes or changed since. Fit and save it again."
        ) from error
    return posterior


def _first_inputs(loader: Iterable[Any], functional: FunctionalModel) -> Inputs:
    """The inputs of the first batch, to prove rows on."""
    check_reusable(loader, "val_loader")
    return next(limited(functional, loader, "val_loader", None))[1]


def _residual(after: Tensor, before: Tensor) -> Tensor:
    return relative(after.double().norm(dim=1), before.double().norm(dim=1))


def _check_prior(value: PriorPrecision) -> str | float | dict[str, float]:
    if isinstance(value, Mapping):
        return {
            str(name): _check_positive(number, f"prior_precision[{name!r}]")
            for name, number in value.items()
        }
    if isinstance(value, str):
        if value == "evidence":
            return value
        raise InputError(
            f"`prior_precision` is {value!r}; expected 'evidence', a positive number, or one per "
            "parameter tensor ({name: value})."
        )
    return _check_positive(value, "prior_precision")


def _check_positive(value: float, name: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise InputError(f"`{name}` is {value!r}; expected a positive, finite number.")
    return float(value)


def _check_count(value: int, name: str, least: int = 1) -> int:
    try:
        count = operator.index(value)  # NumPy's integers too
    except TypeError:
        count = least - 1
    if isinstance(value, bool) or count < least:
        raise InputError(f"`{name}` is {value!r}; expected a whole number, {least} or more.")
    return count
