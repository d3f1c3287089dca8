"""Rows without the tokens that nothing comes back from: padding, and all but one token behind a pooled one.

A factor holds the inputs and output gradients of every token. Where the gradients of a token are zero for every row of
its example, as behind the padding of a text, or in the last layer of an encoder whose head reads one token, it adds
nothing to any row. Examples of about one length are kept together, so that each block is as short as its longest one:
texts of 16 to 48 tokens, padded to 48, then take two thirds of the memory, and of the work of every product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nullbayes.jacobian.block import Block
from nullbayes.jacobian.factors.base import Factor
from nullbayes.jacobian.factors.dense import DenseFactor
from nullbayes.jacobian.factors.lookup import LookupFactor
from nullbayes.jacobian.factors.outer import OuterFactor

# Bytes of the rows of a captured piece from which it pays to look, and tokens of its longest example.
FROM, FEWEST_TOKENS = 2**24, 8
# Lengths are told apart in so many steps.
STEPS = 8
# A factor with more than this share of its tokens alive stays as it is.
WORTH = 0.9

#: examples ``(k,)`` of the piece (None: all, in order), their rows, and which of the lengths they have
Piece = tuple[Tensor | None, Block, int]


def by_length(block: Block) -> Iterator[Piece]:
    """The examples of a captured block, those of about one length together, without tokens that are not alive."""
    alive = {} if block.nbytes < FROM else _alive(block)
    tokens = max((t.shape[1] for t in alive.values()), default=0)
    if tokens < FEWEST_TOKENS:
        yield None, block, 0
        return
    whole = [t.sum(1) for t in alive.values() if t.shape[1] == tokens]
    lengths = torch.stack(whole).amax(0).clamp(min=1)
    steps = (lengths * STEPS).div(tokens, rounding_mode="floor").clamp(max=STEPS - 1)
    kinds = steps.unique().tolist()
    for kind in kinds:
        index = (steps == kind).nonzero()[:, 0]
        some = None if len(kinds) == 1 else index
        factors = {
            key: _chosen(factor, some, alive.get(key)) for key, factor in block.factors.items()
        }
        yield some, Block(factors, len(index), block.cotangents), kind


def _alive(block: Block) -> dict[tuple[str, ...], Tensor]:
    """``(B, T)`` of each factor with a token axis: whether any row of the example has a gradient there."""
    out = {}
    for key, factor in block.factors.items():
        if isinstance(factor, OuterFactor | LookupFactor) and factor.tokens > 1:
            out[key] = (factor.g != 0).flatten(3).any(3).any(1)
    return out


def _chosen(factor: Factor, index: Tensor | None, alive: Tensor | None) -> Factor:
    """The examples ``index`` with their tokens that are alive in front, as many as the longest of them has."""
    if isinstance(factor, DenseFactor):
        return factor if index is None else DenseFactor(factor.slots, factor.values[index])
    assert isinstance(factor, OuterFactor | LookupFactor)
    rows = torch.arange(factor.examples, device=factor.g.device) if index is None else index
    longest = 1 if alive is None else max(1, int(alive[rows].sum(1).max()))
    if alive is None or longest > WORTH * factor.tokens:
        if index is None:
            return factor
        order = torch.arange(factor.tokens, device=rows.device).expand(len(rows), -1)
    else:
        order = alive[rows].byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
    cotangents = torch.arange(factor.cotangents, device=rows.device)
    g = factor.g[rows[:, None, None], cotangents[None, :, None], order[:, None, :]]
    at = rows[:, None]
    if isinstance(factor, LookupFactor):
        return LookupFactor(factor.slot, factor.index[at, order], g)
    return factor.like(factor.a[at, order], g)
