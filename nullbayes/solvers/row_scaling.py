"""Rows with weights: brought closer to one length, or some of them left out."""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.jacobian.operator import JacobianOperator, RowOperator, Tick
from nullbayes.solvers.preconditioners import row_square_norms

# Rows shorter than this share of the mean square are not lengthened further.
SHORTEST = 1e-4


class RowWeighted(RowOperator):
    """``D A`` with the diagonal ``weights (M,)``; a weight of zero leaves a row out.

    Args:
        squares: ``‖A_m‖² (M,)`` float64 where they are known: to find them takes as long as a pass.
    """

    def __init__(
        self, operator: RowOperator, weights: Tensor, squares: Tensor | None = None
    ) -> None:
        inner: RowOperator = operator
        mine: Tensor = weights
        if isinstance(operator, RowWeighted):
            inner, mine = operator.operator, operator.weights * weights
            squares = operator.squares
        self.squares: Tensor | None = squares
        self.operator: RowOperator = inner
        self.weights: Tensor = mine.to(inner.dtype)
        self.shape, self.dtype, self.device = inner.shape, inner.dtype, inner.device
        self.processes = inner.processes

    def squared_norms(self) -> Tensor:
        """``‖D_m A_m‖²`` of every row: ``(M,)`` float64."""
        squares = row_square_norms(self.operator) if self.squares is None else self.squares
        return squares * self.weights.double().square()

    def matvec(self, vectors: Tensor) -> Tensor:
        return self.operator.matvec(vectors) * self.weights

    def rmatvec(self, weights: Tensor) -> Tensor:
        return self.operator.rmatvec(weights * self.weights)

    def gram(self, tick: Tick | None = None) -> Tensor:
        weights = self.weights.double()
        return self.operator.gram(tick).mul_(weights[:, None]).mul_(weights)

    def subset(self, rows: int, generator: torch.Generator) -> RowWeighted:
        some = self.operator.subset(rows, generator)
        index = some.chosen
        weights = self.weights if index is None else self.weights[index.to(self.device)]
        return RowWeighted(some, weights)

    def image_norms(self, vectors: Tensor, row_scale: Tensor | None = None) -> Tensor:
        weights = self.weights if row_scale is None else self.weights * row_scale
        return self.operator.image_norms(vectors, weights)

    def normal(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.operator, JacobianOperator):
            return self.operator.normal(vectors, self.weights)
        return super().normal(vectors)


class RowScaled(RowWeighted):
    """``D A`` with ``D = ‖row‖^-power``, scaled so that the sum of squares of the rows stays.

    An iteration that ends early has removed what its rows weigh most. Rows of confident examples are
    short, so without this their outputs drift far before they count.
    """

    def __init__(self, operator: RowOperator, power: float) -> None:
        squares = row_square_norms(operator)
        scale = (squares + SHORTEST * squares.mean()).clamp(min=1e-300).pow(-power / 2)
        kept = squares.sum() / (squares * scale.square()).sum().clamp(min=1e-300)
        super().__init__(operator, scale * kept.sqrt(), squares)
