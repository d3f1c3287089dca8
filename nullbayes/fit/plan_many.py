"""What several processes tell each other during a fit: bytes by counting, seconds by trying."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from nullbayes.common.processes import Processes
from nullbayes.common.progress import COMMUNICATION
from nullbayes.constraints.problem import Problem
from nullbayes.errors import InputError
from nullbayes.fit.plan import Few, Plan, counted
from nullbayes.fit.result import Settings
from nullbayes.model.data import Batches, Shard
from nullbayes.model.shares import refuse_limit
from nullbayes.solvers.conjugate_gradient import EXPECTED_ITERATIONS
from nullbayes.solvers.dual import DualCholesky
from nullbayes.solvers.eigen import PrimalEigen
from nullbayes.solvers.primal import PrimalQR
from nullbayes.solvers.refinement import DIRECT_PASSES

# Numbers of the sums that are tried, at most.
_TRIED = 2**22


def made_together(
    made: Callable[[Few], Plan],
    problem: Problem,
    loader: Iterable[Any],
    limit: int | None,
    processes: Processes,
) -> Plan:
    """One plan for all of ``processes``, by one of them, which has data; each reads a `Shard` of its own once.

    Args:
        made: the plan of examples that were counted.

    Raises:
        InputError: a limit with a `Shard`, as in ``fit``; or nobody has any examples.
    """
    processes.neighbours  # noqa: B018  asked of all, before one of them works
    inner = loader.loader if isinstance(loader, Batches) else loader
    if not isinstance(inner, Shard):
        return processes.shared(lambda: made(counted(problem, loader, limit)))
    refuse_limit(limit)
    few = _of_shard(problem, loader)
    told = processes.gather((0, 0) if few is None else (few.examples, few.largest))
    counts, largest = zip(*told, strict=True)
    if not any(counts):
        raise InputError("`train_loader` holds no examples, in any process. Pass filled shards.")

    def make() -> Plan:
        assert few is not None
        return made(replace(few, examples=sum(counts), largest=max(largest)))

    return processes.shared(make, counts.index(max(counts)))


def _of_shard(problem: Problem, shard: Iterable[Any]) -> Few | None:
    """What this process has, None where that is nothing; read from the beginning to the end once."""
    batches = iter(shard)
    first = next(batches, None)
    if first is None:
        return None
    return counted(problem, itertools.chain([first], batches))


def with_communication(
    plan: Plan, problem: Problem, settings: Settings, samples: int, processes: Processes
) -> Plan:
    """The plan of one of ``processes``, with what it sends to the others."""
    if plan.solver is None:
        return plan
    m, p = plan.rows, plan.parameters
    itemsize = 4 if processes.size == 2 and problem.dtype == torch.float32 else 8
    once = samples * p * itemsize  # the sum of (S, P) over the processes
    sums, rest = 1.0 * EXPECTED_ITERATIONS, 0
    if plan.solver == DualCholesky.name:
        # The Gram matrix is summed, and its factor given out; the blocks of rows go round.
        sums, rest = 1.0 + DIRECT_PASSES, 2 * 8 * m * m + plan.bytes.get("Jacobian rows", 0)
    elif plan.solver == PrimalQR.name:
        sums, rest = 0.0, 2 * 8 * min(m, p) * p
    elif plan.solver == PrimalEigen.name:
        sums, rest = 0.0, 2 * 8 * p * p
    sent = round(sums * once + rest)
    speed = _bytes_per_second(samples * p, problem, processes)
    seconds = {**plan.seconds, COMMUNICATION: sent / speed}
    return replace(plan, seconds=seconds, sent=sent)


def _bytes_per_second(numbers: int, problem: Problem, processes: Processes) -> float:
    """Of a sum over the processes; the better of two."""
    values = torch.zeros(max(1, min(numbers, _TRIED)), dtype=torch.float64, device=problem.device)
    took = []
    for _ in range(2):
        processes.barrier()
        started = time.perf_counter()
        processes.sum_(values)
        took.append(time.perf_counter() - started)
    return values.nbytes / processes.largest(max(1e-6, min(took)))
