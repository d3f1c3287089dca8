"""Second moments of a convolution's patches from products of its input's Fourier coefficients.

Block ``(i, j)`` of ``Σ a aᵀ`` is ``Σ_q y[q] y[q + Δ]ᵀ`` with ``Δ = j - i``, over the ``q`` that tap ``i`` reaches
(``shifts.py``). Over all ``q`` that is a correlation ``R(Δ)`` of the input with itself, hence a sum over frequencies:
``R(Δ) = 1/N Σ_f y(f) y(f)ᴴ exp(-2πi f·Δ / N)``, of an input with as many zeros beside it as the farthest taps are apart
(the correlation theorem). One product a frequency serves all ``Δ``, and half of the frequencies say all of a real
input: for a kernel of 3 × 3, 1.7 products of ``C`` channels a position where shifts take 13. What tap ``i`` does not
reach, rows and columns at the borders, is subtracted. With zeros for padding that is ``y`` at the first and the last
row and column, for the few ``Δ`` along them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.moments.rule import Summed

# Bytes of inputs that are transformed at a time.
_PIECE_BYTES = 2**23
# Products of how many frequencies are made at a time: so many bytes of them, or so many.
_PRODUCT_BYTES, _TOGETHER = 2**21, 20
# Positions summed up in the working precision before they go to float64.
_ROWS = 2**18
# Examples below which sums over frequencies cost more than products of shifted inputs.
LEAST_EXAMPLES = 8


@dataclass(frozen=True)
class Axis:
    """One axis of space: ``taps``, ``dilation`` apart; ``before`` and ``after`` zeros are put around the input."""

    taps: int
    dilation: int
    before: int
    after: int

    def positions(self, length: int) -> int:
        """Of the output for an input of this length."""
        return length + self.before + self.after - self.dilation * (self.taps - 1)

    def beyond(self, apart: int, tap: int, length: int) -> list[int]:
        """Places of the input that ``tap`` does not reach, where there is another ``apart`` taps from them.

        From the end, as negative numbers, where they lie behind what it reaches.
        """
        shift, start = apart * self.dilation, tap * self.dilation - self.before
        low, high = max(0, -shift), min(length, length - shift)
        stop = start + self.positions(length)
        return [*range(low, min(high, start)), *(q - length for q in range(max(low, stop), high))]


@functools.lru_cache(256)
def _border(axis: Axis, apart: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First taps of pairs so far ``apart``, and all places that one of them does not reach."""
    taps = tuple(range(max(0, -apart), axis.taps - max(0, apart)))
    places = {q for tap in taps for q in axis.beyond(apart, tap, length)}
    return taps, tuple(sorted(places, key=lambda q: (q < 0, q)))


def _distances(rows: int, columns: int) -> list[tuple[int, int]]:
    """Of two taps, each pair once."""
    return [
        (down, right)
        for down in range(rows)
        for right in range(0 if down == 0 else 1 - columns, columns)
    ]


class SpectralSums:
    """Of one convolution with two axes of space and stride one.

    Args:
        axes: of space.
        biased: whether totals are needed; zeros otherwise.
    """

    def __init__(
        self, axes: Sequence[Axis], groups: int, dtype: torch.dtype, *, biased: bool
    ) -> None:
        self.axes, self.groups, self.dtype, self.biased = tuple(axes), groups, dtype, biased
        rows, columns = (axis.taps for axis in self.axes)
        self.distances = _distances(rows, columns)
        self.real: Tensor | None = None  # by distance: (D, G, C, C)
        self.imaginary: Tensor | None = None
        # By distance, and place at the border along either axis (None: all): (G, C, C).
        self.borders: dict[tuple[int, int | None, int | None], Tensor] = {}
        self.totals: Tensor | None = None  # (k, k', channels)
        self.whole: Tensor | None = None  # what went to float64: (G, C, k, k', C, k, k')
        self.count = self.rows = 0

    def pays(self, examples: int, space: Sequence[int]) -> bool:
        """Whether maps of this size are less work so than by shifts: products of ``C`` channels an example."""
        if examples < LEAST_EXAMPLES or any(
            axis.positions(length) <= axis.dilation * (axis.taps - 1)
            for axis, length in zip(self.axes, space, strict=True)
        ):
            return False
        sizes = [_size(axis, n) for axis, n in zip(self.axes, space, strict=True)]
        own = math.prod(sizes) * (1.5 + len(self.distances) / examples)
        for down, right in self.distances:
            strips = [
                len(_border(axis, apart, n)[1])
                for axis, apart, n in zip(self.axes, (down, right), space, strict=True)
            ]
            own += strips[0] * (space[1] + strips[1]) + strips[1] * space[0]
        return own < math.prod(space) * len(self.distances)

    def add(self, x: Tensor) -> None:
        """Add the input ``(n, channels, H, W)``, without the zeros beside it."""
        each = x[0].numel() * self.dtype.itemsize
        for part in x.split(max(1, _PIECE_BYTES // each)):
            # Channels last, then examples beside them: two quick copies instead of a slow one.
            rows = part.permute(0, 2, 3, 1).to(self.dtype).contiguous().flatten(1, 2)
            rows = rows.transpose(0, 1).contiguous().view(*part.shape[2:], *part.shape[:2])
            self._add_products(rows)
            self._add_borders(rows)
            if self.biased:
                self._add_totals(rows.sum(2))
        counts = [a.positions(n) for a, n in zip(self.axes, x.shape[2:], strict=True)]
        self.count += len(x) * math.prod(counts)
        self.rows += len(x) * math.prod(counts)
        if self.rows >= _ROWS:
            self._widen()

    def _add_products(self, x: Tensor) -> None:
        """``x (H, W, n, channels)``."""
        sizes = [_size(axis, n) for axis, n in zip(self.axes, x.shape[:2], strict=True)]
        found = _coefficients(x, sizes)
        shifts = tuple(
            (down * self.axes[0].dilation, right * self.axes[1].dilation)
            for down, right in self.distances
        )
        cosines, sines = (t.to(found) for t in _phases(sizes[0], sizes[1], shifts))
        channels = x.shape[3] // self.groups
        size = (len(shifts), self.groups, channels * channels)
        if self.real is None or self.imaginary is None:
            self.real, self.imaginary = found.new_zeros(size), found.new_zeros(size)
        step = max(_TOGETHER, _PRODUCT_BYTES // (channels * channels * self.dtype.itemsize))
        room = found.new_empty(min(step, len(found)), channels, channels)
        for g in range(self.groups):
            own = found[..., g * channels : (g + 1) * channels]  # (F, 2, n, C)
            real, imaginary = self.real[:, g], self.imaginary[:, g]
            for start in range(0, len(own), step):
                some = own[start : start + step]
                at = slice(start, start + len(some))
                both = some.flatten(1, 2)
                products = room[: len(some)]
                torch.bmm(both.mT, both, out=products)
                real.addmm_(cosines[:, at], products.flatten(1))
                torch.bmm(some[:, 1].mT, some[:, 0], out=products)
                imaginary.addmm_(sines[:, at], products.flatten(1))

    def _add_borders(self, x: Tensor) -> None:
        """``x (H, W, n, channels)``: products along rows and columns that a tap does not reach."""
        lanes: dict[int, Tensor] = {}  # columns, which are quickly copied

        def lane(q: int) -> Tensor:
            if q not in lanes:
                lanes[q] = x[:, q].contiguous()
            return lanes[q]

        space = x.shape[:2]
        for number, apart in enumerate(self.distances):
            shift = [a * axis.dilation for a, axis in zip(apart, self.axes, strict=True)]
            rows, columns = (
                _border(axis, a, n)[1] for axis, a, n in zip(self.axes, apart, space, strict=True)
            )
            left, right = max(0, -shift[1]), space[1] - max(0, shift[1])
            for r in rows:
                top, bottom = x[r], x[r % space[0] + shift[0]]
                a, b = top[left:right], bottom[left + shift[1] : right + shift[1]]
                self._add_border((number, r, None), a, b)
                for c in columns:
                    other = c % space[1]
                    self._add_border((number, r, c), top[other], bottom[other + shift[1]])
            for c in columns:
                one, two = lane(c % space[1]), lane(c % space[1] + shift[1])
                self._add_border((number, None, c), one[: space[0] - shift[0]], two[shift[0] :])

    def _add_border(self, place: tuple[int, int | None, int | None], a: Tensor, b: Tensor) -> None:
        channels = a.shape[-1] // self.groups
        if place not in self.borders:
            self.borders[place] = a.new_zeros(self.groups, channels, channels)
        for g, out in enumerate(self.borders[place]):
            at = slice(g * channels, (g + 1) * channels)
            out.addmm_(a[..., at].reshape(-1, channels).T, b[..., at].reshape(-1, channels))

    def _add_totals(self, places: Tensor) -> None:
        """``places (H, W, channels)``, summed over examples."""
        around = [n for axis in self.axes[::-1] for n in (axis.before, axis.after)]
        seen = torch.nn.functional.pad(places, [0, 0, *around])
        counts = [a.positions(n) for a, n in zip(self.axes, places.shape[:2], strict=True)]
        if self.totals is None:
            taps = [axis.taps for axis in self.axes]
            self.totals = places.new_zeros(*taps, places.shape[2], dtype=torch.float64)
        for i in range(self.axes[0].taps):
            for j in range(self.axes[1].taps):
                down, right = i * self.axes[0].dilation, j * self.axes[1].dilation
                some = seen[down : down + counts[0], right : right + counts[1]]
                self.totals[i, j] += some.sum((0, 1))

    def _widen(self) -> None:
        """Put blocks of taps together in float64."""
        if self.real is None or self.imaginary is None:
            return
        channels, (k, w) = math.isqrt(self.real.shape[2]), (axis.taps for axis in self.axes)
        if self.whole is None:
            size = (self.groups, channels, k, w, channels, k, w)
            self.whole = self.real.new_zeros(size, dtype=torch.float64)
        length = 2**20  # any that is long enough: places at the far border count from there
        for number, (down, right) in enumerate(self.distances):
            turned = self.imaginary[number].view(-1, channels, channels).double()
            full = self.real[number].view(-1, channels, channels).double() + turned - turned.mT
            for i in _border(self.axes[0], down, length)[0]:
                rows = self.axes[0].beyond(down, i, length)
                for j in _border(self.axes[1], right, length)[0]:
                    columns = self.axes[1].beyond(right, j, length)
                    block = full.clone()
                    for r in rows:
                        block -= self.borders[number, r, None]
                        for c in columns:
                            block += self.borders[number, r, c]
                    for c in columns:
                        block -= self.borders[number, None, c]
                    self.whole[:, :, i, j, :, i + down, j + right] += block
                    if (down, right) != (0, 0):
                        self.whole[:, :, i + down, j + right, :, i, j] += block.mT
        for part in (self.real, self.imaginary, *self.borders.values()):
            part.zero_()
        self.rows = 0

    def flush(self) -> list[Summed]:
        """The sums since the last time."""
        self._widen()
        if self.whole is None:
            return []
        inputs = self.whole[0, :, :, :, 0, 0, 0].numel()
        sums = self.whole.new_zeros(self.groups, inputs)
        if self.totals is not None:
            sums = self.totals.permute(2, 0, 1).reshape(self.groups, inputs)
        gram = self.whole.reshape(self.groups, inputs, inputs)
        out = [Summed("weight", gram, sums, self.count)]
        self.whole = self.totals = self.real = self.imaginary = None
        self.borders = {}
        self.count = 0
        return out

    def mark(self) -> Tensor | None:
        """Finite where the sums are."""
        return None if self.real is None else self.real[0].sum()


def _size(axis: Axis, length: int) -> int:
    """Of the transform along one axis: no pair of taps meets around its end."""
    return length + axis.dilation * (axis.taps - 1)


def _counts(size: int) -> tuple[int, int]:
    """How many frequencies are real, and how many stand for a pair."""
    return 2 - size % 2, (size - 1) // 2


@functools.lru_cache(64)
def _frequencies(size: int) -> Tensor:
    """``2π f / N``: the real ones, then one of each pair."""
    real, pairs = _counts(size)
    chosen = [0, size // 2][:real] + list(range(1, pairs + 1))
    return torch.tensor(chosen, dtype=torch.float64) * (2 * math.pi / size)


@functools.lru_cache(64)
def _transform(size: int, length: int) -> Tensor:
    """``(N, L)``: cosines of all frequencies, then sines of those that stand for a pair."""
    real, _ = _counts(size)
    angles = _frequencies(size)[:, None] * torch.arange(length, dtype=torch.float64)
    return torch.cat([angles.cos(), angles[real:].sin()])


def _coefficients(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """``x (H, W, *rest)`` -> ``(F, 2, *rest)``: real parts of its coefficients and negative imaginary parts.

    In the order of :func:`_phases`.
    """
    height, width = x.shape[:2]
    rest = x.shape[2:]
    down, across = (
        _transform(n, length).to(x) for n, length in zip(sizes, (height, width), strict=True)
    )
    y = down @ x.reshape(height, -1)
    y = across @ y.view(sizes[0], width, -1)  # (N, N', ...)
    (r1, p1), (r2, p2) = (_counts(n) for n in sizes)
    cosines, sines = y[: r1 + p1], y[r1 + p1 :]
    count = r1 * r2 + r1 * p2 + p1 * r2 + 2 * p1 * p2
    out = y.new_empty(count, 2, y.shape[2])
    ends = [r1 * r2, r1 * p2, p1 * r2, p1 * p2, p1 * p2]
    alone, wide, tall, plus, minus = out.split(ends)
    alone[:, 0] = cosines[:r1, :r2].flatten(0, 1)
    alone[:, 1] = 0
    wide[:, 0] = cosines[:r1, r2 : r2 + p2].flatten(0, 1)
    wide[:, 1] = cosines[:r1, r2 + p2 :].flatten(0, 1)
    tall[:, 0] = cosines[r1:, :r2].flatten(0, 1)
    tall[:, 1] = sines[:, :r2].flatten(0, 1)
    plus, minus = (t.view(p1, p2, 2, -1) for t in (plus, minus))
    cc, cs = cosines[r1:, r2 : r2 + p2], cosines[r1:, r2 + p2 :]
    sc, ss = sines[:, r2 : r2 + p2], sines[:, r2 + p2 :]
    torch.sub(cc, ss, out=plus[:, :, 0])
    torch.add(sc, cs, out=plus[:, :, 1])
    torch.add(cc, ss, out=minus[:, :, 0])
    torch.sub(sc, cs, out=minus[:, :, 1])
    return out.view(count, 2, *rest)


@functools.lru_cache(64)
def _phases(rows: int, columns: int, shifts: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """``(D, F)`` each: by which real and imaginary parts of products make up the correlation at each shift."""
    r1, r2 = _counts(rows)[0], _counts(columns)[0]
    first, second = _frequencies(rows), _frequencies(columns)
    grid = [
        (a.repeat_interleave(len(b)), b.repeat(len(a)), weight)
        for a, b, weight in (
            (first[:r1], second[:r2], 1.0),
            (first[:r1], second[r2:], 2.0),
            (first[r1:], second[:r2], 2.0),
            (first[r1:], second[r2:], 2.0),
            (first[r1:], -second[r2:], 2.0),
        )
    ]
    down, right = torch.cat([a for a, _, _ in grid]), torch.cat([b for _, b, _ in grid])
    weights = torch.cat([torch.full_like(a, w) for a, _, w in grid]) / (rows * columns)
    by = torch.tensor(shifts, dtype=torch.float64)
    angles = by[:, :1] * down + by[:, 1:] * right
    # Imaginary parts are negative: so are their sines.
    return weights * angles.cos(), -weights * angles.sin()
