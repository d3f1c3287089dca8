"""Measure one way of predicting: its figures for the table and the curves for the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nullbayes import metrics
from nullbayes.datasets import Dataset
from nullbayes.posterior.measuring.curves import Answers
from nullbayes.posterior.measuring.estimates import Estimate, auroc, averaged, mean

BATCH = 256
HISTOGRAM_BINS = 36
SMALLEST_SCORE = 1e-9  # histograms are of log10(score)

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Shift:
    """Inputs that differ from the training data in one way."""

    title: str  # "rotated"
    words: str  # "test images turned by 30° to 150°"
    inputs: Tensor
    groups: tuple[tuple[str, int], ...] = ()  # consecutive parts of the inputs: (name, how many)


@dataclass(frozen=True)
class Method:
    """A way of predicting, as two functions of a batch."""

    title: str
    probs: Callable[[Tensor], Tensor]  # (B, ...) -> (B, O)
    score: Callable[[Tensor], Tensor]  # (B, ...) -> (B,), larger for what is new
    score_name: str


def point_method(model: torch.nn.Module) -> Method:
    """The trained network alone; its novelty score is one minus its confidence."""

    def probs(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return model(inputs).softmax(-1)

    return Method("Point estimate", probs, lambda x: 1 - probs(x).max(-1).values, "1 − confidence")


def posterior_method(title: str, posterior: Any) -> Method:
    """A fitted posterior: the linearised predictive mean, and its novelty, in nats."""
    return Method(
        title,
        lambda x: posterior.predict(x).mean,
        lambda x: posterior.novelty(x),
        "novelty (information)",
    )


def number_of_inputs(data: Dataset, shifts: Mapping[str, Shift]) -> int:
    """How many inputs :func:`evaluate` passes, for a progress bar."""
    shifted = sum(len(shift.inputs) for shift in shifts.values())
    return len(data.train) + 2 * len(data.test) + shifted


def evaluate(
    method: Method,
    data: Dataset,
    shifts: Mapping[str, Shift],
    *,
    advance: Advance = lambda n: None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Estimate]]:
    """The method's figures, its curves, and what :func:`differences` compares."""
    fitted = _batched(method.probs, data.train.inputs, advance)
    train = metrics.classification_metrics(fitted, data.train.targets)
    probs = _batched(method.probs, data.test.inputs, advance)
    test = metrics.classification_metrics(probs, data.test.targets)
    inside = _batched(method.score, data.test.inputs, advance)
    outside = {key: _batched(method.score, s.inputs, advance) for key, s in shifts.items()}
    detection = {key: metrics.ood_metrics(inside, scores) for key, scores in outside.items()}
    correct = probs.argmax(1) == data.test.targets
    figures = {
        "title": method.title,
        "score": method.score_name,
        "train_accuracy": train["accuracy"],
        "train_nll": train["nll"],
        "test_accuracy": test["accuracy"],
        **{key: test[key] for key in ("nll", "brier", "ece", "mce", "confidence")},
        "aurc": metrics.aurc(1 - probs.max(1).values, correct),
        "auroc": {key: value["auroc"] for key, value in detection.items()},
        "fpr95": {key: value["fpr95"] for key, value in detection.items()},
        "auroc_by_group": {
            key: _by_group(inside, outside[key], shift.groups)
            for key, shift in shifts.items()
            if shift.groups
        },
    }
    curves = {
        "reliability": metrics.reliability_curve(probs, data.test.targets),
        "roc": {key: metrics.roc_curve(inside, scores) for key, scores in outside.items()},
        "histogram": _histograms(inside, outside),
    }
    estimates = {
        "train_accuracy": mean((fitted.argmax(1) == data.train.targets).double()),
        **_compared(probs, data.test.targets),
    }
    if outside:
        areas = [auroc(inside, scores) for scores in outside.values()]
        estimates["auroc"] = averaged(areas, len(inside))
    return figures, curves, estimates


def nearest_input(
    train: Tensor, test: Tensor, shifts: Mapping[str, Shift], *, advance: Advance = lambda n: None
) -> dict[str, float]:
    """AUROC by shift of the distance to the nearest training input: what it takes no network to tell apart.

    Args:
        train: ``(N, ...)``, everything that the network was trained on; test: ``(M, ...)``, shifted by nothing.
    """
    known = train.flatten(1)

    def distance(inputs: Tensor) -> Tensor:
        return torch.cdist(inputs.flatten(1), known).min(1).values

    inside = _batched(distance, test, advance)
    outside = {key: _batched(distance, shift.inputs, advance) for key, shift in shifts.items()}
    return {key: metrics.ood_metrics(inside, found)["auroc"] for key, found in outside.items()}


def _compared(probs: Tensor, targets: Tensor) -> dict[str, Estimate]:
    """NLL and ECE with what their standard errors are made of."""
    probs = probs.double()
    picked = probs.gather(1, targets[:, None]).squeeze(1)
    top, predicted = probs.max(1)
    count = len(probs)
    answers = Answers(top, (predicted == targets).double(), torch.arange(count), count)
    nll = -picked.clamp_min(metrics.SMALLEST_PROBABILITY).log()
    return {"nll": mean(nll), "ece": answers.ece()}


def differences(
    estimates: Mapping[str, Mapping[str, Estimate]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Every method minus the point estimate, paired image by image, with the standard error of that."""
    out = {}
    for key, values in estimates.items():
        pairs = {name: e.minus(estimates["point"][name]) for name, e in values.items()}
        out[key] = {name: {"value": e.value, "error": e.error} for name, e in pairs.items()}
    return out


def _batched(function: Callable[[Tensor], Tensor], inputs: Tensor, advance: Advance) -> Tensor:
    parts = []
    for batch in inputs.split(BATCH):
        parts.append(function(batch).detach().cpu())
        advance(len(batch))
    return torch.cat(parts)


def _by_group(
    inside: Tensor, scores: Tensor, groups: tuple[tuple[str, int], ...]
) -> dict[str, float]:
    parts = scores.split([count for _, count in groups])
    return {
        name: metrics.ood_metrics(inside, part)["auroc"]
        for (name, _), part in zip(groups, parts, strict=True)
    }


def _histograms(inside: Tensor, outside: Mapping[str, Tensor]) -> dict[str, Any]:
    """Counts of log10(score) on edges common to all, so that the panels of one method compare."""
    logs = {
        k: v.double().clamp_min(SMALLEST_SCORE).log10() for k, v in {"": inside, **outside}.items()
    }
    every = torch.cat(list(logs.values()))
    low, high = float(every.quantile(0.001)), float(every.max())
    edges = torch.linspace(low, max(high, low + 1e-3), HISTOGRAM_BINS + 1, dtype=torch.float64)
    counts = {
        key: torch.histogram(value.clamp(low, float(edges[-1])), edges)[0].tolist()
        for key, value in logs.items()
    }
    return {"log10_edges": edges.tolist(), "inside": counts.pop(""), "outside": counts}
