"""Estimates that know their standard error, and that of their difference.

Every estimate carries *parts*: deviations whose squares sum to its variance. Two estimates from the same examples have
their parts in the same order, so the parts of a difference are the differences of the parts, and what both share drops
out: a paired comparison, whatever the figure is.

Parts are influences for ratios of sums (the delta method), structural components for AUROC (DeLong, DeLong,
Clarke-Pearson, *Comparing the areas under two or more correlated receiver operating characteristic curves*, Biometrics
1988), and replicates of a delete-a-group jackknife for all else (Shao & Tu, *The Jackknife and Bootstrap*, 1995).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.metrics import ood_metrics

#: groups of a jackknife: example n is in group n mod GROUPS
GROUPS = 50
#: a difference counts from so many of its standard errors on
SIGNIFICANT = 2.0
SAME, BETTER, WORSE = "same", "better", "worse"

Statistic = Callable[[Tensor], float]  # of the entries that a mask (N,) lets through


@dataclass(frozen=True)
class Estimate:
    """A figure with what its standard error is made of.

    Attributes:
        value: the figure; NaN where nothing was counted.
        parts: float64 ``(K,)``; their squares sum to the variance of ``value``. Empty: no error is known.
    """

    value: float
    parts: Tensor

    @property
    def error(self) -> float:
        """The standard error; NaN where it cannot be told (a single example)."""
        if not self.parts.numel():
            return math.nan
        return float(self.parts.square().sum().sqrt())

    def minus(self, other: Estimate) -> Estimate:
        """The difference to an estimate from the same examples, paired."""
        parts = self.parts
        same = parts.shape == other.parts.shape
        return Estimate(self.value - other.value, parts - other.parts if same else parts[:0])


def verdict(difference: float, error: float, *, higher_is_better: bool, digits: int) -> str:
    """``"better"`` or ``"worse"`` where a paired difference exceeds two of its standard errors, else ``"same"``.

    The same, too, where it is not more than one in the last of the ``digits`` that are shown: two figures that read
    alike are not called different, and rounding in the network's
    own precision can be many standard errors.
    """
    if not math.isfinite(difference) or not math.isfinite(error):
        return SAME
    if abs(difference) <= max(SIGNIFICANT * error, 10.0**-digits):
        return SAME
    return BETTER if (difference > 0) == higher_is_better else WORSE


# -- ratios of sums --------------------------------------------------------------------------------


def ratio(totals: Tensor, counts: Tensor) -> Estimate:
    """``Σ totals / Σ counts`` of independent examples ``(N,)``: a mean over what they hold, however many each."""
    totals, counts = totals.double(), counts.double()
    n, count = len(totals), float(counts.sum())
    if not count:
        return Estimate(math.nan, totals[:0])
    value = float(totals.sum()) / count
    if n < 2:
        return Estimate(value, totals[:0])
    influence = (totals - value * counts) * (n / count)
    return Estimate(value, influence / math.sqrt(n * (n - 1)))


def mean(values: Tensor) -> Estimate:
    """The mean of ``(N,)``."""
    return ratio(values, torch.ones_like(values, dtype=torch.float64))


def root(estimate: Estimate) -> Estimate:
    """The square root of an estimate: RMSE from a mean squared error."""
    value = math.sqrt(estimate.value) if estimate.value >= 0 else math.nan
    return Estimate(value, estimate.parts / (2 * value) if value else 0 * estimate.parts)


def averaged(estimates: Sequence[Estimate], inside: int) -> Estimate:
    """The mean of two-sample estimates that share their first sample of ``inside`` and differ in the second."""
    k = len(estimates)
    value = sum(e.value for e in estimates) / k
    if any(len(e.parts) < inside for e in estimates):
        return Estimate(value, estimates[0].parts[:0])
    common = torch.stack([e.parts[:inside] for e in estimates]).mean(0)
    return Estimate(value, torch.cat([common, *(e.parts[inside:] / k for e in estimates)]))


# -- everything else -------------------------------------------------------------------------------


def groups_of(examples: Tensor, count: int) -> Tensor:
    """The jackknife's group of each entry, from the number of its example and how many examples there are."""
    return examples % max(1, min(GROUPS, count))


def jackknife(statistic: Statistic, groups: Tensor) -> Estimate:
    """``statistic`` of all entries, with replicates that leave one of the ``groups (N,)`` out."""
    everything = torch.ones(len(groups), dtype=torch.bool)
    value = statistic(everything)
    return _replicated(value, [statistic(groups != g) for g in groups.unique().tolist()])


def _replicated(value: float, replicates: Sequence[float]) -> Estimate:
    values = torch.tensor(replicates, dtype=torch.float64)
    k = len(values)
    if k < 2 or not bool(values.isfinite().all()):
        return Estimate(value, values[:0])
    return Estimate(value, math.sqrt((k - 1) / k) * (values - values.mean()))


def from_sums(statistic: Callable[[Tensor], float], sums: Tensor) -> Estimate:
    """A statistic of additive sums ``(G, ...)``, one entry a group, with its jackknife."""
    total = sums.sum(0)
    used = [s for s in sums if bool((s != 0).any())]
    return _replicated(statistic(total), [statistic(total - s) for s in used])


# -- two samples -----------------------------------------------------------------------------------


def auroc(inside: Tensor, outside: Tensor) -> Estimate:
    """Area under the ROC curve of a score that should be larger for ``outside (M,)`` than for ``inside (N,)``.

    Parts: ``N`` of the inside, then ``M`` of the outside (DeLong et al. 1988).
    """
    inside, outside = inside.double(), outside.double()
    value = ood_metrics(inside, outside)["auroc"]
    n, m = len(inside), len(outside)
    if n < 2 or m < 2:
        return Estimate(value, inside[:0])
    above = 1 - _rank(outside, inside)
    below = _rank(inside, outside)
    parts = [
        (above - above.mean()) / math.sqrt(n * (n - 1)),
        (below - below.mean()) / math.sqrt(m * (m - 1)),
    ]
    return Estimate(value, torch.cat(parts))


def _rank(among: Tensor, values: Tensor) -> Tensor:
    """Share of ``among`` below each value, ties counting half."""
    ordered = among.sort().values
    lower = torch.searchsorted(ordered, values, right=False).double()
    upper = torch.searchsorted(ordered, values, right=True).double()
    return (lower + upper) / (2 * len(ordered))


def fpr95(inside: Tensor, outside: Tensor) -> Estimate:
    """Share of inside inputs flagged where 95 % of the outside ones are; parts: the jackknife over either sample."""
    inside, outside = inside.double(), outside.double()
    n, m = len(inside), len(outside)
    value = ood_metrics(inside, outside)["fpr95"]
    if n < 2 or m < 2:
        return Estimate(value, inside[:0])
    groups_in, groups_out = groups_of(torch.arange(n), n), groups_of(torch.arange(m), m)
    threshold = _flags_95(outside)
    first = [_share_at(inside[groups_in != g], threshold) for g in groups_in.unique().tolist()]
    second = [
        _share_at(inside, _flags_95(outside[groups_out != g])) for g in groups_out.unique().tolist()
    ]
    parts = [_replicated(value, values).parts for values in (first, second)]
    return Estimate(value, torch.cat(parts))


def _flags_95(outside: Tensor) -> float:
    """The largest threshold at or above which 95 % of ``outside`` lie."""
    m = len(outside)
    return float(outside.kthvalue(m - math.ceil(0.95 * m - 1e-9) + 1).values)


def _share_at(inside: Tensor, threshold: float) -> float:
    return float((inside >= threshold).double().mean())


# -- a threshold -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """A value that a score exceeds for a share ``rate`` of ordinary inputs.

    Attributes:
        value: the order statistic number ``⌈(n + 1)(1 - rate)⌉``: a further input of the same kind exceeds it with
            probability at most ``rate`` (Vovk, Gammerman, Shafer, 2005). None: ``n`` is too small for this rate.
        low, high: order statistics that hold the quantile between them with probability 95 % or more; None where
            that end lies beyond the data.
    """

    rate: float
    value: float | None
    low: float | None
    high: float | None


def threshold(scores: Tensor, rate: float) -> Threshold:
    """The operating threshold of a score from ordinary inputs ``(n,)``."""
    ordered = scores.double().sort().values
    n, q = len(ordered), 1 - rate
    k = math.ceil((n + 1) * q - 1e-9)
    # Number of inputs below the true quantile: binomial. P(x_(low) <= quantile <= x_(high)) >= 0.95.
    number = torch.arange(n + 1, dtype=torch.float64)
    log_p = (
        torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64))
        - torch.lgamma(number + 1)
        - torch.lgamma(n - number + 1)
        + number * math.log(q)
        + (n - number) * math.log(rate)
    )
    below = log_p.exp().cumsum(0)  # P(X <= j)
    low = int((below <= 0.025).sum())  # the first j with P(X <= j) > 0.025
    high = int((below < 0.975).sum()) + 1
    return Threshold(
        rate,
        float(ordered[k - 1]) if 1 <= k <= n else None,
        float(ordered[low - 1]) if low >= 1 else None,
        float(ordered[high - 1]) if high <= n else None,
    )
