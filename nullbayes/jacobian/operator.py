"""The constraint matrix ``A (M, P)`` as an operator: products, Gram matrix, rows on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nullbayes.errors import NonFiniteError
from nullbayes.jacobian.capture import Block
from nullbayes.jacobian.factors import Factor, OuterFactor
from nullbayes.jacobian.parameters import ParameterSpace

# Rows that blocks of small batches are merged to: large enough for matrix products to run at full
# speed, small enough that the lower triangle of blocks is close to half the Gram matrix.
BLOCK_ROWS = 1024
# Bytes of written-out rows that a Gram build may hold for one layer.
GRAM_ROWS_BYTES = 2**30

Tick = Callable[[float], None]


class RowOperator(ABC):
    """What a solver may ask of ``A``. Two methods and a shape are enough; the rest follows."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def matvec(self, vectors: Tensor) -> Tensor:
        """``A v`` for ``S`` vectors at once: ``(S, P)`` -> ``(S, M)``."""

    @abstractmethod
    def rmatvec(self, weights: Tensor) -> Tensor:
        """``Aᵀ w`` for ``S`` vectors at once: ``(S, M)`` -> ``(S, P)``."""

    def gram(self, tick: Tick | None = None) -> Tensor:
        """``A Aᵀ``: ``(M, M)`` float64, accumulated from products in the operator's dtype."""
        m = self.shape[0]
        out = torch.empty(m, m, dtype=torch.float64, device=self.device)
        done = 0
        for rows in self.iter_rows(BLOCK_ROWS):
            out[done : done + len(rows)] = self.matvec(rows).double()
            done += len(rows)
            if tick:
                tick(done / m)
        return (out + out.T) / 2

    def iter_rows(self, at_most: int) -> Iterator[Tensor]:
        """The rows in order, written out, at most ``at_most`` at a time: ``(m, P)``."""
        m = self.shape[0]
        for start in range(0, m, at_most):
            unit = torch.zeros(min(at_most, m - start), m, dtype=self.dtype, device=self.device)
            unit[torch.arange(len(unit)), torch.arange(start, start + len(unit))] = 1
            yield self.rmatvec(unit)


class DenseOperator(RowOperator):
    """A matrix held as it is: ``matrix (M, P)``. For small problems and for checking solvers."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.dtype, self.device = matrix.dtype, matrix.device

    def matvec(self, vectors: Tensor) -> Tensor:
        return vectors @ self.matrix.T

    def rmatvec(self, weights: Tensor) -> Tensor:
        return weights @ self.matrix

    def iter_rows(self, at_most: int) -> Iterator[Tensor]:
        yield from self.matrix.split(at_most)


class JacobianOperator(RowOperator):
    """``A`` from captured blocks; nothing of size ``M × P`` is ever formed.

    Args:
        space: the parameters (columns).
        blocks: captured rows, in the order of the data.
    """

    def __init__(self, space: ParameterSpace, blocks: Sequence[Block]) -> None:
        self.space = space
        self.blocks = merge_blocks(blocks)
        self.starts = [0]
        for block in self.blocks:
            self.starts.append(self.starts[-1] + block.num_rows)
        self.shape = (self.starts[-1], space.total)
        self.dtype, self.device = space.dtype, space.device

    @property
    def examples(self) -> int:
        return sum(block.examples for block in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes that the factors take."""
        return sum(block.nbytes for block in self.blocks)

    def matvec(self, vectors: Tensor) -> Tensor:
        out = vectors.new_zeros(len(vectors), self.shape[0])
        for block, start in zip(self.blocks, self.starts, strict=False):
            part = out[:, start : start + block.num_rows]
            for factor in block.factors.values():
                part += factor.matvec(vectors)
        return out

    def rmatvec(self, weights: Tensor) -> Tensor:
        out = weights.new_zeros(len(weights), self.shape[1])
        for block, start in zip(self.blocks, self.starts, strict=False):
            part = weights[:, start : start + block.num_rows]
            for factor in block.factors.values():
                factor.rmatvec(part, out)
        return out

    def gram(self, tick: Tick | None = None) -> Tensor:
        m = self.shape[0]
        out = torch.zeros(m, m, dtype=torch.float64, device=self.device)
        keys = list(self.blocks[0].factors) if self.blocks else []
        for k, key in enumerate(keys):
            factors = _ready([block.factors[key] for block in self.blocks])
            for i, left in enumerate(factors):
                rows = slice(self.starts[i], self.starts[i + 1])
                for j, right in enumerate(factors[: i + 1]):
                    out[rows, self.starts[j] : self.starts[j + 1]] += _product(left, right)
                if tick:
                    tick((k + ((i + 1) / len(factors)) ** 2) / len(keys))
        _mirror(out)
        return out

    def cross_gram(self, other: JacobianOperator) -> Tensor:
        """``A A'ᵀ`` with the rows of another operator over the same parameters: ``(M, M')``."""
        out = torch.zeros(self.shape[0], other.shape[0], dtype=torch.float64, device=self.device)
        for block, start in zip(self.blocks, self.starts, strict=False):
            for other_block, at in zip(other.blocks, other.starts, strict=False):
                part = out[start : start + block.num_rows, at : at + other_block.num_rows]
                for key, factor in block.factors.items():
                    part += factor.gram(other_block.factors[key])
        return out

    def squared_norms(self) -> Tensor:
        """``‖A_m‖²`` of every row: ``(M,)`` float64."""
        parts = []
        for block in self.blocks:
            total = torch.zeros(block.num_rows, dtype=torch.float64, device=self.device)
            for factor in block.factors.values():
                for n in range(block.examples):
                    at = slice(n * block.cotangents, (n + 1) * block.cotangents)
                    one = factor.narrow(n, n + 1)
                    total[at] += one.gram(one).diagonal()
            parts.append(total)
        return torch.cat(parts)

    def iter_rows(self, at_most: int) -> Iterator[Tensor]:
        for block in self.blocks:
            step = max(1, at_most // block.cotangents)
            for start in range(0, block.examples, step):
                stop = min(start + step, block.examples)
                rows = torch.zeros(
                    (stop - start) * block.cotangents,
                    self.shape[1],
                    dtype=self.dtype,
                    device=self.device,
                )
                for factor in block.factors.values():
                    at, values = 0, factor.narrow(start, stop).rows()
                    for slot in factor.slots:
                        rows[:, slot.start : slot.stop] = values[:, at : at + slot.numel]
                        at += slot.numel
                yield rows

    def check_finite(self) -> None:
        """Raise :class:`NonFiniteError` naming the parameters whose rows are not finite."""
        for i, block in enumerate(self.blocks):
            for names, factor in block.factors.items():
                if not all(bool(t.isfinite().all()) for t in factor.tensors()):
                    raise NonFiniteError(
                        f"the Jacobian rows of {list(names)} hold NaN or infinity (block {i}). "
                        "The outputs were finite, so a derivative overflowed: use float64 "
                        "(`model.double()`) or look for sqrt, log or division near zero."
                    )


def merge_blocks(blocks: Sequence[Block], rows: int = BLOCK_ROWS) -> list[Block]:
    """Join consecutive small blocks with the same number of cotangents and the same factors."""
    out: list[Block] = []
    group: list[Block] = []

    def flush() -> None:
        if group:
            out.append(Block.merge(group))
            group.clear()

    for block in blocks:
        fits = sum(b.num_rows for b in group) + block.num_rows <= max(rows, block.num_rows)
        if group and not (fits and group[0].cotangents == block.cotangents):
            flush()
        group.append(block)
    flush()
    return out


def _ready(factors: list[Factor]) -> list[Factor | Tensor]:
    """Outer factors whose Gram blocks want written-out rows, written out once if they fit."""
    first = factors[0]
    if not isinstance(first, OuterFactor) or not first.gram_by_rows:
        return list(factors)
    width = first.groups * first.width_out * first.width_in
    total = sum(f.num_rows for f in factors) * width * first.g.element_size()
    if total > GRAM_ROWS_BYTES:
        return list(factors)
    return [f.matrices() for f in factors if isinstance(f, OuterFactor)]


def _product(left: Factor | Tensor, right: Factor | Tensor) -> Tensor:
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor)
        return left @ right.T
    assert isinstance(right, Factor)
    return left.gram(right)


def _mirror(matrix: Tensor, step: int = 2048) -> None:
    """Copy the lower triangle of blocks to the upper one, without a second full matrix."""
    m = len(matrix)
    for i in range(0, m, step):
        stop = min(i + step, m)
        square = matrix[i:stop, i:stop]
        square.copy_(square.tril() + square.tril(-1).T)
        matrix[i:stop, stop:] = matrix[stop:, i:stop].T
