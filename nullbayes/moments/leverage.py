"""Ridge leverage ``aᵀ (C + δ I)⁻¹ a`` of an input at a block: how little the training inputs say of it.

Of a last layer's features this is a Mahalanobis distance about the origin; of a looked-up row, ``1 / (c + δ)``.

The root of ``(C + δ I)⁻¹`` is one matrix of the network's own precision, so a leverage is one product. Where it is wide
that product costs more than the layer; then 128 random orthogonal directions of its ``I`` stand for all (Johnson &
Lindenstrauss 1984): a leverage has a relative standard error of ``√(2 / 128 · (1 - 128 / I))``, at most an eighth, the
same directions for all inputs. Of LeNet's scores that is a twenty-fifth of their spread, and a thousandth of AUROC.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.moments.factor import DenseFactor, Edge, Factor, LowRankFactor, factorise
from nullbayes.moments.second import BlockMoments

# Columns up to which the root is taken whole, and how many directions stand for a wider one.
WHOLE, DIRECTIONS = 256, 128


class Leverage:
    """Leverages of inputs at one block, from its sums. ``edge`` must not be exact.

    Args:
        factor: of these sums at this edge, where it is known.
        directions: that stand for the root of a block wider than 256 columns; None: all of it.
    """

    def __init__(
        self,
        moments: BlockMoments,
        edge: Edge,
        columns: int,
        dtype: torch.dtype,
        factor: Factor | None = None,
        directions: int | None = DIRECTIONS,
    ) -> None:
        self.rows: Tensor | None = None
        self.low: LowRankFactor | None = None
        self.root: Tensor | None = None  # (G, k, I), of `(C + δ I)⁻¹`
        self.dtype = dtype
        if moments.rows is not None:
            self.rows = (moments.rows.double() + edge.rows).reciprocal().to(dtype)
        scale = edge.inputs.reciprocal()  # (G,)
        self.scale = scale.to(dtype)
        # By bias column: `(own, k)` of each group, and what a constant one adds `(G, 1, k)`.
        self._parts: dict[tuple[int, int | None], tuple[Tensor, Tensor | None]] = {}
        if moments.inputs is None:
            return
        found = factor
        if not isinstance(found, (DenseFactor, LowRankFactor)):
            found = factorise(BlockMoments(moments.inputs, None), edge, columns)
        if isinstance(found, LowRankFactor):
            self.low = found
            return
        assert isinstance(found, DenseFactor)
        root = found.root
        if directions is not None and columns > WHOLE:
            root = _sketched(root, directions)
        self.root = (root * scale.sqrt()[:, None, None]).to(dtype)

    def lengths(self, a: Tensor, own: int, column: int | None) -> tuple[Tensor, Tensor]:
        """Of inputs ``(*lead, G, I)``: roots of their leverages, and their own lengths; ``(n,)`` each, ``lead`` flat.

        Without the constant one of a bias in the second. One product and two norms: of a small layer the calls cost
        more than the numbers.
        """
        groups = a.shape[-2]
        if groups > 1 or self.low is not None:
            x = a[..., :own].to(self.dtype)
            long = torch.linalg.vector_norm(x, dim=(-1, -2)).reshape(-1)
            return self.of(a, own, column).sqrt().reshape(-1), long
        x = a.reshape(-1, a.shape[-1])
        if x.shape[1] != own:
            x = x[:, :own]
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        weight, one = self.part(own, column)
        y = torch.mm(x, weight[0]) if one is None else torch.addmm(one[0], x, weight[0])
        # Columns lie together: norms along them take four times as long.
        if x.stride(0) == 1 < x.stride(1):
            return torch.linalg.vector_norm(y, dim=1), torch.mul(x, x).sum(1).sqrt_()
        return torch.linalg.vector_norm(y, dim=1), torch.linalg.vector_norm(x, dim=1)

    def of(self, a: Tensor, own: int, column: int | None) -> Tensor:
        """Inputs ``(*lead, G, I)`` -> ``(*lead)``, summed over the groups."""
        lead, groups = a.shape[:-2], a.shape[-2]
        if groups == 1 and self.low is None:
            return self.lengths(a, own, column)[0].square().reshape(lead)
        flat = a.reshape(-1, groups, a.shape[-1])[..., :own].to(self.dtype)
        if self.low is not None:
            return self._of_low(flat.transpose(0, 1), own, column).reshape(lead)
        weight, one = self.part(own, column)
        y = flat.transpose(0, 1) @ weight
        if one is not None:
            y = y + one
        return torch.linalg.vector_norm(y, dim=(0, 2)).square().reshape(lead)

    def part(self, own: int, column: int | None) -> tuple[Tensor, Tensor | None]:
        """Of a root ``(G, own, k)`` as it multiplies inputs, and what a constant one adds ``(G, 1, k)``."""
        if (own, column) not in self._parts:
            assert self.root is not None
            one = None if column is None else self.root[:, None, :, own + column].contiguous()
            self._parts[own, column] = (self.root[:, :, :own].mT.contiguous(), one)
        return self._parts[own, column]

    def _of_low(self, x: Tensor, own: int, column: int | None) -> Tensor:
        assert self.low is not None
        whole = x.new_zeros(*x.shape[:2], self.low.directions.shape[1])
        whole[..., :own] = x
        if column is not None:
            whole[..., own + column] = 1.0
        squares = self.low.whiten(whole).square().sum(2)
        return (squares * self.scale[:, None]).sum(0)

    def of_rows(self, index: Tensor) -> Tensor:
        """Looked-up rows ``(*lead)`` -> ``(*lead)``."""
        assert self.rows is not None
        return self.rows[index.long()]


def _sketched(root: Tensor, directions: int) -> Tensor:
    """``(G, k, I)`` whose products with a vector are as long as those of ``root (G, I, I)`` on average over ``k``."""
    columns = root.shape[1]
    normal = torch.randn(columns, directions, generator=torch.Generator().manual_seed(columns))
    basis = torch.linalg.qr(normal.to(root)).Q
    return (columns / directions) ** 0.5 * (basis.T @ root)
