"""Calibration and selective prediction from confidences and hits: each figure with its jackknife."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nullbayes.posterior.measuring.estimates import (
    Estimate,
    from_sums,
    groups_of,
    jackknife,
    ratio,
)

BINS = 15
RISK = 0.05


@dataclass(frozen=True)
class Answers:
    """Answers with the confidence in each, and whether it was right.

    Attributes:
        confidence: float64 ``(K,)`` in [0, 1].
        hit: float64 ``(K,)``, 1 where right.
        example: int64 ``(K,)``, which example an answer belongs to: those of one are not independent.
        examples: how many examples there are.
    """

    confidence: Tensor
    hit: Tensor
    example: Tensor
    examples: int

    def __len__(self) -> int:
        return len(self.hit)

    def where(self, mask: Tensor) -> Answers:
        """Those that ``mask (K,)`` lets through; examples keep their numbers."""
        return Answers(self.confidence[mask], self.hit[mask], self.example[mask], self.examples)

    @cached_property
    def groups(self) -> Tensor:
        return groups_of(self.example, self.examples)

    @cached_property
    def _descending(self) -> tuple[Tensor, Tensor, Tensor]:
        """Confidence, hit and group, the most confident first."""
        order = self.confidence.argsort(descending=True, stable=True)
        return self.confidence[order], self.hit[order], self.groups[order]

    # -- calibration -----------------------------------------------------------------------------

    def bin_sums(self) -> Tensor:
        """``(G, BINS, 3)``: count, confidence and hits of each group in each bin of equal width."""
        return bin_sums(self.confidence, self.hit, self.groups)

    def ece(self) -> Estimate:
        """Expected calibration error over `BINS` bins of equal width (Guo et al. 2017)."""
        return from_sums(binned_error, self.bin_sums())

    def adaptive_ece(self) -> Estimate:
        """The same over bins with equal numbers of answers (Nixon et al., CVPR workshops 2019)."""
        confidence, hit, groups = self._descending

        def statistic(mask: Tensor) -> float:
            gap = (confidence - hit)[mask]
            n = len(gap)
            if not n:
                return math.nan
            edges = torch.linspace(0, n, min(BINS, n) + 1).round().long()
            running = torch.cat([gap.new_zeros(1), gap.cumsum(0)])
            return float(running[edges].diff().abs().sum()) / n

        return jackknife(statistic, groups)

    def gap(self) -> Estimate:
        """Mean confidence minus accuracy: above zero is overconfident."""
        totals = torch.zeros(self.examples, dtype=torch.float64)
        counts = torch.zeros_like(totals)
        totals.index_add_(0, self.example, self.confidence - self.hit)
        counts.index_add_(0, self.example, torch.ones_like(self.hit))
        held = counts > 0
        return ratio(totals[held], counts[held])

    def reliability(self) -> dict[str, list[float]]:
        """Mean confidence, accuracy and count of each bin, as `nullbayes.metrics.reliability_curve` has them."""
        count, confidence, hit = self.bin_sums().sum(0).unbind(1)
        filled = count.clamp_min(1)
        return {
            "confidence": (confidence / filled).tolist(),
            "accuracy": (hit / filled).tolist(),
            "count": count.tolist(),
        }

    # -- selective prediction --------------------------------------------------------------------

    def aurc(self) -> Estimate:
        """Area under the risk-coverage curve; lower is better. As `nullbayes.metrics.aurc`, ties answered together."""
        confidence, hit, groups = self._descending

        def statistic(mask: Tensor) -> float:
            coverage, risk = _risk_coverage(confidence[mask], hit[mask])
            return float((risk * torch.cat([coverage.new_zeros(1), coverage]).diff()).sum())

        return jackknife(statistic, groups)

    def coverage_at_risk(self) -> Estimate:
        """The largest share of inputs that can be answered, the most confident first, with at most 5 % errors."""
        confidence, hit, groups = self._descending

        def statistic(mask: Tensor) -> float:
            coverage, risk = _risk_coverage(confidence[mask], hit[mask])
            allowed = coverage[risk <= RISK]
            return float(allowed.max()) if len(allowed) else 0.0

        return jackknife(statistic, groups)

    def risk_coverage(self, points: int = 200) -> dict[str, list[float]]:
        """The curve, thinned for drawing."""
        coverage, risk = _risk_coverage(*self._descending[:2])
        if len(coverage) > points:
            keep = torch.linspace(0, len(coverage) - 1, points).round().long()
            coverage, risk = coverage[keep], risk[keep]
        return {"coverage": coverage.tolist(), "risk": risk.tolist()}


def _risk_coverage(confidence: Tensor, hit: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage and risk after each run of equal confidences, the most confident first."""
    n = len(hit)
    wrong = (1 - hit).cumsum(0)
    answered = torch.arange(1, n + 1, dtype=torch.float64)
    last = torch.ones(n, dtype=torch.bool)
    last[:-1] = confidence.diff() != 0
    return (answered / n)[last], (wrong / answered)[last]


def bin_sums(confidence: Tensor, hit: Tensor, groups: Tensor, bins: int = BINS) -> Tensor:
    """``(G, bins, 3)`` sums of one, confidence and hit over bins of equal width, by group ``(K,)``."""
    count = int(groups.max()) + 1 if len(groups) else 1
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    index = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, bins - 1)
    values = torch.stack([torch.ones_like(hit), confidence, hit], 1)
    sums = torch.zeros(count * bins, 3, dtype=torch.float64)
    return sums.index_add_(0, groups * bins + index, values).reshape(count, bins, 3)


def binned_error(sums: Tensor) -> float:
    """``Σ |confidence - hits| / Σ count`` of sums ``(..., bins, 3)``; the mean of those not empty."""
    count, confidence, hit = sums.unbind(-1)
    total = count.sum(-1)
    gap = (confidence - hit).abs().sum(-1)
    filled = total > 0
    if not bool(filled.any()):
        return math.nan
    return float((gap[filled] / total[filled]).mean())
