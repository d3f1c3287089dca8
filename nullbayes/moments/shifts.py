"""Second moments of a convolution's patches from products of shifted copies of its input.

The patch at position ``p`` of the output has ``x[p + i]`` at tap ``i``, so the block of taps ``(i, j)`` of ``Σ a aᵀ``
is ``Σ_p x[p + i] x[p + j]ᵀ``: a sum over ``q = p + i`` of ``x[q] x[q + Δ]ᵀ`` with ``Δ = j - i``. Pairs of taps with one
``Δ`` add up the same products over ranges of ``q`` that differ at the borders alone. So each ``Δ`` needs one product
over the common range and one for each row and column at the borders: 13 products of ``C`` channels for a kernel of
3 × 3 where patches take 81 (45 by symmetry).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nullbayes.moments.products import add_lower, mirror
from nullbayes.moments.rule import Summed

# Bytes of inputs that are reordered at a time.
_PIECE_BYTES = 2**23
# Positions summed up in the working precision before they go to float64.
_ROWS = 2**18
# Rows of a map from which on a product of each and their sum cost less than a product after the other.
_MANY = 6


class ShiftedSums:
    """Of one convolution with two axes of space and stride one.

    Args:
        dilation: distance of neighbouring taps.
    """

    def __init__(
        self, kernel: Sequence[int], dilation: Sequence[int], groups: int, dtype: torch.dtype
    ) -> None:
        self.kernel, self.dilation = tuple(kernel), tuple(dilation)
        self.groups, self.dtype = groups, dtype
        # By distance of taps: products (rows, columns, G, C, C) over the common range and at each border.
        self.parts: dict[tuple[int, int], Tensor] = {}
        self.totals: Tensor | None = None  # (k, k', channels)
        self.whole: Tensor | None = None  # what went to float64: (G, C, k, k', C, k, k')
        self.count = self.rows = 0

    def fits(self, positions: Sequence[int]) -> bool:
        """Whether maps of so many positions have a common range along each axis."""
        return all(
            n > d * (k - 1) for n, k, d in zip(positions, self.kernel, self.dilation, strict=True)
        )

    def add(self, x: Tensor, positions: Sequence[int]) -> None:
        """Add the padded input ``(n, channels, H, W)``."""
        each = x[0].numel() * self.dtype.itemsize
        for part in x.split(max(1, _PIECE_BYTES // each)):
            # Channels last, then examples beside them: two quick copies instead of a slow one.
            rows = part.permute(0, 2, 3, 1).to(self.dtype).contiguous().flatten(1, 2)
            rows = rows.transpose(0, 1).contiguous().view(*part.shape[2:], *part.shape[:2])
            self._add(rows, positions)
        self.count += len(x) * positions[0] * positions[1]
        self.rows += len(x) * positions[0] * positions[1]
        if self.rows >= _ROWS:
            self._widen()

    def _add(self, x: Tensor, positions: Sequence[int]) -> None:
        """``x (H, W, n, channels)``."""
        per_place = x.sum(2)
        channels = x.shape[3] // self.groups
        height, width = positions
        if self.totals is None:
            self.totals = x.new_zeros(*self.kernel, x.shape[3], dtype=torch.float64)
        down, right = self.dilation
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                seen = per_place[down * i : down * i + height, right * j : right * j + width]
                self.totals[i, j] += seen.sum((0, 1))
        for apart in self._distances():
            ranges = [
                _ranges(a, k, d, n)
                for a, k, d, n in zip(apart, self.kernel, self.dilation, positions, strict=True)
            ]
            if apart not in self.parts:
                size = (len(ranges[0]), len(ranges[1]), self.groups, channels, channels)
                self.parts[apart] = x.new_zeros(size)
            out = self.parts[apart]
            shift = (apart[0] * down, apart[1] * right)
            for r, row in enumerate(ranges[0]):
                for c, column in enumerate(ranges[1]):
                    _multiply(out[r, c], x, row, column, shift)

    def _distances(self) -> Iterator[tuple[int, int]]:
        """Of two taps, each pair once."""
        for down in range(self.kernel[0]):
            for right in range(0 if down == 0 else 1 - self.kernel[1], self.kernel[1]):
                yield down, right

    def _widen(self) -> None:
        """Put blocks of taps together in float64."""
        if not self.parts:
            return
        some = next(iter(self.parts.values()))
        channels, (k, w) = some.shape[-1], self.kernel
        if self.whole is None:
            size = (self.groups, channels, k, w, channels, k, w)
            self.whole = some.new_zeros(size, dtype=torch.float64)
        for (down, right), products in self.parts.items():
            rows = [_chosen(i, down, k, self.dilation[0]) for i in range(k - down)]
            low = max(0, -right)
            last = low + w - abs(right)
            columns = [_chosen(j, right, w, self.dilation[1]) for j in range(low, last)]
            for i, row in enumerate(rows):
                over = products[row].sum(0, dtype=torch.float64)
                for j, column in enumerate(columns, low):
                    block = over[column].sum(0)  # (G, C, C)
                    self.whole[:, :, i, j, :, i + down, j + right] += block
                    if (down, right) != (0, 0):
                        self.whole[:, :, i + down, j + right, :, i, j] += block.mT
            products.zero_()
        self.rows = 0

    def flush(self) -> Iterator[Summed]:
        """The sums since the last time."""
        self._widen()
        if self.whole is None or self.totals is None:
            return
        inputs = self.whole[0, :, :, :, 0, 0, 0].numel()
        sums = self.totals.permute(2, 0, 1).reshape(self.groups, inputs)
        yield Summed("weight", self.whole.reshape(self.groups, inputs, inputs), sums, self.count)
        self.whole = self.totals = None
        self.count = 0

    def mark(self) -> Tensor | None:
        """Finite where the sums are."""
        found = self.parts.get((0, 0))
        return None if found is None else found.diagonal(dim1=-2, dim2=-1).sum()


def _ranges(apart: int, taps: int, dilation: int, positions: int) -> list[tuple[int, int]]:
    """Along one axis: the range of ``q`` that all pairs of taps so far apart have in common, and each place beside it.

    The first tap of such a pair is one of ``low, ..., high``; that of tap ``i`` begins at ``i · dilation``.
    """
    low, high = max(0, -apart) * dilation, (taps - 1 - max(0, apart)) * dilation
    beside = [*range(low, high), *range(low + positions, high + positions)]
    return [(high, low + positions), *((q, q + 1) for q in beside)]


def _multiply(
    out: Tensor, x: Tensor, row: tuple[int, int], column: tuple[int, int], shift: tuple[int, int]
) -> None:
    """Add ``Σ_q x[q] x[q + shift]ᵀ`` over a range of rows and columns to ``out (G, C, C)``."""
    groups, channels = out.shape[:2]
    height, wide = row[1] - row[0], column[1] - column[0]
    a = x[row[0] : row[1], column[0] : column[1]]
    b = x[row[0] + shift[0] : row[1] + shift[0], column[0] + shift[1] : column[1] + shift[1]]
    for g in range(groups):
        at = slice(g * channels, (g + 1) * channels)
        if wide == 1 and height > 1:  # a narrow strip is quickly copied
            first, second = (t[..., at].reshape(-1, channels) for t in (a, b))
            out[g].addmm_(first.T, second)
            continue
        first, second = (t[..., at].flatten(1, 2) for t in (a, b))
        if height > _MANY:
            out[g] += torch.bmm(first.mT, second).sum(0)
        else:
            for top, bottom in zip(first, second, strict=True):
                out[g].addmm_(top.T, bottom)


def _chosen(tap: int, apart: int, taps: int, dilation: int) -> list[int]:
    """Which of :func:`_ranges` add up to the range of one first tap."""
    low, high = max(0, -apart) * dilation, (taps - 1 - max(0, apart)) * dilation
    start = tap * dilation
    before = [1 + q - low for q in range(start, high)]
    after = [1 + high - low + q for q in range(start - low)]
    return [0, *before, *after]


class PatchSums:
    """Of one convolution with two axes of space: products of patches written out with their channels last."""

    def __init__(self, kernel: Sequence[int], channels: int, dtype: torch.dtype) -> None:
        self.kernel, self.channels, self.dtype = tuple(kernel), channels, dtype
        self.gram: Tensor | None = None
        self.totals: Tensor | None = None
        self.whole: Tensor | None = None
        self.count = self.rows = 0

    def add(self, x: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> None:
        """Add the padded input ``(n, channels, H, W)``."""
        taps = self.kernel[0] * self.kernel[1]
        each = x[0].numel() * taps // (stride[0] * stride[1]) * self.dtype.itemsize
        for part in x.split(max(1, 4 * _PIECE_BYTES // max(1, each))):
            seen = part.permute(0, 2, 3, 1).to(self.dtype).contiguous()
            for axis, (k, s, d) in enumerate(zip(self.kernel, stride, dilation, strict=True), 1):
                seen = seen.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
            rows = seen.permute(0, 1, 2, 4, 5, 3).reshape(-1, taps * self.channels)
            if self.gram is None or self.totals is None:
                self.gram = rows.new_zeros(rows.shape[1], rows.shape[1])
                self.totals = rows.new_zeros(rows.shape[1], dtype=torch.float64)
            add_lower(self.gram, rows)
            self.totals += rows.sum(0)
            self.count += len(rows)
            self.rows += len(rows)
        if self.rows >= _ROWS:
            self._widen()

    def _widen(self) -> None:
        if self.gram is None:
            return
        if self.whole is None:
            self.whole = torch.zeros_like(self.gram, dtype=torch.float64)
        self.whole += self.gram
        self.gram.zero_()
        self.rows = 0

    def flush(self) -> Iterator[Summed]:
        """The sums since the last time."""
        self._widen()
        if self.whole is None or self.totals is None:
            return
        size = (*self.kernel, self.channels)
        inputs = self.totals.numel()
        gram = mirror(self.whole[None]).view(*size, *size).permute(2, 0, 1, 5, 3, 4)
        sums = self.totals.view(size).permute(2, 0, 1).reshape(1, inputs)
        yield Summed("weight", gram.reshape(1, inputs, inputs), sums, self.count)
        self.whole = self.totals = self.gram = None
        self.count = 0

    def mark(self) -> Tensor | None:
        """Finite where the sums are."""
        return None if self.gram is None else self.gram.diagonal().sum()
