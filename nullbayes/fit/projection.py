"""The projection of prior samples, and on its way what samples do to examples that they have not seen.

A solver that iterates can begin with all rows but those of a few examples. What its samples do to these is what a
posterior does to other data of the same kind; then the few join in, and the search goes on from where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nullbayes.certificate.leave_one_out import Held
from nullbayes.common.processes import Processes
from nullbayes.constraints.problem import Problem
from nullbayes.constraints.training_rows import TrainingRows
from nullbayes.fit.result import Checkpoint
from nullbayes.fit.together import any_of, carried, gathered_spans, taken
from nullbayes.solvers import Projection, State, Status
from nullbayes.solvers.checkpoint import Report, Watch, describe_problem, probe_of


@dataclass(frozen=True)
class Work:
    """What is projected: ``vectors (S, P)``, which may be written over.

    Attributes:
        problem: tells this fit from others, beside what is measured here.
        report: of progress.
        identity: of the network's weights; a checkpoint around others is refused.
    """

    state: State
    rows: TrainingRows
    vectors: Tensor
    checkpoint: Checkpoint | None
    problem: str
    report: Report | None
    identity: str = ""

    @property
    def processes(self) -> Processes | None:
        """Those that hold the rows together."""
        return self.rows.operator.processes

    def watches(self) -> tuple[Watch, Watch]:
        """For the search without some examples and for that with all: their checkpoints fit only the same equations."""
        if self.checkpoint is None:
            return Watch(self.report), Watch(self.report)
        operator, v = self.rows.operator, self.vectors
        probe = operator.image_norms(probe_of(operator.shape[1], v))[0]
        shift = f"{self.state.shift:.4e}"
        problem = describe_problem(self.problem, operator.shape, len(v), shift, probe)
        place = (self.report, self.checkpoint.path, self.checkpoint.every)
        before = f"{problem}|without some"
        both = Watch(*place, before), Watch(*place, problem, before)
        for watch in both:
            watch.identity, watch.processes = self.identity, operator.processes
        return both


def projected(
    work: Work,
    noise: Tensor | None,
    held: Sequence[Held],
    changes: Callable[[Tensor], list[Tensor]],
) -> tuple[Projection, list[Tensor]]:
    """Project; see :meth:`State.project`. With what ``changes`` says of vectors that have not seen ``held``.

    Those are empty where nothing is held out, where the solver has no use for it, or after an interrupt.
    """
    first, second = work.watches()
    found, spent = _before(work, held, changes, first, second)
    if isinstance(found, Projection):
        return found, []
    second.carried = carried(work.processes, found)
    done = work.state.consume(work.vectors, noise, second)
    if done.status is not Status.INTERRUPTED:
        second.finish()
    return replace(done, iterations=spent + done.iterations), found


def _before(
    work: Work,
    held: Sequence[Held],
    changes: Callable[[Tensor], list[Tensor]],
    first: Watch,
    second: Watch,
) -> tuple[list[Tensor] | Projection, int]:
    """What samples that have not seen ``held`` do to it (or where the search was interrupted), and iterations."""
    if not any_of(work.processes, held):
        return [], 0
    there = second.resume()  # of an earlier run, which had come further than this
    if there is not None:
        sizes = [len(h.spans) for h in held]
        return [c.to(work.vectors.device) for c in taken(work.processes, there, sizes)], 0
    spans = gathered_spans(work.processes, [span for h in held for span in h.spans])
    done = work.state.project_without(work.vectors, spans, first)
    if done is None:
        return [], 0
    if done.status is Status.INTERRUPTED:
        return done, done.iterations
    with torch.no_grad():
        return changes(done.value), done.iterations


def stored_(
    problem: Problem, done: Projection, dtype: torch.dtype | None
) -> tuple[Tensor, Projection]:
    """Weight changes ``(S, P)`` of projected vectors as they are stored, in ``dtype`` (None: the working one).

    Where that rounds, the vectors are rounded in place: what is measured is what is stored, and the status says so.
    One sample at a time, so that beside both there is no third copy.
    """
    value = done.value
    if dtype is None or dtype == problem.dtype:
        return problem.weight_changes(value), done
    columns = problem.weight_changes(value[:1].clone()).shape[1]
    out = value.new_empty(len(value), columns, dtype=dtype)
    for one, into in zip(value.split(1), out.split(1), strict=True):
        into.copy_(problem.weight_changes(one))
        one.copy_(problem.isotropic(into.to(problem.dtype)))
    return out, replace(done, status=done.status.rounded)
