"""Matrix products and parts of vectors: what all kinds of factors are made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nullbayes.common.eight_bits import packed_in
from nullbayes.common.memory import bounded, times_on, working_bytes
from nullbayes.model.parameters import Slot

# Elements of the largest temporary that one product may create (256 MB of float32).
CHUNK_ELEMENTS = 64 * 2**20
# Rows of a matrix that are added to another of a wider dtype at a time: adding them at once would make a copy in it.
ADDED_ROWS = 256
# Elements of a float64 copy that is read again at once: 2 MB.
NEAR_DOUBLES = 2**18
# Multiplications from which a matrix product is given to oneDNN, see `product`.
ONEDNN_PRODUCT = 2**20
# Rows up to which a product with vectors is as fast as these can be read: where they lie, then. With more, it pays to
# bring them together first. And columns that are read at a time, for a result that stays in registers.
FEW_ROWS, READ_COLUMNS = 16, 2**13
# Examples of a batch that are looked at for subnormal numbers; of one example alone, one number in so many.
SEEN_FIRST, ONE_IN = 4, 8


def chunk_elements(device: torch.device) -> int:
    """Elements of the largest temporary that one product may create now; up to four of them are held at a time."""
    most = CHUNK_ELEMENTS * times_on(device)
    return min(most, max(1, working_bytes(device) // 16)) if bounded(device) else most


def add_into(out: Tensor, values: Tensor) -> None:
    """``out += values`` for matrices, without a copy of ``values`` in the dtype of ``out``."""
    for into, some in zip(out.split(ADDED_ROWS), values.split(ADDED_ROWS), strict=True):
        into += some


def product(x: Tensor, y: Tensor) -> Tensor:
    """``x yᵀ`` for matrices ``(m, k)`` and ``(n, k)``.

    PyTorch leaves its matrix products in single precision to MKL, which on processors that are not
    Intel's uses half the width of their vector units; its convolutions go to oneDNN, which uses all
    of it. So do large products here (measured: 105 against 240 GFLOP/s on one Zen 5 core).
    """
    large = len(x) * len(y) * x.shape[1] >= ONEDNN_PRODUCT
    # In other layouts oneDNN may fall back to its reference code, a thousand times slower.
    dense = all(z.is_contiguous() or z.mT.is_contiguous() for z in (x, y))
    if large and dense and x.device.type == "cpu" and x.dtype == torch.float32 and _onednn():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
        return out
    return x @ y.T


def few_rows(vectors: Tensor, columns: slice, rows: Tensor) -> Tensor:
    """``vectors[:, columns] rowsᵀ (S, R)`` for a few ``rows (R, K)``.

    Reading the vectors is what takes time: 1.3 GB for 30 samples of 11 million weights. They are read once, where they
    lie; a copy that a product may like better would write and read them again. In half precision they are widened a
    piece at a time.
    """
    packed = packed_in(vectors)
    if packed is not None:
        return packed.few_rows(columns.start, rows)
    vectors = vectors[:, columns]
    out = rows.new_zeros(len(rows), len(vectors))
    for start in range(0, rows.shape[1], READ_COLUMNS):
        some = vectors[:, start : start + READ_COLUMNS].to(rows.dtype)
        out.addmm_(rows[:, start : start + READ_COLUMNS], some.T)
    return out.T


@functools.cache
def _onednn() -> bool:
    """Whether this build of PyTorch has oneDNN, in the form in which its compiler calls it."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, y = torch.ones(2, 3), torch.ones(4, 3)
    try:
        out = torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool((out == 3).all())


def flushed(x: Tensor) -> Tensor:
    """``x (B, …)`` with zeros for what is subnormal, or less than ``eps⁴`` of its largest entry.

    A CPU multiplies subnormal numbers fifty times slower than others (measured: a product of which a quarter was so
    small), and networks make them: attention that masks by adding -100 leaves gradients of e⁻¹⁰⁰, at the same tokens of
    every example. So a few examples are looked at first, and mostly the last. What is left out is invisible beside
    the rest: 1e-28 of it in single precision.
    """
    if x.device.type != "cpu" or not x.numel():
        return x
    info = torch.finfo(x.dtype)
    eps = min(info.eps, torch.finfo(torch.float32).eps) ** 4
    few = x[:: -(-len(x) // SEEN_FIRST)]
    if len(x) == 1 and x.shape[-1] > ONE_IN:  # a token has them in all its numbers
        few = x[..., ::ONE_IN]
    for part in (few, x):
        low, high = torch.aminmax(part)  # in a tenth of the time of a norm
        largest = max(-float(low), float(high))
        if not math.isfinite(largest):  # an error that others report
            return x
        kept = torch.nn.functional.hardshrink(part, max(info.tiny, largest * eps))
        if torch.equal(kept, part):
            return x
    return kept


def gather(vectors: Tensor, slots: Sequence[Slot]) -> Tensor:
    """The columns of ``slots`` side by side: ``(S, P)`` -> ``(S, columns)``; a view if they are so."""
    parts = [vectors[:, start:stop] for start, stop in runs(slots)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def scatter_add(out: Tensor, slots: Sequence[Slot], values: Tensor) -> None:
    """Add ``values (S, columns)`` into the columns of ``slots`` of ``out (S, P)``."""
    at = 0
    for start, stop in runs(slots):
        out[:, start:stop] += values[:, at : at + stop - start]
        at += stop - start


def runs(slots: Sequence[Slot]) -> list[tuple[int, int]]:
    """Columns ``start:stop`` of ``slots``, those of neighbours as one."""
    out: list[tuple[int, int]] = []
    for slot in slots:
        if out and out[-1][1] == slot.start:
            out[-1] = out[-1][0], slot.stop
        else:
            out.append((slot.start, slot.stop))
    return out
