"""What one batch of predictions is worth, example by example, whatever the likelihood.

Every kind of likelihood gives the same few numbers for each example, so that what comes after does not ask which it is.
Positions of masks and tokens are observations of one example: they count in its sums, and up to `POSITIONS` of them,
evenly spaced, enter calibration and risk-coverage figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nullbayes.likelihood import Binary, Classification, Likelihood, Regression
from nullbayes.likelihood.base import Moments
from nullbayes.posterior.prediction import per_example

#: positions of one example that enter calibration and risk-coverage figures
POSITIONS = 256
#: classes up to which class-wise figures are made
MOST_CLASSES = 1000
#: central predictive intervals of a regression
LEVELS = (0.5, 0.9, 0.95)
#: the same, for a curve
CURVE_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass
class Observed:
    """One batch under one method; float64 on the CPU unless said otherwise.

    Attributes:
        nll: ``(B,)`` negative log predictive density, nats, summed over positions.
        count: ``(B,)`` observations in each example; 0 where all are ignored.
        score: ``(B,)`` hits, squared errors or losses, summed over them.
        sums: ``(B,)`` each, of further figures per observation: ``brier``, ``crps``, ``coverage_90``, ...
        example, group: ``(K,)``: of each observation the number of its example in the batch, and the class, label or
            output that it belongs to.
        confidence, hit: ``(K,)`` of each answer; without classes, None and squared errors.
        z: ``(K,)`` of a regression: errors in units of the predicted standard deviation.
        classwise: probabilities ``(K, O)`` and what happened ``(K, O)``, for class-wise calibration.
        scores: ``(B,)`` each, by name: what might tell out-of-distribution inputs.
    """

    nll: Tensor
    count: Tensor
    score: Tensor
    example: Tensor
    group: Tensor
    confidence: Tensor | None = None
    hit: Tensor | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    classwise: tuple[Tensor, Tensor] | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)
    z: Tensor | None = None


def kind_of(likelihood: Likelihood) -> str:
    """``"classification"``, ``"binary"``, ``"regression"`` or ``"other"``."""
    if isinstance(likelihood, Classification):
        return "classification"
    if isinstance(likelihood, Binary):
        return "binary"
    return "regression" if isinstance(likelihood, Regression) else "other"


def observe(
    likelihood: Likelihood, moments: Moments, samples: Tensor, point: Tensor, targets: Any
) -> Observed:
    """Figures of a batch predicted by ``samples (S, B, *out)`` around ``point (B, *out)``, with their ``moments``."""
    nll = -_host(likelihood.log_predictive(samples, targets))
    made = _KINDS[kind_of(likelihood)](likelihood, moments, samples, targets, nll)
    made.scores = scores(likelihood, moments, point)
    return made


def scores(likelihood: Likelihood, moments: Moments, point: Tensor) -> dict[str, Tensor]:
    """Scores ``(B,)`` that need no target; each larger for what is less known."""
    kind, size = kind_of(likelihood), len(point)
    epistemic = _host(per_example(moments.epistemic))
    total = _host(per_example(moments.total))
    if kind == "regression":
        return {"total_variance": total, "epistemic_variance": epistemic}
    if kind == "other":
        out = {"epistemic_variance": epistemic}
        return out | ({"total_variance": total} if likelihood.describes_targets else {})
    out = {"entropy": total, "mutual_information": epistemic}
    mean, logits = moments.mean, point
    if kind == "classification":
        assert isinstance(likelihood, Classification)
        top = mean.amax(likelihood._axis(tuple(point.shape)))
        energy = likelihood.energy(logits)
    else:  # one energy a label: Wang et al., Can multi-label classification networks know what they don't know?, 2021
        top, energy = torch.maximum(mean, 1 - mean), -torch.nn.functional.softplus(logits)
    out["max_softmax"] = 1 - _host(top).reshape(size, -1).mean(1)
    out["energy"] = _host(energy).reshape(size, -1).mean(1)
    return out


def sample_log_likelihoods(likelihood: Likelihood, samples: Tensor, targets: Any) -> Tensor:
    """``log p_s(y)`` of each sample by itself: ``(S, B)`` float32 on the CPU."""
    each = [likelihood.log_predictive(sample[None], targets) for sample in samples]
    return torch.stack(each).detach().float().cpu()


# -- one function a kind ---------------------------------------------------------------------------


def _classified(
    likelihood: Likelihood, moments: Moments, samples: Tensor, targets: Any, nll: Tensor
) -> Observed:
    assert isinstance(likelihood, Classification)
    flat, labels, _ = likelihood._flatten(moments.mean, targets)
    probs = _host(flat)  # (B, T, O)
    if labels.is_floating_point():
        soft = _host(labels)
        kept = torch.ones(soft.shape[:2], dtype=torch.bool)
        label = soft.argmax(-1)
    else:
        kept = likelihood._kept(labels).cpu()
        label = torch.where(kept, labels.cpu().long(), torch.zeros_like(labels.cpu().long()))
        soft = torch.nn.functional.one_hot(label, probs.shape[-1]).double()
    top, predicted = probs.max(-1)
    hit = (predicted == label).double()
    brier = (probs - soft).square().sum(-1)
    example, position = _some(kept)
    few = probs.shape[-1] <= MOST_CLASSES
    return Observed(
        nll,
        kept.sum(1).double(),
        (hit * kept).sum(1),
        example,
        label[example, position],
        top[example, position],
        hit[example, position],
        {"brier": (brier * kept).sum(1)},
        (probs[example, position], soft[example, position]) if few else None,
    )


def _binary(
    likelihood: Likelihood, moments: Moments, samples: Tensor, targets: Any, nll: Tensor
) -> Observed:
    size = len(moments.mean)
    probs = _host(moments.mean).reshape(size, -1)  # (B, T)
    labels = _host(likelihood.prepare_targets(moments.mean, targets)).reshape(size, -1)
    top = torch.maximum(probs, 1 - probs)
    hit = ((probs >= 0.5) == (labels >= 0.5)).double()
    kept = torch.ones_like(hit, dtype=torch.bool)
    example, position = _some(kept)
    several = moments.mean.ndim == 2 and probs.shape[1] > 1  # labels, not pixels
    group = position if several else (labels[example, position] >= 0.5).long()
    classwise = None
    if moments.mean.ndim <= 2 and probs.shape[1] <= min(MOST_CLASSES, POSITIONS):
        # Each example in a row, so that a column is a label.
        classwise = (probs, labels)
    return Observed(
        nll,
        kept.sum(1).double(),
        hit.sum(1),
        example,
        group,
        top[example, position],
        hit[example, position],
        {"brier": (probs - labels).square().sum(1)},
        classwise,
    )


def _regressed(
    likelihood: Likelihood, moments: Moments, samples: Tensor, targets: Any, nll: Tensor
) -> Observed:
    size = len(moments.mean)
    mean = _host(moments.mean).reshape(size, -1)
    deviation = _host(moments.total).reshape(size, -1).sqrt()
    wanted = _host(likelihood.prepare_targets(moments.mean, targets)).reshape(size, -1)
    error = wanted - mean
    z = error / deviation
    sums = {"crps": (deviation * _standard_crps(z)).sum(1)}
    for level in CURVE_LEVELS:
        reach = half_width(level)
        sums[f"coverage_{100 * level:g}"] = (z.abs() <= reach).double().sum(1)
        sums[f"width_{100 * level:g}"] = (2 * reach * deviation).sum(1)
    sums["z_squared"] = z.square().sum(1)
    kept = torch.ones_like(error, dtype=torch.bool)
    example, position = _some(kept)
    several = moments.mean.ndim == 2 and mean.shape[1] > 1
    return Observed(
        nll,
        kept.sum(1).double(),
        error.square().sum(1),
        example,
        position if several else torch.zeros_like(position),
        None,
        error[example, position].square(),
        sums,
        z=z[example, position],
    )


def _other(
    likelihood: Likelihood, moments: Moments, samples: Tensor, targets: Any, nll: Tensor
) -> Observed:
    size = len(samples[0])
    if likelihood.score_kind.bounds_prior:  # a loss: of the samples, as `Likelihood.score_draws`
        score = torch.stack([_host(likelihood.loss(sample, targets)) for sample in samples]).mean(0)
        count = torch.ones(size, dtype=torch.float64)
    else:
        values = _host(likelihood.correct(moments.mean, targets))
        even = values.numel() and values.numel() % size == 0
        rows = values.reshape(size, -1) if even else torch.full((size, 1), math.nan)
        score = rows.sum(1)
        count = torch.full((size,), float(rows.shape[1]), dtype=torch.float64)
    nothing = torch.arange(size)
    return Observed(nll, count, score, nothing, torch.zeros(size, dtype=torch.int64))


_KINDS = {
    "classification": _classified,
    "binary": _binary,
    "regression": _regressed,
    "other": _other,
}


def half_width(level: float) -> float:
    """Of the central interval of a standard normal that holds a share ``level``."""
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))


def _standard_crps(z: Tensor) -> Tensor:
    """CRPS of a standard normal at ``z`` (Gneiting & Raftery, JASA 2007, eq. 21); in units of its deviation."""
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    return z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi)


def _some(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Example and position of the entries of ``kept (B, T)``, at most `POSITIONS` an example, evenly spaced."""
    example, position = kept.nonzero(as_tuple=True)
    most = int(kept.sum(1).max()) if kept.numel() else 0
    if most <= POSITIONS:
        return example, position
    chosen = []
    for number in range(len(kept)):
        here = kept[number].nonzero()[:, 0]
        if len(here) > POSITIONS:
            here = here[torch.linspace(0, len(here) - 1, POSITIONS).round().long()]
        chosen.append(torch.stack([torch.full_like(here, number), here], 1))
    both = torch.cat(chosen)
    return both[:, 0], both[:, 1]


def _host(values: Tensor) -> Tensor:
    return values.detach().cpu().double()
