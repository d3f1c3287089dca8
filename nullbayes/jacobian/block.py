"""The rows of one or more batches, in the factors in which the layers give them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.jacobian.factors.base import Factor, concatenate
from nullbayes.jacobian.factors.dense import DenseFactor
from nullbayes.jacobian.factors.lookup import LookupFactor
from nullbayes.jacobian.factors.outer import OuterFactor
from nullbayes.jacobian.factors.products import add_into
from nullbayes.model.parameters import Slot

Key = tuple[str, ...]


@dataclass
class Block:
    """The rows of one or more batches: factors of the parameters that they are not zero for."""

    factors: dict[Key, Factor]
    examples: int
    cotangents: int

    @property
    def num_rows(self) -> int:
        return self.examples * self.cotangents

    @property
    def nbytes(self) -> int:
        return sum(factor.nbytes for factor in self.factors.values())

    @property
    def resident(self) -> int:
        """Bytes of memory held between uses: all of them, unlike blocks that are kept elsewhere."""
        return self.nbytes

    @property
    def where(self) -> str:
        return "memory"

    @property
    def device(self) -> torch.device:
        for factor in self.factors.values():
            return factor.tensors()[0].device
        return torch.device("cpu")

    @contextmanager
    def opened(self) -> Iterator[Block]:
        """Itself; see ``block_storage.py`` for blocks that are not in memory."""
        yield self

    def narrow(self, start: int, stop: int) -> Block:
        """The examples ``start:stop``, as views."""
        factors = {names: f.narrow(start, stop) for names, f in self.factors.items()}
        return Block(factors, stop - start, self.cotangents)

    @staticmethod
    def merge(blocks: Sequence[Block]) -> Block:
        """One block from several with the same number of cotangents."""
        layout = common_layout(blocks)
        blocks = [block.arranged(layout) for block in blocks]
        keys = blocks[0].factors
        return Block(
            {key: concatenate([b.factors[key] for b in blocks]) for key in keys},
            sum(b.examples for b in blocks),
            blocks[0].cotangents,
        )

    def gram(self, other: Block, out: Tensor) -> None:
        """``out (B·C, B'·C') += A A'ᵀ``."""
        layout = common_layout([self, other])
        mine, theirs = self.arranged(layout), other.arranged(layout)
        for key, factor in mine.factors.items():
            add_into(out, factor.gram(theirs.factors[key]))

    def arranged(self, layout: Layout) -> Block:
        """The same rows in the factors of ``layout``; itself where it has them already."""
        held = layout.written is None or isinstance(self.factors.get(layout.written), DenseFactor)
        if held and list(self.factors) == layout.keys:
            return self
        factors: dict[Key, Factor] = {}
        for key in layout.keys:
            own = self.factors.get(key)
            if key == layout.written:
                if not isinstance(own, DenseFactor):
                    own = self._written(layout.slots, layout.sample)
                factors[key] = own
            else:
                factors[key] = self._nothing(layout.like[key]) if own is None else own
        return Block(factors, self.examples, self.cotangents)

    def _written(self, slots: Sequence[Slot], sample: Tensor) -> DenseFactor:
        """The columns of ``slots`` written out, zeros where this block has none."""
        shape = (self.examples, self.cotangents)
        out = {s.name: sample.new_zeros(*shape, s.numel) for s in slots}
        for factor in self.factors.values():
            if out.keys().isdisjoint(slot.name for slot in factor.slots):
                continue
            rows = factor.rows().reshape(*shape, -1)
            widths = [slot.numel for slot in factor.slots]
            for slot, values in zip(factor.slots, rows.split(widths, 2), strict=True):
                out[slot.name] = values
        return DenseFactor(slots, torch.cat([out[s.name] for s in slots], dim=2))

    def _nothing(self, like: Factor) -> Factor:
        """Rows of zero in the shape of ``like``, a factor of another block."""
        shape = (self.examples, self.cotangents, 1)
        if isinstance(like, OuterFactor):
            a = like.a.new_zeros(self.examples, 1, like.groups, like.width_in)
            return like.like(a, like.g.new_zeros(*shape, like.groups, like.width_out))
        assert isinstance(like, LookupFactor)
        index = like.index.new_full((self.examples, 1), -1)
        return LookupFactor(like.slot, index, like.g.new_zeros(*shape, like.dim))


@dataclass(frozen=True)
class Layout:
    """Which factors the rows of several blocks have in common.

    Attributes:
        keys: of all factors, in order; ``written``: which of them holds what is written out, with its ``slots``.
        like: a factor for each of the others.
        sample: a tensor in the dtype and on the device of the rows.
    """

    keys: list[Key]
    written: Key | None
    slots: tuple[Slot, ...]
    like: dict[Key, Factor]
    sample: Tensor


def common_layout(blocks: Iterable[Block]) -> Layout:
    """Factors that all ``blocks`` have, or have nothing for; parameters of all the others are written out.

    Blocks differ where a batch was not served by a layer's rule, or did not reach a layer at all.
    """
    blocks = list(blocks)
    like: dict[Key, Factor] = {}
    for block in blocks:
        for key, factor in block.factors.items():
            like.setdefault(key, factor)
    first = next((f for f in like.values()), None)
    if first is None:
        return Layout([], None, (), {}, torch.zeros(0))
    common = {
        key: factor
        for key, factor in like.items()
        if not isinstance(factor, DenseFactor) and all(_agrees(b, key, factor) for b in blocks)
    }
    covered = {name for key in common for name in key}
    slots = {s.name: s for f in like.values() for s in f.slots if s.name not in covered}
    order = tuple(sorted(slots.values(), key=lambda slot: slot.start))
    written = tuple(slot.name for slot in order) or None
    keys = [key for key in like if key in common]
    if written is not None:
        keys.append(written)
    return Layout(keys, written, order, common, first.tensors()[0].new_zeros(0))


def _agrees(block: Block, key: Key, factor: Factor) -> bool:
    own = block.factors.get(key)
    if own is None:
        return all(set(key).isdisjoint(other) for other in block.factors)
    return own is factor or _kind(own) == _kind(factor)


def _kind(factor: Factor) -> tuple[object, ...]:
    """What two factors must share to be multiplied with one another, or joined."""
    if isinstance(factor, OuterFactor):
        return (
            *("outer", factor.transposed, factor.bias_scale, factor.groups),
            *(factor.width_in, factor.width_out),
        )
    return (type(factor).__name__,)


def kinds(block: Block) -> tuple[object, ...]:
    """Which factors a block has, to tell two sets apart."""
    return tuple((key, _kind(factor)) for key, factor in block.factors.items())
