"""What sums of outer products cost, and which way of multiplying them is the cheapest: counted from their sizes."""

from __future__ import annotations

from torch import Tensor

from nullbayes.jacobian.factors import contraction
from nullbayes.jacobian.factors.base import Factor


class OuterCosts(Factor):
    """The counted costs of an `OuterFactor`, whose sizes these are.

    Attributes:
        tokens, groups, width_in, width_out: ``T``, ``G``, ``I`` with the constant input of a bias, ``O``.
        g: output gradients ``(B, C, T, G, O)``.
    """

    tokens: int
    groups: int
    width_in: int
    width_out: int
    g: Tensor

    @property
    def product_flops(self) -> float:
        b, c, t, o = self.examples, self.cotangents, self.tokens, self.groups * self.width_out
        layerwise = 2.0 * b * t * o * (self.width_in + c)
        rows = 2.0 * b * c * o * self.width_in
        return min(layerwise, rows) if t > 1 else layerwise

    @property
    def gram_flops_per_pair(self) -> float:
        costs = [contraction.pairs_cost(self)]
        if self.tokens > 1:
            costs += [contraction.rows_cost(self), contraction.folded_cost(self)]
        return 2.0 * self.groups * min(costs)

    @property
    def written_flops(self) -> float:
        size = self.tokens * self.groups * self.width_out * self.width_in
        return 2.0 * self.num_rows * size if self.gram_by_rows else 0.0

    @property
    def captured_flops(self) -> float:
        size = self.tokens * self.groups * self.width_out * self.width_in
        return 2.0 * self.examples * (1 + self.cotangents) * size

    @property
    def written_rows_bytes(self) -> int | None:
        if not self.gram_by_rows:
            return None
        width = self.groups * self.width_out * self.width_in
        return self.num_rows * width * self.g.element_size()

    @property
    def prefers_dense(self) -> bool:
        """Whether written-out rows are no larger than what is stored now.

        Convolutions with many positions and few weights: the rows are smaller than the patches,
        and a Gram matrix of written-out rows is one matrix product.
        """
        dense = self.cotangents * self.groups * self.width_out * self.width_in
        stored = self.tokens * self.groups * (self.width_in + self.cotangents * self.width_out)
        return self.tokens > 1 and dense <= 1.5 * stored

    @property
    def gram_by_rows(self) -> bool:
        """Whether a Gram block is cheaper from written-out rows than by contracting tokens."""
        contract = min(contraction.pairs_cost(self), contraction.folded_cost(self))
        return self.tokens > 1 and contraction.rows_cost(self) <= contract
