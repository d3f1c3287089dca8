"""Training rows of which every process holds some: what each has, put in relation to all.

Examples and rows are numbered through the processes; sums are over all of them. What is large stays where it is: rows,
the examples that the certificate looks at, and those that are audited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_map

from nullbayes.common.processes import Processes
from nullbayes.constraints.problem import Problem
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.shared import SharedOperator
from nullbayes.model.shares import Share

if TYPE_CHECKING:
    from nullbayes.constraints.training_rows import TrainingRows

# Where the examples of a process begin whose place among all is not known yet: far from those of the others.
APART = 2**40


def is_probe(loader: Iterable[Any]) -> bool:
    """Whether batches only tell what data look like: this process has none of its own."""
    return isinstance(loader, Share) and loader.empty


def start_of(problem: Problem, loader: Iterable[Any]) -> int:
    """The number of this process's first example, each of its draws counted."""
    if not isinstance(loader, Share):
        return 0
    if loader.start is None:
        return APART * loader.processes.rank
    return loader.start * problem.functional.draws


def everyones(
    pairs: Iterator[tuple[Tensor, Any]], loader: Iterable[Any]
) -> Iterator[tuple[Tensor, Any]]:
    """Outputs and targets of all processes, in the order of the data."""
    if not isinstance(loader, Share):
        return pairs
    own = [] if loader.empty else [tree_map(_copied, pair) for pair in pairs]
    pairs_of_all = loader.processes.gather(own)
    return (pair for part in pairs_of_all for pair in part)


def _copied(leaf: Any) -> Any:
    return leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf


def together(
    finish: Callable[[], TrainingRows],
    plan: CapturePlan,
    loader: Iterable[Any],
    audited: int,
) -> TrainingRows:
    """The rows that ``finish`` gives, which are this process's, as a part of all."""
    if not isinstance(loader, Share):
        return finish()
    processes = loader.processes
    # What no example of this process leads to may be reached by another's.
    unreached, felt = zip(*processes.gather((plan.unreached, plan.felt)), strict=True)
    plan.unreached, plan.felt = set.intersection(*map(set, unreached)), set().union(*felt)
    return _joined(finish(), processes, loader, audited)


def _joined(rows: TrainingRows, processes: Processes, loader: Share, audited: int) -> TrainingRows:
    operator = SharedOperator(rows.operator, processes)
    everyone = processes.gather((rows.examples, rows.chances))
    start = sum(count for count, _ in everyone[: processes.rank])
    # They were numbered from where the process thought that it begins.
    known = 0 if loader.start is not None else start - APART * processes.rank
    lowest = sorted(c for _, chances in everyone for c in chances)[:audited]
    drawn = [
        (chance, replace(d, number=d.number + known))
        for d, chance in zip(rows.audited, rows.chances, strict=True)
        if lowest and chance <= lowest[-1]
    ]
    sums = processes.total(
        rows.examples,
        rows.batches,
        rows.loss,
        rows.least_loss,
        rows.observed,
        rows.trace,
        rows.trace * rows.discarded_trace,
    )
    examples, batches, loss, least, observed, trace, discarded = sums
    first = int(operator.index[0]) if len(operator.index) else 0
    return replace(
        rows,
        operator=operator,
        stretches=[replace(s, first=start, relabelled=-known) for s in rows.stretches],
        examples=round(examples),
        batches=round(batches),
        loss=loss,
        least_loss=least,
        observed=round(observed),
        trace=trace,
        discarded_trace=discarded / trace if trace > 0 else 0.0,
        checked_numbers=[range(r.start + start, r.stop + start) for r in rows.checked_numbers],
        spans=[slice(s.start + first, s.stop + first) for s in rows.spans],
        audited=[d for _, d in drawn],
        chances=[chance for chance, _ in drawn],
    )
