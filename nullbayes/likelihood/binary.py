"""Independent Bernoulli outputs: one logit, or many for multi-label targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nullbayes.common.deprecation import formerly_positional
from nullbayes.errors import InputError
from nullbayes.likelihood.base import Likelihood, Moments, register_likelihood
from nullbayes.likelihood.helpers import (
    check_batch,
    check_same_shape,
    diagonal_factor,
    entropy_terms,
    epistemic_variance,
    log_mean_exp,
    require_samples,
    reshape_column,
)


@register_likelihood
class Binary(Likelihood):
    """Bernoulli likelihood of each logit; ``loss = Σ_k softplus(f_k) - y_k f_k``.

    Outputs of any shape ``(B, *out)``; targets of the same shape (or ``(B,)`` for ``(B, 1)``), bool,
    0/1 integers or probabilities.
    """

    name = "binary"
    score_name = "accuracy"

    def prepare_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets in the outputs' device, dtype and, for ``(B,)`` against ``(B, 1)``, shape."""
        return reshape_column(outputs, targets.to(outputs))

    def validate(self, outputs: Tensor, targets: Tensor, where: str) -> None:
        check_batch(outputs, targets, where)
        labels = self.prepare_targets(outputs, targets)

        def advice() -> str:
            if outputs.ndim == 2 and labels.ndim == 1:
                return f'For one of {outputs.shape[1]} classes per example use likelihood="classification".'
            return "Give each logit its own 0/1 target."

        check_same_shape(outputs, labels, where, advice)
        low, high = float(targets.min()), float(targets.max())
        if low < 0 or high > 1:
            if low == -1 and high == 1:
                mend = "For targets of -1 and 1 pass `(targets + 1) / 2`."
            else:
                mend = 'For more than two classes use likelihood="classification".'
            raise InputError(
                f"{where}: targets lie in [{low:.6g}, {high:.6g}], expected 0 or 1, or probabilities between. {mend}"
            )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        labels = self.prepare_targets(outputs, targets)
        nll = F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
        return nll.reshape(outputs.shape[0], -1).sum(1)

    def loss_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``p - y``, detached, written so that it does not cancel for confident, right predictions."""
        outputs = outputs.detach()
        labels = self.prepare_targets(outputs, targets)
        return (1 - labels) * outputs.sigmoid() - labels * (-outputs).sigmoid()

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One column ``sqrt(p (1 - p))`` per logit, detached; ``1 - p`` is taken as sigmoid(-f)."""
        outputs = outputs.detach()
        # The root of each factor first: their product underflows float32 from |f| = 88 on.
        return diagonal_factor(outputs.sigmoid().sqrt() * (-outputs).sigmoid().sqrt())

    def sampled_gradient(self, outputs: Tensor, targets: Tensor, uniform: Tensor) -> Tensor:
        """``p - y`` at labels drawn with probability ``p``, detached."""
        outputs = outputs.detach()
        label = (uniform < outputs.double().sigmoid()).to(outputs)
        return (1 - label) * outputs.sigmoid() - label * (-outputs).sigmoid()

    def inverse_link(self, outputs: Tensor) -> Tensor:
        """Probabilities, one per logit."""
        return outputs.sigmoid()

    @formerly_positional("linearised")
    def moments(self, samples: Tensor, point: Tensor, *, linearised: bool) -> Moments:
        """Mean probabilities, and entropies in nats of each logit's label: all ``(B, *out)``."""
        variance = epistemic_variance(samples, point, linearised=linearised)
        log_yes, log_no = F.logsigmoid(samples), F.logsigmoid(-samples)
        mean_yes, mean_no = log_mean_exp(log_yes), log_mean_exp(log_no)
        total = entropy_terms(mean_yes) + entropy_terms(mean_no)
        aleatoric = (entropy_terms(log_yes) + entropy_terms(log_no)).mean(0)
        epistemic = (total - aleatoric).clamp_min(0)
        return Moments(mean_yes.exp(), variance, total, aleatoric, epistemic)

    def log_predictive(self, samples: Tensor, targets: Tensor) -> Tensor:
        """``log mean_s p_s(y_k)``, summed over logits (probabilities as targets: averaged): ``(B,)``."""
        require_samples(samples, 1)
        labels = self.prepare_targets(samples[0], targets)
        yes, no = log_mean_exp(F.logsigmoid(samples)), log_mean_exp(F.logsigmoid(-samples))
        return (labels * yes + (1 - labels) * no).reshape(labels.shape[0], -1).sum(1)

    def divergence(self, point: Tensor, samples: Tensor, targets: Tensor) -> Tensor:
        """Exact, averaged over the logits: ``(S, B)``."""
        yes = point.sigmoid() * (F.logsigmoid(point) - F.logsigmoid(samples))
        no = (-point).sigmoid() * (F.logsigmoid(-point) - F.logsigmoid(-samples))
        return (yes + no).reshape(*samples.shape[:2], -1).mean(2).clamp_min(0)

    def correct(self, mean: Tensor, targets: Tensor) -> Tensor:
        """1 where probability and target lie on the same side of one half, else 0: ``(B, *out)``."""
        labels = self.prepare_targets(mean, targets)
        return torch.eq(mean >= 0.5, labels >= 0.5).to(mean.dtype)

    def confidence(self, mean: Tensor, targets: Tensor) -> Tensor:
        """Probability of the more probable side, per logit: ``(B, *out)``."""
        return torch.maximum(mean, 1 - mean)
