"""Second moments of a wide layer in less memory: frequent directions.

Rows ``B (ℓ, I)`` with ``BᵀB ≼ C ≼ BᵀB + Δ I``, where ``Δ`` adds up what was cut off; it is at most ``‖A‖_F² / ℓ``
(Ghashami, Liberty, Phillips & Woodruff, *Frequent Directions*, SIAM J. Comput. 2016). The posterior takes the upper
bound ``BᵀB + Δ I`` for ``C``: no direction then looks freer than it is. While nothing was cut off (``Δ = 0``: inputs
span at most ``ℓ`` directions) it is exact, the null space too; afterwards no direction is surely free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.common.decompositions import svd


class Sketch:
    """``G`` sketches of rank at most ``rank`` over ``I`` columns, float64."""

    def __init__(self, groups: int, columns: int, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.rows = torch.zeros(groups, 0, columns, dtype=torch.float64, device=device)  # (G, k, I)
        self.cut = torch.zeros(groups, dtype=torch.float64, device=device)  # Δ (G,)
        self.total = torch.zeros(groups, dtype=torch.float64, device=device)  # trace of C (G,)

    def add(self, a: Tensor, own: int, column: int | None) -> None:
        """Add inputs ``a (N, G, own)`` and, where the use has a bias, their constant ones in ``column``."""
        columns = self.rows.shape[2]
        for part in a.split(max(1, self.rank)):
            x = torch.zeros(*part.shape[:2], columns, dtype=torch.float64, device=self.rows.device)
            x[..., :own] = part
            if column is not None:
                x[..., own + column] = 1.0
            self._append(x.transpose(0, 1))

    def _append(self, x: Tensor) -> None:
        """Rows ``(G, n, I)`` more."""
        self.total = self.total + x.square().sum((1, 2))
        self.rows = torch.cat([self.rows, x], dim=1)
        if self.rows.shape[1] >= 2 * self.rank and bool(self.total.isfinite().all()):
            self._shrink()

    def _shrink(self) -> None:
        """Back to ``rank`` rows; what the next one has is taken off all of them and added to ``cut``."""
        if self.rank >= self.rows.shape[2]:  # nothing has to go
            self.rows = torch.linalg.qr(self.rows, mode="r").R
            return
        _, sizes, directions = svd(self.rows)
        squares = sizes.square()
        off = (
            squares[:, self.rank]
            if squares.shape[1] > self.rank
            else squares.new_zeros(len(squares))
        )
        # What rounding leaves of directions that were never there is not a loss.
        floor = torch.finfo(torch.float64).eps * self.rows.shape[2] * squares[:, 0]
        off = torch.where(off <= floor, torch.zeros_like(off), off)
        kept = (squares[:, : self.rank] - off[:, None]).clamp_min(0)
        self.rows = kept.sqrt()[..., None] * directions[:, : self.rank]
        self.cut = self.cut + off

    def plus(self, other: Sketch) -> Sketch:
        """The sketch of both sets of inputs; what was cut off adds up."""
        out = Sketch(self.rows.shape[0], self.rows.shape[2], self.rank, self.rows.device)
        out.rows = torch.cat([self.rows, other.rows], dim=1)
        out.cut, out.total = self.cut + other.cut, self.total + other.total
        if out.rows.shape[1] > out.rank:
            out._shrink()
        return out

    @property
    def trace(self) -> Tensor:
        """Of the exact ``C``: ``(G,)``."""
        return self.total

    @property
    def nbytes(self) -> int:
        return 2 * self.rank * self.rows.shape[0] * self.rows.shape[2] * 8

    def spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal directions ``(G, I, k)``, their eigenvalues ``(G, k)`` and that of all others ``(G,)``."""
        if not self.rows.shape[1]:
            groups, _, columns = self.rows.shape
            return self.rows.new_zeros(groups, columns, 0), self.rows.new_zeros(groups, 0), self.cut
        _, sizes, directions = svd(self.rows)
        return directions.mT, sizes.square() + self.cut[:, None], self.cut
