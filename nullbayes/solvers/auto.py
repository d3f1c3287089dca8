"""Choose a solver by counted cost and memory, and say why."""

from __future__ import annotations

from dataclasses import dataclass

from nullbayes.errors import InputError, MemoryBudgetError
from nullbayes.memory import format_bytes
from nullbayes.solvers.base import Solver
from nullbayes.solvers.dual import DualCholesky
from nullbayes.solvers.primal import PrimalQR


@dataclass(frozen=True)
class Choice:
    """A solver and the reason for it."""

    solver: Solver
    why: str


def choose(
    solver: str | Solver, rows: int, columns: int, budget: int, tolerance: float | None = None
) -> Choice:
    """The cheapest direct solver whose memory fits, or the one asked for.

    Raises:
        MemoryBudgetError: none fits ``budget`` bytes.
        InputError: ``solver`` is neither ``"auto"`` nor a solver.
    """
    if isinstance(solver, Solver):
        return Choice(solver, "chosen by the user")
    if solver != "auto":
        raise InputError(
            f"`solver` is {solver!r}; expected 'auto' or an object from `nullbayes.solvers`: "
            "DualCholesky(), PrimalQR()."
        )
    candidates: list[Solver] = [DualCholesky(tolerance), PrimalQR(tolerance)]
    costs = {s.name: s.cost(rows, columns) for s in candidates}
    fitting = [s for s in candidates if costs[s.name].nbytes <= budget]
    listed = "; ".join(
        f"{s.name}: {costs[s.name].flops:.1e} flop, {format_bytes(costs[s.name].nbytes)}"
        for s in candidates
    )
    if not fitting:
        raise MemoryBudgetError(
            f"no direct solver fits in {format_bytes(budget)} for {rows} rows and {columns} "
            f"weights ({listed}). Fit fewer examples (`max_examples=`), keep fewer directions of "
            "each (`directions='auto'`), preserve each example's loss only (`preserve='loss'`), "
            "choose fewer weights (`parameters=`), or raise `memory=`."
        )
    best = min(fitting, key=lambda s: costs[s.name].flops)
    return Choice(best, f"least work of those that fit in memory ({listed})")
