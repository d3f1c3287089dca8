"""Ridge leverage ``aᵀ (C + δ I)⁻¹ a`` of an input at a block: how little the training inputs say of it.

Of a last layer's features this is a Mahalanobis distance about the origin; of a looked-up row, ``1 / (c + δ)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.moments.factor import DenseFactor, Edge, LowRankFactor, factorise
from nullbayes.moments.second import BlockMoments


class Leverage:
    """Leverages of inputs at one block, from its sums. ``edge`` must not be exact."""

    def __init__(self, moments: BlockMoments, edge: Edge, columns: int, dtype: torch.dtype) -> None:
        self.rows: Tensor | None = None
        self.factor: DenseFactor | LowRankFactor | None = None
        if moments.rows is not None:
            self.rows = (moments.rows.double() + edge.rows).reciprocal().to(dtype)
        if moments.inputs is not None:
            found = factorise(BlockMoments(moments.inputs, None), edge, columns)
            assert isinstance(found, (DenseFactor, LowRankFactor))
            self.factor = found
        self.scale = edge.inputs.reciprocal().to(dtype)  # (G,)
        self.dtype = dtype

    def relative(self, a: Tensor, own: int, column: int | None) -> Tensor:
        """Leverage of an input over its squared size, the constant one of a bias included: of its direction alone."""
        squares = a[..., :own].to(self.dtype).square().sum((-1, -2))
        size = squares + (0.0 if column is None else 1.0)
        return self.of(a, own, column) / size.clamp_min(torch.finfo(self.dtype).tiny)

    def of(self, a: Tensor, own: int, column: int | None) -> Tensor:
        """Inputs ``(*lead, G, I)`` -> ``(*lead)``, summed over the groups."""
        assert self.factor is not None
        lead, groups = a.shape[:-2], a.shape[-2]
        flat = a.reshape(-1, groups, a.shape[-1])[..., :own]
        x = flat.to(self.dtype).transpose(0, 1)  # (G, n, own)
        if isinstance(self.factor, DenseFactor):
            root = self.factor.root.to(self.dtype)
            y = x @ root[:, :, :own].mT
            if column is not None:
                y = y + root[:, None, :, own + column]
            squares = y.square().sum(2)
        else:
            whole = x.new_zeros(*x.shape[:2], self.factor.directions.shape[1])
            whole[..., :own] = x
            if column is not None:
                whole[..., own + column] = 1.0
            squares = self.factor.whiten(whole).square().sum(2)
        return (squares * self.scale[:, None]).sum(0).reshape(lead)

    def of_rows(self, index: Tensor) -> Tensor:
        """Looked-up rows ``(*lead)`` -> ``(*lead)``."""
        assert self.rows is not None
        return self.rows[index.long()]
