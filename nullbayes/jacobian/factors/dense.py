"""Rows written out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from nullbayes.jacobian.factors.base import Factor
from nullbayes.jacobian.factors.products import (
    ONEDNN_PRODUCT,
    flushed,
    gather,
    product,
    runs,
    scatter_add,
)
from nullbayes.model.parameters import Slot

# Rows to a vector from which products with them read the rows as they lie.
MANY = 16


class DenseFactor(Factor):
    """Rows written out: ``values (B, C, columns)``."""

    def __init__(self, slots: Sequence[Slot], values: Tensor) -> None:
        self.slots = tuple(slots)
        self.values = values.contiguous()
        self.examples, self.cotangents = values.shape[:2]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def tensors(self) -> list[Tensor]:
        return [self.values]

    def rows(self) -> Tensor:
        return self.values.reshape(self.num_rows, -1)

    def matvec(self, vectors: Tensor) -> Tensor:
        rows = self.rows()
        some = gather(vectors, self.slots).to(rows.dtype).contiguous()
        # oneDNN brings its second matrix into an order of its own: of two, the smaller one.
        return product(rows, some).T if self._few(some) else product(some, rows)

    def rmatvec(self, weights: Tensor, out: Tensor) -> None:
        rows = self.rows()
        if not (self._few(weights) and out.dtype == rows.dtype):
            scatter_add(out, self.slots, product(weights.contiguous(), rows.mT))
            return
        at = 0
        for start, stop in runs(self.slots):
            out[:, start:stop].addmm_(weights, rows[:, at : at + stop - start])
            at += stop - start

    def _few(self, vectors: Tensor) -> bool:
        """Whether these are few beside the rows, of which rearranging a copy would cost as much as the product."""
        return self.num_rows >= MANY * len(vectors) and self.values.numel() >= ONEDNN_PRODUCT

    def gram(self, other: Factor) -> Tensor:
        return product(self.rows(), other.rows())

    def only(self, names: Collection[str]) -> DenseFactor | None:
        widths = [slot.numel for slot in self.slots]
        parts = zip(self.slots, self.values.split(widths, 2), strict=True)
        chosen = [(slot, values) for slot, values in parts if slot.name in names]
        if not chosen:
            return None
        slots, values = zip(*chosen, strict=True)
        return DenseFactor(slots, torch.cat(values, 2))

    def scaled(self, scales: Mapping[str, float]) -> DenseFactor:
        each = [self.values.new_full((s.numel,), scales[s.name]) for s in self.slots]
        return DenseFactor(self.slots, flushed(self.values * torch.cat(each)))

    def narrow(self, start: int, stop: int) -> DenseFactor:
        return DenseFactor(self.slots, self.values[start:stop])

    def single(self, rows: Tensor) -> DenseFactor:
        return DenseFactor(self.slots, self.rows()[rows][:, None])

    def joined(self, parts: Sequence[DenseFactor]) -> DenseFactor:
        return DenseFactor(self.slots, torch.cat([p.values for p in parts]))
