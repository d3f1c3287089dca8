"""Leverages of inputs, layer by layer: how little each layer's training inputs say of what it receives now."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from nullbayes.model.batch import Inputs, batch_size, take
from nullbayes.model.functional import FunctionalModel
from nullbayes.moments.blocks import Blocks
from nullbayes.moments.capture import recording
from nullbayes.moments.factor import Edge
from nullbayes.moments.gather import Gathered
from nullbayes.moments.leverage import Leverage
from nullbayes.moments.rule import Seen

# Edge of the leverage, as a share of the mean eigenvalue, where the posterior's own is zero.
EXACT_EDGE = 1e-6
# Positions of a convolution's output at which its inputs are looked at: all of them cost many times the layer itself.
POSITIONS = 16
# Examples on which it is found which axis of a layer's input belongs to the batch.
PROBE = 3

Values = list[tuple[int, Tensor]]  # by call in order: the block, and leverages (*lead)


class Leverages:
    """Leverages of all blocks, from one forward pass.

    Which axis of a layer's input is that of the examples is found by comparing a small batch with its examples one by
    one: the first (each example's share in one piece), or the second. Where neither is, examples go through the network
    one at a time.

    Args:
        relative: leverages over the squared size of the input, see :meth:`Leverage.relative`.
        positions: of each convolution, evenly spaced; None: all.
    """

    def __init__(
        self,
        functional: FunctionalModel,
        blocks: Blocks,
        gathered: Gathered,
        delta: float,
        *,
        relative: bool = True,
        positions: int | None = POSITIONS,
    ) -> None:
        self.functional, self.blocks = functional, blocks
        parts = zip(blocks.blocks, gathered.sums, strict=True)
        self.layers = [
            Leverage(sums, Edge.of(sums, delta or EXACT_EDGE), block.columns, functional.dtype)
            for block, sums in parts
        ]
        self._axes: list[int] | None = None  # by call; empty: one example at a time
        self.relative, self.positions = relative, positions

    def raw(self, inputs: Inputs) -> Values:
        """Leverages of one forward pass, call by call."""
        out: Values = []

        def receive(site: int, number: int, column: int | None, seen: Seen) -> None:
            layer, block = self.layers[number], self.blocks.blocks[number]
            if seen.index is not None:
                values = layer.of_rows(seen.index)
            else:
                assert seen.a is not None
                of = layer.relative if self.relative else layer.of
                values = of(seen.a, block.own, column)
            if seen.follows:
                out[-1] = (number, torch.cat([out[-1][1], values]))  # a call in several parts
            else:
                out.append((number, values))

        with torch.no_grad(), recording(self.blocks.sites, receive, thin=self.positions):
            self.functional(self.functional.weights(), inputs)
        return out

    def by_example(self, inputs: Inputs) -> dict[int, Tensor]:
        """By block: leverages ``(B, T)`` of all inputs that it receives for each example, NaN where there are fewer."""
        size = batch_size(inputs)
        if self._axes is None and size > 1:
            self._axes = self._find_axes(take(inputs, 0, min(size, PROBE)))
        if size > 1 and self._axes:
            values = self.raw(inputs)
            split = [
                _split(v, axis, size) for (_, v), axis in zip(values, self._axes, strict=False)
            ]
            if len(values) == len(self._axes) and all(part is not None for part in split):
                return _joined(
                    [(n, p) for (n, _), p in zip(values, split, strict=True) if p is not None]
                )
        singles = [self._single(take(inputs, i, i + 1, size)) for i in range(size)]
        return _stacked(singles)

    def _single(self, inputs: Inputs) -> dict[int, Tensor]:
        return _joined([(n, v.reshape(1, -1)) for n, v in self.raw(inputs)])

    def _find_axes(self, few: Inputs) -> list[int]:
        size = batch_size(few)
        together = self.raw(few)
        alone = [self.raw(take(few, i, i + 1, size)) for i in range(size)]
        if any(len(a) != len(together) for a in alone):
            return []
        axes = []
        for call, (_, values) in enumerate(together):
            want = torch.stack([a[call][1].double().sum() for a in alone])
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


def _split(values: Tensor, axis: int, size: int) -> Tensor | None:
    """``(*lead)`` as ``(B, T)`` with the examples on ``axis``; None where it cannot be."""
    if values.ndim <= axis or values.shape[axis] % size or not values.numel():
        return None
    if axis == 0:
        return values.reshape(size, -1)
    if values.shape[1] != size:
        return None
    return values.movedim(1, 0).reshape(size, -1)


def _joined(values: Values) -> dict[int, Tensor]:
    parts: dict[int, list[Tensor]] = defaultdict(list)
    for number, value in values:
        parts[number].append(value)
    return {number: torch.cat(value, dim=1) for number, value in parts.items()}


def _stacked(singles: list[dict[int, Tensor]]) -> dict[int, Tensor]:
    out = {}
    for number in sorted({n for one in singles for n in one}):
        rows = [one.get(number, torch.zeros(1, 0)) for one in singles]
        width = max(r.shape[1] for r in rows)
        out[number] = torch.cat(
            [torch.nn.functional.pad(r, (0, width - r.shape[1]), value=torch.nan) for r in rows]
        )
    return out
