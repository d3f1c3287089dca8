"""A few rows in place of all: what a solver times its stages on before a fit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nullbayes.jacobian.block_storage import block_rows
from nullbayes.jacobian.operator import JacobianOperator

QUICK = 0.3  # seconds


@dataclass(frozen=True)
class Rehearsal:
    """Rows of a few examples, and the fit that they stand for.

    Attributes:
        operator: the rows that are there.
        rows, samples: M and S of the whole fit.
        block_bytes: what a block of rows may hold.
        left_out: whether the certificate leaves examples out (`Likelihood.mean_moves`).
        drawing: seconds that drawing all prior samples takes.
    """

    operator: JacobianOperator
    rows: int
    samples: int
    block_bytes: int
    left_out: bool
    drawing: float

    def vectors(self, count: int) -> Tensor:
        """Random ``(count, P)``."""
        p = self.operator.shape[1]
        return torch.randn(count, p, dtype=self.operator.dtype, device=self.operator.device)

    @cached_property
    def samples_like(self) -> Tensor:
        """Random ``(S, P)``."""
        return self.vectors(self.samples)

    @cached_property
    def one_pass(self) -> float:
        """Seconds of one pass over all rows with all samples."""
        return self.seconds_of_pass(self.samples_like)

    def seconds_of_pass(self, v: Tensor) -> float:
        """One product with the rows and one with their transpose, for all rows."""
        here = self.operator.shape[0]
        half = next(self.operator.pieces(max(1, here // 2)))
        whole = timed(lambda: self.operator.normal(v))
        if not half.shape[0] < here < self.rows:
            return whole * self.rows / here
        # Reading and writing the vectors is paid once a block, and the trial is a small one.
        part = timed(lambda: half.normal(v))
        per_row = max(0.0, whole - part) / (here - half.shape[0])
        once = max(0.0, whole - per_row * here)
        block = min(
            block_rows(self.operator.device), self.block_bytes * here / max(1, self.operator.nbytes)
        )
        return once * max(1.0, self.rows / block) + per_row * self.rows


def timed(run: Callable[[], Any]) -> float:
    """Seconds; the better of two where it is over soon, and something else may have come between."""
    took: list[float] = []
    while not took or (len(took) < 2 and took[0] < QUICK):
        started = time.perf_counter()
        run()
        took.append(time.perf_counter() - started)
    return min(took)
