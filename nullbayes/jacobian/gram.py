"""The Gram matrix ``A Aᵀ`` from captured blocks, wherever they are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from nullbayes.common.memory import working_bytes
from nullbayes.jacobian.block import Block
from nullbayes.jacobian.block_storage import Openable
from nullbayes.jacobian.factors.base import Factor
from nullbayes.jacobian.factors.outer import OuterFactor
from nullbayes.jacobian.factors.panels import add_panels
from nullbayes.jacobian.factors.products import add_into

# Bytes of written-out rows that a Gram build may hold for one layer.
GRAM_ROWS_BYTES = 2**30
# Bytes of recomputed rows held at a time, while the others are captured anew beside them.
PANEL_BYTES = 2**30
# Numbers of a weight from which its rows are written some outputs at a time, and what those may take.
WIDE, PANEL_ROWS_BYTES = 2**16, 2**27
# A block's product with itself is computed whole below twice so many rows.
HALVED = 768
# Rows of the lower triangle that are mirrored at a time.
MIRRORED = 512

Tick = Callable[[float], None]


def gram_matrix(
    blocks: Sequence[Openable], starts: Sequence[int], device: torch.device, tick: Tick | None
) -> Tensor:
    """``(M, M)`` float64, accumulated from products in the dtype of the rows."""
    out = torch.zeros(starts[-1], starts[-1], dtype=torch.float64, device=device)
    if any(block.where == "recomputed" for block in blocks):
        _by_panels(blocks, starts, out, tick)
    elif blocks:
        _by_layers(blocks, starts, out, tick)
    _mirror(out)
    return out


def _by_layers(
    blocks: Sequence[Openable], starts: Sequence[int], out: Tensor, tick: Tick | None
) -> None:
    """One layer of all blocks at a time: rows on disk are read once."""
    with blocks[0].opened() as first:
        keys = list(first.factors)
    for k, key in enumerate(keys):
        with ExitStack() as stack:
            opened = [stack.enter_context(block.opened()) for block in blocks]
            whole = [block.factors[key] for block in opened]
            wide = _wide(whole)
            if wide:
                add_panels(wide, out, min(PANEL_ROWS_BYTES, _room(out)))
                if tick:
                    tick((k + 1) / len(keys))
                continue
            factors = _ready(whole, _room(out))
            for i, left in enumerate(factors):
                rows = slice(starts[i], starts[i + 1])
                for j, right in enumerate(factors[:i]):
                    add_into(out[rows, starts[j] : starts[j + 1]], _product(left, right))
                _add_own(left, out[rows, rows])
                if tick:
                    tick((k + ((i + 1) / len(factors)) ** 2) / len(keys))


def _wide(factors: Sequence[Factor]) -> list[OuterFactor]:
    """``factors`` of a layer whose rows are best written out, some outputs of all examples at a time; else none."""
    outer = [
        f
        for f in factors
        if isinstance(f, OuterFactor)
        and f.groups == 1
        and not f.transposed
        and f.a.is_contiguous()
        and f.width_in * f.width_out >= WIDE
    ]
    written = any(f.written_rows_bytes is not None for f in outer)
    return outer if written and len(outer) == len(factors) else []


def _by_panels(
    blocks: Sequence[Openable], starts: Sequence[int], out: Tensor, tick: Tick | None
) -> None:
    """Some blocks held, all earlier ones opened beside them: each is captured once a panel."""
    first, room = 0, min(PANEL_BYTES, _room(out))
    while first < len(blocks):
        last, held = first, 0
        with ExitStack() as stack:
            panel: list[Block] = []
            while last < len(blocks) and (not panel or held + blocks[last].nbytes <= room):
                panel.append(stack.enter_context(blocks[last].opened()))
                held, last = held + blocks[last].nbytes, last + 1
            for j in range(last):
                if j >= first:
                    _add_pairs(panel[j - first :], panel[j - first], starts, j, j, out)
                    continue
                with blocks[j].opened() as right:
                    _add_pairs(panel, right, starts, first, j, out)
        first = last
        if tick:
            tick((last / len(blocks)) ** 2)


def _add_pairs(
    panel: Sequence[Block], right: Block, starts: Sequence[int], first: int, j: int, out: Tensor
) -> None:
    for i, left in enumerate(panel, first):
        part = out[starts[i] : starts[i + 1], starts[j] : starts[j + 1]]
        left.gram(right, part)


def _room(out: Tensor) -> int:
    """Bytes for rows beside ``out``: solvers hold a second matrix of that size later, products half of one now."""
    return 2 * working_bytes(out.device) + out.nbytes // 2


def _ready(factors: list[Factor], room: int) -> list[Factor | Tensor]:
    """Factors whose Gram blocks want written-out rows, written out once if they fit."""
    sizes = [f.written_rows_bytes for f in factors] if factors[0].written_rows_bytes else [None]
    if None in sizes or sum(n or 0 for n in sizes) > min(GRAM_ROWS_BYTES, room):
        return list(factors)
    return [f.matrices() for f in factors]


def _add_own(rows: Factor | Tensor, out: Tensor) -> None:
    """A block's products with itself: by halves, so that little more than the lower triangle is computed."""
    size = len(rows) if isinstance(rows, Tensor) else rows.examples
    if len(out) < 2 * HALVED or size < 2:
        add_into(out, _product(rows, rows))
        return
    half, at = size // 2, len(out) // size * (size // 2)
    first: Factor | Tensor
    second: Factor | Tensor
    if isinstance(rows, Tensor):
        first, second = rows[:half], rows[half:]
    else:
        first, second = rows.narrow(0, half), rows.narrow(half, size)
    _add_own(first, out[:at, :at])
    add_into(out[at:, :at], _product(second, first))
    _add_own(second, out[at:, at:])


def _product(left: Factor | Tensor, right: Factor | Tensor) -> Tensor:
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor)
        return left @ right.T
    assert isinstance(right, Factor)
    return left.gram(right)


def _mirror(matrix: Tensor, step: int = MIRRORED) -> None:
    """Copy the lower triangle of blocks to the upper one, without a second full matrix."""
    m = len(matrix)
    for i in range(0, m, step):
        stop = min(i + step, m)
        square = matrix[i:stop, i:stop]
        square.copy_(square.tril() + square.tril(-1).T)
        matrix[i:stop, stop:] = matrix[stop:, i:stop].T
