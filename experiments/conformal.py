"""Sets of classes with a level of coverage, by split conformal prediction and from probabilities as they are.

Conformal sets contain the right class with a probability of ``level`` or more, whatever the probabilities are worth,
as long as what is predicted and what they were set on are drawn alike; nothing is promised of shifted inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def threshold(scores: Tensor, level: float) -> float:
    """The ``⌈(n + 1) level⌉``-th smallest of ``scores (n,)``; infinite where there are too few of them.

    Vovk, Gammerman, Shafer, *Algorithmic Learning in a Random World*, 2005.
    """
    rank = math.ceil((len(scores) + 1) * level - 1e-9)
    return float(scores.sort().values[rank - 1]) if rank <= len(scores) else math.inf


def likely(p: Tensor) -> Tensor:
    """``1 - p (N, C)``: sets of all classes above one probability, of the least size on average.

    Sadinle, Lei, Wasserman, *Least ambiguous set-valued classifiers with bounded error levels*, JASA 2019.
    """
    return 1 - p


def adaptive(p: Tensor, u: Tensor) -> Tensor:
    """What more likely classes hold, and a share ``u (N,)`` of the class itself: ``(N, C)``.

    Romano, Sesia, Candès, *Classification with valid and adaptive coverage*, NeurIPS 2020, eq. 8: more classes where
    probabilities are more even. With ``u`` uniform in [0, 1] its level is exact where probabilities are right.
    """
    ordered, index = p.sort(dim=1, descending=True)
    above = ordered.cumsum(1) - ordered
    return torch.empty_like(p).scatter(1, index, above + u[:, None] * ordered)


def regularised(p: Tensor, u: Tensor, weight: float = 0.1, free: int = 1) -> Tensor:
    """The same plus ``weight`` for each class beyond the first ``free``: fewer unlikely classes.

    Angelopoulos, Bates, Jordan, Malik, *Uncertainty sets for image classifiers using conformal prediction*, ICLR 2021.
    """
    rank = p.argsort(dim=1, descending=True).argsort(dim=1) + 1
    return adaptive(p, u) + weight * (rank - free).clamp_min(0)


def by_mass(p: Tensor, level: float) -> Tensor:
    """The fewest classes whose probabilities add up to ``level``: ``(N, C)`` booleans. No validation data."""
    ordered, index = p.sort(dim=1, descending=True)
    wanted = (ordered.cumsum(1) - ordered) < level
    return torch.zeros_like(wanted).scatter(1, index, wanted)


def sets(scores: Tensor, at: float) -> Tensor:
    """Classes whose score is ``at`` or less: ``(N, C)`` booleans."""
    return scores <= at


def figures(chosen: Tensor, targets: Tensor) -> dict[str, float]:
    """Share of sets that hold the right class, mean size, and the share of sets without any class."""
    sizes = chosen.sum(1).double()
    held = chosen.gather(1, targets[:, None]).double()
    return {
        "coverage": float(held.mean()),
        "size": float(sizes.mean()),
        "empty": float((sizes == 0).double().mean()),
    }
