"""What the null-space and the Laplace posterior share: fit, calibrate, predict, score novelty, draw, save."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nullbayes.certificate import Certificate
from nullbayes.common.arguments import check_count, check_positive, check_sample_dtype
from nullbayes.common.crowd import Crowd
from nullbayes.constraints.directions import Directions
from nullbayes.constraints.preserve import Preserve
from nullbayes.constraints.problem import Problem
from nullbayes.errors import InputError, NotFittedError
from nullbayes.fit.pipeline import build, extended, rescaled
from nullbayes.fit.plan import Few, Plan, counted, plan_fit
from nullbayes.fit.plan_many import made_together, with_communication
from nullbayes.fit.result import AUDITED, Checkpoint, Fit, Run, Settings
from nullbayes.fit.together import check_alike
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.capture.verify import prove
from nullbayes.jacobian.linearise import state_dicts
from nullbayes.likelihood import Likelihood
from nullbayes.model.adapters import beside_adapter, check_there, check_unmerged
from nullbayes.model.batch import Inputs, batch_size, check_inputs, to_device
from nullbayes.model.checks import check_mode
from nullbayes.model.data import as_inputs, as_loader
from nullbayes.model.fingerprint import Watch, check_unchanged
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.loader import first_inputs
from nullbayes.model.parameters import ParameterSpace
from nullbayes.model.shares import shared
from nullbayes.model.undisturbed import reading_method, undisturbed_method
from nullbayes.posterior.calibration import calibration_path
from nullbayes.posterior.calibration_path import CalibrationPath, warn_of_closed
from nullbayes.posterior.growing import Grows
from nullbayes.posterior.judged import RowJudged
from nullbayes.posterior.predicting import Predicts
from nullbayes.posterior.serving import Serves
from nullbayes.posterior.storage import described, restored, write_posterior
from nullbayes.posterior.validation import checked, search_of

Self = TypeVar("Self", bound="Posterior")
# Weights that are looked at at each call: all of them, up to so many (some 2 ms); of more, these in turn.
LOOKED_AT = 2**23


class Posterior(RowJudged, Predicts, Grows, Serves):
    """What :class:`NullSpacePosterior` and :class:`LaplacePosterior` share. Use one of those two.

    Attributes:
        problem: what is asked: network, likelihood, what is preserved, prior.
        calibration: the path of the last :meth:`calibrate`; None before it.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is Posterior:
            raise InputError(
                "`Posterior` is abstract: it holds what the posteriors share. Use "
                "`nb.NullSpacePosterior(model)` or `nb.LaplacePosterior(model)`."
            )
        return super().__new__(cls)

    def __init__(self, problem: Problem, settings: Settings) -> None:
        self.problem, self._settings = problem, settings
        self.calibration: CalibrationPath | None = None
        self._fit: Fit | None = None
        #: see `NullSpacePosterior`
        self.process_group: Any = None
        # The model's tensors as they were when they were last found unchanged.
        self._watch: Watch | None = None
        # A loaded posterior proves its rows on the first inputs that it sees.
        self._proven: CapturePlan | None = None

    # -- what it is about --------------------------------------------------------------------------

    @property
    def functional(self) -> FunctionalModel:
        """The network as a function of the chosen weights."""
        return self.problem.functional

    @property
    def model(self) -> nn.Module:
        """The trained network. It is never written to."""
        return self.functional.model

    @property
    def space(self) -> ParameterSpace:
        """The weights that take part."""
        return self.problem.space

    @property
    def likelihood(self) -> Likelihood:
        """How outputs explain targets; after ``fit`` with its observation noise."""
        return self.problem.likelihood

    @property
    def preserve(self) -> Preserve:
        return self.problem.preserve

    @property
    def directions(self) -> Directions:
        return self.problem.directions

    @property
    def delta(self) -> float:
        """Where the null space ends, relative to the prior precision; 1 for Laplace."""
        return self._settings.target.delta

    @property
    def certificate(self) -> Certificate:
        """The measured guarantee at the current prior precision."""
        return self._fitted().certificate

    @property
    def num_samples(self) -> int:
        """Weight samples that are stored."""
        return self._fitted().num_samples

    @property
    def prior_precision(self) -> float:
        """``α``; a factor on all where there is one for each tensor (`precision_by_name`).

        Setting it rescales samples and certificate; the projection does not depend on it.
        """
        return self._fitted().alpha

    @prior_precision.setter
    def prior_precision(self, value: float) -> None:
        self._set_prior_precision(value)

    @undisturbed_method
    def _set_prior_precision(self, value: float) -> None:
        fit, value = self._fitted(), check_positive(value, "prior_precision")
        check = fit.check
        if check is None or (check.processes is None and check.crowd.processes is None):
            self._take(rescaled(fit, value))
            return
        with self._together("prior_precision", value=value):
            self._take(rescaled(fit, value))

    @property
    def precision_by_name(self) -> dict[str, float]:
        """The prior precision of each parameter tensor."""
        alpha, each = self._fitted().alpha, self.problem.precision_by_name or {}
        return {name: alpha * each.get(name, 1.0) for name in self.space.names}

    def __repr__(self) -> str:
        kept = self.preserve.describe() if self._settings.target.preserves else "nothing"
        state = "not fitted"
        if self._fit is not None:
            held = "guarantee held" if self.certificate.held else "guarantee weak"
            judged = f", {held}" if self._settings.target.preserves else ""
            state = (
                f"{self.num_samples} samples, prior precision {self.prior_precision:.4g}{judged}"
            )
        return (
            f"{type(self).__name__}({type(self.model).__name__}, {self.space.total:,} weights, "
            f"{self.likelihood!r}, preserves {kept}; {state})"
        )

    # -- fit ---------------------------------------------------------------------------------------

    @reading_method
    def plan(
        self,
        train_loader: Any,
        *,
        num_samples: int = 30,
        max_examples: int | None = None,
    ) -> Plan:
        """Sizes, memory and time of :meth:`fit` with the same arguments, from a trial on a few examples.

        Raises:
            InputError, ModelError, NonFiniteError: what ``fit`` would raise on the first batch.
        """
        num_samples = check_count(num_samples, "num_samples")
        max_examples = None if max_examples is None else check_count(max_examples, "max_examples")
        with self._together(
            "plan", num_samples=num_samples, max_examples=max_examples
        ) as processes:
            train_loader = self._data(train_loader, "train_loader")
            problem, settings = self.problem, self._settings

            def made(few: Few) -> Plan:
                return plan_fit(problem, settings, few, num_samples, processes)

            if processes is None:
                return made(counted(problem, train_loader, max_examples))
            plan = made_together(made, problem, train_loader, max_examples, processes)
            return with_communication(plan, problem, settings, num_samples, processes)

    @reading_method
    def fit(
        self: Self,
        train_loader: Any,
        num_samples: int = 30,
        seed: int = 0,
        *,
        max_examples: int | None = None,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: float = 60.0,
        audit: int | None = None,
        sample_dtype: torch.dtype | None = None,
    ) -> Self:
        """Build the posterior from the training data; nothing of an earlier fit is kept until it is done.

        Args:
            train_loader: batches ``(inputs, targets)`` or mappings; arrays or tensors ``(X, y)``; a data set, Lightning
                data module or `nullbayes.Batches`. Read once; twice where observation noise has to be estimated.
            num_samples: weight samples ``S``; ``draw`` adds more later.
            seed: sample ``s`` depends on ``(seed, s)`` alone. Global random state is not touched.
            max_examples: constrain the first so many examples only.
            progress: bars on standard error.
            checkpoint: file for the state of an iterative solver, written every ``checkpoint_every`` seconds, removed
                when the fit is done; after a kill, the same call goes on from there.
            audit: training examples, drawn from all the data, on which the guarantee is measured once more without
                the fit's rows (``certificate.audit``); fewer than the default are noted there. None: 16, or as many
                as a twentieth of the fit's time allows; a number is audited whole, however long that takes. At least
                1: without an audit no guarantee is said to have held.
            sample_dtype: what samples are stored in, in memory and in files, and measured in: None, the working
                precision; or ``torch.bfloat16`` for half the room, which rounds each by up to 0.4 %.

        Ctrl-C while the solver iterates ends it early, with the best samples so far and a certificate of those. At any
        other time it leaves the earlier fit as it was, as every error does.

        Raises: InputError, ModelError, NonFiniteError, MemoryBudgetError, SolverError, StorageError
        """
        run = Run(
            check_count(num_samples, "num_samples"),
            check_count(seed, "seed", 0),
            None if max_examples is None else check_count(max_examples, "max_examples"),
            progress,
            _checkpoint(checkpoint, checkpoint_every),
            AUDITED if audit is None else check_count(audit, "audit"),
            check_sample_dtype(sample_dtype, self.functional.dtype),
            patient=audit is not None,
        )
        with self._together("fit") as processes:
            train_loader = self._data(train_loader, "train_loader")
            run = replace(run, crowd=Crowd.of(self.sample_group))
            for everyone in filter(None, (processes, run.crowd.processes)):
                check_alike(self.problem, self._settings, run, everyone)
            if processes is not None:
                run = replace(run, progress=progress and processes.leads)
                train_loader = shared(train_loader, processes, "train_loader", run.max_examples)
            # Looked at first: what changes in between shows at the first use.
            watch = Watch(self.model, LOOKED_AT)
            self._take(build(self.problem, self._settings, train_loader, run))
        self.calibration, self._watch = None, watch
        return self

    def _data(self, data: Any, name: str) -> Iterable[Any]:
        """``data`` as a loader; with what can be said of it and of the model before anything is computed."""
        free = self.functional.layouts is not None
        loader = as_loader(data, name, self.functional.dtype, labelled=not free, pieces=free)
        check_mode(self.model, frozen=self.problem.randomness is not None)
        check_unmerged(self.model, self.space)
        self.space.check_finite(self.model)
        self.problem.check_within()
        return loader

    def _take(self, fit: Fit) -> None:
        """Everything that was fitted changes in one step."""
        self._fit, self.problem = fit, fit.problem

    def _fitted(self) -> Fit:
        if self._fit is None:
            raise NotFittedError(
                f"this {type(self).__name__} has not been fitted; call `fit(train_loader)` first, or "
                "`nb.load(path, model)`."
            )
        return self._fit

    # -- use ---------------------------------------------------------------------------------------

    @reading_method
    def calibrate(
        self,
        val_loader: Any,
        *,
        ood_loader: Iterable[Any] | None = None,
        metric: str = "nll",
        tune: str | None = None,
        progress: bool = True,
    ) -> CalibrationPath:
        """Choose the prior precision on validation data: the whole path from one pass.

        For regression whose noise was estimated from training residuals, that noise is chosen instead: a network that
        fits its training data better than new data has understated it.

        Args:
            val_loader: data that were not trained on, in any form that ``fit`` takes.
            ood_loader: optional; adds AUROC of the predictive uncertainty along the path. It is
                reported, never optimised.
            metric: ``"nll"`` or ``"ece"``.
            tune: ``"prior"``, ``"temperature"`` or ``"noise"``; None as above. A temperature divides outputs before
                they become probabilities, and leaves samples, novelty and joint predictions as they are.

        A prior by which accuracy falls below the network's, by more than a point and than four examples, is not chosen.

        Warns:
            NullBayesWarning: the best value lies at an edge, does not beat the trained network, was passed over for
                its accuracy, or closes the posterior.
        """
        fit = self._fitted()
        self._check_model()
        loaders = checked(self.functional, val_loader, ood_loader, metric)
        if tune == "temperature":
            warn_of_closed(self.calibration, self.prior_precision)
        asked = {"metric": metric, "tune": tune, "ood_loader": ood_loader is not None}
        with self._together("calibrate", **asked) as processes:
            plan = fit.plan or self._proven
            if plan is None:
                plan = self._capture_plan(first_inputs(self.functional, loaders[0], "val_loader"))
            search = search_of(loaders, metric, tune, progress, processes)
            path = calibration_path(fit, plan, search)
            if path.tuned == "prior":
                self.prior_precision = path.prior_precision[path.chosen]
            elif path.noise_scale is not None:
                noised = self.likelihood.with_noise(path.noise_scale[path.chosen])
                assert noised is not None
                self._take(fit.explained_by(noised))
        self.calibration = path
        return path

    # -- the model -----------------------------------------------------------------------------------

    def _capture_plan(self, inputs: Inputs) -> CapturePlan:
        plan = self._fitted().plan or self._proven
        if plan is None:  # a loaded posterior proves its rows on the first batch it sees
            self.functional.outputs(inputs, "`x`")  # wrong inputs are said to be that
            plan = self._proven = prove(self.functional, inputs)
        return plan

    def _check_model(self) -> None:
        """Refuse a model that is in training mode, or no longer the one that was fitted."""
        check_mode(self.model, frozen=self.problem.randomness is not None)
        fit = self._fitted()
        if self._watch is None or not self._watch.same(self.model):
            check_there(self.model, self.space)
            # Looked at first: what changes in between shows the next time.
            watch = Watch(self.model, LOOKED_AT)
            check_unchanged(self.model, fit.fingerprint)
            self.functional.check_same()
            self._watch = watch

    def _inputs(self, x: Inputs, draws: list[int] | None) -> Inputs:
        """Checked, on the device, and keyed for ``draws`` of the frozen noise unless that is None."""
        x = to_device(as_inputs(x, self.functional.dtype), self.functional.device)
        x = self.functional.as_called(x)
        self._check_model()
        if not batch_size(x, "`x`"):
            raise InputError(
                "`x` holds no examples: its first axis has length 0. Pass at least one."
            )
        check_inputs(x, "`x`")
        return x if draws is None else self.functional.keyed(x, draws)

    # -- samples and files -------------------------------------------------------------------------

    def _samples(self) -> Tensor:
        """Weight changes ``Δ (S, P)`` at the current prior precision."""
        return self._fitted().samples

    def sample(self, count: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Yield ``count`` samples (default: all that are stored) as plain state dicts for ``load_state_dict``.

        More than were fitted are drawn first, see :meth:`draw`.
        """
        self._fitted().check_whole("sample")
        count = self.num_samples if count is None else check_count(count, "count")
        if count > self.num_samples:
            self.draw(count - self.num_samples)
        return state_dicts(self.model, self.space, self._samples()[:count])

    @undisturbed_method
    def draw(self, count: int) -> None:
        """Add ``count`` samples; they continue the stream of the fit's seed.

        Raises:
            NotFittedError: not fitted, or loaded from a file (which holds no factorisation).
        """
        fit = self._fitted()
        if fit.state is None:
            raise NotFittedError(
                f"this posterior was loaded from a file, or compacted, with {len(fit.stored)} samples; more need the "
                "factorisation, so call `fit` again with a larger `num_samples`."
            )
        count = check_count(count, "count")
        fit.check_whole("draw")
        if fit.state.operator.processes is None:
            self._take(extended(fit, self._settings, count))
            return
        with self._together("draw", count=count):
            self._take(extended(fit, self._settings, count))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write samples, settings, certificate and a fingerprint of the model to one safetensors file.

        Args:
            path: of the file; or the folder of a saved adapter of peft, in which it is called
                ``adapter_posterior.safetensors``.

        Raises:
            NotFittedError: not fitted. StorageError: the file cannot be written; an earlier one stays.
        """
        fit = self._fitted()
        fit.check_whole("save")
        settings = described(fit, self._settings.target, self.calibration)
        settings["class"] = type(self).__name__
        write_posterior(beside_adapter(path), fit, settings)

    def _restore(
        self, samples: Tensor, settings: dict[str, Any], prints: dict[str, str], watch: Watch
    ) -> None:
        """Take over what a file holds, around this posterior's model, whose ``prints`` were taken after ``watch``."""
        fit, self.calibration = restored(self.problem, samples, settings, prints)
        self._take(fit)
        self._watch = watch


def _checkpoint(path: str | os.PathLike[str] | None, seconds: float) -> Checkpoint | None:
    every = check_positive(seconds, "checkpoint_every")
    return None if path is None else Checkpoint(path, every)
