"""The rows of one or more batches, in the factors in which the layers give them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nullbayes.jacobian.factors.base import Factor, concatenate


@dataclass
class Block:
    """The rows of one or more batches: factors that together cover every parameter."""

    factors: dict[tuple[str, ...], Factor]
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
        return next(iter(self.factors.values())).tensors()[0].device

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
        keys = blocks[0].factors
        return Block(
            {key: concatenate([b.factors[key] for b in blocks]) for key in keys},
            sum(b.examples for b in blocks),
            blocks[0].cotangents,
        )
