"""The whole prior-scale path from one pass over validation data; or that of a temperature, or of a regression's noise.

Linearised samples scale with ``α^{-1/2}``: the Jacobian products are computed once, and every
prior precision is a multiplication away. The far end of the path is the trained network itself.

Observation noise that was estimated from training residuals is too small wherever the network fits its training data
better than new data, and no prior precision mends that: the null space is where training data say nothing. So there
the noise is what validation data are asked for (measured in docs/evaluation/regression.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nullbayes.common.arguments import check_choice
from nullbayes.common.processes import Processes
from nullbayes.common.progress import stages
from nullbayes.errors import InputError
from nullbayes.fit.result import Fit
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.linearise import linearised_outputs
from nullbayes.likelihood import Likelihood
from nullbayes.likelihood.helpers import mirrored
from nullbayes.metrics import calibration_error, ood_metrics
from nullbayes.model.batch import Inputs
from nullbayes.model.shares import share_of
from nullbayes.posterior.calibration_path import CalibrationPath, allowed_loss, warn
from nullbayes.posterior.prediction import per_example

METRICS = ("nll", "ece")
TUNED = ("prior", "temperature", "noise")
POINTS = 49
DECADES = (-4.0, 8.0)
NOISE_DECADES = (-1.0, 3.0)
TEMPERATURE_DECADES = (-0.5, 1.0)
BINS = 15


@dataclass(frozen=True)
class Search:
    """What `calibrate` was asked for.

    Attributes:
        loader, ood_loader, metric: see `nullbayes.Posterior.calibrate`.
        tune: one of `TUNED`; None: the noise where it was estimated from training data, else the prior.
        progress: whether to show it.
        processes: those that read the other shares of the data.
    """

    loader: Iterable[Any]
    ood_loader: Iterable[Any] | None = None
    metric: str = "nll"
    tune: str | None = None
    progress: bool = True
    processes: Processes | None = None


def calibration_path(fit: Fit, plan: CapturePlan, search: Search) -> CalibrationPath:
    """Evaluate the path around the prior precision of ``fit`` and choose the best point.

    Raises:
        InputError: an unknown metric, or one that this likelihood does not have; noise that is not to be tuned.
    """
    walk = _Walk(fit, plan, search)
    with stages(show=search.progress) as stage:
        for index, inputs, targets in stage.track(
            share_of(fit.problem.functional, search.loader, "val_loader"), "calibration"
        ):
            walk.add(inputs, targets, f"val_loader, batch {index}")
        if search.ood_loader is not None:
            loader = share_of(fit.problem.functional, search.ood_loader, "ood_loader")
            for index, inputs, _ in stage.track(loader, "out of distribution"):
                walk.add_out(inputs, f"ood_loader, batch {index}")
    path, values = walk.result()
    warn(path, values)
    return path


class _Walk:
    """Sums over validation data for every point of the path at once."""

    def __init__(self, fit: Fit, plan: CapturePlan, search: Search) -> None:
        self.fit, self.plan, self.search = fit, plan, search
        likelihood, start = fit.problem.likelihood, fit.alpha
        self.tune = _what(search.tune, likelihood)
        self.scales: list[float] | None = None
        self.temperatures: list[float] | None = None
        if self.tune == "temperature":
            self.temperatures = _decades(1.0, TEMPERATURE_DECADES)
            self.path = [start] * POINTS
            self.figures = [_Figures(likelihood, 1 / t) for t in self.temperatures]
            self.points = [_Figures(likelihood, 1 / t) for t in self.temperatures]
        elif self.tune == "prior":
            self.path = _decades(start, DECADES)
            self.figures = [_Figures(likelihood) for _ in self.path]
            self.points = [_Figures(likelihood)]
        else:
            self.scales, self.path = _decades(1.0, NOISE_DECADES), [start] * POINTS
            self.figures = [_Figures(_noised(likelihood, c)) for c in self.scales]
            self.points = [_Figures(_noised(likelihood, c)) for c in self.scales]
        self.scores_in: list[list[Tensor]] = [[] for _ in self.path]
        self.scores_out: list[list[Tensor]] = [[] for _ in self.path]
        self.examples = 0

    def _outputs(self, inputs: Inputs, where: str) -> tuple[Tensor, Tensor]:
        functional = self.fit.problem.functional
        point, change = linearised_outputs(functional, self.plan, self.fit.stored, inputs, where)
        return point, self.fit.crowd.joined(change)

    def add(self, inputs: Inputs, targets: Any, where: str) -> None:
        """One batch of validation data."""
        point, unit = self._outputs(inputs, where)
        targets = self.fit.problem.checked_targets(point, targets, where)
        self.examples += len(point)
        for precision, figure, scores in zip(self.path, self.figures, self.scores_in, strict=True):
            scores.append(figure.add(point, point + unit / math.sqrt(precision), targets))
        for alone in self.points:
            alone.add(point, point[None], targets)

    def add_out(self, inputs: Inputs, where: str) -> None:
        """One batch of out-of-distribution inputs."""
        point, unit = self._outputs(inputs, where)
        for precision, figure, out in zip(self.path, self.figures, self.scores_out, strict=True):
            centre = figure.beta * point
            moved = mirrored(figure.beta * (point + unit / math.sqrt(precision)), centre)
            moments = figure.likelihood.moments(moved, centre, linearised=True)
            out.append(per_example(moments.total))

    def _join(self, processes: Processes) -> None:
        """What all processes have seen, in the order of the data."""
        self.examples = round(processes.total(self.examples)[0])
        every = [*self.figures, *self.points]
        found = processes.gather([figure.seen() for figure in every])
        for figure, *parts in zip(every, *found, strict=True):
            figure.take(parts)
        for scores in (self.scores_in, self.scores_out):
            for own, *lists in zip(scores, *processes.gather(scores), strict=True):
                own[:] = [values for part in lists for values in part]

    def result(self) -> tuple[CalibrationPath, list[float]]:
        """The path with its best point chosen, and the values of the metric along it."""
        if self.search.processes is not None:
            self._join(self.search.processes)
        metric, likelihood = self.search.metric, self.fit.problem.likelihood
        if self.examples and likelihood.score_name == "accuracy" and not self.points[0].count:
            raise InputError(
                f"`val_loader`: every label of its {self.examples} examples is one to be ignored, so nothing tells one "
                "prior from another. Pass examples with labels."
            )
        rows = [figure.result(self.examples) for figure in self.figures]
        has_ece = rows[0]["ece"] is not None
        if metric == "ece" and not has_ece:
            raise InputError(
                f"metric='ece' needs class probabilities, not {likelihood!r}; use 'nll'."
            )
        values = [_finite(row[metric]) for row in rows]
        ends = [p.result(self.examples) for p in self.points]
        best = min(range(len(self.path)), key=lambda i: (values[i], self.path[i]))
        allowed = [i for i in range(len(self.path)) if self._accurate(rows[i], ends[0])]
        chosen = min(allowed or [best], key=lambda i: (values[i], self.path[i]))
        auroc = None
        if self.search.ood_loader is not None:
            pairs = zip(self.scores_in, self.scores_out, strict=True)
            auroc = [ood_metrics(torch.cat(a), torch.cat(b))["auroc"] for a, b in pairs]
        path = CalibrationPath(
            self.path,
            [_number(row["nll"]) for row in rows],
            [_number(row["accuracy"]) for row in rows],
            [_number(row["ece"]) for row in rows] if has_ece else None,
            auroc,
            chosen,
            metric,
            likelihood.score_name,
            self.fit.alpha,
            min(ends, key=lambda row: _finite(row[metric])),
            self.examples,
            chosen in (0, len(self.path) - 1),
            self.tune,
            self.scales,
            self.temperatures,
            chosen != best,
        )
        return path, values

    def _accurate(self, row: dict[str, float | None], network: dict[str, float | None]) -> bool:
        """Whether the accuracy of a prior is within what is allowed of the network's; true of all else."""
        if self.tune != "prior" or self.fit.problem.likelihood.score_name != "accuracy":
            return True
        known, score = network["accuracy"], row["accuracy"]
        return known is None or score is None or not score < known - allowed_loss(self.examples)


def check_arguments(metric: str, ood_loader: Iterable[Any] | None) -> None:
    """Before anything is computed."""
    check_choice(metric, METRICS, "metric")
    if ood_loader is not None and not isinstance(ood_loader, Iterable):
        raise InputError(
            f"`ood_loader` is {type(ood_loader).__name__}, expected an iterable of (inputs, targets) "
            "batches, e.g. a DataLoader."
        )


def _what(tune: str | None, likelihood: Likelihood) -> str:
    estimated = likelihood.with_noise(1.0) is not None
    if tune is None:
        return "noise" if estimated else "prior"
    check_choice(tune, TUNED, "tune")
    if tune == "temperature" and likelihood.score_name != "accuracy":
        raise InputError(
            f"tune='temperature' needs class probabilities, not {likelihood!r}; use tune='prior'."
        )
    if tune == "noise" and not estimated:
        raise InputError(
            f"tune='noise' needs a regression whose noise was estimated from training data, not {likelihood!r}; "
            "use likelihood='regression', or tune='prior'."
        )
    return tune


def _noised(likelihood: Likelihood, factor: float) -> Likelihood:
    other = likelihood.with_noise(factor)
    assert other is not None
    return other


def _decades(start: float, decades: tuple[float, float]) -> list[float]:
    low, high = decades
    return [start * 10 ** (low + (high - low) * i / (POINTS - 1)) for i in range(POINTS)]


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.inf


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class _Figures:
    """Sums over batches for one prior precision."""

    def __init__(self, likelihood: Likelihood, beta: float = 1.0) -> None:
        self.likelihood, self.beta = likelihood, beta
        self.nll, self.score, self.count = 0.0, 0.0, 0
        self.confidences: list[Tensor] = []
        self.hits: list[Tensor] = []

    def add(self, point: Tensor, moved: Tensor, targets: Tensor) -> Tensor:
        """Count one batch; returns the uncertainty of each example ``(B,)``."""
        with torch.no_grad():
            if self.beta != 1:
                moved, point = self.beta * moved, self.beta * point
            both = mirrored(moved, point)
            moments = self.likelihood.moments(both, point, linearised=True)
            self.nll -= float(self.likelihood.log_predictive(both, targets).double().sum())
            total, count = self.likelihood.score(moments.mean, targets)
            self.score, self.count = self.score + total, self.count + count
            confidence = self.likelihood.confidence(moments.mean, targets)
            if confidence is not None:
                self.confidences.append(confidence.flatten())
                self.hits.append(self.likelihood.correct(moments.mean, targets).flatten().long())
            return per_example(moments.total)

    def seen(self) -> tuple[float, float, int, list[Tensor], list[Tensor]]:
        """The sums so far."""
        return self.nll, self.score, self.count, self.confidences, self.hits

    def take(self, parts: Sequence[tuple[float, float, int, list[Tensor], list[Tensor]]]) -> None:
        """Those of all processes."""
        self.nll = math.fsum(part[0] for part in parts)
        self.score = math.fsum(part[1] for part in parts)
        self.count = sum(part[2] for part in parts)
        self.confidences = [t for part in parts for t in part[3]]
        self.hits = [t for part in parts for t in part[4]]

    def result(self, examples: int) -> dict[str, float | None]:
        ece = None
        if self.confidences:
            ece, _ = calibration_error(torch.cat(self.confidences), torch.cat(self.hits), BINS)
        return {
            "nll": self.nll / max(1, examples),
            "accuracy": self.likelihood.final_score(self.score, self.count),
            "ece": ece,
        }
