"""Captured rows restricted to some parameters, or with the columns of each parameter multiplied by a number.

Rows are captured once; what a prior precision for each layer asks of them needs no second pass over the data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from nullbayes.jacobian.block import Block
from nullbayes.jacobian.block_storage import Kept, OnDisk, Openable, Recomputed
from nullbayes.jacobian.operator import JacobianOperator


class _Restricted(Kept):
    """A block, wherever it is kept, with the columns of some parameters only."""

    def __init__(self, whole: Openable, names: Collection[str]) -> None:
        self._whole, self._names = whole, names
        self.examples, self.cotangents = whole.examples, whole.cotangents
        self.nbytes, self.resident, self.where = whole.nbytes, whole.resident, whole.where

    @contextmanager
    def opened(self) -> Iterator[Block]:
        with self._whole.opened() as block:
            parts = [f.only(self._names) for f in block.factors.values()]
            factors = {tuple(s.name for s in f.slots): f for f in parts if f is not None}
            yield Block(factors, self.examples, self.cotangents)


def restricted(operator: JacobianOperator, names: Collection[str]) -> JacobianOperator:
    """The rows with zeros in the columns of all parameters but ``names``; nothing is copied."""
    return operator.over([_Restricted(b, names) for b in _own(operator)])


def rescaled(operator: JacobianOperator, scales: Mapping[str, float]) -> JacobianOperator:
    """The rows with the columns of each parameter multiplied by its number of ``scales``, kept where they were."""
    return operator.over([_rescaled(b, scales) for b in _own(operator)])


def _own(operator: JacobianOperator) -> Sequence[Openable]:
    mine = operator.mine
    assert isinstance(mine, JacobianOperator)
    return mine.blocks


def _rescaled(kept: Openable, scales: Mapping[str, float]) -> Openable:
    if isinstance(kept, Recomputed):
        return kept.scaled(dict(scales))
    with kept.opened() as block:
        factors = {key: factor.scaled(scales) for key, factor in block.factors.items()}
        new = Block(factors, kept.examples, kept.cotangents)
        return OnDisk(new) if isinstance(kept, OnDisk) else new
