"""Seconds of each stage of a fit, from short trials on this machine and the laws that the stages follow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from nullbayes.certificate.leave_one_out import rows_left_out
from nullbayes.certificate.measure import SAMPLED_DRAWS, SAMPLED_EXAMPLES, GuaranteeCheck
from nullbayes.common.progress import CERTIFICATE, FACTORISATION, GRAM, PROJECTION
from nullbayes.constraints.preserve import Preserve
from nullbayes.constraints.training_rows import CHECK_EXAMPLES
from nullbayes.fit.prior_samples import standard_normal
from nullbayes.jacobian.block_storage import BLOCK_ROWS, merge_blocks
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.linearise import sampled_outputs
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.likelihood import Likelihood
from nullbayes.model.batch import Inputs, take
from nullbayes.model.functional import FunctionalModel
from nullbayes.solvers import Solver
from nullbayes.solvers.block_cg import inner
from nullbayes.solvers.conjugate_gradient import EXPECTED_ITERATIONS
from nullbayes.solvers.spectrum import EXACT_UP_TO, OPERATOR_PROBES, OPERATOR_STEPS, PROBES, STEPS

# Rows that products are timed with, and the memory that they may take.
TRIAL_ROWS = 2048
TRIAL_BYTES = 2**29
# The side of dense trials: large enough for the speed that large matrices have.
TRIAL_SIDE = 2500
# Passes of the numerical null space that a direct solver makes; the second one finds that a third is not needed.
DIRECT_PASSES = 2
# How often the checked outputs are gone through: evidence's lower bound, drifts and scores.
LOOKS = 4
CHECKED_IN_TRIAL = (8, 96)
QUICK = 0.3  # seconds
FIRST_USE = 3.0  # seconds

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """A few examples whose rows are there, and the fit that they stand for.

    Attributes:
        operator: rows of the ``size`` examples ``inputs``, ``targets``.
        examples, rows, samples: N, M and S of the whole fit.
        block_bytes, check_bytes: what a block of rows and the certificate may hold.
    """

    functional: FunctionalModel
    plan: CapturePlan
    likelihood: Likelihood
    preserve: Preserve
    inputs: Inputs
    targets: Any
    operator: JacobianOperator
    size: int
    examples: int
    rows: int
    samples: int
    block_bytes: int
    check_bytes: int

    def seconds(self, solver: Solver) -> dict[str, float]:
        """By stage, without capturing the rows."""
        p = self.operator.shape[1]
        v = self._vectors(self.samples)
        drawing = _timed(lambda: standard_normal(0, range(self.samples), p, 0, v))
        one_pass = self._pass(v)
        out = {CERTIFICATE: self._certificate(v) + one_pass}
        if solver.iterative:
            once = self._pass(v[:OPERATOR_PROBES])
            out[FACTORISATION] = OPERATOR_STEPS * once if self.rows > EXACT_UP_TO else 0.0
            # Each step keeps a block of search directions conjugate: a few products of (S, P) with (S, S).
            vectors = _timed(lambda: (inner(v, v), inner(v, v), inner(v, v), v.T @ v[:, :1]))
            out[GRAM] = 0.0
            out[PROJECTION] = drawing + EXPECTED_ITERATIONS * (one_pass + 2 * vectors)
        elif solver.name == "primal QR":
            tall = torch.randn(2 * p + 16, p, dtype=torch.float64, device=self.operator.device)
            qr = _timed(lambda: torch.linalg.qr(tall, mode="r"))
            out[GRAM] = qr * max(1.0, self.rows / max(1, p))
            out[FACTORISATION] = 0.0
            out[PROJECTION] = drawing + (0.5 + 0.5 * DIRECT_PASSES) * one_pass
        else:
            self._dual(out, v, drawing, one_pass)
        return out

    def _vectors(self, count: int) -> Tensor:
        p = self.operator.shape[1]
        return torch.randn(count, p, dtype=self.operator.dtype, device=self.operator.device)

    def tiled(self) -> Trial:
        """The same with its rows several times over: products of a few rows say little of those of many."""
        here, held = self.operator.shape[0], max(1, self.operator.nbytes)
        times = min(-(-TRIAL_ROWS // here), -(-self.rows // here), TRIAL_BYTES // held)
        if times < 2:
            return self
        blocks = merge_blocks([b for b in self.operator.blocks for _ in range(times)])  # type: ignore[misc]
        return replace(self, operator=JacobianOperator(self.operator.space, blocks))

    def _pass(self, v: Tensor) -> float:
        """One product with the rows and one with their transpose, for all rows."""
        here = self.operator.shape[0]
        half = next(self.operator.pieces(max(1, here // 2)))
        whole = _timed(lambda: self.operator.normal(v))
        if not half.shape[0] < here < self.rows:
            return whole * self.rows / here
        # Reading and writing the vectors is paid once a block, and the trial is a small one.
        part = _timed(lambda: half.normal(v))
        per_row = max(0.0, whole - part) / (here - half.shape[0])
        once = max(0.0, whole - per_row * here)
        block = min(BLOCK_ROWS, self.block_bytes * here / max(1, self.operator.nbytes))
        return once * max(1.0, self.rows / block) + per_row * self.rows

    def _dual(self, out: dict[str, float], v: Tensor, drawing: float, one_pass: float) -> None:
        here, m = self.operator.shape[0], self.rows
        # A block's product with itself is computed whole, so the trial did all of its M² pairs.
        pairs = _timed(self.operator.gram) / here**2
        blocks = max(1.0, m / BLOCK_ROWS)
        computed = 0.5 + 0.5 / blocks  # the lower triangle of blocks, the diagonal ones whole
        n = min(TRIAL_SIDE, max(m, 2))
        grow = m / n
        matrix = torch.full((n, n), 1.0, dtype=torch.float64, device=self.operator.device)
        matrix.diagonal().fill_(2.0 * n)
        cholesky = _timed(lambda: torch.linalg.cholesky_ex(matrix))
        scaling = _timed(lambda: matrix.clone().mul_(matrix[:, :1]).mul_(matrix[0]))
        if m <= EXACT_UP_TO:
            spectrum = _timed(lambda: torch.linalg.eigvalsh(matrix)) * grow**3
        else:
            single, few = matrix.float(), torch.randn(n, PROBES, device=self.operator.device)
            spectrum = (STEPS * _timed(lambda: single @ few) + scaling / 2) * grow**2
        right = torch.randn(n, self.samples, dtype=torch.float64, device=self.operator.device)
        solve = _timed(lambda: torch.cholesky_solve(right, matrix)) * grow**2
        if self.likelihood.score_name == "accuracy":
            # Many columns at once are solved for at another speed than a few.
            left_out = min(m, rows_left_out(m))
            several = torch.randn(n, min(256, left_out), dtype=matrix.dtype, device=matrix.device)
            solving = _timed(lambda: torch.cholesky_solve(several, matrix)) * grow**2
            out[CERTIFICATE] += one_pass / 2 + solving * left_out / several.shape[1]
        out[GRAM] = computed * pairs * m**2
        out[FACTORISATION] = cholesky * grow**3 + scaling * grow**2 + spectrum
        out[PROJECTION] = drawing + (0.5 + DIRECT_PASSES) * one_pass + DIRECT_PASSES * solve

    def _certificate(self, v: Tensor) -> float:
        """Linearised outputs of the checked examples, looks at them, and a few sampled networks."""
        count = min(self.size, CHECKED_IN_TRIAL[0])

        def checked_some() -> GuaranteeCheck:
            some, answers = take(self.inputs, 0, count), take(self.targets, 0, count, self.size)
            return GuaranteeCheck(
                self.functional, self.plan, self.likelihood, self.preserve, [(some, answers)], v
            )

        linear, check = settled(checked_some)
        if linear < QUICK:
            count = min(self.size, CHECKED_IN_TRIAL[1])
            linear, check = settled(checked_some)
        some = take(self.inputs, 0, count)
        look = _timed(lambda: check.divergence(1e-3))
        sampled, _ = settled(
            lambda: sampled_outputs(self.functional, v[:SAMPLED_DRAWS], some, scale=1e-3)
        )
        held = max(1, sum(unit.nbytes for _, unit, _ in check.batches) // count)
        checked = min(self.examples, CHECK_EXAMPLES, max(1, self.check_bytes // held))
        few = min(self.examples, SAMPLED_EXAMPLES)
        return ((linear + LOOKS * look) * checked + sampled * few) / count


def settled(run: Callable[[], T]) -> tuple[float, T]:
    """Seconds and result; run again where importing and compiling on first use may be most of it."""
    started = time.perf_counter()
    out = run()
    seconds = time.perf_counter() - started
    if seconds < FIRST_USE:
        started = time.perf_counter()
        out = run()
        seconds = time.perf_counter() - started
    return seconds, out


def _timed(run: Callable[[], Any]) -> float:
    """Seconds; the better of two where it is over soon, and something else may have come between."""
    took: list[float] = []
    while not took or (len(took) < 2 and took[0] < QUICK):
        started = time.perf_counter()
        run()
        took.append(time.perf_counter() - started)
    return min(took)
