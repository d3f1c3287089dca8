"""The ways of predicting that are compared: the trained network, its temperature scaling, posteriors."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nullbayes.errors import InputError, NullBayesWarning
from nullbayes.likelihood import Likelihood
from nullbayes.likelihood.helpers import mirrored
from nullbayes.posterior.measuring.observing import kind_of

if TYPE_CHECKING:
    from nullbayes.posterior.calibration_path import CalibrationPath
    from nullbayes.posterior.measuring.subject import Moved, Subject

#: inverse temperatures tried: twentieth to twentyfold, in steps of a tenth, then in steps of a hundredth
_COARSE, _FINE = 63, 23

NETWORK, TEMPERATURE, EVIDENCE, GUARANTEE, CALIBRATED, GIVEN = RESERVED = (
    "network",
    "temperature",
    "evidence",
    "guarantee",
    "calibrated",
    "given",
)
#: outputs ``(B, *out)`` of the trained network and targets, batch by batch
Outputs = Callable[[], Iterator[tuple[Tensor, Any]]]


@dataclass(frozen=True)
class Method:
    """One way of predicting from the network's outputs and what samples do to them.

    Attributes:
        key: a short name; title: for people.
        likelihood: with the observation noise that goes with it.
        scale: of samples at prior precision one; None: the network alone.
        beta: the inverse temperature of outputs.
        setting: what was chosen, for a table: ``"prior precision 12.3"``.
        linearised: whether outputs of samples come with their mirror images about the network's.
    """

    key: str
    title: str
    likelihood: Likelihood
    scale: float | None = None
    beta: float = 1.0
    setting: str = ""
    linearised: bool = True

    def samples(self, point: Tensor, moved: Moved) -> tuple[Tensor, Tensor]:
        """Output samples ``(S, B, *out)`` and their centre ``(B, *out)``."""
        if self.scale is None:
            point = point if self.beta == 1 else self.beta * point
            return point[None], point
        outputs = moved(self.scale)
        if self.beta != 1:
            outputs, point = self.beta * outputs, self.beta * point
        return mirrored(outputs, point) if self.linearised else outputs, point


@dataclass(frozen=True)
class Source:
    """A posterior, the methods that read its samples, and how it was calibrated."""

    posterior: Subject
    methods: list[Method]
    notes: list[str] = field(default_factory=list)
    path: CalibrationPath | None = None


def own_source(posterior: Subject, validation: Iterable[Any] | None, outputs: Outputs) -> Source:
    """The network, temperature scaling where validation data are there, and the posterior before and after `calibrate`.

    Args:
        outputs: of the trained network on ``validation``; unused without it.

    Nothing of ``posterior`` changes: what has to be calibrated is calibrated in a copy.
    """
    likelihood, notes, path = _before(posterior), list[str](), posterior.calibration
    methods = [Method(NETWORK, "Trained network", likelihood)]
    if validation is not None:
        methods += scaled(likelihood, outputs)
    methods.append(_uncalibrated(posterior, likelihood))
    if posterior.calibration is None and validation is not None:
        other = copy.copy(posterior)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NullBayesWarning)
            other.calibrate(validation, progress=False)
        notes += [str(w.message) for w in caught if issubclass(w.category, NullBayesWarning)]
        methods.append(_calibrated(other))
        path = other.calibration
    elif posterior.calibration is not None:
        methods.append(_calibrated(posterior))
    return Source(posterior, methods, notes, path)


def other_sources(against: Sequence[Subject] | Mapping[str, Subject]) -> list[Source]:
    """One source for each further posterior, named by the caller or by its class."""
    from nullbayes.posterior.judged import Judged

    if isinstance(against, Judged):
        against = [cast("Subject", against)]
    named = dict(against) if isinstance(against, Mapping) else {}
    if not isinstance(against, Mapping):
        for posterior in against:
            name = type(posterior).__name__
            while name in named:
                head, _, number = name.rpartition(" ")
                name = f"{head} {int(number) + 1}" if number.isdigit() else f"{name} 2"
            named[name] = posterior
    out = []
    for name, posterior in named.items():
        if not isinstance(posterior, Judged):
            raise InputError(
                f"`against` holds {type(posterior).__name__}, expected fitted posteriors, as a list or as "
                "{name: posterior}."
            )
        posterior._check_model()
        if name in RESERVED:
            raise InputError(
                f"`against` names a posterior {name!r}, which is taken; choose another."
            )
        out.append(Source(posterior, [_method(posterior, (str(name), str(name)))]))
    return out


def _before(posterior: Subject) -> Likelihood:
    """The likelihood as it was before `calibrate` chose its noise."""
    path = posterior.calibration
    if path is None or path.noise_scale is None:
        return posterior.likelihood
    return (
        posterior.likelihood.with_noise(1 / path.noise_scale[path.chosen]) or posterior.likelihood
    )


def _name(posterior: Subject) -> str:
    words = {
        "NullSpacePosterior": "Null-space",
        "LaplacePosterior": "Full Laplace",
        "LayerNullSpacePosterior": "Layer null-space",
    }
    return words.get(type(posterior).__name__, type(posterior).__name__)


def _method(posterior: Subject, names: tuple[str, str]) -> Method:
    """The posterior as it is, under a key and a title."""
    alpha = posterior.prior_precision
    setting = f"prior precision {alpha:.4g}"
    return Method(
        *names, posterior.likelihood, alpha**-0.5, 1.0, setting, linearised=posterior.linearises
    )


def _uncalibrated(posterior: Subject, likelihood: Likelihood) -> Method:
    path = posterior.calibration
    alpha = posterior.prior_precision if path is None else path.start
    key, words = posterior._prior_chosen_by()
    made = _method(posterior, (key, f"{_name(posterior)}, {words}"))
    setting = f"prior precision {alpha:.4g}"
    return replace(made, likelihood=likelihood, scale=alpha**-0.5, setting=setting)


def _calibrated(posterior: Subject) -> Method:
    path = posterior.calibration
    assert path is not None
    made = _method(posterior, (CALIBRATED, f"{_name(posterior)}, calibrated"))
    if path.tuned == "prior":
        return made
    if path.noise_scale is None:
        heat = path.chosen_temperature
        return replace(made, beta=1 / heat, setting=f"temperature {heat:.4g}")
    return replace(made, setting=f"noise variance × {path.noise_scale[path.chosen]:.4g}")


# -- temperature scaling ---------------------------------------------------------------------------


def scaled(likelihood: Likelihood, outputs: Outputs) -> list[Method]:
    """The network with one number fitted on validation data: a temperature, or for regression its noise.

    (Guo et al. 2017.) Nothing where a likelihood has neither.
    """
    kind = kind_of(likelihood)
    if kind in ("classification", "binary"):
        beta = _temperature(likelihood, outputs)
        return [
            Method(
                TEMPERATURE,
                "Temperature scaling",
                likelihood,
                None,
                beta,
                f"temperature {1 / beta:.4g}",
            )
        ]
    if kind != "regression" or likelihood.with_noise(1.0) is None:
        return []
    total, count = 0.0, 0
    for point, targets in outputs():
        variance = likelihood.moments(point[None], point, linearised=True).aleatoric
        error = likelihood.prepare_targets(point, targets) - point
        total += float((error.square() / variance).double().sum())
        count += error.numel()
    noised = likelihood.with_noise(total / max(1, count))
    assert noised is not None
    setting = f"noise variance × {total / max(1, count):.4g}"
    return [Method(TEMPERATURE, "Network, noise from validation", noised, setting=setting)]


def _temperature(likelihood: Likelihood, outputs: Outputs) -> float:
    """The inverse temperature with the lowest NLL, which is convex in it: two passes, whatever the outputs weigh."""
    tried = [1.1 ** (i - _COARSE // 2) for i in range(_COARSE)]
    best = _best(likelihood, outputs, tried)[0]
    tried = [best * 1.01 ** (i - _FINE // 2) for i in range(_FINE)]
    best, values = _best(likelihood, outputs, tried)
    at = tried.index(best)
    if 0 < at < len(tried) - 1:
        low, middle, high = values[at - 1 : at + 2]
        bend = low - 2 * middle + high
        if bend > 0:
            best *= 1.01 ** (0.5 * (low - high) / bend)
    return best


def _best(
    likelihood: Likelihood, outputs: Outputs, tried: Sequence[float]
) -> tuple[float, list[float]]:
    values = [0.0] * len(tried)
    with torch.no_grad():
        for point, targets in outputs():
            for i, beta in enumerate(tried):
                found = likelihood.log_predictive((beta * point)[None], targets)
                values[i] -= float(found.double().sum())
    at = min(range(len(tried)), key=lambda i: values[i] if math.isfinite(values[i]) else math.inf)
    return tried[at], values
