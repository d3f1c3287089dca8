"""The contract of a solver: prepare once, project many vectors, report what was reached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nullbayes.common.progress import PROJECTION
from nullbayes.common.work import Work
from nullbayes.errors import NonFiniteError
from nullbayes.jacobian.operator import RowOperator, Tick
from nullbayes.solvers.checkpoint import QUIET, Watch

if TYPE_CHECKING:
    from nullbayes.solvers.rehearsal import Rehearsal


class Status(Enum):
    """How a projection ended; the value says what to do about it."""

    CONVERGED = "the tolerance was reached"
    NUMERICAL = "what is left lies in directions that move the preserved quantity less than `delta` asks for"
    ROUNDED = "the tolerance was reached; then samples were rounded to what they are stored in"
    STAGNATED = (
        "rounding stopped the residual above the tolerance; use a float64 model "
        "(`model.double()`) or accept the residual by a larger `tolerance`"
    )
    INTERRUPTED = "it was interrupted; the samples are the best that had been reached by then"
    MAX_ITERATIONS = (
        "the iteration limit came before the tolerance; raise `max_iterations` of the solver"
    )

    @property
    def good(self) -> bool:
        """Whether what is left of a sample was left on purpose."""
        return self in (Status.CONVERGED, Status.NUMERICAL, Status.ROUNDED)

    @property
    def rounded(self) -> Status:
        """The status once samples are stored in fewer digits."""
        return Status.ROUNDED if self is Status.CONVERGED else self


@dataclass(frozen=True)
class Projection:
    """Projected vectors and what they cost.

    Attributes:
        value: ``(S, P)`` in the operator's dtype.
        residual: ``(S,)`` float64, recomputed with the operator after the last step. Without a
            shift ``‖A value‖ / ‖A input‖``; with one, the relative residual of the linear system; of
            iterative solvers a bound on the error relative to the sample, see ``block_cg.sample_size``.
        iterations: passes over the operator beyond the first product.
    """

    value: Tensor
    residual: Tensor
    status: Status
    iterations: int


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values of ``A`` with weights: ``tr f(AᵀA) - (P - Σw) f(0) = Σ w f(λ)``.

    Exact (all weights one) for small problems, a quadrature (stochastic Lanczos, Golub & Meurant
    1994; Ubaru, Chen & Saad 2017) otherwise: the mean of two rules, which are its ``bounds``.

    Attributes:
        rounding: how far below zero the least of the computed values was, where all are known.
        bounds: whose effective rank is at most, and at least, that of the probes, at every shift.
    """

    values: Tensor
    weights: Tensor
    exact: bool
    bounds: tuple[Spectrum, Spectrum] | None = None
    rounding: float = 0.0

    @property
    def upper(self) -> Spectrum:
        """The upper bound of an estimate; an exact spectrum itself."""
        return self if self.bounds is None else self.bounds[1]

    def effective_rank(self, shift: float) -> float:
        """``Σ w λ / (λ + shift)``: the number of directions that the data determine (MacKay)."""
        return float((self.weights * self.values / (self.values + shift)).sum())


#: whether a spectrum is known well enough
Settled = Callable[[Spectrum], bool]


@dataclass(frozen=True)
class Cost:
    """What a solver would need, counted before anything runs."""

    flops: float
    nbytes: int


@dataclass(frozen=True)
class Size:
    """What the work depends on; ``flops`` count multiplications and additions.

    Attributes:
        rows, columns: the shape ``(M, P)``.
        samples: vectors to be projected.
        product: flops of ``A v`` for one vector; ``gram``: of ``A Aᵀ``. None: as for a dense matrix.
        itemsize: bytes of one number of the rows.
        written_over: whether samples may take the place of what they are projected from: for the numerical null space.
        device: the type of the device that the rows lie on.
    """

    rows: int
    columns: int
    samples: int = 30
    product: float | None = None
    gram: float | None = None
    itemsize: int = 4
    written_over: bool = False
    device: str = "cpu"

    @property
    def product_flops(self) -> float:
        return 2.0 * self.rows * self.columns if self.product is None else self.product

    @property
    def gram_flops(self) -> float:
        return float(self.rows) ** 2 * self.columns if self.gram is None else self.gram


class Solver(ABC):
    """A way to project onto ``ker A``, or to sample ``(shift I + AᵀA)⁻¹``. Holds settings only.

    Args of every solver: ``tolerance`` on the relative residual (None: 1e-5 for float32, 1e-10 for
    float64; 5e-2 for iterative solvers) and ``max_iterations``.
    """

    name: str
    tolerance: float | None
    #: whether it only multiplies with the rows: linear in their size, and not exact
    iterative: bool = False

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if v is not None)
        return f"{type(self).__name__}({settings})"

    @abstractmethod
    def cost(self, size: Size) -> Cost:
        """Counted work and memory."""

    def tolerance_for(self, dtype: torch.dtype) -> float:
        """The tolerance on the relative residual that holds for rows of ``dtype``."""
        return self.tolerance or (
            ITERATIVE_TOLERANCE if self.iterative else default_tolerance(dtype)
        )

    def forecast(self, rehearsal: Rehearsal) -> dict[str, float]:
        """Seconds by stage of a fit, from short trials. By default :meth:`cost` at the speed of a pass."""
        operator = rehearsal.operator
        scale = rehearsal.rows / max(1, operator.shape[0])
        size = Size(
            rehearsal.rows,
            operator.shape[1],
            rehearsal.samples,
            operator.product_flops * scale,
            operator.gram_flops * scale**2,
            operator.dtype.itemsize,
        )
        speed = 2 * rehearsal.samples * size.product_flops / max(rehearsal.one_pass, 1e-9)
        return {PROJECTION: rehearsal.drawing + self.cost(size).flops / max(speed, 1.0)}

    @abstractmethod
    def prepare(self, operator: RowOperator, tick: Tick | None = None) -> State:
        """Work that needs ``A`` alone."""


class State(ABC):
    """A prepared solver for one operator. Use: ``factorise(shift)``, then ``project`` at will.

    Three things come from one factorisation, with ``λ`` the eigenvalues of ``AᵀA``:

    - ``shift = 0``: the exact projection onto ``ker A``;
    - ``shift > 0`` and noise: samples of ``shift (shift I + AᵀA)⁻¹`` (Laplace);
    - ``shift > 0``, ``numerical=True``: the numerical null space. Each pass leaves
      ``shift / (λ + shift)`` of a direction (iterated Tikhonov): what is far above the shift goes,
      what is far below it stays, however smoothly the spectrum decays.
    """

    operator: RowOperator
    shift: float = 0.0
    numerical: bool = False
    #: passes of the numerical null space; fixed by the first projection, so that later samples follow
    passes: int | None = None
    #: numerical rank of ``A``, or ``Σ λ/(λ + shift)`` with a shift, rounded; known after ``factorise``.
    #: None: it is to be measured with the samples.
    rank: int | None = None
    notes: tuple[str, ...] = ()
    enough: float = 0.0
    #: bytes that its work may take beside the rows, in all
    room: int = 2**30

    @property
    def alone(self) -> bool:
        """Whether :meth:`explained` asks no other process for its rows."""
        return self.operator.processes is None

    @abstractmethod
    def spectrum(self, settled: Settled | None = None) -> Spectrum:
        """Squared singular values; to be asked before ``factorise``. An estimate goes on until it is ``settled``."""

    @abstractmethod
    def factorise(
        self,
        shift: float = 0.0,
        *,
        numerical: bool = False,
        enough: float = 0.0,
        tick: Tick | None = None,
    ) -> None:
        """Make ready to project or to sample.

        Args:
            enough: a norm ``‖A x‖`` that is small enough whatever the relative tolerance says (``row_drift=``).
        """

    @abstractmethod
    def project(
        self, vectors: Tensor, noise: Tensor | None = None, watch: Watch = QUIET
    ) -> Projection:
        """Project, or turn prior samples into posterior ones (Matheron's rule, Wilson et al. 2020).

        Args:
            vectors: ``(S, P)`` standard normal, or anything to be projected.
            noise: ``(S, M)`` standard normal, Matheron's perturbation; needed for Laplace, otherwise unused.
            watch: progress and checkpoints of a solver that iterates.

        Returns:
            ``v - Aᵀ(AAᵀ + shift I)⁻¹(A v + √shift noise)``. For standard normal input its
            covariance is ``I - A⁺A`` (no shift), ``shift (shift I + AᵀA)⁻¹`` (Laplace), or has
            eigenvalues ``(shift / (λ + shift))^(2 passes)`` (numerical).
        """

    def consume(
        self, vectors: Tensor, noise: Tensor | None = None, watch: Watch = QUIET
    ) -> Projection:
        """:meth:`project` for vectors that nobody needs any more: what it returns may be these, written over."""
        return self.project(vectors, noise, watch)

    @abstractmethod
    def explained(self, rows: RowOperator, width: int = 1) -> Tensor:
        """What the data determine of other rows, ``R (I - cov) Rᵀ``: its diagonal blocks.

        ``(R / width, width, width)`` float64, one for every ``width`` rows that follow each other.
        """

    def left_out(
        self, vectors: Tensor | None, spans: Sequence[slice], image: Tensor | None = None
    ) -> list[Tensor] | None:
        """What the projected ``vectors (S, P)`` would be along some rows, had these not been there.

        For each of ``spans`` the values ``A_i Δ (S, |span|)`` float64 under a solution to which all rows but these
        contribute: leave-one-out, from one factorisation (Rasmussen & Williams 2006, eq. 5.12). None where the
        solver has no cheap way to tell.

        Args:
            vectors: None where they were written over; then ``image``, what ``A v (S, M)`` was, must serve.
        """
        return None

    def inverse_blocks(self, shift: float, spans: Sequence[slice]) -> Tensor | None:
        """Blocks of ``(A Aᵀ + shift I)⁻¹``, ``shift > 0``: ``(len(spans), k, k)`` float64, for spans of ``k`` rows.

        None where the solver has no cheap way to tell.
        """
        return None

    def project_without(
        self, vectors: Tensor, spans: Sequence[slice], watch: Watch = QUIET
    ) -> Projection | None:
        """Project as if the rows of ``spans`` were not there; the next :meth:`project` begins at what this found.

        The null space of all rows lies in that of some, so little of the work is lost. None where the solver cannot
        begin anywhere but at the vectors themselves.
        """
        return None

    def covariance_times(self, vectors: Tensor) -> Tensor:
        """``cov v`` for ``vectors (S, P)``, in their dtype: the covariance of samples, at prior precision one.

        By projecting, as exact as that is: a projection is applied twice, but the filter of Laplace once.
        """
        done = self.project(vectors).value
        return done if self.shift and not self.numerical else self.project(done).value

    def extended(self, operator: RowOperator, added: RowOperator) -> State | None:
        """A state for more rows, prepared and not yet factorised, with what is known of the earlier rows.

        Args:
            operator: this state's rows, followed by those of ``added``.

        Returns:
            None where nothing is known that ``Solver.prepare`` would not find as fast.
        """
        return None

    def begin_at(self, vectors: Tensor) -> None:
        """Let the next :meth:`project` begin at ``vectors (S, P)``, projections onto the null space of some rows.

        A solver that has no use for it does nothing.
        """
        return

    def determined(self) -> float | None:
        """How many directions the data determine: ``Σ (1 - f)``, with the share ``f`` left of each one's variance.

        To be asked after a projection. None where no factorisation tells: samples then give an estimate.
        """
        return None

    def exact_spectrum(self) -> Spectrum | None:
        """The spectrum from the factorisation, at any time; None where there is none."""
        return None

    def explained_work(self, rows: int) -> Work:
        """What :meth:`explained` costs for so many rows; `ENDLESS`: it iterates."""
        m, p = self.operator.shape
        numbers = min(m, p) * (p + min(m, p))
        return Work(2.0 * rows * numbers, nbytes=self.operator.dtype.itemsize * numbers)


# Iterative solvers are for problems where 1e-5 is out of reach. From here on predictions no longer change: what goes
# on is the freezing of directions that no prediction notices (benchmarks/whole.py).
ITERATIVE_TOLERANCE = 5e-2


def default_tolerance(dtype: torch.dtype) -> float:
    """Relative residual asked for where the user names none."""
    return 1e-10 if dtype == torch.float64 else 1e-5


def relative(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator`` with 0 / 0 = 0 (nothing to preserve is preserved)."""
    safe = torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    return torch.where(denominator > 0, numerator / safe, torch.zeros_like(numerator))


def require_finite(values: Tensor, what: str) -> None:
    """Raise :class:`NonFiniteError` naming ``what``."""
    if not bool(values.isfinite().all()):
        raise NonFiniteError(
            f"{what} holds NaN or infinity although its inputs were finite: the scale of the rows "
            "overflows this dtype. Use a float64 model (`model.double()`)."
        )
