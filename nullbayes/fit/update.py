"""More training data for a posterior: the rows of earlier examples stay, their data are not needed.

Direct solvers continue from their factorisation: the dual Gram matrix grows by a block (products of two earlier rows
are not computed again), and new rows join the primal triangular factor. What follows is what ``fit`` does, with the
same numbers for each sample, so the result is that of one fit on all data. Solvers that iterate begin anew on all rows,
at the earlier samples where these are of use.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nullbayes.common.progress import AUDIT, ROWS, Laps, stages
from nullbayes.constraints.training_rows import TrainingRows, capture_training
from nullbayes.errors import NotFittedError
from nullbayes.fit.pipeline import Fitting, check_undisturbed
from nullbayes.fit.remarks import where_kept
from nullbayes.fit.result import Fit, Run, Settings
from nullbayes.fit.room import chosen_solver, divided, within
from nullbayes.fit.together import own_budget
from nullbayes.model.fingerprint import quick_digest
from nullbayes.solvers import Solver, State

_ADDED = "were added to"


@dataclass(frozen=True)
class _Earlier:
    """What a fit holds that an update needs."""

    rows: TrainingRows
    state: State
    solver: Solver
    unit: Tensor


def updated(fit: Fit, settings: Settings, loader: Iterable[Any], run: Run) -> Fit:
    """The fit of all data: those of ``fit`` and those of ``loader``.

    Rows stay in units of the noise that training residuals of the first fit had; leave-one-out residuals, where they
    can be had, are those of all examples.

    Args:
        run: how; its number of samples and its seed are those of ``fit``.

    Raises:
        NotFittedError: a fit from a file, which holds no rows.
        MemoryBudgetError: the rows and the solver do not fit the budget.
    """
    earlier = _earlier(fit)
    problem = earlier.rows.asked
    laps, before = Laps(), quick_digest(problem.functional.model)
    budget = settings.memory or own_budget(problem.device, earlier.rows.operator.processes)
    memory = divided(settings, problem.space, run.num_samples, budget)
    with within(budget, memory), stages(show=run.progress) as stage:
        earlier.rows.plan.numbered = earlier.rows.examples
        more = capture_training(
            problem, loader, run.max_examples, memory, stage, run.audit, earlier.rows.plan
        )
        rows = earlier.rows.joined(more, run.audit)
        laps.lap(ROWS)
        laps.move(rows.plan.checking_seconds, ROWS, AUDIT)
        asked = replace(settings, solver=earlier.solver, tolerance=None)
        choice = chosen_solver(asked, rows.operator, run.num_samples, budget - memory.beside)
        choice = replace(choice, why="that of the fit")
        fitting = Fitting(problem, settings, run, rows, choice, stage, laps)
        fitting.prepared = earlier.state.extended(rows.operator, more.operator)
        fitting.begin = problem.isotropic(earlier.unit)
        fitting.factorise()
        fitting.project()
        check, evidence = fitting.check()
        audit = fitting.audit()
        kept = [note for note in fit.certificate.notes if _ADDED in note]
        notes = [*fitting.notes, *where_kept(rows.operator), *kept, _note(more, earlier)]
        noise = fitting.left_out_noise(notes)
    check_undisturbed(problem, before)
    fit = fitting.finish(check, evidence, audit, notes)
    return fit if noise is None else fit.explained_by(noise)


def _earlier(fit: Fit) -> _Earlier:
    if fit.rows is None or fit.state is None or fit.solver is None:
        raise NotFittedError(
            "this posterior was loaded from a file, or compacted, and holds no rows of its training data, which "
            "`update` needs. Call `fit` on all data."
        )
    return _Earlier(fit.rows, fit.state, fit.solver, fit.unit)


def _note(more: TrainingRows, earlier: _Earlier) -> str:
    text = f"{more.examples:,} examples {_ADDED} {earlier.rows.examples:,} by `update`"
    if earlier.solver.iterative:
        return (
            f"{text}; the samples were solved for again on all rows, as exactly as the status says."
        )
    noise = earlier.rows.asked.likelihood.needs_noise_fit
    same = ", with the observation noise of the first" if noise else ""
    return f"{text}, exactly: the posterior is that of one fit on all of them{same}."
