"""What was found along the path of a calibration, in figures and in words."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from nullbayes.errors import NullBayesWarning

NO_GAIN = 1e-4  # of the metric: what lies below is rounding
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
        what = {
            "noise": f"noise variance × {value:.4g}",
            "prior": f"prior precision {self.start:.4g} → {value:.4g}" + ", closed" * self.closed,
        }.get(self.tuned, f"{self.tuned} {value:.4g}")
        before, after = (_said(figures[self.metric]) for figures in (self.before, self.after))
        point = self.point[self.metric]
        network = "" if point is None else f" (network {point:.4g})"
        return (
            f"CalibrationPath({what}; {self.metric} {before} → {after}{network}, "
            f"{score} {self.before['accuracy']:.4g} → {self.after['accuracy']:.4g}, {self.examples} examples)"
        )


def temperature_of(path: CalibrationPath | None) -> float:
    """What outputs are divided by before they become probabilities: one before any calibration."""
    return 1.0 if path is None else path.chosen_temperature


def warn(path: CalibrationPath, values: list[float]) -> None:
    """Say what a user should know of the choice; ``values`` are those of the metric along the path."""
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
            f"{allowed_loss(path.examples):.3g} below the trained network's {path.point['accuracy']:.4f}; it is "
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
        if path.closed:
            text += f" {_closed(path)}"
    elif path.closed:
        text = _closed(path)
    else:
        return
    warnings.warn(text, NullBayesWarning, stacklevel=5)


def _closed(path: CalibrationPath) -> str:
    return (
        f"The prior precision grew from {path.start:.3g} to {path.values[path.chosen]:.3g}: the posterior is all but "
        "closed to the trained network, in joint predictions and on shifted inputs too. To keep these, set "
        f"`prior_precision = {path.start:.4g}` again and calibrate with `tune='temperature'`."
    )


def warn_of_closed(earlier: CalibrationPath | None, precision: float) -> None:
    """A temperature leaves the posterior as it is: also where an earlier calibration closed it."""
    if earlier is not None and earlier.closed and precision == earlier.values[earlier.chosen]:
        warnings.warn(
            f"a temperature is tuned on a posterior that an earlier calibration has closed. {_closed(earlier)}",
            NullBayesWarning,
            stacklevel=4,
        )


def allowed_loss(examples: int) -> float:
    """How far below the network's the accuracy on so many validation examples may fall."""
    return max(ALLOWED_LOSS, BY_CHANCE / max(1, examples))


def _said(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
