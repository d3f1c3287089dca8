"""Sums of products of layer inputs, added up where they are cheap: half of each product, in float32 where that does.

A product ``aᵀ a`` is symmetric, so blocks of columns below its diagonal are enough. In float32 the entries of a sum of
``K`` rows have errors near 1e-7 of the mean square, and those of all entries together move an eigenvalue by
``2 √I`` times that: a hundredth of an edge at a thousandth of the mean eigenvalue, even of 4,608 columns. So float32
serves where the edge is soft and the network is not in float64 (:func:`working_dtype`); sums go to float64 after some
thousand rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Softest edge that float32 products do not blur.
SOFT = 1e-3
# Rows of a product at a time, and how many are added up in float32.
ROWS = 2**14
# Blocks of columns of a product: how many, and how narrow they may get.
_BLOCKS, _NARROWEST = 8, 128


def working_dtype(dtype: torch.dtype, delta: float) -> torch.dtype:
    """What products of a network in ``dtype`` are made in, for an edge at ``delta`` of the mean eigenvalue."""
    return torch.float64 if dtype == torch.float64 or delta < SOFT else torch.float32


def add_lower(out: Tensor, x: Tensor, *, fresh: bool = False) -> None:
    """Add ``xᵀ x`` of ``x (n, I)`` to ``out (I, I)``: on and below the diagonal; above it, anything."""
    columns = x.shape[1]
    step = columns
    if columns >= 2 * _NARROWEST:
        step = max(_NARROWEST, -(-columns // _BLOCKS))
    for start in range(0, columns, step):
        stop = min(columns, start + step)
        part = out[start:stop, :stop]
        part.addmm_(x[:, start:stop].T, x[:, :stop], beta=0.0 if fresh else 1.0)


def mirror(values: Tensor) -> Tensor:
    """Copy what is below the diagonals of ``(G, I, I)`` to above them, in place."""
    columns = values.shape[-1]
    for start in range(0, columns, 512):
        stop = min(columns, start + 512)
        values[..., :start, start:stop] = values[..., start:stop, :start].mT
        block = values[..., start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).mT)
    return values


class InputSums:
    """Sums over inputs of one weight with one bias: ``gram (G, I, I)``, below the diagonal, and ``totals (G, I)``.

    Args:
        gram: what to add products to.
        biased: whether totals are needed.
    """

    def __init__(self, gram: Tensor, *, biased: bool) -> None:
        self.gram, self.biased = gram, biased
        self.totals = gram.new_zeros(gram.shape[:2], dtype=torch.float64)
        self.count = self.rows = 0

    def add(self, a: Tensor, *, shared: bool = False) -> tuple[Tensor, Tensor | None] | None:
        """Add inputs ``(n, G, I)``; where ``shared`` asks for them and can have them, their product and totals."""
        groups, own = a.shape[1:]
        same = groups > 1 and a.stride(1) == 0  # one input for all groups
        if own and (groups == 1 or same) and shared and len(a) <= ROWS:
            x = a[:, 0].to(self.gram.dtype)
            product = self.gram.new_empty(own, own)
            add_lower(product, x, fresh=True)
            made = (product, x.sum(0) if self.biased else None)
            self.add_made(made, len(a))
            return made
        for part in a.split(ROWS):
            self._add(part, same=same)
        self.count += len(a)
        self.rows += len(a)
        return None

    def add_made(self, made: tuple[Tensor, Tensor | None], count: int) -> None:
        """Add a product that another weight with the same input has made."""
        product, totals = made
        self.gram += product
        if totals is not None:
            self.totals += totals
        self.count += count
        self.rows += count

    def _add(self, a: Tensor, *, same: bool) -> None:
        groups, own = a.shape[1:]
        if not own:
            return
        if groups == 1:
            x = a[:, 0].to(self.gram.dtype)
            add_lower(self.gram[0], x)
            if self.biased:
                self.totals[0] += x.sum(0)
            return
        if same:
            x = a[:, 0].to(self.gram.dtype)
            product = self.gram.new_empty(own, own)
            add_lower(product, x, fresh=True)
            self.gram += product
            self.totals += x.sum(0)
            return
        x = a.to(self.gram.dtype)
        if own == 1:
            self.gram[:, 0, 0] += torch.linalg.vector_norm(x[..., 0], dim=0).square()
        else:
            x = x.transpose(0, 1)  # (G, n, I)
            self.gram.baddbmm_(x.mT, x)
            x = x.transpose(0, 1)
        self.totals += x.sum(0)

    def mark(self) -> Tensor:
        """Finite where the sums are."""
        return self.gram.diagonal(dim1=1, dim2=2).sum()
