"""One pass over data of which each process reads a part: what it leaves is that of one process that reads them all.

Sums are added up. The examples that are kept are those that one process would have drawn: each process knows how many
come before its own and how many after, and draws for these as well.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nullbayes.common.processes import Processes
from nullbayes.errors import InputError
from nullbayes.model.batch import Inputs, batch_size, select, take
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.shares import Share
from nullbayes.moments.gather import (
    KEPT_EXAMPLES,
    Batch,
    Gathered,
    Group,
    Reservoir,
    concatenated,
    joined,
)
from nullbayes.moments.second import BlockMoments, DenseMoments

# The batch of the whole, the places of its examples among all that are kept, these, and their targets.
_Numbered = tuple[int, list[int], Inputs, Any]


class Part:
    """The batches of one process, and which of all examples they are.

    Args:
        batches: as ``gather`` takes them.
        draws: how often each example is among them.
    """

    def __init__(self, batches: Iterator[Batch], share: Share, draws: int) -> None:
        self.batches, self.share, self.draws = batches, share, draws
        self.processes: Processes = share.processes
        self._at = 0 if share.start is None else share.start * draws
        self._begun = False
        #: of the batches of the whole that the groups of kept examples are parts of
        self.numbers: dict[int, int] = {}

    def __iter__(self) -> Iterator[Batch]:
        return self.batches

    def keep(self, kept: Reservoir, inputs: Inputs, targets: Any) -> None:
        """Draw from one more batch, cut where one process would have begun another."""
        if not self._begun:
            self._begun = True
            kept.make_room(inputs)
            kept.pass_over(self._at)
        size = batch_size(inputs)
        step = size if self.share.batch is None else self.share.batch * self.draws
        start = 0
        while start < size:
            stop = min(size, start + step - self._at % step) if self.share.batch else size
            whole = (start, stop) == (0, size)
            some = inputs if whole else take(inputs, start, stop)
            labels = targets if whole or targets is None else take(targets, start, stop, size)
            self.numbers[kept.next] = self._at // step if self.share.batch else -1
            kept.add(some, labels)
            self._at += stop - start
            start = stop

    def together(
        self, own: Gathered, kept: Reservoir, functional: FunctionalModel, largest: int
    ) -> Gathered:
        """What all processes have gathered. Raises `InputError` where none of them has an example."""
        everyone = self.processes
        examples = int(everyone.total(own.examples)[0])
        if not examples:
            raise InputError(
                "the data hold no examples: every batch is empty. Pass a filled loader."
            )
        for sums in own.sums:
            _add_up(sums, everyone)
        everyone.sum_(own.members.counts)
        if self.share.start is None:
            room = max(1, round(KEPT_EXAMPLES * own.examples / examples))
            kept.reduce(room)
        elif self._begun:
            kept.pass_over(examples * self.draws - kept.seen)
        groups = [(self.numbers[n], slots, *group) for n, slots, group in kept.numbered()]
        groups = [group for part in everyone.gather(_copied(groups)) for group in part]
        whole = _rejoined([_to(group, functional.device) for group in groups])
        largest = int(everyone.largest(largest))
        if self.share.batch is not None:
            largest = self.draws * min(self.share.batch, examples)
        return Gathered(own.sums, own.members, examples, joined(whole, functional, largest))


def _add_up(sums: BlockMoments, processes: Processes) -> None:
    sums.count = int(processes.total(sums.count)[0])
    if sums.rows is not None:
        processes.sum_(sums.rows)
    if isinstance(sums.inputs, DenseMoments):
        processes.sum_(sums.inputs.values)
    elif sums.inputs is not None:
        each = processes.gather(sums.inputs)
        sums.inputs = functools.reduce(lambda a, b: a.plus(b), each)


def _rejoined(groups: list[_Numbered]) -> list[Group]:
    """Parts of one batch that two processes have, put together again, in the order in which one process has them."""
    out: list[_Numbered] = []
    for number, slots, inputs, targets in groups:
        if out and number >= 0 and out[-1][0] == number:
            _, before, earlier, labels = out[-1]
            sizes = batch_size(earlier), batch_size(inputs)
            both = concatenated(earlier, inputs, *sizes)
            known = None if targets is None else concatenated(labels, targets, *sizes)
            if both is not None and (known is None) == (targets is None):
                order = torch.tensor(before + slots).argsort()
                some = None if known is None else select(known, order)
                out[-1] = number, sorted(before + slots), select(both, order), some
                continue
        out.append((number, slots, inputs, targets))
    return [(inputs, targets) for *_, inputs, targets in out]


def _copied(groups: Any) -> Any:
    return _mapped(groups, lambda t: t.detach().cpu().clone())


def _to(group: Any, device: torch.device) -> Any:
    return _mapped(group, lambda t: t.to(device))


def _mapped(value: Any, change: Any) -> Any:
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value)
