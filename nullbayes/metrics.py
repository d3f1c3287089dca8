"""How good are the probabilities, and does the score tell the familiar from the new?

Every function takes tensors of any dtype, on any device, computes in float64 on the CPU and returns plain floats and
lists, ready for JSON. AUROC and the ROC curve come from torchmetrics, which is given ranks: scores outside [0, 1] it
would turn into probabilities by a sigmoid, which makes ties of large ones. Calibration errors are summed here: its own
are computed in float32 and give confidences of exactly 1 a bin of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nullbayes.errors import InputError, NonFiniteError

# A class predicted with probability 0 that then happens costs -log of this, 87.3 nats, instead of infinity, so that one
# example cannot hide all others. It is float32's smallest normal number, for every dtype, so that figures compare.
SMALLEST_PROBABILITY = float(torch.finfo(torch.float32).tiny)


def classification_metrics(
    probs: Tensor,  # (N, O), rows sum to 1
    targets: Tensor,  # (N,) integer labels
    bins: int = 15,
) -> dict[str, float]:
    """Accuracy, mean confidence, NLL, Brier score, and expected and maximum calibration error (ECE, MCE).

    NLL is in nats per example, with probabilities clamped at ``SMALLEST_PROBABILITY``. The Brier score is the sum over
    classes of the squared error, between 0 and 2. ECE and MCE are of the top class, over ``bins`` bins of equal width
    (Guo, Pleiss, Sun, Weinberger, *On Calibration of Modern Neural Networks*, ICML 2017).
    """
    probs, targets = _probabilities(probs, targets)
    picked = probs.gather(1, targets[:, None]).squeeze(1)
    top, predicted = probs.max(1)
    brier = probs.square().sum(1) - 2 * picked + 1
    ece, mce = calibration_error(top, predicted == targets, bins)
    return {
        "accuracy": _float((predicted == targets).double().mean()),
        "confidence": _float(top.mean()),
        "nll": _float(-picked.clamp_min(SMALLEST_PROBABILITY).log().mean()),
        "brier": _float(brier.mean()),
        "ece": ece,
        "mce": mce,
    }


def regression_metrics(
    mean: Tensor,  # (N, ...) predictive mean
    variance: Tensor,  # same shape: predictive variance, noise included
    targets: Tensor,  # same shape
    levels: Sequence[float] = (0.5, 0.9, 0.95),
) -> dict[str, float]:
    """RMSE, Gaussian NLL, and the share of targets inside the central predictive interval of each level.

    A calibrated prediction has ``coverage_90`` near 0.90.
    """
    mean, variance, targets = (
        _finite(t, name)
        for t, name in ((mean, "mean"), (variance, "variance"), (targets, "targets"))
    )
    if not mean.shape == variance.shape == targets.shape or not mean.numel():
        raise InputError(
            "`regression_metrics` needs mean, variance and targets of one shape, with at least one element: got "
            f"{tuple(mean.shape)}, {tuple(variance.shape)} and {tuple(targets.shape)}."
        )
    if bool((variance <= 0).any()):
        raise InputError(
            "`variance` must be positive: pass the total predictive variance, with the noise in it."
        )
    error = targets - mean
    nll = 0.5 * (error.square() / variance + variance.log() + math.log(2 * math.pi))
    result = {"rmse": _float(error.square().mean().sqrt()), "nll": _float(nll.mean())}
    for level in levels:
        if not 0 < level < 1:
            raise InputError(f"A coverage level lies between 0 and 1, got {level}.")
        width = math.sqrt(2) * torch.erfinv(torch.tensor(level, dtype=torch.float64))
        result[f"coverage_{100 * level:g}"] = _float(
            (error.abs() <= width * variance.sqrt()).double().mean()
        )
    return result


def reliability_curve(probs: Tensor, targets: Tensor, bins: int = 15) -> dict[str, list[float]]:
    """Mean confidence and accuracy of the top class in each of ``bins`` bins of confidence; empty bins hold 0.

    ``sum(count / N * |accuracy - confidence|)`` is the ECE of :func:`classification_metrics`.
    """
    probs, targets = _probabilities(probs, targets)
    top, predicted = probs.max(1)
    return _binned(top, predicted == targets, bins)


def _binned(confidence: Tensor, hit: Tensor, bins: int) -> dict[str, list[float]]:
    """The curve of :func:`reliability_curve` from confidences ``(N,)``, float64, and whether each was right."""
    if bins < 1:
        raise InputError(f"`bins` must be at least 1, got {bins}.")
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    index = (torch.bucketize(confidence.contiguous(), edges, right=True) - 1).clamp(0, bins - 1)
    count, total, right = (
        torch.zeros(bins, dtype=torch.float64).index_add_(0, index, values.double())
        for values in (torch.ones_like(confidence), confidence, hit)
    )
    filled = count.clamp_min(1)
    return {
        "edges": edges.tolist(),
        "confidence": (total / filled).tolist(),
        "accuracy": (right / filled).tolist(),
        "count": count.tolist(),
    }


def calibration_error(
    confidence: Tensor,  # (N,) in [0, 1]
    hit: Tensor,  # (N,) whether each was right
    bins: int = 15,
) -> tuple[float, float]:
    """Expected and maximum calibration error of confidences, over ``bins`` bins of equal width."""
    curve = _binned(confidence.detach().cpu().double(), hit.detach().cpu(), bins)
    sure, right, count = (
        torch.tensor(curve[key], dtype=torch.float64) for key in ("confidence", "accuracy", "count")
    )
    gaps = (right - sure).abs()
    return _float((gaps * count / count.sum()).sum()), _float(gaps.max())


def ood_metrics(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """How well a score tells ``outside`` (M,), where it should be larger, from ``inside`` (N,).

    ``auroc``: the probability that an outside score exceeds an inside one, ties counting half. ``fpr95``: the share of
    inside inputs flagged at the threshold that flags at least 95 % of the outside ones.
    """
    from torchmetrics.functional.classification import (
        binary_auroc,
        binary_specificity_at_sensitivity,
    )

    ranks, labels = _ranks(inside, outside)
    specificity, _ = binary_specificity_at_sensitivity(ranks, labels, min_sensitivity=0.95)
    return {"auroc": _float(binary_auroc(ranks, labels)), "fpr95": 1.0 - _float(specificity)}


def roc_curve(inside: Tensor, outside: Tensor, points: int = 200) -> dict[str, list[float]]:
    """False and true positive rates of the score's ROC curve, thinned to about ``points`` points for drawing."""
    from torchmetrics.functional.classification import binary_roc

    ranks, labels = _ranks(inside, outside)
    fpr, tpr, _ = binary_roc(ranks, labels)
    if len(fpr) > points:
        # Evenly along the curve, not along one axis: steep stretches keep their points.
        along = (fpr + tpr).double()
        keep = torch.searchsorted(along, torch.linspace(0, 2, points, dtype=along.dtype)).clamp(
            max=len(fpr) - 1
        )
        keep = torch.cat([torch.zeros(1, dtype=keep.dtype), keep]).unique()
        fpr, tpr = fpr[keep], tpr[keep]
    return {"fpr": [round(v, 5) for v in fpr.tolist()], "tpr": [round(v, 5) for v in tpr.tolist()]}


def risk_coverage(uncertainty: Tensor, correct: Tensor) -> dict[str, list[float]]:
    """Error rate among the share ``coverage`` of inputs answered when the most uncertain ones are declined first.

    (El-Yaniv, Wiener, *On the Foundations of Noise-free Selective Classification*, JMLR 2010.) Inputs with equal
    uncertainty are answered together, so the order of the data cannot matter.
    """
    score, hit = (
        _finite(uncertainty, "uncertainty").flatten(),
        correct.detach().cpu().double().flatten(),
    )
    if len(score) != len(hit) or not len(score):
        raise InputError(f"One uncertainty per answer is needed: got {len(score)} and {len(hit)}.")
    order = score.argsort()
    wrong = (1 - hit[order]).cumsum(0)
    answered = torch.arange(1, len(score) + 1, dtype=torch.float64)
    last = torch.ones(len(score), dtype=torch.bool)  # the last of each run of ties
    last[:-1] = score[order].diff() > 0
    return {
        "coverage": (answered / len(score))[last].tolist(),
        "risk": (wrong / answered)[last].tolist(),
    }


def aurc(uncertainty: Tensor, correct: Tensor) -> float:
    """Area under the risk-coverage curve: the mean risk over coverages; lower is better.

    Tied inputs count with the risk of answering all of them.
    """
    curve = risk_coverage(uncertainty, correct)
    coverage = torch.tensor([0.0, *curve["coverage"]], dtype=torch.float64)
    return _float((torch.tensor(curve["risk"], dtype=torch.float64) * coverage.diff()).sum())


def _float(value: Tensor) -> float:
    return float(value.item())


def _finite(value: Tensor, name: str) -> Tensor:
    value = value.detach().cpu().double()  # moved first: not every device has float64
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(
            f"`{name}` holds {int((~torch.isfinite(value)).sum())} values that are NaN or infinite."
        )
    return value


def _probabilities(probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    probs, targets = _finite(probs, "probs"), targets.detach().cpu()
    if (
        probs.ndim != 2
        or targets.shape != probs.shape[:1]
        or targets.is_floating_point()
        or not len(probs)
    ):
        raise InputError(
            "Expected probs of shape (N, O) and integer targets of shape (N,), N at least 1: got "
            f"{tuple(probs.shape)} and {tuple(targets.shape)} of {targets.dtype}."
        )
    sums = probs.sum(1)
    if bool((probs < -1e-6).any()) or bool(((sums - 1).abs() > 1e-2).any()):
        raise InputError(
            f"The rows of `probs` are not probabilities (sums from {sums.min():.4g} to {sums.max():.4g}, smallest "
            f"entry {probs.min():.4g}): pass softmax outputs, not logits."
        )
    targets = targets.long()
    if int(targets.min()) < 0 or int(targets.max()) >= probs.shape[1]:
        raise InputError(
            f"Labels run from {int(targets.min())} to {int(targets.max())}, but there are {probs.shape[1]} classes."
        )
    probs = probs.clamp_min(0)
    return probs / probs.sum(1, keepdim=True), targets  # float16 rows sum to 1 only within 1e-3


def _ranks(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Both scores replaced by their joint dense rank in [0, 1]: order and ties stay, scale and overflow are gone."""
    inside, outside = _finite(inside, "inside").flatten(), _finite(outside, "outside").flatten()
    if not len(inside) or not len(outside):
        raise InputError(
            f"Both sides need at least one score: got {len(inside)} inside, {len(outside)} outside."
        )
    values, rank = torch.cat([inside, outside]).unique(return_inverse=True)
    labels = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    return rank.double() / max(1, len(values) - 1), labels
