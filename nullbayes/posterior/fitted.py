"""What a posterior holds once it is fitted: samples, certificate and model; more samples, and files of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from nullbayes.certificate.certificate import Certificate
from nullbayes.common.arguments import check_count, check_positive
from nullbayes.constraints.directions import Directions
from nullbayes.constraints.preserve import Preserve
from nullbayes.errors import InputError, NotFittedError
from nullbayes.fit.pipeline import extended, rescaled
from nullbayes.fit.result import NULL_SPACE, Fit, Settings
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.capture.verify import prove
from nullbayes.jacobian.linearise import state_dicts
from nullbayes.likelihood import Likelihood
from nullbayes.model.batch import Inputs, batch_size, check_inputs, to_device
from nullbayes.model.checks import check_mode
from nullbayes.model.fingerprint import check_unchanged, fingerprint
from nullbayes.model.functional import FunctionalModel, undisturbed_method
from nullbayes.model.parameters import ParameterSpace
from nullbayes.posterior.calibration import CalibrationPath
from nullbayes.posterior.storage import write_posterior


class FittedPosterior:
    """The part of :class:`nullbayes.posterior_base.Posterior` that is about what was fitted."""

    kind: ClassVar[str]
    model: nn.Module
    likelihood: Likelihood
    preserve: Preserve
    directions: Directions
    space: ParameterSpace
    functional: FunctionalModel
    calibration: CalibrationPath | None
    _settings: Settings

    def __init__(self) -> None:
        self.calibration = None
        self._fit: Fit | None = None
        # Identity and version of the model's tensors when they were last found unchanged.
        self._seen: list[tuple[int, int]] = []
        # A loaded posterior proves its rows on the first inputs that it sees.
        self._proven: CapturePlan | None = None

    def _fitted(self) -> Fit:
        if self._fit is None:
            raise NotFittedError(
                f"this {type(self).__name__} has not been fitted; call `fit(train_loader)` first, or "
                "`nb.load(path, model)`."
            )
        return self._fit

    @property
    def certificate(self) -> Certificate:
        """The measured guarantee at the current prior precision."""
        return self._fitted().certificate

    @property
    def num_samples(self) -> int:
        """Weight samples held."""
        return len(self._fitted().unit)

    @property
    def prior_precision(self) -> float:
        """``α``. Setting it rescales samples and certificate; the projection does not depend on it."""
        return self._fitted().alpha

    @prior_precision.setter
    def prior_precision(self, value: float) -> None:
        self._set_prior_precision(value)

    @undisturbed_method
    def _set_prior_precision(self, value: float) -> None:
        fit = self._fitted()
        self._fit = rescaled(fit, check_positive(value, "prior_precision"))

    def _samples(self) -> Tensor:
        """Weight changes ``Δ (S, P)`` at the current prior precision."""
        return self._fitted().samples

    @property
    def delta(self) -> float:
        """Where the null space ends, relative to the prior precision; 1 for Laplace."""
        return self._settings.delta

    # -- the model ---------------------------------------------------------------------------------

    def _capture_plan(self, inputs: Inputs) -> CapturePlan:
        plan = self._fitted().plan or self._proven
        if plan is None:  # a loaded posterior proves its rows on the first batch it sees
            self.functional.outputs(inputs, "`x`")  # wrong inputs are said to be that
            plan = self._proven = prove(self.functional, inputs)
        return plan

    def _check_model(self) -> None:
        """Refuse a model that is in training mode, or no longer the one that was fitted."""
        check_mode(self.model, self.functional.randomness is not None)
        fit = self._fitted()
        tensors = (*self.model.parameters(), *self.model.buffers())
        versions = [(id(t), t._version) for t in tensors]
        if versions == self._seen:
            return
        check_unchanged(self.model, fit.fingerprint)
        self._seen = versions

    def _inputs(self, x: Inputs, draws: list[int] | None) -> Inputs:
        """Checked, on the device, and keyed for ``draws`` of the frozen noise unless that is None."""
        x = to_device(x, self.functional.device)
        self._check_model()
        if not batch_size(x, "`x`"):
            raise InputError(
                "`x` holds no examples: its first axis has length 0. Pass at least one."
            )
        check_inputs(x, "`x`")
        return x if draws is None else self.functional.keyed(x, draws)

    # -- samples and files -------------------------------------------------------------------------

    def sample(self, count: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Yield ``count`` samples (default: all held) as plain state dicts for ``load_state_dict``.

        More than were fitted are drawn first, see :meth:`draw`.
        """
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
                f"this posterior was loaded from a file with {len(fit.unit)} samples; more need the "
                "factorisation, so call `fit` again with a larger `num_samples`."
            )
        count = check_count(count, "count")
        self._fit = extended(fit, self.functional, self._settings, count)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write samples, settings, certificate and a fingerprint of the model to one safetensors file."""
        fit, frozen = self._fitted(), self.functional.randomness
        write_posterior(
            path,
            model=self.model,
            space=self.space,
            samples=fit.unit,
            settings={
                "class": type(self).__name__,
                "likelihood": self.likelihood.config(),
                "preserve": self.preserve.name,
                "directions": self.directions,
                "options": {"delta": self.delta} if self.kind == NULL_SPACE else {},
                "prior": self._settings.prior,
                "randomness": None if frozen is None else frozen.config(),
                "prior_precision": fit.alpha,
                "seed": fit.seed,
                "certificate": fit.certificate.as_dict(),
                "calibration": None if self.calibration is None else self.calibration.as_dict(),
            },
        )

    def _restore(self, samples: Tensor, settings: dict[str, Any]) -> None:
        self._fit = Fit(
            self.likelihood,
            samples,
            float(settings["prior_precision"]),
            int(settings["seed"]),
            Certificate.from_dict(settings["certificate"]),
            fingerprint(self.model),
        )
        path = settings["calibration"]
        self.calibration = None if path is None else CalibrationPath(**path)
