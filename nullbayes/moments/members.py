"""Which examples are in the sums, in a fixed amount of memory: a counting filter of content hashes.

Asked for an example that was added it always says yes. Of one that was not, it says no except with a small probability:
0.2 % after 60,000 examples; after a million it is of no use, and the sums themselves have to tell (Fan, Cao, Almeida &
Broder, *Summary cache*, IEEE/ACM ToN 2000).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from nullbayes.model.batch import Inputs, batch_size, flags_of, plain

CELLS = 2**20
# Numbers hashed at a time.
_NUMBERS = 2**20
# Multipliers of numbers: the first of a fixed stream, as many as were needed so far.
_KEYS: list[Tensor] = []


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

    def minus(self, other: Members) -> Members:
        """Without a set of examples; see :meth:`overdrawn` for those that were not there."""
        return Members(self.counts - other.counts)

    def overdrawn(self, words: Tensor) -> int:
        """Of examples that were taken out, by their :func:`digests`: how many cannot have been there."""
        return int(self.counts[_cells_of(words)].lt(0).any(1).sum())

    def copy(self) -> Members:
        return Members(self.counts.clone())

    def _put(self, inputs: Inputs, sign: int) -> None:
        cells = self._cells(inputs).flatten()
        self.counts.index_add_(0, cells, torch.full_like(cells, sign, dtype=torch.int32))

    def _cells(self, inputs: Inputs) -> Tensor:
        return _cells_of(digests(inputs))


def _cells_of(words: Tensor) -> Tensor:
    """``(B, 4)`` cells of each example: four parts of its 64-bit hash, the last one overlapping."""
    return torch.stack([(words >> shift) & (CELLS - 1) for shift in (0, 15, 30, 44)], dim=1)


def digests(inputs: Inputs) -> Tensor:
    """One int64 ``(B,)`` of each example: its numbers times random ones, summed in a ring (Dietzfelbinger 1996).

    One product a number, so that telling examples apart costs little beside the network. Floating-point numbers count
    in float32, zeros not at all, as in ``model/randomness.py``.
    """
    size = batch_size(inputs)
    total = torch.zeros(size, dtype=torch.int64)
    pairs = zip(tree_flatten(plain(inputs))[0], flags_of(inputs, size), strict=True)
    # What has length one counts for every example: alone, an example cannot say whether that is its own.
    leaves = [t for t, has in pairs if has or (isinstance(t, Tensor) and t.ndim and len(t) == 1)]
    for place, leaf in enumerate(leaves):
        flat = (torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf).detach()
        flat = flat.reshape(len(flat), -1).expand(size, -1)
        keys = _keys(flat.shape[1], flat.device)
        for start in range(0, size, step := max(1, _NUMBERS // max(1, flat.shape[1]))):
            part = flat[start : start + step]
            if part.is_floating_point():
                part = (part.to(torch.float32) + 0.0).contiguous().view(torch.int32)
            wide = part.to(torch.int64)
            # Products of integer matrices are the processor's alone.
            words = wide @ keys if wide.device.type == "cpu" else (wide * keys).sum(1)
            words = words.cpu()
            total[start : start + step] += _mixed(words + place * 0x632BE59BD9B4E019)
    return total


def _keys(count: int, device: torch.device) -> Tensor:
    """The first ``count`` of a fixed stream of odd numbers (splitmix64)."""
    if not _KEYS or len(_KEYS[0]) < count:
        place = torch.arange(1, 1 + (1 << max(10, (count - 1).bit_length())))
        _KEYS[:] = [_mixed(_mixed(place * -0x61C8864680B583EB)) | 1]
    return _KEYS[0][:count].to(device)


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, on int64 with wrap-around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
