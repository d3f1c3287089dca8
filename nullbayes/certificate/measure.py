"""What samples do to the training data and to examples that are left out: what a certificate is written from."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nullbayes.certificate.verdict import ALLOWED_DIVERGENCE, ALLOWED_LEFT_OUT
from nullbayes.common.crowd import ALONE, Crowd
from nullbayes.common.memory import working_bytes
from nullbayes.common.processes import Processes
from nullbayes.constraints.preserve import Predictions
from nullbayes.constraints.problem import Problem
from nullbayes.errors import NonFiniteError
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.linearise import linearised_outputs, sampled_outputs
from nullbayes.likelihood.helpers import mirrored
from nullbayes.model.batch import Inputs, batch_size, take
from nullbayes.model.size import is_large

# Re-weighted networks that are run themselves, and on how many training examples.
SAMPLED_NETWORKS, SAMPLED_EXAMPLES = 10, 128
# Temporaries of the size of the sampled outputs that a look at them takes, in float64.
LOOKED_AT = 8

# Of large networks, each pass of which is dear, fewer.
SAMPLED_OF_LARGE, NETWORKS_OF_LARGE = 8, 5

# Outputs ``(B, *out)``, what samples at prior precision one do to them ``(S, B, *out)``, and targets.
Batch = tuple[Tensor, Tensor, Any]


class GuaranteeCheck:
    """Training examples with their changed outputs at unit prior precision.

    Stored so that drift and accuracy can be given at any prior precision without another pass.
    """

    def __init__(
        self,
        problem: Problem,
        plan: CapturePlan,
        examples: Sequence[tuple[Inputs, Any]],
        samples: Tensor,
        processes: Processes | None = None,
        crowd: Crowd | None = None,
        known: Sequence[tuple[Tensor | None, Tensor | None]] = (),
        places: Sequence[int] | None = None,
    ) -> None:
        """``known``: outputs and their changes of ``examples``, training data, where rows say that (`row_changes`).

        ``places``: for each of ``examples``, how many of all processes' come before it; None: these are all.
        """
        #: those that hold the other samples
        self.crowd = crowd = crowd or ALONE
        #: those that hold the other examples; what is said is of all of them
        self.processes = processes
        self.problem, self.likelihood, self.samples = problem, problem.likelihood, samples
        functional, self.plan = problem.functional, plan
        self.inputs = [inputs for inputs, _ in examples]
        self.batches: list[Batch] = []
        for n, (inputs, targets) in enumerate(examples):
            point, change = known[n] if n < len(known) else (None, None)
            if point is None or change is None:
                point, change = linearised_outputs(functional, plan, samples, inputs, point=point)
            self.batches.append((point, crowd.joined(change), targets))
        #: the number of the first sample here, among all
        self.first = 0
        if crowd.processes is not None:
            crowd.agree("examples", [float(point.double().sum()) for point, _, _ in self.batches])
            self.first = crowd.processes.place(len(samples))[0]
        #: some of them, each as under a posterior that has not seen it (``leave_one_out.py``)
        self.left_out: list[Batch] = []
        self.has_left_out = False
        self.few: list[tuple[Inputs, Any]] = []
        own = sum(len(point) for point, _, _ in self.batches)
        before, self.examples = (0, own) if processes is None else processes.place(own)
        if places is None:
            sizes = (len(point) for point, _, _ in self.batches)
            places = list(itertools.accumulate(sizes, initial=before))[:-1]
        for (inputs, targets), place in zip(examples, places, strict=True):
            whole = batch_size(inputs)
            size = min(max(0, sampled_examples(problem) - place), whole)
            if size:
                self.few.append((take(inputs, 0, size), take(targets, 0, size, whole)))

    def with_more(self, samples: Tensor) -> GuaranteeCheck:
        """The same examples under more samples ``(S', P)``; those left out stay with the samples that they had."""
        more = copy.copy(self)
        more.samples = torch.cat([self.samples, samples])
        more.batches = [
            (point, torch.cat([unit, self._changes(inputs, samples)]), targets)
            for (point, unit, targets), inputs in zip(self.batches, self.inputs, strict=True)
        ]
        return more

    def of(self, samples: Tensor) -> GuaranteeCheck:
        """The same examples under other samples ``(S', P)`` alone: the first of these, or the same rounded."""
        other = copy.copy(self)
        other.samples = samples
        other.batches = [
            (point, self._changes(inputs, samples), targets)
            for (point, unit, targets), inputs in zip(self.batches, self.inputs, strict=True)
        ]
        return other

    @property
    def sampled(self) -> Tensor:
        """Those of the samples with which the re-weighted network itself is run."""
        return self.samples[: max(0, sampled_networks(self.problem) - self.first)]

    def _changes(self, inputs: Inputs, samples: Tensor) -> Tensor:
        return linearised_outputs(self.problem.functional, self.plan, samples, inputs)[1]

    def leave_out(self, batches: list[Batch]) -> None:
        """Take over examples, each as under a posterior that has not seen it."""
        self.left_out = batches
        self.has_left_out = self._sum(len(batches))[0] > 0

    def _sum(self, *values: float) -> list[float]:
        """Each over all processes."""
        return list(values) if self.processes is None else self.processes.total(*values)

    def divergence(self, scale: float, *, left_out: bool = False) -> float:
        """Mean divergence of a sample's training predictions, linearised, in nats per observation.

        Args:
            left_out: of the examples in ``left_out`` instead.
        """
        total, count = 0.0, 0.0
        with torch.no_grad():
            for point, unit, targets in _pieces(self.left_out if left_out else self.batches):
                values = self.likelihood.divergence(point, point + scale * unit, targets)
                total += float(values.double().sum())
                count += values.numel()
        total, count = self._sum(total, count)
        return total / max(count, 1)

    def bounded_precision(self, alpha: float, allowed: float = ALLOWED_DIVERGENCE) -> float:
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
        if self.has_left_out and excess <= 1:  # no need to look further where it is above already
            excess = max(excess, self.divergence(scale, left_out=True) / ALLOWED_LEFT_OUT)
        score = self.likelihood.score_kind
        if not score.bounds_prior:
            return excess
        before, after = self._scores(scale)
        allowed = 0.5 * score.allowed_growth * abs(before) + 1e-300
        return max(excess, score.worsened(before, after) / allowed)

    def _scores(self, scale: float) -> tuple[float, float]:
        """Training score of the trained network, and of the samples times ``scale``."""
        likelihood = self.likelihood
        before, after = [0.0, 0.0], [0.0, 0.0]
        with torch.no_grad():
            for point, unit, targets in _pieces(self.batches):
                for sums, values in ((before, point[None]), (after, point + scale * unit)):
                    both = mirrored(values, point)
                    total, count = likelihood.score_draws(
                        both, point, linearised=True, targets=targets
                    )
                    sums[0] += total
                    sums[1] += count
        before, after = self._sum(*before), self._sum(*after)
        return (
            likelihood.final_score(before[0], int(before[1])),
            likelihood.final_score(after[0], int(after[1])),
        )

    def measure(self, scale: float) -> dict[str, Any]:
        """Drifts and training scores when the unit samples are multiplied by ``scale``."""
        change, outputs, likelihood = _Rms(), _Rms(), self.likelihood
        with torch.no_grad():
            for point, unit, targets in _pieces(self.batches):
                moved = point + scale * unit
                change.add(self.problem.change(point, moved, targets, linear=True))
                outputs.add(likelihood.centre(scale * unit))
            sampled = _Rms()
            for inputs, targets in self.few:
                functional = self.problem.functional
                # Training examples: each was shown to be a function of itself when its rows were captured.
                point, moved = sampled_outputs(
                    functional, self.sampled, inputs, scale=scale, proved=True
                )
                moved = self.crowd.joined(moved)
                sampled.add(self.problem.change(point, moved, targets, linear=False))
        for rms in (change, outputs, sampled):
            rms.total, rms.count = self._sum(rms.total, rms.count)
        before, after = self._scores(scale)
        out = self.divergence(scale, left_out=True) if self.has_left_out else None
        preserve = self.problem.preserve
        # A user's own loss may have no second derivative, which only rows of predictions need.
        known = preserve.natural_units and not self.likelihood.score_kind.bounds_prior
        return {
            "divergence": self.divergence(scale)
            if known or preserve.name == Predictions.name
            else None,
            "drift": change.value,
            "output_drift": outputs.value,
            "sampled_drift": sampled.value,
            "left_out_divergence": out,
            "network_score": before,
            "posterior_score": after,
        }


def sampled_examples(problem: Problem) -> int:
    """On how many the re-weighted network itself is looked at."""
    return SAMPLED_OF_LARGE if is_large(problem.functional.model) else SAMPLED_EXAMPLES


def sampled_networks(problem: Problem) -> int:
    """With how many samples it is."""
    return NETWORKS_OF_LARGE if is_large(problem.functional.model) else SAMPLED_NETWORKS


def _pieces(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The same examples, as many at a time as can be looked at in float64, and by way of a few temporaries."""
    for point, unit, targets in batches:
        size = len(point)
        each = 8 * unit[:, :1].numel() * LOOKED_AT
        step = max(1, working_bytes(point.device) // max(1, each))
        if step >= size:
            yield point, unit, targets
            continue
        for i in range(0, size, step):
            stop = min(i + step, size)
            yield point[i:stop], unit[:, i:stop], take(targets, i, stop, size)


class _Rms:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0.0

    def add(self, values: Tensor) -> None:
        self.total += float(values.double().square().sum())
        self.count += values.numel()

    @property
    def value(self) -> float:
        return math.sqrt(self.total / self.count) if self.count else 0.0
