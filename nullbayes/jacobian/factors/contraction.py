"""Gram blocks ``A A'ᵀ`` of two factors of one layer: ways to sum over the tokens of both, and what each costs.

With ``R[n, c] = Σ_t g[n, c, t] ⊗ a[n, t]`` an entry is ``Σ_tt' (g·g') (a·a')``. Costs are multiplications per pair of
rows and group, in those of a large product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from nullbayes.jacobian.factors.products import product

if TYPE_CHECKING:
    from nullbayes.jacobian.factors.outer import OuterFactor
    from nullbayes.jacobian.factors.outer_costs import OuterCosts

# Elements of the folded right side that one product reads again: small enough for a core's own cache (measured: 2^17 to
# 2^19 are alike, 2^20 takes twice as long).
FOLDED_ELEMENTS = 2**18
# What a multiplication costs where the right side is folded first: products are small (measured 1.5 to 3).
FOLD_PENALTY = 2.8


def rows_cost(factor: OuterCosts) -> float:
    """From written-out rows: ``O I``."""
    return float(factor.width_out * factor.width_in)


def pairs_cost(factor: OuterCosts) -> float:
    """All pairs of tokens, ``T² (O + 1)``, and the inputs' products, which ``C²`` rows share (Novak et al. 2022)."""
    return factor.tokens**2 * (factor.width_out + 2 + _inputs_cost(factor))


def folded_cost(factor: OuterCosts) -> float:
    """Folded, ``T O (T + C) / C``: the right side's tokens are summed for ``C`` rows at once."""
    t, c = factor.tokens, factor.cotangents
    return FOLD_PENALTY * t * factor.width_out * (t + c) / c + t**2 * _inputs_cost(factor)


def _inputs_cost(factor: OuterCosts) -> float:
    return factor.width_in / factor.cotangents**2


def single(left: OuterFactor, right: OuterFactor) -> Tensor:
    """``(B*C, B'*C')`` of one token: products of ``a`` and of ``g``, entry by entry."""
    out: Tensor | None = None
    for k in range(left.groups):
        inputs = product(left.a[:, 0, k], right.a[:, 0, k])  # (B, B')
        g = left.g[:, :, 0, k].reshape(left.num_rows, -1)
        grads = product(g, right.g[:, :, 0, k].reshape(right.num_rows, -1))
        shaped = grads.view(left.examples, left.cotangents, right.examples, right.cotangents)
        shaped.mul_(inputs[:, None, :, None])
        out = grads if out is None else out.add_(grads)
    assert out is not None
    return out


def by_rows(left: OuterFactor, right: OuterFactor) -> Tensor:
    """Rows written out, as many at a time as fit."""
    width = left.cotangents * left.groups * left.width_out * left.width_in
    lefts, rights = left.chunks(width), right.chunks(width)
    if len(lefts) == len(rights) == 1:
        return product(left.matrices(), right.matrices())
    out, start = left.g.new_empty(left.num_rows, right.num_rows), 0
    for part in lefts:
        rows, at = part.matrices(), 0
        for other in rights:
            columns = slice(at, at + other.num_rows)
            out[start : start + len(rows), columns] = product(rows, other.matrices())
            at = columns.stop
        start += len(rows)
    return out


def by_pairs(left: OuterFactor, right: OuterFactor) -> Tensor:
    """Every token of one with every token of the other."""
    left.settle()
    right.settle()
    out = left.g.new_zeros(left.num_rows, right.num_rows)
    b2, c2, t2, _, o = right.g.shape
    start = 0
    for part in left.chunks(left.tokens * left.cotangents * right.num_rows * t2):
        b, c, t = part.g.shape[:3]
        block = out[start : start + part.num_rows].view(b, c, b2, c2)
        start += part.num_rows
        for k in range(left.groups):
            grads = product(part.g[:, :, :, k].reshape(-1, o), right.g[:, :, :, k].reshape(-1, o))
            inputs = _inputs(part, right, k).view(b, 1, t, b2, 1, t2)
            block += (grads.view(b, c, t, b2, c2, t2) * inputs).sum(dim=(2, 5))
    return out


def folded(left: OuterFactor, right: OuterFactor) -> Tensor:
    """``Z[c', t] = Σ_t' (a_t·a'_t') g'[c', t']`` for each pair of examples, then ``Σ_t g[c, t]·Z[c', t]``.

    The pairs of tokens are gone before the rows of the left side come in, and all of it is matrix products.
    """
    left.settle()
    right.settle()
    out = left.g.new_zeros(left.num_rows, right.num_rows)
    b2, c2, t2, _, o = right.g.shape
    c, t = left.cotangents, left.tokens
    step = max(1, FOLDED_ELEMENTS // (c2 * t * o))
    start = 0
    for part in left.chunks(t * b2 * t2):
        for k in range(left.groups):
            inputs = _inputs(part, right, k).view(-1, t, b2, t2).transpose(1, 2).contiguous()
            for n, (g, each) in enumerate(zip(part.g[:, :, :, k], inputs, strict=True)):
                rows = out[start + n * c : start + (n + 1) * c]
                for j in range(0, b2, step):
                    some = right.g[j : j + step, :, :, k]  # (b', C', T', O)
                    z = each[j : j + step, None] @ some  # (b', C', T, O)
                    rows[:, j * c2 : (j + len(some)) * c2] += g.reshape(c, -1) @ z.view(-1, t * o).T
        start += part.num_rows
    return out


def _inputs(left: OuterFactor, right: OuterFactor, group: int) -> Tensor:
    """``a·a'`` of all tokens ``(B*T, B'*T')``."""
    return product(left.a[:, :, group].flatten(0, 1), right.a[:, :, group].flatten(0, 1))
