"""Gaussian regression with observation noise that is given or estimated from the residuals."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nullbayes.common.arguments import check_choice
from nullbayes.common.deprecation import formerly_positional
from nullbayes.errors import InputError, NotFittedError
from nullbayes.likelihood.base import Likelihood, Moments, register_likelihood
from nullbayes.likelihood.helpers import (
    check_batch,
    check_same_shape,
    diagonal_factor,
    epistemic_variance,
    float64_setting,
    log_mean_exp,
    require_samples,
    reshape_column,
    to_float64,
)

ESTIMATES = ("left-out", "training")


@register_likelihood
class Regression(Likelihood):
    """Gaussian likelihood, ``loss = Σ_o ½ (y_o - f_o)² / σ_o² + ½ log(2π σ_o²)``.

    Outputs of any shape ``(B, *out)``; targets of the same shape (or ``(B,)`` for ``(B, 1)``).

    Args:
        noise_variance: the variance σ² (not the standard deviation) of the targets around the outputs:
            a number, one per channel (last axis; axis 1 where the outputs have four axes or more), or
            one per output element. None: one per channel, estimated by `fit_noise`.
        estimate: how the fit of a `NullSpacePosterior` estimates it where it is not given: ``"left-out"``, by
            leave-one-out residuals from the factorisation of the training rows where there is one; ``"training"``,
            by training residuals, which understate it where the network fits training data better than new data.
    """

    name = "regression"
    score_name = "rmse"

    def __init__(
        self,
        noise_variance: float | Sequence[float] | Tensor | None = None,
        *,
        estimate: str = "left-out",
    ) -> None:
        self.estimate = check_choice(estimate, ESTIMATES, "estimate")
        self._given = noise_variance is not None
        self._noise: Tensor | None = None  # float64 on the CPU
        if noise_variance is not None:
            self._noise = _checked(
                float64_setting(noise_variance, "noise_variance"), "noise_variance is"
            )

    # -- observation noise -----------------------------------------------------------------------

    @property
    def noise_variance(self) -> Tensor | None:
        """The variance given or fitted (float64, CPU), or None before `fit_noise`."""
        return None if self._noise is None else self._noise.clone()

    @property
    def needs_noise_fit(self) -> bool:
        """True unless the noise was given; stays True after a fit, so that new data fits it anew."""
        return not self._given

    def fit_noise(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Set the noise of each channel to its mean squared residual over ``batches``.

        The maximum-likelihood estimate at fixed outputs; one pass, sums in float64. Leaves the
        iterable unread where the noise was given. Raises `InputError` if there is no batch, if shapes
        do not fit, or if a channel has no residual at all.
        """
        if self._given:
            return
        total: Tensor | None = None  # (K,)
        count = 0
        for number, (outputs, targets) in enumerate(batches):
            residual = outputs.detach()
            wanted = self.prepare_targets(residual, targets)
            check_same_shape(residual, wanted, f"fit_noise, batch {number}", _same_shape)
            residual = to_float64(wanted) - to_float64(residual)
            squares = channels_last(residual).square().sum(0).cpu()
            if total is not None and total.shape != squares.shape:
                raise InputError(
                    f"fit_noise, batch {number}: {squares.numel()} output channels, earlier batches "
                    f"had {total.numel()}; expected the same in each. Pass `noise_variance=`."
                )
            total = squares if total is None else total + squares
            count += residual.numel() // squares.numel()
        if total is None or count == 0:
            raise InputError(
                "fit_noise got no examples, expected at least one. Pass a filled loader."
            )
        self._noise = _checked(
            total / count,
            "the mean squared residual of each output is",
            "The model fits an output exactly, or its residuals are not finite: pass the noise, "
            "`Regression(noise_variance=...)`.",
        )

    def with_noise(self, factor: float | Tensor) -> Regression | None:
        """The same with its estimated noise times ``factor`` (a number, or one a channel); None where it was given."""
        if self._given or self._noise is None:
            return None
        other = copy.copy(self)
        other._noise = _checked(self._noise * factor, "the noise variance times `factor` is")
        return other

    def _variance(self, outputs: Tensor) -> Tensor:
        """The noise variance in the outputs' dtype and device, broadcastable to ``(B, *out)``."""
        if self._noise is None:
            raise NotFittedError(
                "the observation noise is not known yet. Call `fit_noise` (`fit` of a posterior does), "
                "or pass `Regression(noise_variance=...)`."
            )
        shape = tuple(outputs.shape[1:])
        if self._noise.numel() == 1:
            spread = self._noise.reshape(())
        elif tuple(self._noise.shape) == shape:
            spread = self._noise
        elif self._noise.ndim == 1 and self._noise.numel() == _channels(shape):
            spread = (
                self._noise if len(shape) <= 2 else self._noise.view(-1, *[1] * (len(shape) - 1))
            )
        elif self._noise.numel() == math.prod(shape):
            spread = self._noise.reshape(shape)
        else:
            raise InputError(
                f"noise_variance has shape {tuple(self._noise.shape)}, outputs have shape "
                f"{tuple(outputs.shape)}; expected one number, {_channels(shape)} (one per channel) or "
                f"shape {shape} (one per output)."
            )
        return spread.to(outputs)

    # -- targets, loss and derivatives -----------------------------------------------------------

    def prepare_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets in the outputs' device, dtype and, for ``(B,)`` against ``(B, 1)``, shape."""
        return reshape_column(outputs, targets.to(outputs))

    def validate(self, outputs: Tensor, targets: Tensor, where: str) -> None:
        check_batch(outputs, targets, where)
        check_same_shape(outputs, self.prepare_targets(outputs, targets), where, _same_shape)
        if self._noise is not None and self._given:
            try:
                self._variance(outputs)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        nll = -self._log_density(outputs, self.prepare_targets(outputs, targets))
        return nll.reshape(outputs.shape[0], -1).sum(1)

    def _log_density(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log density of each target element, same shape as ``outputs`` ``(B, *out)``."""
        variance = self._variance(outputs)
        squares = (targets - outputs).square() / variance
        return -0.5 * (squares + variance.log() + math.log(2 * math.pi))

    def loss_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``(f - y) / σ²``, detached."""
        outputs = outputs.detach()
        return (outputs - self.prepare_targets(outputs, targets)) / self._variance(outputs)

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One column ``1 / σ_o`` per output, detached."""
        return diagonal_factor(self._variance(outputs).rsqrt().expand_as(outputs))

    # -- predictions -----------------------------------------------------------------------------

    @formerly_positional("linearised")
    def moments(self, samples: Tensor, point: Tensor, *, linearised: bool) -> Moments:
        """Mean and variances of the prediction, all ``(B, *out)``; ``total = aleatoric + epistemic``."""
        epistemic = epistemic_variance(samples, point, linearised=linearised)
        aleatoric = self._variance(point).expand_as(point).clone()
        mean = point if linearised else samples.mean(0)
        return Moments(mean, epistemic, aleatoric + epistemic, aleatoric, epistemic)

    def log_predictive(self, samples: Tensor, targets: Tensor) -> Tensor:
        """``log mean_s N(y_o; f_so, σ_o²)``, summed over outputs (marginals, not joint): ``(B,)``.

        Taken per output because the joint density of many outputs, averaged over a few samples, is
        ruled by the one sample that happens to fit best.
        """
        require_samples(samples, 1)
        wanted = self.prepare_targets(samples[0], targets)
        log_density = torch.stack([self._log_density(sample, wanted) for sample in samples])
        return log_mean_exp(log_density).reshape(wanted.shape[0], -1).sum(1)

    def observed(self, change: Tensor) -> Tensor:
        return change / self._variance(change[0]).sqrt()

    def divergence(self, point: Tensor, samples: Tensor, targets: Tensor) -> Tensor:
        """``(f_s - f)² / 2σ²``, averaged over the outputs: ``(S, B)``."""
        squares = (samples - point).square() / (2 * self._variance(point))
        return squares.reshape(*samples.shape[:2], -1).mean(2)

    # -- storage ---------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        noise = None if self._noise is None else self._noise.tolist()
        return {
            "name": self.name,
            "noise_variance": noise if self._given else None,
            "fitted_noise_variance": None if self._given else noise,
            "estimate": self.estimate,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Regression:
        likelihood = cls(config["noise_variance"], estimate=config.get("estimate", "training"))
        fitted = config.get("fitted_noise_variance")
        if fitted is not None:
            likelihood._noise = _checked(
                float64_setting(fitted, "noise"), "fitted_noise_variance is"
            )
        return likelihood


def _channels(shape: Sequence[int]) -> int:
    """Number of channels of an output shape (batch axis left out)."""
    if not shape:
        return 1
    return shape[-1] if len(shape) <= 2 else shape[0]


def channels_last(tensor: Tensor) -> Tensor:
    """``(B, *out)`` as ``(rows, K)``, one column per channel."""
    if tensor.ndim >= 4:
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else 1)


def _checked(
    variance: Tensor, what: str, mend: str = "Pass variances, not a flag or a log."
) -> Tensor:
    if variance.numel() == 0 or not bool((torch.isfinite(variance) & (variance > 0)).all()):
        raise InputError(f"{what} {variance.tolist()}, expected finite numbers > 0. {mend}")
    return variance


def _same_shape() -> str:
    return "Reshape the targets; broadcasting them would silently train on the wrong pairs."
