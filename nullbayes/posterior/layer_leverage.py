"""Leverages of inputs, layer by layer: how little each layer's training inputs say of what it receives now."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nullbayes.errors import NonFiniteError
from nullbayes.model.batch import Inputs, batch_size, take
from nullbayes.model.functional import FunctionalModel
from nullbayes.moments.blocks import Blocks
from nullbayes.moments.capture import hooks_of, plain_paths
from nullbayes.moments.factor import Edge, Factor
from nullbayes.moments.gather import Gathered
from nullbayes.moments.leverage import DIRECTIONS, Leverage
from nullbayes.moments.rule import Seen

# Edge of the leverage, as a share of the mean eigenvalue, where the posterior's own is zero.
EXACT_EDGE = 1e-6
# Positions of a convolution's output at which its inputs are looked at: all of them cost many times the layer itself.
POSITIONS = 16
# Examples on which it is found which axis of a layer's input belongs to the batch.
PROBE = 3
# In place of an axis: all examples have this call in common (positions that are looked up).
SHARED = -1

# By call in order: the block, leverages (*lead), and those over the squared size of the input.
Values = list[tuple[int, Tensor, Tensor]]
# By block: the two of all inputs that it receives for each example (B, T), NaN where there are fewer.
ByExample = dict[int, tuple[Tensor, Tensor]]


class Leverages:
    """Leverages of all blocks, and the same over the squared size of the input, from one forward pass.

    Which axis of a layer's input is that of the examples is found by comparing a small batch with its examples one by
    one: the first (each example's share in one piece), or the second. Where neither is, examples go through the network
    one at a time.

    Args:
        positions: of each convolution, evenly spaced; None: all.
        factors: of the blocks at this ``delta``, where they are known.
        directions: see :class:`Leverage`.
    """

    def __init__(
        self,
        functional: FunctionalModel,
        blocks: Blocks,
        gathered: Gathered,
        delta: float,
        *,
        positions: int | None = POSITIONS,
        factors: Sequence[Factor] | None = None,
        directions: int | None = DIRECTIONS,
    ) -> None:
        self.functional, self.blocks = functional, blocks
        self.positions = positions
        self.layers: list[Leverage] = []
        known = factors if factors is not None and delta else [None] * len(blocks.blocks)
        for i, (block, sums, factor) in enumerate(
            zip(blocks.blocks, gathered.sums, known, strict=True)
        ):
            if factor is not None and i and factor is known[i - 1]:
                self.layers.append(self.layers[-1])  # queries, keys and values: one input
                continue
            edge = Edge.of(sums, delta or EXACT_EDGE)
            self.layers.append(
                Leverage(sums, edge, block.columns, functional.dtype, factor, directions)
            )
        # Scale and shift of normalisation layers say nothing about an input.
        self.counted = {i for i, b in enumerate(blocks.blocks) if b.columns > 2}
        if not self.counted:
            self.counted = set(range(len(blocks.blocks)))
        self.ordered = sorted(self.counted)
        self._axes: list[int] | None = None  # by call; empty: one example at a time
        self._network: Callable[[Inputs], Tensor] | None = None
        self._found: Values = []
        self._last: tuple[Any, ...] | None = None
        self._lock = threading.Lock()
        self._weights: tuple[tuple[int, int], ...] = ()

    def _pass(self, inputs: Inputs) -> tuple[Values, Tensor]:
        """Leverages of one forward pass, call by call, and its outputs."""
        with self._lock, torch.no_grad(), plain_paths():
            weights = tuple((id(p), p.data_ptr()) for p in self.functional.model.parameters())
            if self._network is None or weights != self._weights:
                sites = [
                    site
                    for site in self.blocks.sites
                    if any(i in self.counted for i, _ in site.places.values())
                ]
                hooks = hooks_of(sites, self._receive, thin=self.positions)
                self._network = self.functional.bound(self.functional.weights(), hooks)
                self._weights = weights
            try:
                outputs = self._network(inputs)
                found = self._found
            finally:
                self._found, self._last = [], None
        sums = torch.stack(
            [outputs.sum().double(), *(sizes.sum().double() for _, sizes, _ in found)]
        )
        if not bool(sums.isfinite().all()):
            raise NonFiniteError(
                "the outputs, or what layers receive, hold NaN or infinity on these inputs; check that they are finite "
                "and scaled as in training."
            )
        return found, outputs

    def _receive(self, site: int, number: int, column: int | None, seen: Seen) -> None:
        if number not in self.counted:
            return
        sizes, directions = self._values(number, column, seen)
        if seen.follows:
            _, before, before_over = self._found.pop()
            sizes, directions = torch.cat([before, sizes]), torch.cat([before_over, directions])
        self._found.append((number, sizes, directions))

    def _values(self, number: int, column: int | None, seen: Seen) -> tuple[Tensor, Tensor]:
        """Leverages of one call, and the same over squared sizes; of a tensor that was just seen, those found then."""
        layer, block = self.layers[number], self.blocks.blocks[number]
        if seen.index is not None:
            values = layer.of_rows(seen.index)
            return values, values
        a = seen.a
        assert a is not None
        same = (id(layer), column, a.data_ptr(), a.shape, a.stride(), a._version)
        if self._last is None or self._last[0] != same:
            self._last = (same, a, layer.both(a, block.own, column))
        found: tuple[Tensor, Tensor] = self._last[2]
        return found

    def means(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Means for each example ``(B, L)`` over what the blocks that count receive, and outputs ``(B, *out)``.

        Of leverages, and of those over squared sizes; float64, NaN where an example does not reach a layer.
        """
        size = batch_size(inputs)
        values, outputs = self._single(inputs) if size == 1 else self._by_example(inputs)
        absent = (torch.full((size, 1), torch.nan),) * 2
        parts = [values.get(i, absent) for i in self.ordered]
        sizes, directions = (
            torch.stack([part[i].double().nanmean(1) for part in parts], 1) for i in (0, 1)
        )
        return sizes, directions, outputs

    def _by_example(self, inputs: Inputs) -> tuple[ByExample, Tensor]:
        size = batch_size(inputs)
        if self._axes is None and size > 1:
            self._axes = self._find_axes(take(inputs, 0, min(size, PROBE)))
        if size > 1 and self._axes:
            values, outputs = self._pass(inputs)
            split: Values = []
            for (number, *pair), axis in zip(values, self._axes, strict=False):
                sizes, directions = (_split(v, axis, size) for v in pair)
                if sizes is not None and directions is not None:
                    split.append((number, sizes, directions))
            if len(values) == len(self._axes) == len(split):
                return _joined(split), outputs
        singles = [self._single(take(inputs, i, i + 1, size)) for i in range(size)]
        return _stacked([values for values, _ in singles]), torch.cat([out for _, out in singles])

    def _single(self, inputs: Inputs) -> tuple[ByExample, Tensor]:
        values, outputs = self._pass(inputs)
        return _joined([(n, a.reshape(1, -1), b.reshape(1, -1)) for n, a, b in values]), outputs

    def _find_axes(self, few: Inputs) -> list[int]:
        size = batch_size(few)
        together = self._pass(few)[0]
        alone = [self._pass(take(few, i, i + 1, size))[0] for i in range(size)]
        if any(len(a) != len(together) for a in alone):
            return []
        axes = []
        for call, (_, _, values) in enumerate(together):
            want = torch.stack([a[call][2].double().sum() for a in alone])
            if all(_shared(a[call][2], values) for a in alone):
                axes.append(SHARED)
                continue
            for axis in (0, 1):
                part = _split(values, axis, size)
                if part is not None and torch.allclose(
                    part.double().sum(1), want, rtol=1e-2, atol=1e-12
                ):
                    axes.append(axis)
                    break
            else:
                return []
        return axes


def _shared(one: Tensor, values: Tensor) -> bool:
    """Whether a call is the same for a batch and an example alone: what does not depend on the example."""
    return one.shape == values.shape and bool(torch.allclose(one, values, rtol=1e-4))


def _split(values: Tensor, axis: int, size: int) -> Tensor | None:
    """``(*lead)`` as ``(B, T)`` with the examples on ``axis``; None where it cannot be."""
    if axis == SHARED:
        return values.reshape(1, -1).expand(size, -1)
    if values.ndim <= axis or values.shape[axis] % size or not values.numel():
        return None
    if axis == 0:
        return values.reshape(size, -1)
    if values.shape[1] != size:
        return None
    return values.movedim(1, 0).reshape(size, -1)


def _joined(values: Values) -> ByExample:
    parts: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for number, *pair in values:
        parts[number].append((pair[0], pair[1]))
    return {
        n: (torch.cat([a for a, _ in pairs], dim=1), torch.cat([b for _, b in pairs], dim=1))
        for n, pairs in parts.items()
    }


def _stacked(singles: list[ByExample]) -> ByExample:
    absent = (torch.zeros(1, 0),) * 2
    out = {}
    for number in sorted({n for one in singles for n in one}):
        rows = [one.get(number, absent) for one in singles]
        width = max(sizes.shape[1] for sizes, _ in rows)
        out[number] = (_padded([a for a, _ in rows], width), _padded([b for _, b in rows], width))
    return out


def _padded(rows: list[Tensor], width: int) -> Tensor:
    """``(1, T)`` each as ``(B, width)``, NaN where there are fewer."""
    pad = torch.nn.functional.pad
    return torch.cat([pad(row, (0, width - row.shape[1]), value=torch.nan) for row in rows])
