"""Blocks of Jacobian rows in the shape in which a layer gives them, never as a matrix.

A factor holds the rows of ``B`` examples with ``C`` cotangents each, restricted to the columns of
one or two parameter tensors. Row ``(n, c)`` comes before row ``(n, c + 1)``. Three shapes cover
everything: rows written out (:class:`DenseFactor`), looked-up rows (:class:`LookupFactor`) and, for
linear and convolution layers, sums of outer products over token axes (``OuterFactor`` in ``outer.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nullbayes.jacobian.factors import products as columns
from nullbayes.jacobian.factors.products import gather, product, scatter_add
from nullbayes.model.parameters import Slot


class Factor(ABC):
    """Rows of ``A`` for ``examples`` × ``cotangents``, restricted to the columns of ``slots``."""

    slots: tuple[Slot, ...]
    examples: int
    cotangents: int

    @property
    def num_rows(self) -> int:
        return self.examples * self.cotangents

    @property
    def columns(self) -> int:
        return sum(slot.numel for slot in self.slots)

    @property
    @abstractmethod
    def nbytes(self) -> int: ...

    @abstractmethod
    def matvec(self, vectors: Tensor) -> Tensor:
        """``A v``: vectors ``(S, P)`` -> ``(S, B*C)``."""

    @abstractmethod
    def rmatvec(self, weights: Tensor, out: Tensor) -> None:
        """``out += Aᵀ w``: weights ``(S, B*C)``, out ``(S, P)``."""

    @abstractmethod
    def rows(self) -> Tensor:
        """The rows written out: ``(B*C, columns)``, columns in the order of ``slots``."""

    @abstractmethod
    def gram(self, other: Factor) -> Tensor:
        """``A A'ᵀ`` with a factor of the same kind and slots: ``(B*C, B'*C')``."""

    @abstractmethod
    def narrow(self, start: int, stop: int) -> Factor:
        """The examples ``start:stop``."""

    @abstractmethod
    def joined(self, parts: Sequence[Any]) -> Factor:
        """``parts``, of this kind and its slots, as one; token axes are padded with zero rows."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What is stored, for finiteness checks."""


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
        return product(gather(vectors, self.slots).contiguous(), self.rows())

    def rmatvec(self, weights: Tensor, out: Tensor) -> None:
        scatter_add(out, self.slots, product(weights.contiguous(), self.rows().mT))

    def gram(self, other: Factor) -> Tensor:
        return product(self.rows(), other.rows())

    def narrow(self, start: int, stop: int) -> DenseFactor:
        return DenseFactor(self.slots, self.values[start:stop])

    def joined(self, parts: Sequence[DenseFactor]) -> DenseFactor:
        return DenseFactor(self.slots, torch.cat([p.values for p in parts]))


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

    def narrow(self, start: int, stop: int) -> LookupFactor:
        return LookupFactor(self.slot, self.index[start:stop], self.g[start:stop])

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
        table = vectors[:, self.slot.start : self.slot.stop].reshape(len(vectors), -1, self.dim)
        looked = table[:, self.index.clamp(min=0)] * (self.index >= 0)[None, :, :, None]
        return torch.einsum("bctd,sbtd->sbc", self.g, looked).reshape(len(vectors), -1)

    def rmatvec(self, weights: Tensor, out: Tensor) -> None:
        s = len(weights)
        w = weights.reshape(s, self.examples, self.cotangents)
        tokens = torch.einsum("sbc,bctd->sbtd", w, self.g) * (self.index >= 0)[None, :, :, None]
        index = self.index.clamp(min=0).reshape(-1)
        table = out.new_zeros(s, self.slot.shape[0], self.dim)
        table.index_add_(1, index, tokens.reshape(s, -1, self.dim))
        out[:, self.slot.start : self.slot.stop] += table.reshape(s, -1)

    def gram(self, other: Factor) -> Tensor:
        assert isinstance(other, LookupFactor)
        # Only entries that both blocks look up can contribute: the table's size never matters.
        mine, theirs = self.index.unique(), other.index.unique()
        shared = mine[torch.isin(mine, theirs) & (mine >= 0)]
        out = self.g.new_zeros(self.num_rows, other.num_rows)
        rows = max(self.num_rows, other.num_rows)
        step = max(1, columns.CHUNK_ELEMENTS // max(1, rows * self.dim))
        for i in range(0, len(shared), step):
            part = shared[i : i + step]
            left = self._compact(renumber(self.index, part), len(part))
            out += left @ other._compact(renumber(other.index, part), len(part)).T
        return out


def renumber(index: Tensor, entries: Tensor) -> Tensor:
    """Positions of ``index`` in the sorted ``entries``; -1 where it is not among them."""
    at = torch.searchsorted(entries, index).clamp(max=len(entries) - 1)
    return torch.where(entries[at] == index, at, -1)


def concatenate(parts: Sequence[Factor]) -> Factor:
    """Factors of several batches as one; token axes and cotangents are padded with zero rows."""
    return parts[0] if len(parts) == 1 else parts[0].joined(parts)
