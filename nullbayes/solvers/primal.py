"""Few weights, many rows: an orthogonal basis of the row space of ``A``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from nullbayes.common.decompositions import solve, svd
from nullbayes.common.processes import Processes, once
from nullbayes.common.progress import FACTORISATION, GRAM, PROJECTION
from nullbayes.common.work import Work
from nullbayes.jacobian.operator import RowOperator, Tick
from nullbayes.solvers.base import (
    Cost,
    Projection,
    Settled,
    Size,
    Solver,
    Spectrum,
    State,
    Status,
    relative,
    require_finite,
)
from nullbayes.solvers.block_cg import blocks
from nullbayes.solvers.checkpoint import QUIET, Watch
from nullbayes.solvers.norms import fetched
from nullbayes.solvers.refinement import DIRECT_PASSES, iterate
from nullbayes.solvers.rehearsal import Rehearsal, timed


class Primal(Solver):
    """What makes a `PrimalState`, to which more rows can be added."""

    def __init__(self, tolerance: float | None = None, cutoff: float | None = None) -> None:
        self.tolerance, self.cutoff = tolerance, cutoff

    def prepare(self, operator: RowOperator, tick: Tick | None = None) -> PrimalState:
        r = torch.zeros(0, operator.shape[1], dtype=torch.float64, device=operator.device)
        return self.absorbed(r, operator, operator, tick)

    @abstractmethod
    def absorbed(
        self, r: Tensor, added: RowOperator, operator: RowOperator, tick: Tick | None = None
    ) -> PrimalState:
        """A state for ``operator``, of whose rows all but those of ``added`` are in ``r (k, P)``: ``rᵀr``."""


class PrimalQR(Primal):
    """Stream the rows through a QR factorisation, then one singular value decomposition.

    ``R`` with ``RᵀR = AᵀA`` is all that is kept of the rows, ``P²`` numbers however many there are.
    It is accumulated by orthogonal transformations in float64, never as ``AᵀA``: squaring would
    lose every singular value below 1e-8 of the largest.

    Args:
        tolerance: relative residual below which the status is "converged".
        cutoff: singular values below ``cutoff`` times the largest count as zero; None: 32 eps of
            the rows' dtype, the size of their own rounding.
    """

    name = "primal QR"

    def cost(self, size: Size) -> Cost:
        # QR of stacked chunks costs about 2.5 P² a row, the SVD about 20 P³; float64 counts twice.
        small = min(size.rows, size.columns)
        flops = 2 * (2.5 * size.rows * size.columns * small + 20 * size.columns * small**2)
        vectors = 6 * size.samples * size.columns * 8
        # Three times as many rows, to be copied beside the factor; later a decomposition of that, six matrices.
        return Cost(flops, 8 * size.columns * (7 * small + 1024) + vectors)

    def forecast(self, rehearsal: Rehearsal) -> dict[str, float]:
        p, device = rehearsal.operator.shape[1], rehearsal.operator.device
        tall = torch.randn(2 * p + 16, p, dtype=torch.float64, device=device)
        qr = timed(lambda: torch.linalg.qr(tall, mode="r"))
        return {
            GRAM: qr * max(1.0, rehearsal.rows / max(1, p)),
            FACTORISATION: 0.0,
            PROJECTION: rehearsal.drawing + (0.5 + 0.5 * DIRECT_PASSES) * rehearsal.one_pass,
        }

    def absorbed(
        self, r: Tensor, added: RowOperator, operator: RowOperator, tick: Tick | None = None
    ) -> PrimalState:
        processes, added = operator.processes, added.mine
        if processes is not None and not processes.leads:
            r = r[:0]  # it counts once
        m, p = added.shape
        chunk = max(1024, 3 * min(m, p))
        pending: list[Tensor] = []
        held = done = 0
        for rows in added.iter_rows(1024):
            pending.append(rows)
            held += len(rows)
            if held >= chunk:
                r = self._absorb(r, pending)
                done, held = done + held, 0
                if tick:
                    tick(done / m)
        r = self._absorb(r, pending)
        if processes is not None:
            r = self._of_all(r, processes)
        require_finite(r, "the triangular factor of the Jacobian rows")
        sigma, basis = once(processes, lambda: svd(r)[1:], r)
        if tick:
            tick(1.0)
        return PrimalState(self, operator, sigma, basis)

    def _of_all(self, r: Tensor, processes: Processes) -> Tensor:
        """The triangular factors of all processes joined in a tree; whole in the first, empty in the others."""
        rank, step, p = processes.rank, 1, r.shape[1]
        while step < processes.size:
            counts = processes.gather(len(r))
            other = r[:0]
            for source in range(step, processes.size, 2 * step):
                given = r if source == rank else r.new_empty(counts[source], p)
                processes.give_(given.contiguous(), source)
                if source == rank + step:
                    other = given
            r = r[:0] if rank % (2 * step) else self._absorb(r, [other])
            step *= 2
        return r

    @staticmethod
    def _absorb(r: Tensor, pending: list[Tensor]) -> Tensor:
        n, p = len(r) + sum(map(len, pending)), r.shape[1]
        # Columns one after the other, as the factorisation wants them: it then needs no copy.
        stacked = r.new_empty(p, n).mT if n > p else r.new_empty(n, p)
        at = len(r)
        stacked[:at] = r
        for rows in pending:
            stacked[at : at + len(rows)] = rows
            at += len(rows)
        pending.clear()
        if n <= p:
            return stacked
        if r.device.type != "cpu":
            return torch.linalg.qr(stacked, mode="r").R
        return torch.geqrf(stacked, out=(stacked, r.new_empty(p)))[0][:p].triu()


class PrimalState(State):
    """Singular values ``sigma (r,)`` and right singular vectors ``basis (r, P)``, float64."""

    def __init__(self, solver: Primal, operator: RowOperator, sigma: Tensor, basis: Tensor) -> None:
        self.solver, self.operator = solver, operator
        cutoff = solver.cutoff or 32 * torch.finfo(operator.dtype).eps
        keep = sigma > cutoff * sigma[:1]
        self.sigma, self.basis = sigma[keep], basis[keep]
        self.rank = int(keep.sum())
        self.weights = torch.ones_like(self.sigma)
        self.share = torch.zeros_like(self.sigma)

    def spectrum(self, settled: Settled | None = None) -> Spectrum:
        return Spectrum(self.sigma.square(), torch.ones_like(self.sigma), exact=True)

    def factorise(
        self,
        shift: float = 0.0,
        *,
        numerical: bool = False,
        enough: float = 0.0,
        tick: Tick | None = None,
    ) -> None:
        self.shift, self.numerical, self.enough = shift, numerical, enough
        # What a direction with singular value σ loses: all of it without a shift; with one, its
        # standard deviation falls from 1 to √(shift / (shift + σ²)).
        self.share = shift / (shift + self.sigma.square())
        self.weights = 1.0 - (self.share if numerical else self.share.sqrt())
        self.rank = round(float((1.0 - self.share).sum()))

    def project(
        self, vectors: Tensor, noise: Tensor | None = None, watch: Watch = QUIET
    ) -> Projection:
        """The symmetric square root of the covariance: no ``noise`` is needed with a shift."""
        tolerance = self.solver.tolerance_for(self.operator.dtype)
        if self.numerical:
            done = iterate(
                self.operator,
                vectors,
                lambda x: self._remove(x.double()).to(x.dtype),
                self.passes,
                tolerance,
                self.enough,
            )
            self.passes = done.iterations
            return done
        before = self.operator.image_norms(vectors)
        require_finite(before, "the product of the Jacobian rows with prior samples")
        x = self._remove(vectors.double())
        if self.shift > 0:
            return Projection(x.to(vectors.dtype), torch.zeros_like(before), Status.CONVERGED, 1)
        value = self._remove(x).to(vectors.dtype)
        residual = relative(self.operator.image_norms(value), before)
        ok = bool((residual <= tolerance).all())
        return Projection(value, residual, Status.CONVERGED if ok else Status.STAGNATED, 1)

    def _remove(self, x: Tensor) -> Tensor:
        return x - ((x @ self.basis.T) * self.weights) @ self.basis

    def covariance_times(self, vectors: Tensor) -> Tensor:
        x = vectors.double()
        gone = (x @ self.basis.T) * (1.0 - self.share**self._power)
        return (x - gone @ self.basis).to(vectors.dtype)

    @property
    def alone(self) -> bool:
        return True

    def exact_spectrum(self) -> Spectrum:
        return self.spectrum()

    def extended(self, operator: RowOperator, added: RowOperator) -> PrimalState:
        """The new rows join the triangular factor."""
        return self.solver.absorbed(self.sigma[:, None] * self.basis, added, operator)

    def determined(self) -> float:
        return float((1.0 - self.share**self._power).sum())

    @property
    def _power(self) -> int:
        return 2 * self.passes if self.numerical and self.passes else 1

    def left_out(
        self, vectors: Tensor | None, spans: Sequence[slice], image: Tensor | None = None
    ) -> list[Tensor] | None:
        if not self.shift > 0 or vectors is None:
            return None  # without a shift, what is left of a row is rounding
        x, pairs = vectors.double(), []
        gone = 1 - self.share  # of each direction: σ² / (shift + σ²)
        along = gone[:, None] * (self.basis @ x.T)  # (r, S)
        for span in spans:
            rows = self.operator.own_rows(torch.arange(span.start, span.stop)).double()
            seen = rows @ self.basis.T  # (k, r)
            beyond = rows @ x.T - seen @ along  # A_i Δ: (k, S)
            # One minus the leverage: the row space holds these rows, so nothing else remains.
            free = torch.eye(len(rows), dtype=x.dtype, device=x.device)
            free -= (seen * (gone / self.sigma.square())) @ seen.T
            pairs += [free, beyond]
        # Small systems are the processor's; they are read at once.
        read = fetched(*pairs) if pairs else []
        return [solve(f, b).T for f, b in zip(read[::2], read[1::2], strict=True)]

    def inverse_blocks(self, shift: float, spans: Sequence[slice]) -> Tensor | None:
        share, processes = 1.0 / (shift + self.sigma.square()), self.operator.processes
        out = []
        for span in filter(self.operator.holds, spans):
            rows = self.operator.own_rows(torch.arange(span.start, span.stop)).double()
            seen = rows @ self.basis.T  # (k, r)
            eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
            out.append(((eye - (seen * share) @ seen.T) / shift).cpu())
        if processes is not None:  # spans come process by process
            out = [block for blocks in processes.gather(out) for block in blocks]
        return torch.stack(out).to(self.sigma.device)

    def explained_work(self, rows: int) -> Work:
        each, (rank, columns) = self.operator.row_work, self.basis.shape
        # Read in double precision, written and read in that of the rows.
        nbytes = (8 + 2 * self.operator.dtype.itemsize) * float(rank * columns)
        return Work(rank * rows * each.product, nbytes=nbytes)

    def explained(self, rows: RowOperator, width: int = 1) -> Tensor:
        seen = rows.matvec(self.basis.to(rows.dtype)).double()  # (r, R)
        return blocks(seen * (1.0 - self.share**self._power).sqrt()[:, None], width)
