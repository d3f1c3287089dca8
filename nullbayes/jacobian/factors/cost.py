"""Floating-point operations of products with captured rows, counted and not timed."""

from __future__ import annotations

from nullbayes.jacobian.factors import contraction
from nullbayes.jacobian.factors.base import Factor, LookupFactor
from nullbayes.jacobian.factors.outer import OuterFactor


def product_flops(factor: Factor) -> float:
    """Of ``A v`` for one of many vectors; ``Aᵀ w`` costs the same."""
    b, c = factor.examples, factor.cotangents
    if isinstance(factor, OuterFactor):
        t, o = factor.tokens, factor.groups * factor.width_out
        layerwise = 2.0 * b * t * o * (factor.width_in + c)
        rows = 2.0 * b * c * o * factor.width_in
        return min(layerwise, rows) if t > 1 else layerwise
    if isinstance(factor, LookupFactor):
        return 2.0 * b * c * factor.tokens * factor.dim
    return 2.0 * b * c * factor.columns


def gram_flops_per_pair(factor: Factor) -> float:
    """Of one entry of ``A Aᵀ``, as :meth:`Factor.gram` forms it."""
    if isinstance(factor, OuterFactor):
        costs = [contraction.pairs_cost(factor)]
        if factor.tokens > 1:
            costs += [contraction.rows_cost(factor), contraction.folded_cost(factor)]
        return 2.0 * factor.groups * min(costs)
    if isinstance(factor, LookupFactor):
        return 2.0 * factor.tokens**2 * factor.dim
    return 2.0 * factor.columns
