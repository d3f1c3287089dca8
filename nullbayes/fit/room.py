"""A solver that fits the memory that is left beside the rows, and what is said of rows that had to go elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from nullbayes.common.memory import explained_out_of_memory, format_bytes, working_within
from nullbayes.constraints.memory_budget import SOLVER_VECTORS, FitMemory
from nullbayes.errors import MemoryBudgetError
from nullbayes.fit.result import Settings
from nullbayes.jacobian.block_storage import fits_on_disk
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.model.parameters import ParameterSpace
from nullbayes.solvers import Choice, DualCholesky, Size, choose


def divided(settings: Settings, space: ParameterSpace, samples: int, budget: int) -> FitMemory:
    """The parts of a fit's ``budget``.

    Rows may take what a direct solver leaves them, which writes samples over the prior's; one that iterates holds
    more of those, and sends rows to disk before it begins. An accelerator has no disk, so there the rows leave that
    much at once.
    """
    direct = settings.solver == "auto" or isinstance(settings.solver, DualCholesky)
    few = settings.target.numerical and direct and space.device.type == "cpu"
    each = 1 if few else SOLVER_VECTORS
    return FitMemory.of(budget, samples, space.total, space.dtype, each, space.device)


@contextmanager
def within(budget: int, memory: FitMemory) -> Iterator[None]:
    """A fit's work with no larger temporaries than its budget has room for."""
    with explained_out_of_memory(budget), working_within(memory.temporaries):
        yield


def chosen_solver(
    settings: Settings, operator: JacobianOperator, num_samples: int, budget: int
) -> Choice:
    """A solver that fits beside the rows; rows go to disk where that makes room for it.

    Args:
        budget: bytes that rows and solver may take together.
    """
    m, p = operator.shape
    size = Size(
        m,
        p,
        num_samples,
        operator.product_flops,
        operator.gram_flops,
        operator.dtype.itemsize,
        settings.target.numerical,
        operator.device.type,
    )
    resident = operator.resident
    movable = resident if fits_on_disk(resident, operator.device) else 0
    room = budget - resident + movable
    if operator.processes is not None:
        room = -round(operator.processes.largest(-room))
    choice = choose(settings.solver, size, room, settings.tolerance)
    if choice.nbytes > room:
        raise MemoryBudgetError(
            f"{choice.solver.name} needs {format_bytes(choice.nbytes)} for {m} rows, {p} weights and "
            f"{num_samples} samples, more than the {format_bytes(budget)} that `memory=` leaves it. Raise that, draw "
            "fewer samples at a time, or leave the choice to solver='auto'."
        )
    operator.move_out(budget - choice.nbytes)
    left = budget - operator.resident
    if operator.processes is not None:
        left = -round(operator.processes.largest(-left))
    return replace(choice, room=max(choice.nbytes, left))
