"""What the null-space and the Laplace posterior share: fit, calibrate, predict, score novelty."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nullbayes.common.arguments import (
    PriorPrecision,
    check_choice,
    check_count,
    check_positive,
    check_prior,
)
from nullbayes.common.memory import parse_bytes
from nullbayes.constraints.directions import Directions, resolve_directions
from nullbayes.constraints.preserve import Preserve, resolve_preserve
from nullbayes.errors import InputError
from nullbayes.fit.pipeline import build
from nullbayes.fit.projection import Checkpoint
from nullbayes.fit.result import DELTA, Settings
from nullbayes.jacobian.linearise import linearised_outputs, sampled_outputs
from nullbayes.likelihood import Likelihood, LossFunction, resolve_loss
from nullbayes.model.batch import Inputs
from nullbayes.model.checks import check_mode
from nullbayes.model.functional import Forward, FunctionalModel, undisturbed_method, unwrapped
from nullbayes.model.loader import check_reusable, first_inputs
from nullbayes.model.parameters import ParameterChoice, ParameterSpace
from nullbayes.model.randomness import FrozenRandomness, resolve_randomness
from nullbayes.posterior.calibration import CalibrationPath, calibration_path, check_arguments
from nullbayes.posterior.fitted import FittedPosterior
from nullbayes.posterior.information import novelty_information
from nullbayes.posterior.novelty import (
    Scorer,
    check_has_entropy,
    loss_targets,
    loss_variance,
    novelty_variance,
)
from nullbayes.posterior.prediction import (
    METHODS,
    SCORES,
    Prediction,
    make_prediction,
    per_example,
    structured,
)
from nullbayes.solvers import Size, Solver, choose

Self = TypeVar("Self", bound="Posterior")
CLASSIFICATION = "classification"


class Posterior(FittedPosterior):
    """What the null-space and the Laplace posterior share. Use one of those two.

    Args:
        model: the trained network, in evaluation mode. It is never written to.
        likelihood: ``"classification"``, ``"binary"``, ``"regression"``, a likelihood object, or a callable
            ``loss(outputs, targets) -> (B,)`` of whatever the model returns; ``loss=`` is another name for it.
        parameters: which weights take part: all that require a gradient (None), names, or a
            filter ``(name, parameter) -> bool``.
        prior_precision: ``"evidence"``, a number, or one per parameter tensor ``{name: value}``.
        solver: ``"auto"`` or an object from ``nb.solvers``.
        directions: None (all), a number or ``"auto"``: how many of the leading eigen-directions of
            each example's output Hessian are constrained.
        forward: ``forward(model, inputs) -> outputs`` where ``model(inputs)`` does not do.
        tolerance: relative residual asked for; None: 1e-5 (float32), 1e-10 (float64), and 5e-2 for
            data sets that only an iterative solver can take. Of an iterative Laplace sample: a bound on its
            error beside the sample itself.
        drift: stop at this RMS change of an example's preserved quantity (``certificate.row_drift``)
            even if the tolerance is not reached by then; for iterative solvers.
        memory: what a fit may take beside what the process holds already, e.g. ``"8GB"``; None: 70 % of
            what is free. Rows that do not fit go to disk, or are computed anew for each pass.
        randomness: None: the model must not draw random numbers. ``"frozen"`` (or ``nb.FrozenRandomness(seed)``):
            an example gets the same ones in every batch, order and call; they follow from its content.
        draws: how many draws of that noise each example is constrained for (as many times the rows).

    Raises:
        InputError: an argument that cannot be used.
        ModelError: a model whose training mode or layers rule out per-example predictions.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | LossFunction = CLASSIFICATION,
        preserve: str | Preserve = "predictions",
        *,
        loss: LossFunction | None = None,
        parameters: ParameterChoice = None,
        prior_precision: PriorPrecision = "evidence",
        solver: str | Solver = "auto",
        directions: Directions = None,
        forward: Forward | None = None,
        tolerance: float | None = None,
        drift: float | None = None,
        memory: str | int | None = None,
        randomness: str | FrozenRandomness | None = None,
        draws: int | None = None,
        delta: float = DELTA,
    ) -> None:
        super().__init__()
        self.model = unwrapped(model)
        self.likelihood = resolve_loss(likelihood, loss, CLASSIFICATION)
        self.preserve = resolve_preserve(preserve)
        self.directions = resolve_directions(directions)
        if self.directions is not None and not self.preserve.takes_directions:
            self.preserve.rows(self.likelihood, (2,), self.directions)  # raises, saying why
        self.space = ParameterSpace.from_model(self.model, parameters)
        self.functional = FunctionalModel(
            self.model,
            self.space,
            forward,
            layouts=self.likelihood.layouts,
            randomness=resolve_randomness(randomness, draws),
        )
        prior = check_prior(prior_precision)
        self.space.scales(prior if isinstance(prior, dict) else None)  # raises on wrong names
        choose(solver, Size(1, 1), 1 << 62)  # a wrong argument is said now, not after the capture
        if tolerance is not None and isinstance(solver, Solver):
            raise InputError(
                f"`tolerance` is {tolerance!r} beside a solver object, which has its own: say it there, "
                f"`{type(solver).__name__}(tolerance=...)`."
            )
        self._settings = Settings(
            kind=self.kind,
            preserve=self.preserve,
            directions=self.directions,
            prior=prior,
            delta=delta,
            solver=solver,
            tolerance=None if tolerance is None else check_positive(tolerance, "tolerance"),
            drift=None if drift is None else check_positive(drift, "drift"),
            memory=None if memory is None else parse_bytes(memory),
        )

    # -- fit -------------------------------------------------------------------------------------

    @undisturbed_method
    def fit(
        self: Self,
        train_loader: Iterable[Any],
        num_samples: int = 30,
        seed: int = 0,
        *,
        max_examples: int | None = None,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: float = 60.0,
    ) -> Self:
        """Build the posterior from the training data; nothing of an earlier fit is kept until it is done.

        Args:
            train_loader: batches ``(inputs, targets)`` or mappings; read once (twice where the
                observation noise has to be estimated). Every example counts, partial batches too.
            num_samples: weight samples ``S``; ``draw`` adds more later.
            seed: sample ``s`` depends on ``(seed, s)`` alone. Global random state is not touched.
            max_examples: constrain the first so many examples only.
            progress: bars on standard error.
            checkpoint: file for the state of an iterative solver, written every ``checkpoint_every``
                seconds; after a kill, the same call goes on from there. Removed when the fit is done.

        Ctrl-C while the solver iterates ends it early: the best samples so far are kept, with a
        certificate that says what they reached. At any other time it leaves the earlier fit as it was.

        Raises:
            InputError, ModelError, NonFiniteError, MemoryBudgetError, SolverError, StorageError: each names what
                was found and the mend; the model and an earlier fit stay as they were.
        """
        num_samples = check_count(num_samples, "num_samples")
        max_examples = None if max_examples is None else check_count(max_examples, "max_examples")
        seed = check_count(seed, "seed", 0)
        check_reusable(train_loader, "train_loader")
        check_mode(self.model, self.functional.randomness is not None)
        self.space.check_finite(self.model)
        fit = build(
            self.functional,
            self.likelihood,
            self._settings,
            train_loader,
            num_samples,
            seed,
            max_examples,
            progress,
            None
            if checkpoint is None
            else Checkpoint(checkpoint, check_positive(checkpoint_every, "checkpoint_every")),
        )
        self._fit, self.likelihood, self.calibration = fit, fit.likelihood, None
        return self

    # -- use -------------------------------------------------------------------------------------

    @undisturbed_method
    def calibrate(
        self,
        val_loader: Iterable[Any],
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
            val_loader: batches that were not trained on.
            ood_loader: optional; adds AUROC of the predictive uncertainty along the path. It is
                reported, never optimised.
            metric: ``"nll"`` or ``"ece"``.
            tune: ``"prior"`` or ``"noise"``; None as above.

        Warns:
            NullBayesWarning: the best value lies at an edge, or does not beat the trained network.
        """
        fit = self._fitted()
        check_arguments(metric, ood_loader)
        self._check_model()
        check_reusable(val_loader, "val_loader")
        plan = fit.plan or self._proven
        if plan is None:
            plan = self._capture_plan(first_inputs(self.functional, val_loader, "val_loader"))
        path = calibration_path(
            self.functional,
            plan,
            self.likelihood,
            fit.unit,
            fit.alpha,
            val_loader,
            ood_loader,
            metric,
            tune,
            progress,
        )
        if path.noise_scale is None:
            self.prior_precision = path.prior_precision[path.chosen]
        else:
            noised = self.likelihood.with_noise(path.noise_scale[path.chosen])
            assert noised is not None
            self.likelihood = noised
        self.calibration = path
        return path

    def predict(self, x: Inputs, method: str = "linearised", *, draw: int = 0) -> Prediction:
        """Predict a batch ``x`` (tensor, tuple or mapping of tensors).

        Args:
            method: ``"linearised"`` (default; what the guarantee covers) or ``"sampled"``, the
                network with re-weighted parameters.
            draw: which draw of the frozen noise, where the model draws any; ``fit`` saw those below its ``draws``.

        Returns:
            With a callable loss and a model that returns several tensors, each field in the model's structure.
        """
        flat = self._predict(x, method, draw)
        return flat if self.likelihood.layouts is None else structured(flat, self.likelihood)

    @undisturbed_method
    def _predict(self, x: Inputs, method: str, draw: int) -> Prediction:
        check_choice(method, METHODS, "method")
        fit, x = self._fitted(), self._inputs(x, [check_count(draw, "draw", 0)])
        # Samples at prior precision one, and what they do scaled: a scaled copy of them may be gigabytes.
        scale = fit.alpha**-0.5
        if method == "sampled":
            point, outputs = sampled_outputs(self.functional, fit.unit, x, "`x`", scale)
        else:
            plan = self._capture_plan(x)
            point, change = linearised_outputs(self.functional, plan, fit.unit, x, "`x`")
            outputs = point + scale * change
        return make_prediction(self.likelihood, point, outputs, method)

    @undisturbed_method
    def novelty(
        self, x: Inputs, score: str = "information", exact: bool | None = None, targets: Any = None
    ) -> Tensor:
        """How much the training data leave open at ``x``: ``(B,)``, larger is less known.

        Where the model draws random numbers: the mean over the ``draws`` that were fitted.

        Args:
            score: ``"information"``: what an observation at ``x`` would tell of the weights, in nats:
                ``½ log det(I + J(x) Σ J(x)ᵀ)`` (of logits without what is common to all, which no prediction
                depends on), whatever `calibrate` made of the prior precision;
                ``"variance"``: ``tr J(x) Σ J(x)ᵀ``, the epistemic variance of the same outputs;
                ``"share"``: the variance's share of the prior's, in [0, 1]; ``"entropy"`` of the mean
                prediction; ``"mutual_information"`` between label and weights; ``"loss"``: the epistemic
                variance of each example's own loss, which costs one row however many outputs there are.
            exact: variance, information and share from the factorisation instead of the samples. None: where the
                posterior was fitted here and it costs less than 3e8 operations an example.
            targets: for ``"loss"``; may be left out with a callable loss, which then gets the inputs.
        """
        check_choice(score, SCORES, "score")
        self._fitted()
        x = self._inputs(x, None)
        frozen = self.functional.randomness
        drawn = range(1 if frozen is None else frozen.draws)
        if score in ("entropy", "mutual_information"):
            check_has_entropy(self.likelihood, score)
            parts = [self._predict(x, METHODS[0], draw) for draw in drawn]
            values = [per_example(p.total if score == "entropy" else p.epistemic) for p in parts]
            return torch.stack(values).mean(0)
        if score == "loss":
            targets = loss_targets(self.likelihood, x, targets, self.functional.device)
        values = []
        for draw in drawn:
            some = self.functional.keyed(x, [draw])
            plan, fit = self._capture_plan(some), self._fitted()
            scorer = Scorer(self.functional, plan, fit, self._settings, self.likelihood)
            if score == "loss":
                values.append(loss_variance(scorer, some, targets, exact))
            elif score == "information":
                values.append(novelty_information(scorer, some, exact))
            else:
                values.append(novelty_variance(scorer, some, score == "share", exact))
        return torch.stack(values).mean(0)
