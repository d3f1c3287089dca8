"""The constraint matrix ``A (M, P)`` as an operator: products, Gram matrix, rows on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from nullbayes.common.crowd import ALONE, Crowd
from nullbayes.common.processes import Processes
from nullbayes.common.work import RowWork
from nullbayes.errors import NonFiniteError
from nullbayes.jacobian.block import Block
from nullbayes.jacobian.block_storage import Openable, Part, moved_out
from nullbayes.jacobian.gram import gram_matrix
from nullbayes.jacobian.images import Images
from nullbayes.model.parameters import ParameterSpace

Tick = Callable[[float], None]


class RowOperator(ABC):
    """What a solver may ask of ``A``. Two methods and a shape are enough; the rest follows."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    #: those that hold the rows together; None: this one has them all
    processes: Processes | None = None
    #: those that project other samples with the same rows
    crowd: Crowd = ALONE
    #: of a `subset`: the numbers of its rows among those it was taken from; None: all of them
    chosen: Tensor | None = None

    @property
    def mine(self) -> RowOperator:
        """The rows that this process holds: all of them, but for `SharedOperator`."""
        return self

    @abstractmethod
    def matvec(self, vectors: Tensor) -> Tensor:
        """``A v`` for ``S`` vectors at once: ``(S, P)`` -> ``(S, M)``."""

    @abstractmethod
    def rmatvec(self, weights: Tensor) -> Tensor:
        """``Aᵀ w`` for ``S`` vectors at once: ``(S, M)`` -> ``(S, P)``."""

    def subtract_(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """``v -= Aᵀ w`` in place, ``vectors (S, P)``: samples of large networks are gigabytes."""
        return vectors.sub_(self.rmatvec(weights))

    def normal(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """``AᵀA v (S, P)`` and ``‖A v‖² (S,)`` float64, in one pass over the rows."""
        image = self.matvec(vectors)
        return self.rmatvec(image), image.double().square().sum(1)

    def image_norms(self, vectors: Tensor, row_scale: Tensor | None = None) -> Tensor:
        """``‖A v‖ (S,)`` float64; ``row_scale (M,)`` multiplies the rows first."""
        image = self.matvec(vectors)
        return (image if row_scale is None else image * row_scale).double().norm(dim=1)

    def gram(self, tick: Tick | None = None) -> Tensor:
        """``A Aᵀ``: ``(M, M)`` float64, accumulated from products in the operator's dtype."""
        m = self.shape[0]
        out = torch.empty(m, m, dtype=torch.float64, device=self.device)
        done = 0
        for rows in self.iter_rows(1024):
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

    def pieces(self, rows: int) -> Iterator[RowOperator]:
        """The same matrix as consecutive operators of about ``rows`` rows each, none divided further."""
        for values in self.iter_rows(max(1, rows)):
            yield DenseOperator(values)

    def subset(self, rows: int, generator: torch.Generator) -> RowOperator:
        """About ``rows`` of the rows, drawn at random without replacement."""
        keep = torch.randperm(self.shape[0], generator=generator)[:rows].sort().values
        unit = torch.zeros(len(keep), self.shape[0], dtype=self.dtype)
        unit[torch.arange(len(keep)), keep] = 1
        made = DenseOperator(self.rmatvec(unit.to(self.device)))
        made.chosen = keep
        return made

    def cross_gram(self, other: RowOperator) -> Tensor:
        """``A A'ᵀ`` with the rows of another operator over the same columns: ``(M, M')`` float64."""
        return torch.cat([other.matvec(rows).double() for rows in self.iter_rows(1024)])

    def rows(self, index: Tensor) -> Tensor:
        """Some rows written out: ``index (k,)`` -> ``(k, P)``."""
        unit = torch.zeros(len(index), self.shape[0], dtype=self.dtype, device=self.device)
        unit[torch.arange(len(index)), index.to(self.device)] = 1
        return self.rmatvec(unit)

    def holds(self, span: slice) -> bool:
        """Whether this process has these rows, by their numbers among all."""
        return span.start >= 0 and span.stop <= self.shape[0]

    def own_rows(self, index: Tensor) -> Tensor:
        """Those of ``rows`` that this process holds, without asking the others."""
        return self.rows(index)

    def own_span(self, span: slice) -> slice:
        """Where rows that this process holds, by their numbers among all, are in products of ``mine``."""
        return span

    def own(self, values: Tensor) -> Tensor:
        """This process's part of ``values (S, M)``."""
        return values

    @property
    def turns(self) -> list[tuple[int, slice]]:
        """All rows in their order, stretch by stretch: whose each is, and which of this process's rows that are."""
        return [(0, slice(0, self.shape[0]))]

    @property
    def product_flops(self) -> float:
        """Floating-point operations of ``A v`` for one vector."""
        return 2.0 * self.shape[0] * self.shape[1]

    @property
    def gram_flops(self) -> float:
        """Floating-point operations of ``A Aᵀ``, half of it by symmetry."""
        return float(self.shape[0] ** 2 * self.shape[1])

    @property
    def row_work(self) -> RowWork:
        """What one row costs."""
        m, p = max(1, self.shape[0]), float(self.shape[1])
        pair = 2 * self.gram_flops / m**2
        return RowWork(self.product_flops / m, pair, read=p, stored=p * self.dtype.itemsize)


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

    def subset(self, rows: int, generator: torch.Generator) -> DenseOperator:
        keep = torch.randperm(self.shape[0], generator=generator)[:rows].sort().values
        made = DenseOperator(self.matrix[keep.to(self.device)])
        made.chosen = keep
        return made


class JacobianOperator(RowOperator):
    """``A`` from captured blocks; nothing of size ``M × P`` is ever formed.

    Args:
        space: the parameters (columns).
        blocks: captured rows in the order of the data, in memory or elsewhere (``block_storage.py``).
    """

    def __init__(self, space: ParameterSpace, blocks: Sequence[Openable]) -> None:
        self.space = space
        self.blocks = list(blocks)
        self.starts = [0]
        for block in self.blocks:
            self.starts.append(self.starts[-1] + block.num_rows)
        self.shape = (self.starts[-1], space.total)
        self.dtype, self.device = space.dtype, space.device
        self._images = Images()

    @property
    def examples(self) -> int:
        return sum(block.examples for block in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes that the factors take, wherever they are."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def resident(self) -> int:
        """Bytes of memory that the factors take between passes."""
        return sum(block.resident for block in self.blocks)

    def kept(self) -> dict[str, int]:
        """Bytes by where they are kept: ``{"memory": ..., "disk": ..., "recomputed": ...}``."""
        out: dict[str, int] = {}
        for block in self.blocks:
            out[block.where] = out.get(block.where, 0) + block.nbytes
        return out

    def followed_by(self, more: JacobianOperator) -> JacobianOperator:
        """These rows, and those of ``more`` behind them; nothing is copied."""
        return JacobianOperator(self.space, [*self.blocks, *more.blocks])

    def over(self, blocks: Sequence[Openable]) -> JacobianOperator:
        """The same rows made of other ``blocks``, as many as this process has."""
        return JacobianOperator(self.space, blocks)

    def move_out(self, room: int) -> None:
        """Keep no more than ``room`` bytes in memory, where the disk can take the rest."""
        self.blocks = moved_out(self.blocks, room)

    def matvec(self, vectors: Tensor) -> Tensor:
        known = self._images.of(vectors)
        if known is not None:
            return known
        out = torch.zeros(len(vectors), self.shape[0], dtype=self.dtype, device=vectors.device)
        if not len(vectors):  # such as the basis of rows that are all zero
            return out
        for kept, start in zip(self.blocks, self.starts, strict=False):
            part = out[:, start : start + kept.num_rows]
            with kept.opened() as block:
                for factor in block.factors.values():
                    part += factor.matvec(vectors)
        self._images.keep(vectors, out)
        return out

    def rmatvec(self, weights: Tensor) -> Tensor:
        out = weights.new_zeros(len(weights), self.shape[1])
        return self._add_to(out, weights)

    def subtract_(self, vectors: Tensor, weights: Tensor) -> Tensor:
        return self._add_to(vectors, -weights)

    def _add_to(self, out: Tensor, weights: Tensor) -> Tensor:
        if not len(weights):
            return out
        for kept, start in zip(self.blocks, self.starts, strict=False):
            part = weights[:, start : start + kept.num_rows]
            with kept.opened() as block:
                for factor in block.factors.values():
                    factor.rmatvec(part, out)
        return out

    def normal(self, vectors: Tensor, row_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As for every operator; ``row_scale (M,)`` multiplies the rows first."""
        out = torch.zeros_like(vectors)
        square = torch.zeros(len(vectors), dtype=torch.float64, device=self.device)
        if not len(vectors):
            return out, square
        for kept, start in zip(self.blocks, self.starts, strict=False):
            with kept.opened() as block:
                image = vectors.new_zeros(len(vectors), kept.num_rows)
                for factor in block.factors.values():
                    image += factor.matvec(vectors)
                if row_scale is not None:
                    image *= row_scale[start : start + kept.num_rows]
                square += image.double().square().sum(1)
                if row_scale is not None:
                    image *= row_scale[start : start + kept.num_rows]
                for factor in block.factors.values():
                    factor.rmatvec(image, out)
        return out, square

    def gram(self, tick: Tick | None = None) -> Tensor:
        return gram_matrix(self.blocks, self.starts, self.device, tick)

    def pieces(self, rows: int) -> Iterator[JacobianOperator]:
        """Consecutive examples with about ``rows`` rows together; views, nothing is copied."""
        for block in self.blocks:
            step = max(1, rows // block.cotangents)
            for start in range(0, block.examples, step):
                part = Part(block, start, min(start + step, block.examples))
                yield JacobianOperator(self.space, [part])

    def subset(self, rows: int, generator: torch.Generator) -> JacobianOperator:
        """Whole examples, some consecutive ones from each of many blocks."""
        if rows >= self.shape[0]:
            return self
        sizes = [block.examples for block in self.blocks]
        share = rows / self.shape[0]
        chosen = list(chosen_parts(sizes, share, generator)) or [(0, 0, 1)]
        return self.parts(chosen, self.starts)

    def parts(
        self, chosen: Sequence[tuple[int, int, int]], starts: Sequence[int]
    ) -> JacobianOperator:
        """Of some blocks so many examples from one on; ``starts``: the numbers of the blocks' first rows."""
        made = JacobianOperator(
            self.space, [Part(self.blocks[i], start, start + count) for i, start, count in chosen]
        )
        spans = [
            torch.arange(start * width, (start + count) * width) + starts[i]
            for i, start, count in chosen
            for width in (self.blocks[i].cotangents,)
        ]
        made.chosen = torch.cat(spans) if spans else torch.zeros(0, dtype=torch.long)
        return made

    def cross_gram(self, other: RowOperator) -> Tensor:
        if not isinstance(other, JacobianOperator):
            return super().cross_gram(other)
        out = torch.zeros(self.shape[0], other.shape[0], dtype=torch.float64, device=self.device)
        for kept, start in zip(self.blocks, self.starts, strict=False):
            with kept.opened() as block:
                for kept_other, at in zip(other.blocks, other.starts, strict=False):
                    part = out[start : start + block.num_rows, at : at + kept_other.num_rows]
                    with kept_other.opened() as other_block:
                        block.gram(other_block, part)
        return out

    def squared_norms(self) -> Tensor:
        """``‖A_m‖²`` of every row: ``(M,)`` float64."""
        parts = []
        for kept in self.blocks:
            with kept.opened() as block:
                total = torch.zeros(block.num_rows, dtype=torch.float64, device=self.device)
                for factor in block.factors.values():
                    total += factor.squared_norms()
                parts.append(total)
        return torch.cat(parts)

    def own_products(self) -> Tensor:
        """Products of the rows of each example with one another: ``(B, C, C)`` float64."""
        parts = []
        for kept in self.blocks:
            with kept.opened() as block:
                shape = (block.examples, block.cotangents, block.cotangents)
                total = torch.zeros(shape, dtype=torch.float64, device=self.device)
                for factor in block.factors.values():
                    total += factor.own_products()
                parts.append(total)
        return torch.cat(parts)

    def iter_rows(self, at_most: int) -> Iterator[Tensor]:
        for kept in self.blocks:
            step = max(1, at_most // kept.cotangents)
            with kept.opened() as block:
                for start in range(0, block.examples, step):
                    yield self._written(block, start, min(start + step, block.examples))

    def rows(self, index: Tensor) -> Tensor:
        out = torch.empty(len(index), self.shape[1], dtype=self.dtype, device=self.device)
        for at, m in enumerate(index.tolist()):
            b = bisect_right(self.starts, m) - 1
            n, c = divmod(m - self.starts[b], self.blocks[b].cotangents)
            with Part(self.blocks[b], n, n + 1).opened() as block:
                out[at] = self._written(block, 0, 1)[c]
        return out

    def _written(self, block: Block, start: int, stop: int) -> Tensor:
        count = (stop - start) * block.cotangents
        rows = torch.zeros(count, self.shape[1], dtype=self.dtype, device=self.device)
        for factor in block.factors.values():
            at, values = 0, factor.narrow(start, stop).rows()
            for slot in factor.slots:
                rows[:, slot.start : slot.stop] = values[:, at : at + slot.numel]
                at += slot.numel
        return rows

    @property
    def product_flops(self) -> float:
        if not self.blocks:
            return 0.0
        with self.blocks[0].opened() as block:
            each = sum(f.product_flops for f in block.factors.values()) / max(1, block.num_rows)
        return each * self.shape[0]

    @property
    def gram_flops(self) -> float:
        if not self.blocks:
            return 0.0
        with self.blocks[0].opened() as block:
            per_pair = sum(f.gram_flops_per_pair for f in block.factors.values())
        return per_pair * self.shape[0] ** 2 / 2

    @cached_property
    def row_work(self) -> RowWork:
        if not self.blocks:
            return RowWork()
        with self.blocks[0].opened() as block:
            factors, rows = list(block.factors.values()), max(1, block.num_rows)
            return RowWork(
                sum(f.product_flops for f in factors) / rows,
                sum(f.gram_flops_per_pair for f in factors),
                sum(f.written_flops for f in factors) / rows,
                sum(f.captured_flops for f in factors) / rows,
                sum(f.numbers_read for f in factors) / max(1, block.examples),
                block.nbytes / rows,
                len(factors),
            )

    def check_finite(self) -> None:
        """Raise :class:`NonFiniteError` naming the parameters whose rows are not finite."""
        for i, kept in enumerate(self.blocks):
            with kept.opened() as block:
                check_block(block, i)


def chosen_parts(
    sizes: Sequence[int], share: float, generator: torch.Generator
) -> Iterator[tuple[int, int, int]]:
    """A few neighbours from every block: of which, from which example on, how many.

    Views are slices, and data come shuffled or by class.
    """
    # Unused, as in version 0.1: the same seed, the same parts.
    torch.randperm(len(sizes), generator=generator)
    due = 0.0
    for i, size in enumerate(sizes):
        due += share * size
        count = min(int(due), size)
        if count:
            due -= count
            yield i, int(torch.randint(size - count + 1, (), generator=generator)), count


def check_block(block: Block, index: int) -> None:
    """Raise :class:`NonFiniteError` naming the parameters whose rows are not finite."""
    finite = {
        names: torch.stack([t.isfinite().all() for t in factor.tensors()]).all()
        for names, factor in block.factors.items()
    }
    if not finite or bool(torch.stack(list(finite.values())).all()):
        return
    bad = next(names for names, good in finite.items() if not bool(good))
    raise NonFiniteError(
        f"the Jacobian rows of {list(bad)} hold NaN or infinity (block {index}). The outputs were finite, so a "
        "derivative overflowed: use float64 (`model.double()`) or look for sqrt, log or division near zero."
    )
