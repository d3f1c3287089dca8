"""Which examples are audited: drawn at random from all the data while it streams by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nullbayes.audit.batches import counter_generator
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
    """

    def __init__(self, count: int, seed: int, nbytes: int) -> None:
        self.count, self._seed, self._nbytes = count, seed, nbytes
        self._seen, self._batches = 0, 0
        self._held: list[tuple[float, Drawn]] = []

    @property
    def seen(self) -> int:
        """Examples that came by."""
        return self._seen

    @property
    def drawn(self) -> list[Drawn]:
        """Those that stayed, in the order of the data."""
        return sorted((d for _, d in self._held), key=lambda d: d.number)

    def offer(self, inputs: Inputs, targets: Any) -> None:
        """One batch of the stream."""
        size = batch_size(inputs)
        each = sum(t.nbytes for t in tensor_leaves(inputs)) // max(1, size)
        room = max(1, min(self.count, self._nbytes // max(1, each))) if self.count else 0
        generator = counter_generator(self._seed, 1, self._batches)
        chances = torch.rand(size, generator=generator, dtype=torch.float64).tolist()
        edge = max((c for c, _ in self._held), default=0.0)
        for n, chance in enumerate(chances):
            if len(self._held) >= room and chance >= edge:
                continue
            alone = Drawn(self._seen + n, take(inputs, n, n + 1), take(targets, n, n + 1, size))
            self._held = sorted([*self._held, (chance, alone)], key=lambda h: h[0])[:room]
            edge = max((c for c, _ in self._held), default=0.0)
        self._seen += size
        self._batches += 1
