"""The whole prior-scale path from one pass over validation data; or that of a temperature, or of a regression's noise.

Linearised function draws scale with ``α^{-1/2}``: the Jacobian products are computed once, and every
prior precision is a multiplication away. The far end of the path is the trained network itself.

Observation noise that was estimated from training residuals is too small wherever the network fits its training data
better than new data, and no prior precision mends that: the null space is where training data say nothing. So there
the noise is what validation data are asked for (measured in docs/evaluation/regression.md).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nullbayes.common.arguments import check_choice
from nullbayes.common.processes import Processes
from nullbayes.common.progress import stages
from nullbayes.errors import InputError, NullBayesWarning
from nullbayes.fit.result import Fit
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.linearise import linearised_outputs
from nullbayes.likelihood import Likelihood
from nullbayes.likelihood.helpers import mirrored
from nullbayes.metrics import ood_metrics
from nullbayes.model.batch import Inputs
from nullbayes.model.shares import share_of
from nullbayes.posterior.prediction import per_example

METRICS = ("nll", "ece")
TUNED = ("prior", "temperature", "noise")
NO_GAIN = 1e-4  # of the metric: what lies below is rounding
POINTS = 49
DECADES = (-4.0, 8.0)
NOISE_DECADES = (-1.0, 3.0)
TEMPERATURE_DECADES = (-0.5, 1.0)
BINS = 15
# How far a chosen prior may take accuracy on validation data below the trained network's: a share, and examples. A net
# loss of k examples has a standard error of √k at least, so fewer than five may be chance.
ALLOWED_LOSS, BY_CHANCE = 0.01, 4
# A prior precision so many times that before leaves about the trained network, in whatever it is used for.
CLOSING = 1e3


@dataclass(frozen=True, repr=False)
class CalibrationPath:
    """Validation figures along the prior-scale path, or along that of a temperature or of the noise.

    Attributes:
        prior_precision: ascending; the path covers twelve decades around the starting value. All the same where
            something else was tuned.
        nll: mean negative log predictive density per example, nats.
        accuracy: accuracy, or RMSE for regression (``score_name``).
        ece: expected calibration error (15 equal bins, top class), or None for regression.
        auroc: of the predictive uncertainty against ``ood_loader``, or None without one.
        chosen: index of the value that was set.
        metric: what it minimises.
        start: the prior precision before.
        point: the same figures of the trained network; with the noise or temperature that is best for it, where one was
            tuned.
        at_edge: the best value lies at an end of the path.
        tuned: ``"prior"``, ``"temperature"`` or ``"noise"``.
        noise_scale: factors on the noise variance, ascending over four decades; None where something else was tuned.
        temperature: what outputs are divided by before they become probabilities, ascending from 0.32 to 10; None
            where something else was tuned.
        bounded: a better prior precision was passed over, because accuracy there is further below the trained
            network's than a point and than four examples.
    """

    prior_precision: list[float]
    nll: list[float]
    accuracy: list[float]
    ece: list[float] | None
    auroc: list[float] | None
    chosen: int
    metric: str
    score_name: str
    start: float
    point: dict[str, float | None]
    examples: int
    at_edge: bool
    tuned: str = "prior"
    noise_scale: list[float] | None = None
    temperature: list[float] | None = None
    bounded: bool = False

    @property
    def values(self) -> list[float]:
        """What was tried: prior precisions, temperatures, or factors on the noise."""
        return self.temperature or self.noise_scale or self.prior_precision

    @property
    def chosen_temperature(self) -> float:
        """What outputs are divided by from now on; one where no temperature was tuned."""
        return 1.0 if self.temperature is None else self.temperature[self.chosen]

    @property
    def closed(self) -> bool:
        """Whether the prior precision grew so far that about the trained network is left."""
        return self.tuned == "prior" and self.values[self.chosen] >= CLOSING * self.start

    @property
    def before(self) -> dict[str, float | None]:
        """``nll``, ``accuracy`` (or RMSE) and ``ece`` on the validation data before."""
        start = self.start if self.tuned == "prior" else 1.0
        return self._at(
            min(range(len(self.values)), key=lambda i: abs(math.log(self.values[i] / start)))
        )

    @property
    def after(self) -> dict[str, float | None]:
        """The same figures with what was chosen."""
        return self._at(self.chosen)

    def _at(self, index: int) -> dict[str, float | None]:
        ece = None if self.ece is None else self.ece[index]
        return {"nll": self.nll[index], "accuracy": self.accuracy[index], "ece": ece}

    def as_dict(self) -> dict[str, Any]:
        """All fields; JSON-able."""
        return asdict(self)

    def __repr__(self) -> str:
        value, score = self.values[self.chosen], self.score_name
        what = {"noise": "noise variance ×", "prior": "prior precision"}.get(self.tuned, self.tuned)
        best = {"nll": self.nll, "ece": self.ece}[self.metric] or [math.nan] * (self.chosen + 1)
        point = self.point[self.metric]
        network = "" if point is None else f", network {point:.4g}"
        return (
            f"CalibrationPath({what} {value:.4g}, {self.metric} {best[self.chosen]:.4g}{network}, "
            f"{score} {self.before['accuracy']:.4g} → {self.after['accuracy']:.4g}, {self.examples} examples)"
        )


def temperature_of(path: CalibrationPath | None) -> float:
    """What outputs are divided by before they become probabilities: one before any calibration."""
    return 1.0 if path is None else path.chosen_temperature


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
    _warn(path, values)
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
        return known is None or score is None or not score < known - _allowed(self.examples)


def _allowed(examples: int) -> float:
    return max(ALLOWED_LOSS, BY_CHANCE / max(1, examples))


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


def _warn(path: CalibrationPath, values: list[float]) -> None:
    best, point = values[path.chosen], path.point[path.metric]
    if path.at_edge and path.noise_scale is not None:
        text = (
            f"the best noise lies at an end of the path ({path.noise_scale[path.chosen]:g} times what the fit "
            f"estimated) on {path.examples} validation examples. Are they of the same kind as the training data?"
        )
    elif path.at_edge and path.temperature is not None:
        text = (
            f"the best temperature, {path.chosen_temperature:.3g}, lies at an end of the path on {path.examples} "
            "validation examples. Are they of the same kind as the training data?"
        )
    elif path.bounded:
        text = (
            f"the prior precision was bounded at {path.values[path.chosen]:.4g}: with the one that is best by "
            f"{path.metric}, accuracy on {path.examples} validation examples would fall by more than "
            f"{_allowed(path.examples):.3g} below the trained network's {path.point['accuracy']:.4f}; it is "
            f"{path.after['accuracy']:.4f} now. "
            "`tune='temperature'` changes probabilities and leaves the posterior as it is."
        )
    elif path.at_edge and path.chosen:
        text = (
            f"the best prior precision lies at the upper end of the path ({best:.4f}; the trained "
            f"network alone has {point:.4f}): on these data the posterior adds nothing to "
            f"{path.metric}. It now predicts almost as the trained network; its novelty score is "
            "unaffected, but joint predictions and what it says of shifted inputs are gone. `tune='temperature'` "
            "calibrates probabilities and leaves the posterior open. Is the validation set separate from the training "
            "set, and large enough?"
        )
    elif path.at_edge:
        text = (
            "the best prior precision lies at the lower end of the path; the validation data ask "
            "for still wider functions. Set a smaller `prior_precision` and calibrate again."
        )
    elif path.temperature is None and point is not None and point - best <= NO_GAIN * abs(point):
        text = (
            f"no point of the path beats the trained network ({path.metric} {best:.4f} against "
            f"{point:.4f}) on {path.examples} validation examples: on these the posterior adds nothing."
        )
    elif path.closed:
        text = (
            f"the prior precision grew from {path.start:.3g} to {path.values[path.chosen]:.3g}: the posterior is all "
            "but closed to the trained network, in joint predictions and on shifted inputs too. `tune='temperature'` "
            "calibrates probabilities and leaves it open."
        )
    else:
        return
    warnings.warn(text, NullBayesWarning, stacklevel=4)


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
            # Imported where it is used: torchmetrics imports matplotlib and scipy where they are installed, a second.
            from torchmetrics.functional.classification import binary_calibration_error

            confidence, hit = torch.cat(self.confidences), torch.cat(self.hits)
            ece = float(binary_calibration_error(confidence, hit, n_bins=BINS))
        return {
            "nll": self.nll / max(1, examples),
            "accuracy": self.likelihood.final_score(self.score, self.count),
            "ece": ece,
        }
