"""Decisions of a search that several processes make together: those of one hold for all.

Every process computes them from the same numbers; but were one rounded otherwise, on another kind of processor, that
process would go one way and the others another, and all would wait for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from nullbayes.common.processes import Processes
from nullbayes.jacobian.operator import RowOperator
from nullbayes.solvers.base import Status
from nullbayes.solvers.norms import row_norms

_STATUSES: tuple[Status | None, ...] = (None, *Status)


class Agreed:
    """What the processes decide together; with None, what this one decides."""

    def __init__(self, processes: Processes | None) -> None:
        self.processes = processes

    def status(self, own: Status | None) -> Status | None:
        """How a search has ended; None where it goes on. Raises `KeyboardInterrupt` where Ctrl-C came in any."""
        if self.processes is None:
            return own
        return _STATUSES[self.processes.decided(_STATUSES.index(own))]

    def whether(self, own: bool) -> bool:
        """One answer for all."""
        return own if self.processes is None else bool(self.processes.decided(int(own)))

    def norms(self, image: Tensor) -> Tensor:
        """``(S,)`` float64: norms of vectors as long as all rows, of which ``image (S, M')`` is this process's part."""
        if self.processes is None:
            return row_norms(image)
        return self.processes.sum_(row_norms(image).square()).sqrt()

    def turns(self, x: Tensor, operator: RowOperator) -> Iterator[slice]:
        """Through all rows in the order of the data: which of this process's have their turn now.

        What it makes of ``x`` then is everyone's.
        """
        for owner, rows in operator.turns:
            yield rows
            if self.processes is not None:
                self.processes.give_(x, owner)


@contextmanager
def together(processes: Processes | None) -> Iterator[Agreed]:
    """The length of a search. Ctrl-C in one process ends it in all, at the same step."""
    if processes is None:
        yield Agreed(None)
        return
    with processes.interruptible():
        yield Agreed(processes)
