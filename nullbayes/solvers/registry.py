"""Solvers by name, and the choice among them by counted cost and memory.

A new solver is one file: a `Solver` (settings, cost, ``prepare``) and its `State` (``spectrum``, ``factorise``,
``project``, ``explained``) under `@register_solver`. Then ``solver="its name"`` works; ``solver="auto"`` chooses among
the built-in ones, whose costs are known to compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from nullbayes.common.memory import format_bytes
from nullbayes.errors import InputError, MemoryBudgetError
from nullbayes.solvers.alternating import AlternatingProjections
from nullbayes.solvers.base import ITERATIVE_TOLERANCE, Cost, Size, Solver
from nullbayes.solvers.conjugate_gradient import ConjugateGradient
from nullbayes.solvers.dual import DualCholesky
from nullbayes.solvers.eigen import PrimalEigen
from nullbayes.solvers.primal import PrimalQR

AUTO = "auto"
# An exact solution is worth so many times the work of an approximate one.
EXACT_IS_WORTH = 3.0
# Operations that an exact solution may always take: two minutes of a processor, and of an accelerator that is slow in
# double precision. One that is made for it takes seconds, where iterating waits for launches.
ALWAYS_EXACT, ALWAYS_EXACT_ON_ACCELERATOR = 1e13, 2e14
# How far rows are brought to one length before iterating. On 6,000 Fashion-MNIST images, 30 iterations: 0 leaves
# residual .039, logit drift .65 and AUROC .93/.91/.93 (digits, rotated, noise); 0.5 leaves .022, .35, .97/.93/.97.
EQUILIBRATE = 0.5


@dataclass(frozen=True)
class Choice:
    """A solver, the reason for it, the bytes that it needs, and those that it may take."""

    solver: Solver
    why: str
    nbytes: int = 0
    room: int = 2**30


_REGISTRY: dict[str, type[Solver]] = {}
_Class = TypeVar("_Class", bound=type[Solver])


def register_solver(cls: _Class) -> _Class:
    """Class decorator: make ``solver=cls.name`` work. Raises `InputError` if the name is taken."""
    holder = _REGISTRY.get(cls.name)
    if cls.name == AUTO or (holder is not None and holder.__qualname__ != cls.__qualname__):
        owner = "the automatic choice" if holder is None else holder.__qualname__
        raise InputError(
            f"the solver name {cls.name!r} belongs to {owner}; give {cls.__qualname__} another `name`."
        )
    _REGISTRY[cls.name] = cls
    return cls


for _solver in (DualCholesky, PrimalQR, PrimalEigen, ConjugateGradient, AlternatingProjections):
    register_solver(_solver)


def resolve_solver(solver: str | Solver, tolerance: float | None = None) -> Solver | None:
    """The solver asked for; None for the automatic choice. Raises `InputError` listing the names."""
    if isinstance(solver, Solver):
        return solver
    if solver == AUTO:
        return None
    if isinstance(solver, str) and solver in _REGISTRY:
        made = _REGISTRY[solver]()
        made.tolerance = tolerance
        return made
    known = ", ".join(repr(name) for name in _REGISTRY)
    raise InputError(
        f"`solver` is {solver!r}; expected 'auto', {known}, or an object from `nullbayes.solvers`: "
        "DualCholesky(), PrimalQR(), PrimalEigen(), ConjugateGradient(), AlternatingProjections()."
    )


def choose(solver: str | Solver, size: Size, budget: int, tolerance: float | None = None) -> Choice:
    """The cheapest direct solver that fits, unless iterating costs far less; or the one asked for.

    Args:
        budget: bytes that a solver may take.
        tolerance: for the solver that is chosen.

    Raises:
        MemoryBudgetError: none fits ``budget`` bytes.
        InputError: ``solver`` is neither ``"auto"``, nor a registered name, nor a solver.
    """
    chosen = resolve_solver(solver, tolerance)
    if chosen is not None:
        return Choice(chosen, "chosen by the user", chosen.cost(size).nbytes)
    direct: list[Solver] = [DualCholesky(tolerance), PrimalQR(tolerance)]
    iterative = ConjugateGradient(tolerance, equilibrate=EQUILIBRATE)
    costs = {s.name: s.cost(size) for s in (*direct, iterative)}
    listed = "; ".join(
        f"{name}: {cost.flops:.1e} flop, {format_bytes(cost.nbytes)}"
        for name, cost in costs.items()
    )
    if costs[iterative.name].nbytes > budget:
        fitting = [s for s in direct if costs[s.name].nbytes <= budget]
        if not fitting:
            raise MemoryBudgetError(
                f"no solver fits in {format_bytes(budget)} for {size.rows} rows and {size.columns} "
                f"weights with {size.samples} samples ({listed}). Draw fewer samples at a time "
                "(`num_samples=`, then `draw`), choose fewer weights (`parameters=`), raise `memory=`, or, "
                "for an exact solver, take fewer rows (`max_examples=`, `directions='auto'`, "
                "`preserve='loss'`)."
            )
        best = min(fitting, key=lambda s: costs[s.name].flops)
        return Choice(
            best, f"the only kind that fits in memory ({listed})", costs[best.name].nbytes
        )
    exact = _exact(direct, costs, size, budget, EXACT_IS_WORTH * costs[iterative.name].flops)
    if exact is not None:
        return Choice(
            exact, f"exact, and least work of its kind ({listed})", costs[exact.name].nbytes
        )
    if tolerance is not None and tolerance < ITERATIVE_TOLERANCE:
        finer = ConjugateGradient(tolerance, preconditioner="rows", equilibrate=EQUILIBRATE)
        cost = finer.cost(size)
        if cost.nbytes <= budget:
            return Choice(
                finer,
                f"no exact solver fits in {format_bytes(budget)} at a comparable cost ({listed}); below a tolerance of "
                f"{ITERATIVE_TOLERANCE:g} the factor of a part of the rows saves half the passes",
                cost.nbytes,
            )
    return Choice(
        iterative,
        f"no exact solver fits in {format_bytes(budget)} at a comparable cost ({listed})",
        costs[iterative.name].nbytes,
    )


def _exact(
    direct: list[Solver], costs: dict[str, Cost], size: Size, budget: int, worth: float
) -> Solver | None:
    """The exact solver of the least work that fits and is worth its work; None: there is none.

    Args:
        costs: takes what another one costs that is asked where none of ``direct`` will do.
        worth: operations that exactness is worth. Small problems are exact whatever the count says: both take no time.
    """
    always = ALWAYS_EXACT if size.device == "cpu" else ALWAYS_EXACT_ON_ACCELERATOR

    def serves(cost: Cost) -> bool:
        return cost.nbytes <= budget and cost.flops <= max(worth, always)

    exact = [s for s in direct if serves(costs[s.name])]
    if not exact and size.itemsize < 8:
        # A fifth of the work of the triangular factor, which stays the first choice where both would do.
        squared = PrimalEigen(direct[0].tolerance)
        costs[squared.name] = squared.cost(size)
        exact = [squared] if serves(costs[squared.name]) else []
    return min(exact, key=lambda s: costs[s.name].flops, default=None)
