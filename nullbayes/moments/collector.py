"""What the layers of one forward pass after the other receive, added to the sums of the blocks.

Each input is multiplied out when it is seen, since the network may overwrite it afterwards. Layers that read one tensor
(queries, keys and values) share its product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nullbayes.errors import NonFiniteError
from nullbayes.moments.blocks import Blocks
from nullbayes.moments.products import ROWS, InputSums, mirror
from nullbayes.moments.rule import Seen, Summer
from nullbayes.moments.second import BlockMoments, DenseMoments

# The tensor that was seen last: what tells it, itself (so that its memory is not used again), its product.
_Last = tuple[tuple[Any, ...], tuple[Tensor, Tensor], tuple[Tensor, Tensor | None]]


class Collector:
    """Adds to ``sums``, one of each block, until :meth:`finish`.

    Args:
        dtype: of the products, see :func:`working_dtype`.

    Attributes:
        summers: of the sites that need not show their inputs.
    """

    def __init__(self, blocks: Blocks, sums: list[BlockMoments], dtype: torch.dtype) -> None:
        self.blocks, self.sums, self.dtype = blocks, sums, dtype
        self.summers: dict[int, Summer] = {}
        for number, site in enumerate(blocks.sites):
            places = site.places.values()
            if all(isinstance(sums[i].inputs, DenseMoments) for i, _ in places):
                summer = site.rule.summer(site.module, dtype)
                if summer is not None:
                    self.summers[number] = summer
        self._parts: dict[tuple[int, int | None], InputSums] = {}
        self._last: _Last | None = None
        self._head: tuple[int, int | None] = (0, None)
        # Weights whose input another one was seen to read as well.
        self._shared: set[tuple[int, int | None]] = set()
        self._first = True

    def receive(self, site: int, number: int, column: int | None, seen: Seen) -> None:
        """Of :func:`recording`."""
        block, sums = self.blocks.blocks[number], self.sums[number]
        if seen.index is not None:
            if block.own:
                sums.read(seen.index)
            return
        assert seen.a is not None
        a = seen.a.reshape(-1, *seen.a.shape[-2:])[..., : block.own]
        if not isinstance(sums.inputs, DenseMoments):
            sums.add(a, block.own, column)
            return
        place = (number, column)
        part = self._part(place)
        key = (a.data_ptr(), a.shape, a.stride(), a.dtype, seen.a._version, column is None)
        if self._last is not None and self._last[0] == key:
            part.add_made(self._last[2], len(a))
            self._shared.add(self._head)
            return
        self._last = None
        made = part.add(a, shared=self._first or place in self._shared)
        if made is not None:
            self._last, self._head = (key, (seen.a, a), made), place

    def _part(self, place: tuple[int, int | None]) -> InputSums:
        if place not in self._parts:
            number, column = place
            moments = self.sums[number].inputs
            assert isinstance(moments, DenseMoments)
            own = self.blocks.blocks[number].own
            gram = moments.values[:, :own, :own]
            if self.dtype != torch.float64:
                gram = torch.zeros_like(gram, dtype=self.dtype).contiguous()
            self._parts[place] = InputSums(gram, biased=column is not None)
        return self._parts[place]

    def end_batch(self, where: str) -> None:
        """After each forward pass. Raises `NonFiniteError` where a layer's inputs hold NaN or infinity."""
        self._last, self._first = None, False
        self._check(where)
        for place, part in self._parts.items():
            if part.rows >= ROWS:
                self._flush(place, part)

    def _check(self, where: str) -> None:
        marks: list[tuple[int, Tensor]] = [(n, part.mark()) for (n, _), part in self._parts.items()]
        for number, summer in self.summers.items():
            mark = summer.mark()
            if mark is not None:
                marks += [(place, mark) for place, _ in self.blocks.sites[number].places.values()]
        if marks and not bool(torch.stack([m.double() for _, m in marks]).isfinite().all()):
            first = min(n for n, mark in marks if not bool(mark.isfinite()))
            raise NonFiniteError(
                f"{where}: the inputs of the layer with {self.blocks.blocks[first].name!r} hold NaN or infinity. Check "
                "the data of this batch and the layers before that one (overflow, division by zero, logarithms)."
            )
        for block, sums in zip(self.blocks.blocks, self.sums, strict=True):
            if not isinstance(sums.inputs, DenseMoments) and not sums.finite:
                raise NonFiniteError(
                    f"{where}: the inputs of the layer with {block.name!r} hold NaN or infinity. Check the data of "
                    "this batch and the layers before that one (overflow, division by zero, logarithms)."
                )

    def _flush(self, place: tuple[int, int | None], part: InputSums) -> None:
        number, column = place
        own = self.blocks.blocks[number].own
        moments = self.sums[number].inputs
        assert isinstance(moments, DenseMoments)
        if self.dtype != torch.float64:
            moments.values[:, :own, :own] += part.gram
            part.gram.zero_()
        moments.add_totals(part.totals, part.count, own, column)
        self.sums[number].count += part.count
        part.totals.zero_()
        part.count = part.rows = 0

    def finish(self) -> list[BlockMoments]:
        """All sums, once every pass is done."""
        for place, part in self._parts.items():
            self._flush(place, part)
        for sums in self.sums:
            if isinstance(sums.inputs, DenseMoments):
                mirror(sums.inputs.values)
        for number, summer in self.summers.items():
            places = self.blocks.sites[number].places
            for summed in summer.flush():
                if summed.weight in places:
                    block, column = places[summed.weight]
                    self.sums[block].add_sums(summed, self.blocks.blocks[block].own, column)
        return self.sums
