"""Figures of a prediction. Calibration errors are torchmetrics' own, over 15 bins of equal width of the top class.

Everything takes tensors and returns plain floats.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from nullbayes import metrics

BINS = 15
# Sets of labels drawn from the probabilities themselves, for what ECE is by chance.
DRAWN = 200


def classification(probs: Tensor, targets: Tensor) -> dict[str, float]:
    """Accuracy, mean confidence, NLL (nats), Brier, ECE, what of it is not chance, MCE and AURC.

    Args:
        probs: ``(N, O)``, rows sum to one.
        targets: ``(N,)`` integer labels.

    AURC is the area under the risk-coverage curve when the least confident answers are declined first.
    """
    figures = metrics.classification_metrics(probs, targets, BINS)
    top, predicted = probs.max(1)
    ece = calibration_error(probs, targets, "l1")
    return {
        **{key: figures[key] for key in ("accuracy", "confidence", "nll", "brier")},
        "ece": ece,
        "ece_excess": ece - chance_calibration_error(probs),
        "mce": calibration_error(probs, targets, "max"),
        "aurc": metrics.aurc(1 - top, predicted == targets),
    }


def calibration_error(probs: Tensor, targets: Tensor, norm: str) -> float:
    """ECE (``norm="l1"``) or MCE (``"max"``) over ``BINS`` bins.

    torchmetrics gives a confidence of exactly one a bin beyond the last, so confidences end just below it; and it
    computes in the dtype that it is given: float64 here.
    """
    # Only the top class counts: the rest of the mass may sit anywhere below it.
    below_one = probs.detach().double().clamp(max=1 - 1e-12)
    kind: object = norm
    error = multiclass_calibration_error(
        below_one,
        targets,
        num_classes=probs.shape[1],
        n_bins=BINS,
        norm=kind,  # type: ignore[arg-type]
    )
    return float(error)


def chance_calibration_error(probs: Tensor) -> float:
    """Mean ECE of ``probs (N, O)`` if they were exactly right: of labels drawn from them, 200 times, always the same.

    ECE is above zero however good the probabilities are, the more so the fewer the examples and the less confident
    the answers: a method that rightly claims less pays for it (Roelofs et al., *Mitigating bias in calibration error
    estimation*, AISTATS 2022). What exceeds this is miscalibration.
    """
    top = probs.detach().double().amax(1).cpu()
    bins = (top * BINS).long().clamp(max=BINS - 1)
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(DRAWN):
        right = (torch.rand(len(top), generator=generator, dtype=top.dtype) < top).double()
        gaps = torch.zeros(BINS, dtype=top.dtype).index_add_(0, bins, right - top)
        total += float(gaps.abs().sum())
    return total / (DRAWN * len(top))


def regression(mean: Tensor, total: Tensor, targets: Tensor) -> dict[str, float]:
    """RMSE, Gaussian NLL, coverage of the central 50, 90 and 95 % intervals, and their mean calibration error.

    Args:
        mean: ``(N, O)``.
        total: same shape, predictive variance with the noise in it.
        targets: same shape.

    The interval error is the mean of ``|coverage - level|`` over the levels 0.1, 0.2, … 0.9
    (Kuleshov, Fenner, Ermon, *Accurate uncertainties for deep learning using calibrated regression*, ICML 2018,
    with central intervals).
    """
    figures = metrics.regression_metrics(mean, total, targets)
    levels = [k / 10 for k in range(1, 10)]
    coverage = metrics.regression_metrics(mean, total, targets, levels)
    gaps = [abs(coverage[f"coverage_{100 * level:g}"] - level) for level in levels]
    return {**figures, "interval_error": sum(gaps) / len(gaps)}


def detection(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """AUROC and FPR95 of a score that should be larger outside.

    FPR95: the share of inside inputs flagged at the threshold that flags 95 % of the outside ones.
    """
    return metrics.ood_metrics(inside, outside)


def entropy(probs: Tensor) -> Tensor:
    """``(…, O)`` probabilities to ``(…)`` entropies in nats."""
    return torch.special.entr(probs).sum(-1)
