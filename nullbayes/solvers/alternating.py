"""The published method: cyclic projections onto the null spaces of mini-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.common.decompositions import eigh
from nullbayes.jacobian.operator import RowOperator, Tick
from nullbayes.solvers.agreement import Agreed, together
from nullbayes.solvers.base import Cost, Projection, Size, Solver, Status, relative, require_finite
from nullbayes.solvers.block_cg import row_norms
from nullbayes.solvers.checkpoint import QUIET, Watch
from nullbayes.solvers.conjugate_gradient import IterativeState, iterative_forecast
from nullbayes.solvers.refinement import GAP, MAX_PASSES, Refinement
from nullbayes.solvers.rehearsal import Rehearsal

BATCH_ROWS = 144  # sixteen examples with nine softmax directions each, as published
STALLED = 0.999  # a cycle that leaves more than this of the residual, many times in a row
STALLED_CYCLES = 50


class AlternatingProjections(Solver):
    """Projections onto one mini-batch's null space after the other (Miani, Roy & Hauberg 2025, alg. 1).

    The reference that the other solvers are held against. Each mini-batch's small Gram matrix is
    inverted once. What differs from published code: the cut-off is relative to the largest eigenvalue, the
    last, partial mini-batch is kept, and cycles end at a measured residual. With a shift (numerical null
    space, Laplace) the same sweep is block Gauss-Seidel on ``(A Aᵀ + shift I) z = A v + √shift ξ``.

    Args:
        tolerance: on the relative residual; None: 5e-2.
        max_cycles: sweeps over all mini-batches at most.
        batch_rows: rows of a mini-batch.
        accelerate: an exact line search along each cycle's step (Gearhart & Koshy 1989), without a
            shift.
        cutoff: eigenvalues of a mini-batch's Gram matrix below this share of its largest are zero.
    """

    name = "alternating projections"
    iterative = True

    def __init__(
        self,
        tolerance: float | None = None,
        max_cycles: int = 1000,
        batch_rows: int = BATCH_ROWS,
        *,
        accelerate: bool = False,
        cutoff: float = 1e-10,
    ) -> None:
        self.tolerance, self.max_iterations, self.batch_rows = tolerance, max_cycles, batch_rows
        self.accelerate, self.cutoff = accelerate, cutoff

    def cost(self, size: Size) -> Cost:
        batches = -(-size.rows // self.batch_rows)
        inverses = 8 * batches * self.batch_rows**2
        cycle = 2 * size.samples * (size.product_flops + size.rows * self.batch_rows)
        vectors = 4 * size.samples * size.columns * size.itemsize + 8 * size.samples * size.rows
        return Cost(1000 * cycle, inverses + vectors)

    def forecast(self, rehearsal: Rehearsal) -> dict[str, float]:
        return iterative_forecast(rehearsal)

    def prepare(self, operator: RowOperator, tick: Tick | None = None) -> AlternatingState:
        return AlternatingState(self, operator, tick)


@dataclass
class _Batch:
    operator: RowOperator
    rows: slice
    values: Tensor
    vectors: Tensor

    def inverse(self, r: Tensor, shift: float, cutoff: float) -> Tensor:
        """``(A_b A_bᵀ + shift I)⁻¹ r``, pseudo-inverse without a shift; ``(S, m)`` float64."""
        keep = self.values > cutoff * self.values[-1] if shift == 0 else self.values > -1
        scaled = torch.where(keep, 1 / (self.values + shift).clamp(min=1e-300), 0.0)
        return ((r @ self.vectors) * scaled) @ self.vectors.T


def _line_search(start: Tensor, end: Tensor) -> Tensor:
    """The point nearest to the intersection on the line through a cycle's ends (Gearhart & Koshy 1989)."""
    move = start - end
    size = row_norms(move)
    step = relative((start.double() * move.double()).sum(1), size.square())
    # The product cancels where a cycle moves little; a plain step is never wrong.
    resolved = size > torch.finfo(start.dtype).eps ** 0.5 * row_norms(start)
    step = torch.where(resolved, step, torch.ones_like(step))
    return start - step[:, None].to(start.dtype) * move


class AlternatingState(IterativeState):
    """Mini-batches with the eigendecompositions of their Gram matrices."""

    def __init__(
        self, solver: AlternatingProjections, operator: RowOperator, tick: Tick | None
    ) -> None:
        self.solver: AlternatingProjections = solver
        self.operator = operator
        self.batches: list[_Batch] = []
        start = 0
        #: the rows that this process holds; the batches, and all that is as long as rows, are of these
        self.mine = operator.mine
        self.agreed = Agreed(operator.processes)
        for piece in self.mine.pieces(solver.batch_rows):
            gram = piece.gram()
            require_finite(gram, "the Gram matrix of a mini-batch")
            values, vectors = eigh(gram)
            rows = slice(start, start + piece.shape[0])
            self.batches.append(_Batch(piece, rows, values.clamp(min=0), vectors))
            start = rows.stop
            if tick:
                tick(start / self.mine.shape[0])

    def factorise(
        self,
        shift: float = 0.0,
        *,
        numerical: bool = False,
        enough: float = 0.0,
        tick: Tick | None = None,
    ) -> None:
        self.shift, self.numerical, self.enough = shift, numerical, enough

    def project(
        self, vectors: Tensor, noise: Tensor | None = None, watch: Watch = QUIET
    ) -> Projection:
        tolerance = self.solver.tolerance_for(vectors.dtype)
        if not self.numerical:
            goal = Refinement(tolerance, self.solver.max_iterations)
            return self._solve(vectors, noise, goal, watch)
        before = self.agreed.norms(self.mine.matvec(vectors))
        x, after, done, cycles, status = vectors, before, 0, 0, Status.NUMERICAL
        while True:
            previous = after
            limit = max(1, self.solver.max_iterations - cycles)
            solved = self._solve(x, None, Refinement(0.1 * tolerance, limit), watch)
            x, done, cycles = solved.value, done + 1, cycles + solved.iterations
            after = self.agreed.norms(self.mine.matvec(x))
            if bool((after <= (tolerance * before).clamp(min=self.enough)).all()):
                status = Status.CONVERGED
                break
            if solved.status is not Status.CONVERGED:
                status = solved.status
                break
            enough = done >= 2 and float(after.norm()) > float(previous.norm()) / GAP
            if enough if self.passes is None else done >= self.passes:
                break
            if done >= MAX_PASSES:
                break
        self.passes = done if self.passes is None else self.passes
        return Projection(x, relative(after, before), status, cycles)

    def _sweep(self, x: Tensor, z: Tensor, extra: float | Tensor, rows: slice) -> None:
        """One projection after the other onto the null spaces of the batches of ``rows``: changes ``x`` and ``z``."""
        for batch in self.batches:
            if not rows.start <= batch.rows.start < rows.stop:
                continue
            r = batch.operator.matvec(x).double()
            if self.shift:
                r = r - self.shift * z[:, batch.rows]
                r = r + (extra if isinstance(extra, float) else extra[:, batch.rows])
            y = batch.inverse(r, self.shift, self.solver.cutoff)
            x -= batch.operator.rmatvec(y.to(x.dtype))
            z[:, batch.rows] += y

    def _solve(
        self, vectors: Tensor, noise: Tensor | None, goal: Refinement, watch: Watch
    ) -> Projection:
        tolerance, limit = goal.tolerance, goal.max_iterations
        x = vectors
        z = torch.zeros(len(x), self.mine.shape[0], dtype=torch.float64, device=x.device)
        extra: float | Tensor = 0.0
        if noise is not None and self.shift:
            extra = self.shift**0.5 * self.operator.own(noise).double()

        def residual() -> Tensor:
            r: Tensor = self.mine.matvec(x).double() + extra - self.shift * z
            return self.agreed.norms(r)

        before = residual()
        require_finite(before, "the product of the Jacobian rows with prior samples")
        scale = self._scale(vectors, noise)
        if scale is None:
            scale = before
        enough = (tolerance * scale).clamp(min=0.0 if self.shift else self.enough)
        reached, best, stalled, cycles = before, (before, x), 0, 0
        status = Status.MAX_ITERATIONS
        with together(self.operator.processes) as self.agreed:
            try:
                while True:
                    watch.report(cycles, float(relative(reached, enough).max()))
                    found: Status | None = None
                    if bool((reached <= enough).all()):
                        found = Status.CONVERGED
                    elif cycles >= limit or stalled >= STALLED_CYCLES:
                        found = Status.STAGNATED if cycles < limit else Status.MAX_ITERATIONS
                    found = self.agreed.status(found)
                    if found is not None:
                        status = found
                        break
                    x, started, cycles = x.clone(), x, cycles + 1
                    # Processes take turns: each batch begins where the one before it has ended.
                    for rows in self.agreed.turns(x, self.operator):
                        self._sweep(x, z, extra, rows)
                    if self.solver.accelerate and not self.shift:
                        x = _line_search(started, x)
                    previous, reached = reached, residual()
                    require_finite(reached, "the residual of the projection")
                    slow = bool((reached > STALLED * previous).all())
                    stalled = stalled + 1 if slow else 0
                    if float(reached.max()) <= float(best[0].max()):
                        best = (reached, x)
            except KeyboardInterrupt:
                status = Status.INTERRUPTED
        reached, x = best
        return Projection(x, relative(reached, scale), status, cycles)
