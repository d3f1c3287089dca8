"""Standard normal numbers of which sample ``s`` depends on ``(seed, s)`` alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nullbayes.audit.examples import prior_vectors
from nullbayes.jacobian.operator import RowOperator
from nullbayes.solvers.block_cg import row_norms


def generator_for(seed: int, index: int) -> torch.Generator:
    """The random stream of sample ``index``: independent of all others and of how many there are."""
    words = np.random.SeedSequence([seed, index]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


def standard_normal(
    seed: int, indices: range, columns: int, rows: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """``v (S, columns)`` in the dtype of ``like`` and ``ξ (S, rows)`` float64, on its device."""
    v = torch.empty(len(indices), columns, dtype=like.dtype)
    noise = torch.empty(len(indices), rows, dtype=torch.float64)
    for i, index in enumerate(indices):
        generator = generator_for(seed, index)
        v[i].normal_(generator=generator)
        noise[i].normal_(generator=generator)
    return v.to(like.device), noise.to(like.device)


@dataclass(frozen=True)
class Remembered:
    """What a fit needs of prior samples ``v (S, P)`` after their projection, which may write over them.

    Attributes:
        image: ``A v (S, M)`` by the rows of this process.
        squared: sum of squares of all of them.
        few: the first ``(k, P)``, a copy, for the audit.
    """

    image: Tensor
    squared: float
    few: Tensor

    @staticmethod
    def of(vectors: Tensor, operator: RowOperator, model: nn.Module) -> Remembered:
        """To be asked for before the projection; ``operator``: all rows."""
        count = prior_vectors(vectors, model)
        image = operator.mine.matvec(vectors)
        squared = float(row_norms(vectors).square().sum())
        return Remembered(image, squared, vectors[:count].clone())
