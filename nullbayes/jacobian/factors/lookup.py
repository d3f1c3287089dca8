"""Rows of lookup tables: sparse, whatever the size of the table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from nullbayes.common.eight_bits import Packed, packed_in
from nullbayes.jacobian.factors import products
from nullbayes.jacobian.factors.base import Factor
from nullbayes.model.parameters import Slot


class LookupFactor(Factor):
    """Rows of a lookup table: ``R[n, c, v] = Σ_t [index[n, t] = v] g[n, c, t]``.

    Args:
        slot: columns of the table ``(V, D)``.
        index: ``(B, T)`` integer; -1 marks a token without gradient (padding).
        g: output gradients ``(B, C, T, D)``.
    """

    def __init__(self, slot: Slot, index: Tensor, g: Tensor) -> None:
        self.slots, self.index, self.g = (slot,), index, g.contiguous()
        self.slot = slot
        self.examples, self.cotangents, self.tokens, self.dim = g.shape

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + self.g.nbytes

    def tensors(self) -> list[Tensor]:
        return [self.g]

    @property
    def product_flops(self) -> float:
        return 2.0 * self.num_rows * self.tokens * self.dim

    @property
    def numbers_read(self) -> float:
        return float(min(self.index.numel() * self.dim, self.columns))

    @property
    def gram_flops_per_pair(self) -> float:
        return 2.0 * self.tokens**2 * self.dim

    def only(self, names: Collection[str]) -> LookupFactor | None:
        return self if self.slot.name in names else None

    def scaled(self, scales: Mapping[str, float]) -> LookupFactor:
        return LookupFactor(
            self.slot, self.index, products.flushed(self.g * scales[self.slot.name])
        )

    def narrow(self, start: int, stop: int) -> LookupFactor:
        return LookupFactor(self.slot, self.index[start:stop], self.g[start:stop])

    def single(self, rows: Tensor) -> LookupFactor:
        n, c = rows // self.cotangents, rows % self.cotangents
        return LookupFactor(self.slot, self.index[n], self.g[n, c][:, None])

    def joined(self, parts: Sequence[LookupFactor]) -> LookupFactor:
        tokens = max(p.tokens for p in parts)
        index = [pad(p.index, (0, tokens - p.tokens), value=-1) for p in parts]
        g = [pad(p.g, (0, 0, 0, tokens - p.tokens)) for p in parts]
        return LookupFactor(self.slot, torch.cat(index), torch.cat(g))

    def _compact(self, index: Tensor, size: int) -> Tensor:
        """Rows over ``size`` table entries given re-numbered indices: ``(B*C, size*D)``."""
        masked = self.g * (index >= 0)[:, None, :, None]
        out = self.g.new_zeros(self.examples, self.cotangents, size, self.dim)
        where = index.clamp(min=0)[:, None, :, None].expand_as(self.g)
        return out.scatter_add_(2, where, masked).reshape(self.num_rows, -1)

    def rows(self) -> Tensor:
        return self._compact(self.index, self.slot.shape[0])

    def matvec(self, vectors: Tensor) -> Tensor:
        packed = packed_in(vectors)
        if packed is not None:
            return self._matvec_packed(packed)
        table = vectors[:, self.slot.start : self.slot.stop].reshape(len(vectors), -1, self.dim)
        index, here = self.index.clamp(min=0), (self.index >= 0)[None, :, :, None]
        step = max(1, products.chunk_elements(self.device) // max(1, index.numel() * self.dim))
        return torch.cat(
            [
                torch.einsum("bctd,sbtd->sbc", self.g, some[:, index].to(self.g.dtype) * here)
                for some in table.split(step)
            ]
        ).reshape(len(vectors), -1)

    def _matvec_packed(self, vectors: Packed) -> Tensor:
        """Only of the entries that are looked up: the whole tables in float32 may be gigabytes."""
        entries, index = self.index.clamp(min=0).unique(return_inverse=True)
        found = vectors.looked_up(self.slot.start, entries).to(self.g.dtype)  # (S, N, D)
        g = self.g * (self.index >= 0)[:, None, :, None]
        some = torch.zeros(self.num_rows, len(entries), self.dim, dtype=g.dtype, device=g.device)
        at = index[:, None].expand(-1, self.cotangents, -1).flatten(0, 1)
        some.scatter_add_(1, at[..., None].expand(-1, -1, self.dim), g.flatten(0, 1))
        return found.flatten(1) @ some.flatten(1).T

    def rmatvec(self, weights: Tensor, out: Tensor) -> None:
        s = len(weights)
        w = weights.reshape(s, self.examples, self.cotangents)
        tokens = torch.einsum("sbc,bctd->sbtd", w, self.g) * (self.index >= 0)[None, :, :, None]
        # Only entries that are looked up: the whole table for each sample may be gigabytes.
        entries, index = self.index.clamp(min=0).reshape(-1).unique(return_inverse=True)
        table = out.new_zeros(s, len(entries), self.dim)
        table.index_add_(1, index, tokens.reshape(s, -1, self.dim))
        whole = out[:, self.slot.start : self.slot.stop].unflatten(1, (-1, self.dim))
        whole.index_add_(1, entries, table)

    def own_products(self) -> Tensor:
        same = (self.index[:, :, None] == self.index[:, None]) & (self.index >= 0)[:, None]
        g = self.g.double()
        grads = g.flatten(1, 2) @ g.flatten(1, 2).mT
        c, t = self.cotangents, self.tokens
        return (grads.view(-1, c, t, c, t) * same[:, None, :, None]).sum((2, 4))

    def gram(self, other: Factor) -> Tensor:
        assert isinstance(other, LookupFactor)
        # Only entries that both blocks look up can contribute: the table's size never matters.
        mine, theirs = self.index.unique(), other.index.unique()
        shared = mine[torch.isin(mine, theirs) & (mine >= 0)]
        out = self.g.new_zeros(self.num_rows, other.num_rows)
        rows = max(self.num_rows, other.num_rows)
        step = max(1, products.chunk_elements(self.device) // max(1, rows * self.dim))
        for i in range(0, len(shared), step):
            part = shared[i : i + step]
            left = self._compact(renumber(self.index, part), len(part))
            out += left @ other._compact(renumber(other.index, part), len(part)).T
        return out


def renumber(index: Tensor, entries: Tensor) -> Tensor:
    """Positions of ``index`` in the sorted ``entries``; -1 where it is not among them."""
    at = torch.searchsorted(entries, index).clamp(max=len(entries) - 1)
    return torch.where(entries[at] == index, at, -1)
