"""Samples in 8 bits: a quarter of the memory, and of what a prediction for one input reads.

Weights of two axes and more are stored as integers of 8 bits with one scale for each sample and every 131,072 or so
neighbouring weights (`torch.int8`, symmetric): a sample changes by about 1 % of its size. Biases and the weights of
norm layers stay as they are. One product with a few rows reads the integers where they lie, in a kernel of PyTorch's
that widens them in registers; the rows are rounded to bfloat16 for it (0.2 % of a row).
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

# Weights of a tensor from which it is packed, and those that share a scale, about.
FROM, TOGETHER = 2**10, 2**17
LARGEST = 127
# Bytes: the kernel loads whole vectors, and only from places that are multiples of them.
ALIGNED = 64


@dataclass(frozen=True)
class Piece:
    """Columns ``start: start + numel`` of the samples, of a tensor of shape ``(rows, …)``.

    Attributes:
        wide: weights of one of its rows; ``each``: rows that share a scale, a chunk; 0: not packed.
        chunks: how many chunks there are; the last one may be filled up with zeros.
    """

    start: int
    numel: int
    wide: int
    each: int
    chunks: int

    @classmethod
    def of(cls, start: int, shape: Sequence[int], each: int | None = None) -> Piece:
        """``each`` None: as it is best."""
        numel = math.prod(shape)
        packed = len(shape) > 1 and numel >= FROM if each is None else each > 0
        if not packed:
            return cls(start, numel, shape[-1] if len(shape) > 1 else numel, 0, 0)
        rows, wide = shape[0], numel // shape[0]
        if each is None:
            chunks = -(-rows // max(1, TOGETHER // wide))
            each = -(-rows // chunks)
        return cls(start, numel, wide, each, -(-rows // each))

    @property
    def stop(self) -> int:
        return self.start + self.numel

    @property
    def chunk(self) -> int:
        """Weights of a chunk."""
        return self.each * self.wide


class Packed:
    """Weight changes ``(S, P)`` that stand in for a tensor: its length, rows, columns and products with rows.

    Args:
        pieces: the columns, each once.
        values: int8, of all packed pieces one after another, each ``(chunks, S, chunk)``.
        scales: float32, likewise ``(chunks, S)``.
        plain: ``(S, k)``, the columns of the other pieces one after another.
    """

    dtype = torch.int8

    def __init__(
        self, pieces: Sequence[Piece], values: Tensor, scales: Tensor, plain: Tensor
    ) -> None:
        self.pieces, self.values, self.scales, self.plain = list(pieces), values, scales, plain
        self.shape = torch.Size([len(plain), sum(piece.numel for piece in self.pieces)])
        self.device, self._version = plain.device, 0
        self._by_start: dict[int, tuple[Tensor, Tensor]] = {}
        self._plain_at: dict[int, int] = {}
        #: by their first columns, once they were asked for
        self._chunks: dict[int, tuple[Tensor, Tensor]] | None = None
        at = scale_at = plain_at = 0
        for piece in self.pieces:
            if not piece.each:
                self._plain_at[piece.start] = plain_at
                plain_at += piece.numel
                continue
            size, count = piece.chunks * len(self) * piece.chunk, piece.chunks * len(self)
            self._by_start[piece.start] = (
                values[at : at + size].view(piece.chunks, len(self), piece.chunk),
                scales[scale_at : scale_at + count].view(piece.chunks, len(self)),
            )
            at, scale_at = at + size, scale_at + count
        self._order = sorted(self.pieces, key=lambda piece: piece.start)
        self._starts = [piece.start for piece in self._order]

    @classmethod
    def of(cls, samples: Tensor, shapes: Sequence[Sequence[int]]) -> Packed:
        """Packed from ``samples (S, P)``, whose columns are tensors of these shapes."""
        pieces, at = [], 0
        for shape in shapes:
            pieces.append(Piece.of(at, shape))
            at += pieces[-1].numel
        values, scales = [], []
        plain = [samples[:, p.start : p.stop].float() for p in pieces if not p.each]
        for piece in (p for p in pieces if p.each):
            filled = samples.new_zeros(len(samples), piece.chunks * piece.chunk)
            filled[:, : piece.numel] = samples[:, piece.start : piece.stop]
            some = filled.view(len(samples), piece.chunks, piece.chunk).transpose(0, 1)
            largest = some.abs().amax(2).float()
            scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
            values.append((some / scale[..., None]).round().to(torch.int8).reshape(-1))
            scales.append(scale.reshape(-1))
        none = samples.new_zeros(0)
        return cls(
            pieces,
            torch.cat(values) if values else none.to(torch.int8),
            torch.cat(scales) if scales else none.float(),
            torch.cat(plain, 1) if plain else samples.new_zeros(len(samples), 0).float(),
        )

    # -- as a tensor ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.plain)

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + self.plain.nbytes

    def element_size(self) -> int:
        return 1

    def is_inference(self) -> bool:
        return False

    def __iter__(self) -> Iterator[Tensor]:
        return (self[s] for s in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """One sample ``(P,)`` or columns of all, in float32; or some samples, packed."""
        if isinstance(index, tuple):
            rows, columns = index
            assert rows == slice(None)
            start, stop, _ = columns.indices(self.shape[1])
            return self.columns(start, stop)
        if isinstance(index, int):
            return self[[index]].columns(0, self.shape[1])[0]
        keep = torch.arange(len(self))[index].to(self.device)
        values = [v[:, keep].reshape(-1) for v, _ in self._by_start.values()]
        scales = [s[:, keep].reshape(-1) for _, s in self._by_start.values()]
        return Packed(
            self.pieces,
            torch.cat(values) if values else self.values,
            torch.cat(scales) if scales else self.scales,
            self.plain[keep],
        )

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """All of it ``(S, P)``, as `torch.Tensor.to` would convert it from float32."""
        return self.columns(0, self.shape[1]).to(*args, **kwargs)

    def placed(self, device: torch.device) -> Packed:
        """The same on ``device``."""
        parts = (t.to(device) for t in (self.values, self.scales, self.plain))
        return Packed(self.pieces, *parts)

    # -- parts and products ----------------------------------------------------------------------------

    def _within(self, start: int, stop: int) -> Iterator[Piece]:
        first = bisect_right(self._starts, start) - 1
        return itertools.takewhile(lambda p: p.start < stop, self._order[first:])

    def each(self, start: int) -> int:
        """How many rows of the tensor that starts at that column share a scale; 0: it is not packed."""
        return next(p.each for p in self.pieces if p.start == start)

    def _fast(self, piece: Piece) -> bool:
        return piece.chunk % ALIGNED == 0 and self.device.type == "cpu" and _kernel()

    def _chunk_at(self, start: int, width: int) -> tuple[Tensor, Tensor] | None:
        """Values and scales of the chunk of these very columns; None: there is none that the kernel takes."""
        if self._chunks is None:
            self._chunks = {
                p.start + c * p.chunk: (values[c], scales[c])
                for p in self.pieces
                if p.each and self._fast(p)
                for values, scales in [self._by_start[p.start]]
                for c in range(p.chunks)
            }
        found = self._chunks.get(start)
        return None if found is None or found[0].shape[1] != width else found

    def columns(self, start: int, stop: int) -> Tensor:
        """``(S, stop - start)`` float32."""
        out = self.plain.new_empty(len(self), stop - start)
        for piece in self._within(start, stop):
            first, last = max(start, piece.start), min(stop, piece.stop)
            into, begin = out[:, first - start : last - start], first - piece.start
            if not piece.each:
                at = self._plain_at[piece.start] + begin
                into.copy_(self.plain[:, at : at + last - first])
                continue
            values, scales = self._by_start[piece.start]
            for c, span, inside in _chunks(piece, begin, last - piece.start):
                torch.mul(values[c, :, inside], scales[c, :, None], out=into[:, span])
        return out

    def looked_up(self, start: int, index: Tensor) -> Tensor:
        """Rows ``index (N,)`` of the table that starts at column ``start``: ``(S, N, wide)`` float32."""
        piece = next(p for p in self.pieces if p.start == start)
        if not piece.each:
            return self.columns(start, piece.stop).view(len(self), -1, piece.wide)[:, index]
        values, scales = self._by_start[start]
        chunk = index.div(piece.each, rounding_mode="floor")
        shaped = values.view(piece.chunks, len(self), piece.each, piece.wide)
        found = shaped[chunk, :, index % piece.each] * scales[chunk, :, None]  # (N, S, wide)
        return found.transpose(0, 1)

    def few_rows(self, start: int, rows: Tensor) -> Tensor:
        """``Δ rowsᵀ (S, R)`` for ``rows (R, K)`` of the columns from ``start`` on; widened chunk by chunk."""
        known = self._chunk_at(start, rows.shape[1])
        if known is not None and rows.dtype == torch.float32:
            values, scales = known
            return (_product(rows.bfloat16(), values) * scales).T
        stop, total = start + rows.shape[1], rows.new_zeros(len(rows), len(self))
        for piece in self._within(start, stop):
            first, last = max(start, piece.start), min(stop, piece.stop)
            some, begin = rows[:, first - start : last - start], first - piece.start
            if not piece.each:
                at = self._plain_at[piece.start] + begin
                total.addmm_(some, self.plain[:, at : at + last - first].to(rows.dtype).T)
                continue
            values, scales = self._by_start[piece.start]
            fast = rows.dtype == torch.float32 and self._fast(piece)
            some = some.bfloat16() if fast else some
            for c, span, inside in _chunks(piece, begin, last - piece.start):
                part = some[:, span]
                if not fast:
                    found = part @ values[c, :, inside].to(rows.dtype).T
                else:
                    if part.shape[1] < piece.chunk:
                        left = inside.start, piece.chunk - inside.stop
                        part = torch.nn.functional.pad(part, left)
                    found = _product(part.contiguous(), values[c])
                total.addcmul_(found.to(rows.dtype), scales[c].to(rows.dtype))
        return total.T

    @property
    def as_samples(self) -> Tensor:
        """Itself, for those that know samples as a tensor and use no more of it than there is here."""
        return cast(Tensor, self)


def packed_in(samples: object) -> Packed | None:
    """Where samples are in 8 bits, what they are."""
    return samples if isinstance(samples, Packed) else None


def _chunks(piece: Piece, begin: int, end: int) -> Iterator[tuple[int, slice, slice]]:
    """Chunks that hold the weights ``begin: end`` of a piece: which, where in those, and where inside."""
    for c in range(begin // piece.chunk, -(-end // piece.chunk)):
        at = c * piece.chunk
        first, last = max(begin, at), min(end, at + piece.chunk)
        yield c, slice(first - begin, last - begin), slice(first - at, last - at)


def _product(rows: Tensor, values: Tensor) -> Tensor:
    """``rows valuesᵀ`` in bfloat16, of int8 ``values``, which are copied from a place that cannot be loaded from."""
    if values.data_ptr() % ALIGNED:
        values = values.clone()
    # Scales in bfloat16, as the kernel takes them, would round a chunk as a whole.
    return torch._weight_int8pack_mm(rows, values, _ones(len(values)))


@functools.cache
def _ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bfloat16)


@functools.cache
def _kernel() -> bool:
    """Whether this build of PyTorch multiplies integers of 8 bits by rows in bfloat16."""
    x, w = torch.ones(2, 64, dtype=torch.bfloat16), torch.ones(4, 64, dtype=torch.int8)
    try:
        out = torch._weight_int8pack_mm(x, w, torch.ones(4, dtype=torch.bfloat16))
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return bool((out == 64).all())
