"""Cheap approximations of ``(AᵀA + μ I)⁻¹`` (primal) and ``(A Aᵀ + shift I)⁻¹`` (dual).

A primal preconditioner acts on weights ``(S, P)``, a dual one on rows ``(S, M)``. New ones: a subclass
under ``@register``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from nullbayes.common.decompositions import cholesky_, mirror_upper_, solved
from nullbayes.errors import InputError, SolverError
from nullbayes.jacobian.operator import JacobianOperator, RowOperator, Tick
from nullbayes.jacobian.single_rows import row_bytes, single_rows
from nullbayes.solvers.base import require_finite

# Bytes of the Gram matrix that a subset or a low-rank factor may take.
GRAM_BYTES = 2**30
# Rows of a subset from which its factor is in float32: a third of the time, half of the memory.
SINGLE = 2048
# Bytes that copies of single rows may take, however small their Gram matrix.
COPIES_BYTES = 2**26
# Columns of the sketch per row of A (its error falls with the root of this), and columns at most.
SKETCH_PER_ROW = 4
SKETCH_COLUMNS = 32768
# Rows that randomly pivoted Cholesky picks at most, and at a time.
PIVOTS = 2048
PIVOT_BLOCK = 128
# Added to a unit diagonal at most, for a matrix that rounding has made indefinite.
MOST_JITTER = 1e-2


class Preconditioner(ABC):
    """Prepared once for an operator and a shift, then applied in each iteration.

    Attributes:
        dual: acts on rows, not on weights.
        keeps_range: maps the row space of ``A`` to itself, so that an exact projection stays one.
    """

    name: ClassVar[str]
    dual: ClassVar[bool] = False
    keeps_range: ClassVar[bool] = True
    notes: tuple[str, ...] = ()

    @abstractmethod
    def prepare(self, operator: RowOperator, shift: float, tick: Tick | None = None) -> None:
        """What needs ``A`` and the shift alone."""

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes that it takes for ``A (rows, columns)``, as far as that can be told beforehand."""
        return 0

    @abstractmethod
    def apply(self, r: Tensor) -> Tensor:
        """Symmetric positive definite; same shape and dtype."""


PRECONDITIONERS: dict[str, type[Preconditioner]] = {}
_Class = TypeVar("_Class", bound=type[Preconditioner])


def register(cls: _Class) -> _Class:
    """Class decorator: make ``ConjugateGradient(preconditioner=cls.name)`` work."""
    PRECONDITIONERS[cls.name] = cls
    return cls


def resolve(value: str | Preconditioner) -> Preconditioner | None:
    """The preconditioner of that name, or the object itself; None for ``"none"``."""
    if isinstance(value, Preconditioner):
        return value
    if value == "none":
        return None
    if isinstance(value, str) and value in PRECONDITIONERS:
        return PRECONDITIONERS[value]()
    names = ", ".join(repr(n) for n in ("auto", "none", *sorted(PRECONDITIONERS)))
    raise InputError(
        f"`preconditioner` is {value!r}; expected {names} or a Preconditioner object. Leave it at 'auto' "
        "when in doubt."
    )


@register
class Subset(Preconditioner):
    """``(c A_sᵀ A_s + μ I)⁻¹`` with the rows of some examples, through the dual Cholesky factor of these.

    ``c = M / M_s`` stands in for the rows left out, ``μ`` for the curvature that the subset does not see.
    It is measured: the largest eigenvalue of ``AᵀA`` on the null space of the subset's rows.

    Args:
        rows: how many; None: what 1 GB of Gram matrix allows, and no more than a tenth of all.
    """

    name = "subset"
    #: the share of the measured curvature that is taken for ``μ``
    tail: ClassVar[float] = 1.0

    def __init__(self, rows: int | None = None, seed: int = 0) -> None:
        self.rows, self.seed = rows, seed

    def prepare(self, operator: RowOperator, shift: float, tick: Tick | None = None) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self._some, share = self._part(operator, generator)
        gram = self._some.gram(tick)
        require_finite(gram, "the Gram matrix of the preconditioner's rows")
        self._factorise(gram, 1e-6 * float(gram.diagonal().mean()))
        seen = self._some.shape[0] == operator.shape[0]
        self.mu = 0.0 if seen else self.tail * self._tail(operator, generator)
        # Relative to the largest row as a floor: all rows may be in the subset, or the rest zero.
        self.mu = max(self.mu + shift, 1e-4 * float(gram.diagonal().max()), 1e-300)
        self._factorise(gram, self.mu * share)
        self.notes = (f"{self._what}, tail curvature {self.mu:.2g}",)

    def _part(self, operator: RowOperator, generator: torch.Generator) -> tuple[RowOperator, float]:
        """The rows to factorise, and the share of ``AᵀA`` that theirs stands for."""
        some = operator.subset(self._wanted(operator.shape[0]), generator)
        self._what = f"subset of {some.shape[0]:,} rows, drawn by chance"
        return some, some.shape[0] / operator.shape[0]

    def _wanted(self, m: int) -> int:
        return min(m, self.rows or min(int((GRAM_BYTES / 8) ** 0.5), max(256, m // 10)))

    def nbytes(self, rows: int, columns: int) -> int:
        """The Gram matrix, its scaled copy and the factor of that."""
        return 3 * 8 * self._wanted(rows) ** 2

    def _factorise(self, gram: Tensor, shift: float) -> None:
        diagonal = gram.diagonal() + max(shift, 1e-300)
        scale = diagonal.clamp(min=1e-300).rsqrt()
        # It only has to be near, and its products with the rows round as much anyway.
        single = len(gram) >= SINGLE and self._some.dtype != torch.float64
        self._scale = scale.float() if single else scale
        shifted = gram.float() if single else gram.clone()
        shifted.mul_(self._scale[:, None]).mul_(self._scale)
        self._factor = positive_factor(
            shifted, 1e-6 if single else 1e-7, "the Gram matrix of the preconditioner's rows"
        )

    def apply(self, r: Tensor) -> Tensor:
        image = self._some.matvec(r).to(self._scale) * self._scale
        z = solved(self._factor, image.T).T * self._scale
        return r - self._some.rmatvec(z.to(r.dtype))

    def _tail(self, operator: RowOperator, generator: torch.Generator, steps: int = 4) -> float:
        """Largest eigenvalue outside the subset's rows: a few steps of block power iteration."""
        v = torch.randn(4, operator.shape[1], generator=generator, dtype=operator.dtype)
        v = self.apply(v.to(operator.device))
        value = 0.0
        for _ in range(steps):
            v = v / v.norm(dim=1, keepdim=True).clamp(min=1e-30)
            g, square = operator.normal(v)
            value = max(value, float(square.max()))
            v = self.apply(g)
        return value


@register
class Rows(Subset):
    """As :class:`Subset`, of single rows chosen by their length: what stands for all of them is closer to all.

    A row of squared length ``s`` is taken with the probability ``π = min(1, s / τ)`` and divided by ``√π``, so that the
    rows taken have the ``AᵀA`` of all on average, with the least error that so many rows chosen independently can have
    (Drineas, Kannan & Mahoney 2006). Confident examples, whose rows are short, cost no place in the Gram matrix. Copies
    are made of the rows that are taken; where those of single rows would take more than the Gram matrix (rows of many
    tokens, which the rows of an example share), whole examples by chance are taken instead.
    """

    name = "rows"
    # The largest is of few directions: on 54,000 rows the half left .032 after 20 passes, all of it .037, a tenth more.
    tail = 0.5

    def _part(self, operator: RowOperator, generator: torch.Generator) -> tuple[RowOperator, float]:
        # Imported here: that of weighted rows builds on this file.
        from nullbayes.solvers.row_scaling import RowWeighted

        whole = operator if isinstance(operator, RowWeighted) else None
        inner = operator if whole is None else whole.operator
        wanted = self._wanted(inner.shape[0])
        squares = row_square_norms(inner) if whole is None else whole.squared_norms()
        squares = squares.cpu()
        there = int((squares > 0).sum())
        if not there or wanted * row_bytes(inner) > self._copied(wanted):
            return super()._part(operator, generator)
        chance = inclusion(squares, wanted) if wanted < there else (squares > 0).double()
        some = single_rows(inner, drawn(chance, generator))
        assert some.chosen is not None
        self._what = f"{some.shape[0]:,} of {inner.shape[0]:,} rows, chosen by their length"
        scale = chance[some.chosen].rsqrt().to(inner.device)
        if whole is not None:
            scale = scale * whole.weights[some.chosen.to(inner.device)]
        return RowWeighted(some, scale), 1.0

    @staticmethod
    def _copied(rows: int) -> int:
        """Bytes that copies of the rows may take: those of their Gram matrix, or a few more."""
        return max(COPIES_BYTES, 8 * rows**2)


def inclusion(squares: Tensor, wanted: int) -> Tensor:
    """Probabilities ``min(1, squares / τ)`` that sum to ``wanted``, fewer than there are squares above zero."""
    ordered = squares.sort(descending=True).values
    # With the k longest certain, the others share what is left of `wanted` by their squares.
    rest = ordered.flip(0).cumsum(0).flip(0)
    certain = torch.arange(min(wanted, len(squares)))
    tau = rest[: len(certain)] / (wanted - certain)
    # The first k at which the longest of the others is not certain itself.
    k = int((ordered[: len(certain)] <= tau).nonzero()[0])
    return (squares / tau[k]).clamp(max=1)


def drawn(chance: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of what is taken, each with its ``chance``, by systematic sampling: their number hardly varies."""
    start = torch.rand((), generator=generator, dtype=torch.float64)
    upto = chance.cumsum(0) + start
    before = torch.cat([start[None], upto[:-1]])
    return (upto.floor() > before.floor()).nonzero()[:, 0]


@register
class Kronecker(Preconditioner):
    """A block for each layer: ``(Σ a aᵀ) ⊗ (Σ g gᵀ) / N``, from all examples (Martens & Grosse 2015).

    The strongest per second where many rows have a smooth spectrum (benchmarks/whole.py), but it does
    not map the row space to itself: an exact projection needs one of the others. ``μ`` is the shift at
    which a Tikhonov filter on its own spectrum leaves ``left`` of the residual.
    """

    name = "kronecker"
    keeps_range = False

    def __init__(self, left: float = 0.2) -> None:
        self.left = left

    def prepare(self, operator: RowOperator, shift: float, tick: Tick | None = None) -> None:
        from nullbayes.solvers.kronecker import layer_curvatures
        from nullbayes.solvers.row_scaling import RowWeighted

        weights = None
        if isinstance(operator, RowWeighted):  # rows that were brought closer to one length
            weights, operator = operator.weights, operator.operator
        if not isinstance(operator, JacobianOperator):
            raise InputError(
                "preconditioner='kronecker' needs the layers of a network; for a general operator use "
                "'subset' or 'none'."
            )
        self._layers = layer_curvatures(operator, tick, weights)
        values = torch.cat([layer.values.flatten().double() for layer in self._layers])
        self.mu = max(_filter_shift(values, self.left), shift, 1e-300)
        self.notes = (f"Kronecker factors, tail curvature {self.mu:.2g}",)

    def apply(self, r: Tensor) -> Tensor:
        out = r.clone()  # parameters that no row has are as they were
        for layer in self._layers:
            layer.damp(r, out, self.mu)
        return out


def _filter_shift(values: Tensor, left: float) -> float:
    """The shift ``s`` with ``Σ λ (s / (λ + s))² = left² Σ λ``, by bisection in the logarithm."""
    values = values.clamp(min=0).cpu()  # sixty steps, each of which asks for a number
    total = float(values.sum())
    if total <= 0:
        return 1.0
    low, high = 1e-12 * float(values.max()), float(values.max()) * 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        got = float((values * (middle / (values + middle)).square()).sum())
        low, high = (middle, high) if got < left**2 * total else (low, middle)
    return (low * high) ** 0.5


@register
class Sketch(Preconditioner):
    """``(ÂÂᵀ + shift I)⁻¹`` with ``Â = A Ω``: rows compressed by a random projection.

    The Gram matrix then costs ``M²`` times the sketch's columns, however many weights there are.
    """

    name = "sketch"
    dual = True

    def __init__(self, columns: int | None = None, seed: int = 0) -> None:
        self.columns, self.seed = columns, seed

    def nbytes(self, rows: int, columns: int) -> int:
        """The Gram matrix, one product to add to it, and the factor; or the last two and a copy to solve with."""
        return 3 * 8 * rows**2

    def prepare(self, operator: RowOperator, shift: float, tick: Tick | None = None) -> None:
        m, p = operator.shape
        if 16 * m**2 > 4 * GRAM_BYTES:
            raise SolverError(
                f"preconditioner='sketch' holds an {m} × {m} matrix; use 'kronecker' or 'subset' for so "
                "many rows."
            )
        columns = self.columns or min(SKETCH_PER_ROW * m, SKETCH_COLUMNS)
        generator = torch.Generator().manual_seed(self.seed)
        gram = torch.zeros(m, m, dtype=torch.float64, device=operator.device)
        step, done = max(1, min(256, 2**26 // max(1, p))), 0
        while done < columns:
            count = min(step, columns - done)
            omega = torch.randn(count, p, generator=generator, dtype=operator.dtype)
            image = operator.matvec(omega.to(operator.device))  # (count, M)
            gram += (image.T @ image).double()
            done += count
            if tick:
                tick(done / columns)
        gram /= columns
        require_finite(gram, "the Gram matrix of the sketched rows")
        self._scale = (gram.diagonal() + shift).clamp(min=1e-300).rsqrt()
        gram.mul_(self._scale[:, None]).mul_(self._scale)
        self._factor = positive_factor(gram, 1e-6, "the sketched Gram matrix")
        self.notes = (f"Gram matrix of {columns} random projections of the rows",)

    def apply(self, r: Tensor) -> Tensor:
        return solved(self._factor, (r * self._scale).T).T * self._scale


@register
class Pivoted(Preconditioner):
    """``(F Fᵀ + μ I)⁻¹`` with ``F`` from randomly pivoted Cholesky (Díaz, Epperly, Frangella, Tropp &
    Webber 2023), in blocks of pivots. ``μ`` is the mean of the diagonal that ``F`` leaves.
    """

    name = "pivoted"
    dual = True

    def __init__(self, rank: int | None = None, seed: int = 0) -> None:
        self.rank, self.seed = rank, seed

    def _wanted(self, m: int) -> int:
        return self.rank or min(PIVOTS, m, max(1, GRAM_BYTES // (8 * m)))

    def nbytes(self, rows: int, columns: int) -> int:
        """The factor, and a copy of it while it grows."""
        return 2 * 8 * rows * self._wanted(rows)

    def prepare(self, operator: RowOperator, shift: float, tick: Tick | None = None) -> None:
        m = operator.shape[0]
        rank = self._wanted(m)
        generator = torch.Generator().manual_seed(self.seed)
        diagonal = row_square_norms(operator)
        require_finite(diagonal, "the diagonal of the Gram matrix")
        start = float(diagonal.sum())
        factor = torch.zeros(m, 0, dtype=torch.float64, device=operator.device)
        while factor.shape[1] < rank and float(diagonal.sum()) > 1e-10 * start:
            count = min(PIVOT_BLOCK, rank - factor.shape[1])
            weights = diagonal.cpu()
            picked = torch.multinomial(
                weights, min(count, int((weights > 0).sum())), generator=generator
            )
            picked = picked.unique().to(operator.device)
            columns = operator.matvec(_rows(operator, picked)).double().T  # K[:, picked]
            columns = columns - factor @ factor[picked].T
            core = columns[picked]
            core.diagonal().add_(1e-12 * float(core.diagonal().sum()) + 1e-300)
            root, info = torch.linalg.cholesky_ex((core + core.T) / 2)
            if int(info):
                break  # what is left of these pivots is rounding
            new = torch.linalg.solve_triangular(root, columns.T, upper=False).T
            factor = torch.cat([factor, new], dim=1)
            diagonal = (diagonal - new.square().sum(1)).clamp(min=0)
            diagonal[picked] = 0
            if tick:
                tick(factor.shape[1] / rank)
        self.mu = max(float(diagonal.mean()) + shift, 1e-9 * start / m, 1e-300)
        self._factor = factor
        small = factor.T @ factor
        small.diagonal().add_(self.mu)
        scale = small.diagonal().rsqrt()
        small.mul_(scale[:, None]).mul_(scale)
        self._root = positive_factor(small, 0.0, "the Gram matrix of the pivots")
        self._root.div_(scale[:, None])
        self.notes = (f"{factor.shape[1]} random pivots, tail curvature {self.mu:.2g}",)

    def apply(self, r: Tensor) -> Tensor:
        inner = solved(self._root, (r @ self._factor).T).T
        return (r - inner @ self._factor.T) / self.mu


def positive_factor(matrix: Tensor, jitter: float, what: str) -> Tensor:
    """``L`` with ``L Lᵀ`` the ``matrix`` of unit diagonal and ``jitter``, or more of it where rounding asks for that.

    The matrix is written over.

    Raises:
        SolverError: a hundredth of the diagonal is not enough.
    """
    while jitter <= MOST_JITTER:
        matrix.diagonal().fill_(1 + jitter)
        factor, info = cholesky_(matrix)
        if not int(info):
            return factor
        mirror_upper_(matrix)
        jitter = max(10 * jitter, 1e-15)
    raise SolverError(
        f"{what} could not be factorised even with jitter {MOST_JITTER:.0e} of its diagonal; use a float64 model "
        "(`model.double()`), or another preconditioner."
    )


def row_square_norms(operator: RowOperator) -> Tensor:
    """``‖A_m‖²`` of every row: ``(M,)`` float64."""
    if isinstance(operator, JacobianOperator):
        return operator.squared_norms()
    return torch.cat([rows.double().square().sum(1) for rows in operator.iter_rows(1024)])


def _rows(operator: RowOperator, index: Tensor) -> Tensor:
    if isinstance(operator, JacobianOperator):
        return operator.rows(index)
    unit = torch.zeros(len(index), operator.shape[0], dtype=operator.dtype, device=operator.device)
    unit[torch.arange(len(index)), index] = 1
    return operator.rmatvec(unit)
