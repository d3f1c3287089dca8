"""Blocks of Jacobian rows in the shape in which a layer gives them, never as a matrix.

A factor holds the rows of ``B`` examples with ``C`` cotangents each, restricted to the columns of
one or two parameter tensors. Row ``(n, c)`` comes before row ``(n, c + 1)``. Three shapes cover
everything: rows written out (``dense.py``), looked-up rows (``lookup.py``) and, for linear and
convolution layers, sums of outer products over token axes (``outer.py``). A fourth is one more file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nullbayes.jacobian.factors import products
from nullbayes.model.parameters import Slot

if TYPE_CHECKING:
    from nullbayes.jacobian.factors.outer import OuterFactor


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
    def device(self) -> torch.device:
        return self.tensors()[0].device

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
    def single(self, rows: Tensor) -> Factor:
        """Copies of single rows, by their numbers ``(k,)``: each an example with one cotangent."""

    @abstractmethod
    def joined(self, parts: Sequence[Any]) -> Factor:
        """``parts``, of this kind and its slots, as one; token axes are padded with zero rows."""

    @abstractmethod
    def only(self, names: Collection[str]) -> Factor | None:
        """The columns of the parameters that are among ``names``; None where none is."""

    @abstractmethod
    def scaled(self, scales: Mapping[str, float]) -> Factor:
        """A copy with the columns of each parameter multiplied by its number."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What is stored, for finiteness checks."""

    # -- what has a default, by way of written-out rows ---------------------------------------------

    @property
    def product_flops(self) -> float:
        """Floating-point operations of ``A v`` for one of many vectors; ``Aᵀ w`` costs the same."""
        return 2.0 * self.num_rows * self.columns

    @property
    def gram_flops_per_pair(self) -> float:
        """Floating-point operations of one entry of ``A Aᵀ``, as :meth:`gram` forms it."""
        return 2.0 * self.columns

    @property
    def written_flops(self) -> float:
        """Floating-point operations of writing all rows out, where a Gram block begins with that."""
        return 0.0

    @property
    def captured_flops(self) -> float:
        """Floating-point operations of the passes that the rows come from, counted low."""
        return 0.0

    @property
    def numbers_read(self) -> float:
        """Numbers of one vector that a product reads."""
        return float(self.columns)

    @property
    def written_rows_bytes(self) -> int | None:
        """Bytes of written-out rows that Gram blocks would rather have once than anew for each; None: they do not."""
        return None

    def matrices(self) -> Tensor:
        """Rows ``(B*C, columns)`` in an order of columns that all factors of this layer share."""
        return self.rows()

    @property
    def as_outer(self) -> OuterFactor | None:
        """Itself where rows are sums of outer products, which have a Kronecker-factored curvature."""
        return None

    def own_products(self) -> Tensor:
        """Products of the rows of each example with one another, ``(B, C, C)`` float64."""
        step = max(1, products.NEAR_DOUBLES // max(1, self.columns * self.cotangents))
        found = []
        for start in range(0, self.examples, step):
            part = self.narrow(start, min(start + step, self.examples))
            rows = part.rows().reshape(part.examples, self.cotangents, -1).double()
            found.append(rows @ rows.mT)
        return torch.cat(found)

    def squared_norms(self) -> Tensor:
        """Squared length of each of the ``B*C`` rows, float64."""
        step = max(
            1, products.chunk_elements(self.device) // (4 * max(1, self.columns * self.cotangents))
        )
        starts = range(0, self.examples, step)
        pieces = (self.narrow(i, min(i + step, self.examples)).rows() for i in starts)
        return torch.cat(
            [torch.linalg.vector_norm(p, dim=1, dtype=torch.float64) for p in pieces]
        ).square()


def concatenate(parts: Sequence[Factor]) -> Factor:
    """Factors of several batches as one; token axes and cotangents are padded with zero rows."""
    return parts[0] if len(parts) == 1 else parts[0].joined(parts)
