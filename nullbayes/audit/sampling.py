"""Which examples are audited: drawn at random from all the data while it streams by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_map

from nullbayes.model.batch import Inputs, batch_size, take, tensor_leaves


@dataclass(frozen=True)
class Drawn:
    """One example of the training data.

    Attributes:
        number: its place in the data, from 0, as the loader gave them.
        inputs, targets: a batch of this example alone.
    """

    number: int
    inputs: Inputs
    targets: Any


class Reservoir:
    """``count`` examples, each of the stream's with the same chance, however long the stream is.

    Every example gets a random number of its own; those with the smallest ones stay (Vitter, *Random sampling with a
    reservoir*, 1985). Nothing is read twice, and the global random state is neither read nor moved.

    Args:
        seed: another seed, other examples.
        nbytes: what their inputs may take; fewer examples stay where that is little.
        first: the number of the first example that comes by.
    """

    def __init__(self, count: int, seed: int, nbytes: int, first: int = 0) -> None:
        self.count, self._seed, self._nbytes = count, seed, nbytes
        self._seen = first
        self._held: list[tuple[float, Drawn]] = []

    @property
    def seen(self) -> int:
        """Examples that came by."""
        return self._seen

    @property
    def drawn(self) -> list[Drawn]:
        """Those that stayed, in the order of the data."""
        return sorted((d for _, d in self._held), key=lambda d: d.number)

    @property
    def chances(self) -> list[float]:
        """By which those of :attr:`drawn` stayed, in their order: the smallest of all do; below zero: suspects."""
        return [c for c, _ in sorted(self._held, key=lambda h: h[1].number)]

    def suspect(self, inputs: Inputs, targets: Any, place: int, share: float, most: int) -> None:
        """Keep an example of the batch that :meth:`offer` is about to be given, before those drawn at random.

        Args:
            share: by how much it is suspected; ``most``: examples that are kept for that.
        """
        known = [held for held in self._held if held[0] < 0]
        if not self.count or (len(known) >= most and max(c for c, _ in known) <= -share):
            return
        if len(known) >= most:
            known.sort(key=lambda held: held[0])
            self._held.remove(known[-1])
        self._held = sorted(
            [*self._held, (-share, _alone(inputs, targets, place, self._seen))],
            key=lambda held: held[0],
        )[: self.count]

    def offer(self, inputs: Inputs, targets: Any) -> None:
        """One batch of the stream."""
        size = batch_size(inputs)
        each = sum(t.nbytes for t in tensor_leaves(inputs)) // max(1, size)
        room = max(1, min(self.count, self._nbytes // max(1, each))) if self.count else 0
        chances = _chances(self._seed, self._seen, size)
        edge = max((c for c, _ in self._held), default=0.0)
        there = {d.number for c, d in self._held if c < 0}
        for n, chance in enumerate(chances):
            if self._seen + n in there or (len(self._held) >= room and chance >= edge):
                continue
            alone = _alone(inputs, targets, n, self._seen)
            self._held = sorted([*self._held, (chance, alone)], key=lambda h: h[0])[:room]
            edge = max((c for c, _ in self._held), default=0.0)
        self._seen += size


def _alone(inputs: Inputs, targets: Any, n: int, before: int) -> Drawn:
    """Example ``n`` of a batch by itself, of which ``before`` examples came by already."""
    size = batch_size(inputs)
    return Drawn(
        before + n,
        tree_map(_copied, take(inputs, n, n + 1)),
        tree_map(_copied, take(targets, n, n + 1, size)),
    )


def _copied(leaf: Any) -> Any:
    """A slice would hold on to its whole batch."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _chances(seed: int, start: int, size: int) -> list[float]:
    """Uniform numbers of examples ``start ... start + size``, however the data are cut into batches.

    Of seed and number alone, by splitmix64 (Steele, Lea & Flood, *Fast splittable pseudorandom number generators*,
    2014).
    """
    key = np.random.SeedSequence(abs(seed)).generate_state(1, np.uint64)
    numbers = np.arange(start + 1, start + size + 1, dtype=np.uint64)
    x = numbers * np.uint64(0x9E3779B97F4A7C15) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    chances: list[float] = ((x >> np.uint64(11)).astype(np.float64) * 2.0**-53).tolist()
    return chances
