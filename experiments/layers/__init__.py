"""The layer null space beside its rivals: predictions and scores on every task of the evaluation, and on three more.

Accuracy, NLL, ECE, joint log-likelihood of groups of ten inputs, AUROC of near and of far sets. Tuning and judging
problems are apart, written down in :mod:`experiments.detection.families` and :mod:`experiments.layers.problems`.
"""

from __future__ import annotations

from experiments.layers.running import NAME, jobs, report

__all__ = ["NAME", "jobs", "report"]
