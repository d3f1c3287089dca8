"""What samples do to the training data and to examples that are left out: what a certificate is written from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nullbayes.certificate.certificate import ALLOWED_DIVERGENCE, ALLOWED_GROWTH, ALLOWED_UNSEEN
from nullbayes.constraints.preserve import Preserve
from nullbayes.errors import NonFiniteError
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.linearise import linearised_outputs, sampled_outputs
from nullbayes.likelihood import Likelihood
from nullbayes.likelihood.helpers import mirrored
from nullbayes.model.batch import Inputs, batch_size, take
from nullbayes.model.functional import FunctionalModel

SAMPLED_EXAMPLES = 128
SAMPLED_DRAWS = 10

# Outputs ``(B, *out)``, what samples at prior precision one do to them ``(S, B, *out)``, and targets.
Batch = tuple[Tensor, Tensor, Any]


class GuaranteeCheck:
    """Training examples with their function draws at unit prior precision.

    Held so that drift and accuracy can be given at any prior precision without another pass.
    """

    def __init__(
        self,
        functional: FunctionalModel,
        plan: CapturePlan,
        likelihood: Likelihood,
        preserve: Preserve,
        kept: Sequence[tuple[Inputs, Any]],
        samples: Tensor,
    ) -> None:
        self.functional, self.likelihood, self.preserve = functional, likelihood, preserve
        self.samples = samples
        self.batches: list[Batch] = [
            (*linearised_outputs(functional, plan, samples, inputs), targets)
            for inputs, targets in kept
        ]
        #: some of them, each as under a posterior that has not seen it (``leave_one_out.py``)
        self.left_out: list[Batch] = []
        self.few: list[tuple[Inputs, Any]] = []
        room = SAMPLED_EXAMPLES
        for inputs, targets in kept:
            whole = batch_size(inputs)
            size = min(room, whole)
            if size:
                self.few.append((take(inputs, 0, size), take(targets, 0, size, whole)))
            room -= size

    @property
    def examples(self) -> int:
        return sum(len(point) for point, _, _ in self.batches)

    def divergence(self, scale: float, unseen: bool = False) -> float:
        """Mean divergence of a sample's training predictions, linearised, in nats per observation.

        Args:
            unseen: of the examples in ``left_out`` instead.
        """
        total, count = 0.0, 0
        with torch.no_grad():
            for point, unit, targets in self.left_out if unseen else self.batches:
                values = self.likelihood.divergence(point, point + scale * unit, targets)
                total += float(values.double().sum())
                count += values.numel()
        return total / max(count, 1)

    def keeping(self, alpha: float, allowed: float = ALLOWED_DIVERGENCE) -> float:
        """``alpha``, or the least larger prior precision (to a few per cent) at which predictions stand.

        Those of examples that are left out may move four times as far. A callable loss may also not grow by more than
        half of what a held guarantee may show.
        """
        low = high = alpha
        value = self._excess(high**-0.5, allowed)
        while not value <= 1:  # not a number: out of range so far
            if high > 1e30:
                raise NonFiniteError(
                    "the linearised training outputs of the samples are NaN or infinite at any prior precision."
                )
            # Where the divergence is of second order, this is where it reaches what is allowed.
            low, high = high, high * max(1.1, 1.01 * value if value < 1e4 else 1e4)
            value = self._excess(high**-0.5, allowed)
        while high / low > 1.05 and value < 0.95:
            middle = math.sqrt(low * high)
            found = self._excess(middle**-0.5, allowed)
            if found <= 1:
                high, value = middle, found
            else:
                low = middle
        return high

    def _excess(self, scale: float, allowed: float) -> float:
        excess = self.divergence(scale) / allowed
        if self.left_out and excess <= 1:  # no need to look further where it is above already
            excess = max(excess, self.divergence(scale, unseen=True) / ALLOWED_UNSEEN)
        if self.likelihood.score_name != "loss":
            return excess
        before, after = self._scores(scale)
        return max(excess, (after - before) / (0.5 * ALLOWED_GROWTH["loss"] * abs(before) + 1e-300))

    def _scores(self, scale: float) -> tuple[float, float]:
        """Training score of the trained network, and of the samples times ``scale``."""
        likelihood = self.likelihood
        before, after = [0.0, 0], [0.0, 0]
        with torch.no_grad():
            for point, unit, targets in self.batches:
                for sums, values in ((before, point[None]), (after, point + scale * unit)):
                    both = mirrored(values, point)
                    total, count = likelihood.score_draws(both, point, True, targets)
                    sums[0] += total
                    sums[1] += count
        return (
            likelihood.final_score(before[0], int(before[1])),
            likelihood.final_score(after[0], int(after[1])),
        )

    def measure(self, scale: float) -> dict[str, Any]:
        """Drifts and training scores when the unit samples are multiplied by ``scale``."""
        change, outputs, likelihood = _Rms(), _Rms(), self.likelihood
        with torch.no_grad():
            for point, unit, targets in self.batches:
                moved = point + scale * unit
                change.add(self.preserve.change(likelihood, point, moved, targets, True))
                outputs.add(likelihood.centre(scale * unit))
            sampled = _Rms()
            for inputs, targets in self.few:
                some = self.samples[:SAMPLED_DRAWS]
                point, moved = sampled_outputs(self.functional, some, inputs, scale=scale)
                sampled.add(self.preserve.change(likelihood, point, moved, targets, False))
        before, after = self._scores(scale)
        return {
            "drift": change.value,
            "output_drift": outputs.value,
            "sampled_drift": sampled.value,
            "unseen_divergence": self.divergence(scale, True) if self.left_out else None,
            "map_accuracy": before,
            "posterior_accuracy": after,
        }


class _Rms:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.total += float(values.double().square().sum())
        self.count += values.numel()

    @property
    def value(self) -> float:
        return math.sqrt(self.total / self.count) if self.count else 0.0
