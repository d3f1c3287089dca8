"""Seconds of each stage of a fit, from short trials on this machine and the laws that the stages follow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from nullbayes.audit.examples import SAMPLES, Claim, Question, audit_examples
from nullbayes.audit.sampling import Reservoir
from nullbayes.certificate.measure import GuaranteeCheck, sampled_examples, sampled_networks
from nullbayes.common.progress import AUDIT, CERTIFICATE
from nullbayes.constraints.memory_budget import FitMemory
from nullbayes.constraints.problem import Problem
from nullbayes.constraints.training_rows import CHECK_EXAMPLES
from nullbayes.fit.prior_samples import standard_normal
from nullbayes.fit.result import AUDITED
from nullbayes.jacobian.block_storage import Part, merge_blocks
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.linearise import sampled_outputs
from nullbayes.jacobian.live_tokens import by_length
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.model.batch import Inputs, take
from nullbayes.solvers import Size, Solver
from nullbayes.solvers.rehearsal import QUICK, Rehearsal, timed

# Rows that products are timed with, and the memory that they may take.
TRIAL_ROWS = 2048
TRIAL_BYTES = 2**29
# How often the checked outputs are gone through: evidence's lower bound, drifts and scores.
LOOKS = 4
CHECKED_IN_TRIAL = (8, 96)
FIRST_USE = 3.0  # seconds
AUDITED_IN_TRIAL = 2  # examples
# By how much rows without dead tokens may grow when they are merged with others.
MERGED = 1.1

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """A few examples whose rows are there, and the fit that they stand for.

    Attributes:
        operator: rows of the ``size`` examples ``inputs``, ``targets``.
        examples, rows, batch: N, M and the largest batch of the whole fit; ``memory``: how its budget is divided.
    """

    problem: Problem
    plan: CapturePlan
    inputs: Inputs
    targets: Any
    operator: JacobianOperator
    size: int
    examples: int
    rows: int
    batch: int
    memory: FitMemory

    @property
    def factor_bytes(self) -> int:
        """Of the rows of the whole fit."""
        blocks = self.operator.blocks
        kept = 0
        for whole in blocks:
            for start in range(0, whole.examples, self.batch):
                stop = min(start + self.batch, whole.examples)
                with Part(whole, start, stop).opened() as piece:
                    kept += sum(part.nbytes for _, part, _ in by_length(piece))
        # Of about one length, they are merged to that of the longest of more of them.
        kept = min(self.operator.nbytes, round(MERGED * kept))
        return kept * self.examples // self.size

    @property
    def solved_size(self) -> Size:
        """What the whole fit's solver will work on."""
        scale = self.rows / self.operator.shape[0]
        return Size(
            self.rows,
            self.operator.shape[1],
            self.memory.samples,
            self.operator.product_flops * scale,
            self.operator.gram_flops * scale**2,
            self.operator.dtype.itemsize,
            device=self.operator.device.type,
        )

    def seconds(self, solver: Solver) -> dict[str, float]:
        """By stage, without capturing the rows."""
        tiled, samples = self.tiled(), self.memory.samples
        p, like = self.operator.shape[1], self.problem.trained_weights()
        drawing = timed(lambda: standard_normal(0, range(samples), p, 0, like))
        rehearsal = Rehearsal(
            tiled.operator,
            self.rows,
            samples,
            self.memory.block,
            self.problem.likelihood.mean_moves,
            drawing,
        )
        out = {
            CERTIFICATE: self._certificate(rehearsal.samples_like) + rehearsal.one_pass,
            AUDIT: self._audit(rehearsal.samples_like),
        }
        for stage, more in solver.forecast(rehearsal).items():
            out[stage] = out.get(stage, 0.0) + more
        return out

    def tiled(self) -> Trial:
        """The same with its rows several times over: products of a few rows say little of those of many."""
        here, nbytes = self.operator.shape[0], max(1, self.operator.nbytes)
        times = min(-(-TRIAL_ROWS // here), -(-self.rows // here), TRIAL_BYTES // nbytes)
        if times < 2:
            return self
        blocks = merge_blocks([b for b in self.operator.blocks for _ in range(times)])  # type: ignore[misc]
        return replace(self, operator=JacobianOperator(self.operator.space, blocks))

    def _audit(self, v: Tensor) -> float:
        """Examples moved one at a time, once whatever that uses for the first time is there."""
        few = Reservoir(AUDITED_IN_TRIAL, 0, self.memory.check)
        few.offer(self.inputs, self.targets)
        problem, count = self.problem, min(SAMPLES, len(v))
        question = Question(
            problem.functional,
            v[:count],
            v[:count],
            lambda outputs, example: problem.cotangents(outputs, example.targets).values,
        )
        nothing = [Claim(v.new_zeros(count).double())] * len(few.drawn)
        seconds, _ = settled(lambda: audit_examples(question, few.drawn, nothing, self.size))
        return seconds / max(1, len(few.drawn)) * min(self.examples, AUDITED)

    def _certificate(self, v: Tensor) -> float:
        """Linearised outputs of the checked examples, looks at them, and a few sampled networks."""
        count = min(self.size, CHECKED_IN_TRIAL[0])

        def checked_some() -> GuaranteeCheck:
            some, answers = take(self.inputs, 0, count), take(self.targets, 0, count, self.size)
            return GuaranteeCheck(self.problem, self.plan, [(some, answers)], v)

        linear, check = settled(checked_some)
        if linear < QUICK:
            count = min(self.size, CHECKED_IN_TRIAL[1])
            linear, check = settled(checked_some)
        some = take(self.inputs, 0, count)
        look = timed(lambda: check.divergence(1e-3))
        sampled, _ = settled(
            lambda: sampled_outputs(
                self.problem.functional, v[: sampled_networks(self.problem)], some, scale=1e-3
            )
        )
        each = max(1, sum(unit.nbytes for _, unit, _ in check.batches) // count)
        checked = min(self.examples, CHECK_EXAMPLES, max(1, self.memory.check // each))
        few = min(self.examples, sampled_examples(self.problem))
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
