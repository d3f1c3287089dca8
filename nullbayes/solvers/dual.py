"""Few rows, many weights: factorise the Gram matrix ``A Aᵀ``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from nullbayes.common.decompositions import (
    cholesky_,
    eigh,
    eigvalsh,
    mirror_upper_,
    pinv,
    solved,
)
from nullbayes.common.memory import working_bytes
from nullbayes.common.processes import once
from nullbayes.common.progress import CERTIFICATE, FACTORISATION, GRAM, PROJECTION
from nullbayes.common.work import Work
from nullbayes.errors import SolverError
from nullbayes.jacobian.gram import HALVED
from nullbayes.jacobian.operator import RowOperator, Tick
from nullbayes.solvers.base import (
    Cost,
    Projection,
    Settled,
    Size,
    Solver,
    Spectrum,
    State,
    require_finite,
)
from nullbayes.solvers.block_cg import blocks
from nullbayes.solvers.checkpoint import QUIET, Watch
from nullbayes.solvers.norms import fetched
from nullbayes.solvers.refinement import (
    DIRECT_PASSES,
    DualEquations,
    Refinement,
    conjugate_gradients,
    iterate,
)
from nullbayes.solvers.rehearsal import Rehearsal, timed
from nullbayes.solvers.spectrum import EXACT_UP_TO, PROBES, STEPS, gram_spectrum, shared_spectrum

TRACE_PROBES = 32
# Numbers of the samples from which they take the place of what they are projected from.
WRITTEN_OVER = 2**20
# The side of dense trials: large enough for the speed that large matrices have.
TRIAL_SIDE = 2500
# Rows left out at most, each example by itself, and multiplications of all that: about a second's work.
MOST_WORK = 1e10
FEWEST_ROWS = 128


def rows_left_out(m: int) -> int:
    """Of ``m`` rows, how many are left out at most: their columns of the inverse stay well below a factorisation."""
    return max(FEWEST_ROWS, min(m // 4, int(MOST_WORK / max(1, m) ** 2)))


class DualCholesky(Solver):
    """Gram matrix from the factors, float64 Cholesky, refinement by conjugate gradients.

    Rows are scaled to unit length before factorising, which changes neither null space nor solution
    but keeps an example of which the network is certain (tiny rows) as well conditioned as one of
    which it is not. The jitter is relative to that scale and the rounding of the rows' dtype; what
    it, dependent rows and float32 products blur is refined away against the operator itself.

    Args:
        tolerance: relative residual at which refinement ends.
        max_iterations: refinement steps at most.
        jitter: added to the unit diagonal; None: ``0.1 eps √M`` of the rows' dtype. Directions whose
            squared singular value is below it (rows at unit length) do not count for ``rank``.
    """

    name = "dual Cholesky"

    def __init__(
        self,
        tolerance: float | None = None,
        max_iterations: int = 100,
        jitter: float | None = None,
    ) -> None:
        self.tolerance, self.max_iterations, self.jitter = tolerance, max_iterations, jitter

    def cost(self, size: Size) -> Cost:
        # Gram in the rows' dtype, half of it by symmetry; Cholesky in float64 counts twice.
        numbers = size.samples * size.columns
        in_place = size.written_over and numbers >= WRITTEN_OVER
        vectors = round((1 if in_place else 4) * numbers * size.itemsize)
        flops = size.gram_flops + 2 * size.rows**3 / 3 + 8 * size.samples * size.product_flops
        return Cost(flops, 2 * 8 * size.rows**2 + vectors)

    def forecast(self, rehearsal: Rehearsal) -> dict[str, float]:
        here, m = rehearsal.operator.shape[0], rehearsal.rows
        device = rehearsal.operator.device
        # A block's product with itself is computed whole, so the trial did all of its M² pairs.
        pairs = timed(rehearsal.operator.gram) / here**2
        blocks = max(1.0, m / (2 * HALVED))
        computed = 0.5 + 0.5 / blocks  # the lower triangle of blocks, the diagonal ones whole
        n = min(TRIAL_SIDE, max(m, 2))
        grow = m / n
        matrix = torch.full((n, n), 1.0, dtype=torch.float64, device=device)
        matrix.diagonal().fill_(2.0 * n)
        cholesky = timed(lambda: torch.linalg.cholesky_ex(matrix))
        scaling = timed(lambda: matrix.clone().mul_(matrix[:, :1]).mul_(matrix[0]))
        if m <= EXACT_UP_TO:
            spectrum = timed(lambda: torch.linalg.eigvalsh(matrix)) * grow**3
        else:
            single, few = matrix.float(), torch.randn(n, PROBES, device=device)
            spectrum = (STEPS * timed(lambda: single @ few) + scaling / 2) * grow**2
        right = torch.randn(n, rehearsal.samples, dtype=torch.float64, device=device)
        solve = timed(lambda: solved(matrix, right)) * grow**2
        once = rehearsal.one_pass
        out = {
            GRAM: computed * pairs * m**2,
            FACTORISATION: cholesky * grow**3 + scaling * grow**2 + spectrum,
            PROJECTION: rehearsal.drawing + (0.5 + DIRECT_PASSES) * once + DIRECT_PASSES * solve,
            CERTIFICATE: 0.0,
        }
        if rehearsal.left_out:
            # Many columns at once are solved for at another speed than a few.
            left_out = min(m, rows_left_out(m))
            several = torch.randn(n, min(256, left_out), dtype=matrix.dtype, device=device)
            solving = timed(lambda: solved(matrix, several)) * grow**2
            out[CERTIFICATE] = once / 2 + solving * left_out / several.shape[1]
        return out

    def prepare(self, operator: RowOperator, tick: Tick | None = None) -> DualState:
        gram = operator.gram(tick)
        require_finite(gram.diagonal(), "the Gram matrix of the Jacobian rows")
        return DualState(self, operator, gram)


class DualState(State):
    """``scale (K + shift I) scale + jitter I = L Lᵀ`` with ``scale`` making the diagonal one."""

    def __init__(self, solver: DualCholesky, operator: RowOperator, gram: Tensor) -> None:
        self.solver, self.operator = solver, operator
        self._gram: Tensor | None = gram
        self.chol = gram.new_zeros(0, 0)
        self.scale = gram.new_zeros(0)
        #: of ``K``, where it was asked for and is exact
        self._spectrum: Spectrum | None = None
        #: eigenvalues and eigenvectors of ``K``, once blocks of its inverse were asked for
        self._eigen: tuple[Tensor, Tensor] | None = None

    def spectrum(self, settled: Settled | None = None) -> Spectrum:
        if self._gram is None:
            raise SolverError("the spectrum must be asked for before `factorise`.")
        gram = self._gram
        found = shared_spectrum(self.operator.processes, lambda: gram_spectrum(gram, settled))
        self._spectrum = found if found.exact else None
        return found

    def factorise(
        self,
        shift: float = 0.0,
        *,
        numerical: bool = False,
        enough: float = 0.0,
        tick: Tick | None = None,
    ) -> None:
        if self._gram is None:
            raise SolverError("`factorise` was called twice; prepare the solver again.")
        gram, self._gram = self._gram, None
        self.shift, self.numerical, self.enough = shift, numerical, enough
        m = len(gram)
        diagonal = gram.diagonal().clone() + shift
        live = diagonal > 0
        self.scale = torch.where(live, diagonal, torch.ones_like(diagonal)).rsqrt() * live
        gram.mul_(self.scale[:, None]).mul_(self.scale)
        # About the rounding of the rows' products, and well above that of the factorisation. Less is
        # better, for refinement has to make up for it: 29 iterations at 4 eps √M, 5 at 0.1 eps √M
        # (LeNet, 9,000 rows). Where it is too little, the factorisation says so.
        eps = max(0.1 * torch.finfo(self.operator.dtype).eps, 64 * torch.finfo(gram.dtype).eps)
        asked = jitter = self.solver.jitter or eps * m**0.5
        while True:
            # An example without a row (ignored, or fully certain) gets a unit diagonal: it is inert.
            gram.diagonal().fill_(1.0 + jitter)
            self.chol, info = once(self.operator.processes, partial(cholesky_, gram), gram)
            if int(info) == 0:
                break
            mirror_upper_(gram)
            jitter *= 10
            if jitter > 1e-2:
                raise SolverError(
                    f"the Gram matrix of {m} rows could not be factorised even with jitter "
                    f"{jitter / 10:.0e} of its diagonal; use a float64 model (`model.double()`)."
                )
        del gram
        if jitter > asked:
            text = (
                f"Jitter was raised to {jitter:.0e} of the diagonal to factorise the Gram matrix."
            )
            self.notes = (*self.notes, text)
        self.jitter = jitter
        self.rank = self._rank(int(live.sum()), jitter)
        if tick:
            tick(1.0)

    def _rank(self, live: int, jitter: float) -> int | None:
        """``Σ λ/(λ + shift)``; without a shift, ``Σ λ/(λ + jitter)`` of the scaled Gram matrix.

        Dependent rows count for nothing. Equal to ``live`` minus a trace of the inverse, exactly for
        small ``M``; otherwise with Hutchinson's estimator, whose error is small because the trace is.
        """
        if self.numerical:
            return None  # measured with the samples, which pass more than once
        m = len(self.chol)
        weight = self.scale.square() * self.shift if self.shift > 0 else jitter * (self.scale > 0)
        if m <= EXACT_UP_TO:
            lost = (weight * torch.cholesky_inverse(self.chol).diagonal()).sum()
        else:
            generator = torch.Generator().manual_seed(0)
            shape = (m, TRACE_PROBES)
            probes = torch.randint(0, 2, shape, generator=generator).double().mul_(2).sub_(1)
            probes = probes.to(self.chol.device) * weight.sqrt()[:, None]
            lost = (probes * solved(self.chol, probes)).sum() / TRACE_PROBES
        return max(0, min(round(live - float(lost)), *self.operator.shape))

    def _solve(self, r: Tensor) -> Tensor:
        """``(S, M)`` -> approximate ``(K + shift I)⁻¹ r``."""
        return solved(self.chol, (r * self.scale).T).T * self.scale

    def project(
        self, vectors: Tensor, noise: Tensor | None = None, watch: Watch = QUIET
    ) -> Projection:
        tolerance = self.solver.tolerance_for(self.operator.dtype)
        if self.numerical:
            done = iterate(self.operator, vectors, self._pass, self.passes, tolerance, self.enough)
            self.passes = done.iterations
            return done
        equations = DualEquations(self.operator, vectors, noise, self.shift)
        goal = Refinement(tolerance, self.solver.max_iterations)
        return conjugate_gradients(equations, self._solve, goal)

    def consume(
        self, vectors: Tensor, noise: Tensor | None = None, watch: Watch = QUIET
    ) -> Projection:
        if not self.numerical or vectors.numel() < WRITTEN_OVER:
            return self.project(vectors, noise, watch)
        tolerance = self.solver.tolerance_for(self.operator.dtype)
        done = iterate(self.operator, vectors, self._pass_, self.passes, tolerance, self.enough)
        self.passes = done.iterations
        return done

    def _pass(self, x: Tensor) -> Tensor:
        z = self._solve(self.operator.matvec(x).double())
        along = self.operator.rmatvec(z.to(x.dtype))
        return torch.sub(x, along, out=along)  # samples of large networks are gigabytes

    def _pass_(self, x: Tensor) -> Tensor:
        """:meth:`_pass`, written over ``x``."""
        z = self._solve(self.operator.matvec(x).double())
        return self.operator.subtract_(x, z.to(x.dtype))

    def covariance_times(self, vectors: Tensor) -> Tensor:
        if self.numerical:
            for _ in range(2 * (self.passes or 1)):
                vectors = self._pass(vectors)
            return vectors
        return self.project(vectors).value

    def recovered_gram(self) -> Tensor:
        """``K`` again, from its factorisation: ``scale⁻¹ (L Lᵀ) scale⁻¹ - shift I``, to rounding."""
        if self._gram is not None:
            return self._gram.clone()
        gram = self.chol @ self.chol.T
        inverse = torch.where(self.scale > 0, 1 / self.scale, torch.zeros_like(self.scale))
        gram.mul_(inverse[:, None]).mul_(inverse)
        # The diagonal of what was factorised is one, but for the jitter and rows of zeros.
        gram.diagonal().copy_((inverse.square() - self.shift).clamp(min=0))
        return gram

    def exact_spectrum(self) -> Spectrum:
        values = eigvalsh(self.recovered_gram()).clamp(min=0)
        return Spectrum(values, torch.ones_like(values), exact=True)

    def determined(self) -> float | None:
        """From the eigenvalues of ``K``; None where there are too many rows, or no memory, to have them."""
        m = len(self.chol)
        if m > EXACT_UP_TO:
            return None
        if self.shift > 0 and not self.numerical:
            return None if self.rank is None else float(self.rank)
        live = self.scale > 0
        # Rounding moves eigenvalues either way.
        noise = self.solver.jitter or 10 * self.jitter
        if not self.shift > 0 and bool((self.chol.diagonal()[live].square() > 1e3 * noise).all()):
            return float(live.sum())  # each row lies far off those before it
        known = self._spectrum if self.shift > 0 else None
        if known is None:
            if 24 * m**2 > self.room:
                return None
            known = shared_spectrum(self.operator.processes, self._spectrum_again)
        values = known.values
        if not self.shift > 0:
            found = int((values > max(4 * known.rounding, noise)).sum())
            return float(found - int((~live).sum()))  # a row of zeros has a unit diagonal
        noise = max(4 * known.rounding, torch.finfo(self.operator.dtype).eps * float(values.max()))
        left = (self.shift / (values + self.shift)) ** (2 * (self.passes or 1))
        return float((1 - left)[values > noise].sum())

    def _spectrum_again(self) -> Spectrum:
        """Of ``K``, from its factorisation; without a shift, of ``K`` with rows of unit length."""
        if self.shift > 0:
            return gram_spectrum(self.recovered_gram())
        gram = self.chol @ self.chol.T
        gram.diagonal().sub_(self.jitter)
        return gram_spectrum(gram)

    def extended(self, operator: RowOperator, added: RowOperator) -> DualState:
        """The Gram matrix grows by a block: no product of two earlier rows is computed again."""
        m = self.operator.shape[0]
        gram = self.chol.new_empty(operator.shape[0], operator.shape[0])
        gram[:m, :m] = self.recovered_gram()
        cross = self.operator.cross_gram(added)
        gram[:m, m:], gram[m:, :m] = cross, cross.T
        gram[m:, m:] = added.gram()
        require_finite(gram.diagonal(), "the Gram matrix of the Jacobian rows")
        return DualState(self.solver, operator, gram)

    def inverse_blocks(self, shift: float, spans: Sequence[slice]) -> Tensor | None:
        m = self.operator.shape[0]
        if m > EXACT_UP_TO or 32 * m**2 > self.room:
            return None
        if self._eigen is None:
            values, vectors = eigh(self.recovered_gram())
            self._eigen = values.clamp(min=0), vectors
        values, vectors = self._eigen
        index = torch.stack([torch.arange(s.start, s.stop) for s in spans]).to(vectors.device)
        parts = vectors[index]  # (n, k, M)
        return (parts / (values + shift)) @ parts.mT

    def left_out(
        self, vectors: Tensor | None, spans: Sequence[slice], image: Tensor | None = None
    ) -> list[Tensor] | None:
        # K⁻¹ A v of a row is the residual that it would have, times its entry of K⁻¹.
        if vectors is not None:
            image = self.operator.matvec(vectors)
        assert image is not None
        image = image.double()  # (S, M)
        out: list[Tensor] = []
        # A solve holds the right sides, scaled and transposed, and the solutions, likewise.
        for some in _grouped(
            spans, max(1, working_bytes(image.device) // (6 * 8 * len(self.chol)))
        ):
            out += self._left_out(image, some)
        return out

    def _left_out(self, image: Tensor, spans: Sequence[slice]) -> list[Tensor]:
        """As `left_out`, for as many rows as can be solved for at once; ``image (S, M)``."""
        chosen = torch.cat([torch.arange(s.start, s.stop) for s in spans]).to(image.device)
        units = torch.zeros(len(chosen), len(self.chol), dtype=image.dtype, device=image.device)
        units[torch.arange(len(chosen), device=image.device), chosen] = 1.0
        inverse = self._solve(units)  # rows of K⁻¹: (k, M)
        weights = image @ inverse.T  # (S, k)
        own, at = [], 0
        for span in spans:
            size = span.stop - span.start
            own.append(inverse[at : at + size, span])
            at += size
        # Small matrices, one after the other, are the processor's; they are read at once.
        weights, *own = fetched(weights, *own)
        out, at = [], 0
        for span, block in zip(spans, own, strict=True):
            size = span.stop - span.start
            # At unit diagonal: rows of one example may differ by orders of magnitude. A row of zeros (of an example of
            # which the network is certain) has no entry, and no residual.
            diagonal = block.diagonal()
            scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
            scale = scale * (diagonal > 0)
            inner = pinv(scale[:, None] * block * scale, hermitian=True)
            out.append(weights[:, at : at + size] * scale @ inner * scale)
            at += size
        return out

    def explained_work(self, rows: int) -> Work:
        m, each = self.operator.shape[0], self.operator.row_work
        products = Work(m * (each.written + rows * each.pair), nbytes=m * each.stored)
        halves = 2 * self.passes if self.numerical and self.passes else 1
        # Each reads half of the factor, whatever the number of rows.
        solves = Work(0.0, float(m) ** 2 * rows * halves, 4.0 * m**2 * halves)
        return products + solves

    def explained(self, rows: RowOperator, width: int = 1) -> Tensor:
        cross = self.operator.cross_gram(rows)  # (M, R)
        # (1 - f²)/λ with f = (s/(λ + s))^k is a sum of 2k powers of s/(λ + s) over λ + s: every half
        # of a solve with L Lᵀ gives one.
        terms = 2 * self.passes if self.numerical and self.passes else 1
        half = cross.mul_(self.scale[:, None])
        total = torch.zeros_like(blocks(half, width))
        for j in range(terms):
            if j % 2 == 0:
                half = torch.linalg.solve_triangular(self.chol, half, upper=False)
                total += self.shift**j * blocks(half, width)
            else:
                half = torch.linalg.solve_triangular(self.chol.T, half, upper=True)
                half = half.mul_(self.scale[:, None])
                total += self.shift**j * blocks(half, width)
                half = half.mul_(self.scale[:, None])
        return total


def _grouped(spans: Sequence[slice], rows: int) -> Iterator[list[slice]]:
    """Consecutive ``spans`` with at most so many ``rows`` together, one of them at least."""
    group: list[slice] = []
    held = 0
    for span in spans:
        size = span.stop - span.start
        if group and held + size > rows:
            yield group
            group, held = [], 0
        group.append(span)
        held += size
    if group:
        yield group
