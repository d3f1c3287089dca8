"""Few weights and very many rows: eigenvectors of ``AᵀA``, summed up in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.common.decompositions import eigh, mirror_upper_
from nullbayes.common.processes import once
from nullbayes.common.progress import FACTORISATION, GRAM, PROJECTION
from nullbayes.errors import SolverError
from nullbayes.jacobian.operator import RowOperator, Tick
from nullbayes.solvers.base import Cost, Size, require_finite
from nullbayes.solvers.primal import Primal, PrimalState
from nullbayes.solvers.refinement import DIRECT_PASSES
from nullbayes.solvers.rehearsal import Rehearsal, timed

# Columns of a block of the upper triangle, and rows that are written out at a time.
BLOCK, ROWS = 1024, 1024


class PrimalEigen(Primal):
    """Sum up ``AᵀA (P, P)`` in float64, then one eigendecomposition.

    A fifth of the work of `PrimalQR`, for rows in single precision alone: squaring loses singular values below 1e-8 of
    the largest, and those of float32 rows are their own rounding from 4e-6 of it downwards.

    Args:
        tolerance: relative residual below which the status is "converged".
        cutoff: singular values below ``cutoff`` times the largest count as zero; None: 32 eps of the rows' dtype.

    Raises `SolverError` for rows in float64.
    """

    name = "primal eigen"

    def cost(self, size: Size) -> Cost:
        # Half of AᵀA by symmetry; about 9 P³ for all eigenvectors, most of it at half the speed of a product; float64
        # counts twice.
        p = size.columns
        flops = 2 * (float(size.rows) * p**2 + 18 * float(p) ** 3)
        vectors = 6 * size.samples * p * 8
        return Cost(flops, 8 * p * (4 * p + 2 * ROWS) + vectors)

    def forecast(self, rehearsal: Rehearsal) -> dict[str, float]:
        p, device = rehearsal.operator.shape[1], rehearsal.operator.device
        rows = torch.randn(ROWS, p, dtype=torch.float64, device=device)
        total = torch.zeros(p, p, dtype=torch.float64, device=device)
        adding = timed(lambda: _add(total, rows))
        n = min(p, 1000)
        small = total[:n, :n] + total[:n, :n].T
        solving = timed(lambda: torch.linalg.eigh(small)) * (p / n) ** 3
        return {
            GRAM: adding * rehearsal.rows / ROWS,
            FACTORISATION: solving,
            PROJECTION: rehearsal.drawing + (0.5 + 0.5 * DIRECT_PASSES) * rehearsal.one_pass,
        }

    def absorbed(
        self, r: Tensor, added: RowOperator, operator: RowOperator, tick: Tick | None = None
    ) -> PrimalState:
        if added.dtype == torch.float64:
            raise SolverError(
                "'primal eigen' squares the rows' singular values, and of float64 rows that loses half the digits; use "
                "`solver=nb.solvers.PrimalQR()`."
            )
        own, done = added.mine, 0
        p = own.shape[1]
        total = torch.zeros(p, p, dtype=torch.float64, device=operator.device)
        for rows in own.iter_rows(ROWS):
            _add(total, rows.double())
            done += len(rows)
            if tick:
                tick(done / own.shape[0])
        if operator.processes is not None:
            operator.processes.sum_(total)
        _add(total, r)
        require_finite(total.diagonal(), "the sum of products of the Jacobian rows")
        values, vectors = once(operator.processes, lambda: eigh(mirror_upper_(total)), total)
        if tick:
            tick(1.0)
        sigma = values.clamp(min=0).sqrt().flip(0)
        return PrimalState(self, operator, sigma, vectors.T.flip(0))


def _add(total: Tensor, rows: Tensor) -> None:
    """``total += rowsᵀ rows``, the upper triangle of blocks alone."""
    for start in range(0, len(total), BLOCK):
        stop = start + BLOCK
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
