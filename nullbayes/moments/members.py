"""Which examples are in the sums, in a fixed amount of memory: a counting filter of content hashes.

Asked for an example that was added it always says yes. Of one that was not, it says no except with a small probability:
0.2 % after 60,000 examples; after a million it is of no use, and the sums themselves have to tell (Fan, Cao, Almeida &
Broder, *Summary cache*, IEEE/ACM ToN 2000).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.model.batch import Inputs, batch_size
from nullbayes.model.randomness import content_hash

CELLS = 2**20


class Members:
    """How often each example was added; two filters of different data add up."""

    def __init__(self, counts: Tensor | None = None) -> None:
        self.counts = torch.zeros(CELLS, dtype=torch.int32) if counts is None else counts

    def add(self, inputs: Inputs) -> None:
        """Count the examples of a batch."""
        self._put(inputs, 1)

    def discard(self, inputs: Inputs) -> int:
        """Take a batch's examples out; returns how many of them cannot have been there (nothing is taken then)."""
        cells = self._cells(inputs)
        need = torch.bincount(cells.flatten(), minlength=CELLS).to(torch.int32)
        missing = int((self.counts - need)[cells].lt(0).any(1).sum())
        if not missing:
            self._put(inputs, -1)
        return missing

    def plus(self, other: Members) -> Members:
        """Of both sets of examples."""
        return Members(self.counts + other.counts)

    def copy(self) -> Members:
        return Members(self.counts.clone())

    def _put(self, inputs: Inputs, sign: int) -> None:
        cells = self._cells(inputs).flatten()
        self.counts.index_add_(0, cells, torch.full_like(cells, sign, dtype=torch.int32))

    def _cells(self, inputs: Inputs) -> Tensor:
        """``(B, 4)`` cells of each example: four parts of its 64-bit hash, the last one overlapping."""
        words = content_hash(inputs, batch_size(inputs)).cpu()
        return torch.stack([(words >> shift) & (CELLS - 1) for shift in (0, 15, 30, 44)], dim=1)
