"""One pass over the data: second moments of all layer inputs, and some examples drawn from all of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from nullbayes.errors import InputError
from nullbayes.model.batch import (
    Inputs,
    batch_size,
    check_inputs,
    flags_of,
    select,
    tensor_leaves,
    to_device,
)
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.loader import split_batch
from nullbayes.model.shares import Share
from nullbayes.moments.blocks import Blocks
from nullbayes.moments.capture import recording
from nullbayes.moments.collector import Collector
from nullbayes.moments.members import Members
from nullbayes.moments.second import BlockMoments
from nullbayes.moments.uses import Uses

# Examples drawn for the certificate, at most, and bytes that they may take.
KEPT_EXAMPLES = 128
KEPT_BYTES = 2**26
# The place of an example that another process has.
_ELSEWHERE = (-1, 0)
# Examples of a batch, where data come as one tensor.
ROWS_AT_ONCE = 256

Batch = tuple[int, Inputs, Any]
# Examples and their targets.
Group = tuple[Inputs, Any]


class Spread(Protocol):
    """Batches of which other processes have others, see ``shared.py``."""

    def __iter__(self) -> Iterator[Batch]: ...

    def keep(self, kept: Reservoir, inputs: Inputs, targets: Any) -> None: ...

    def together(
        self, own: Gathered, kept: Reservoir, functional: FunctionalModel, largest: int
    ) -> Gathered: ...


@dataclass
class Gathered:
    """What one pass leaves: the sums by block, which examples are in them, and some of those.

    ``kept``: examples drawn evenly from all data, grouped by batch, with their targets (None: there were none).
    """

    sums: list[BlockMoments]
    members: Members
    examples: int = 0
    kept: list[tuple[Inputs, Any]] = field(default_factory=list)


def unlabelled(loader: Any, device: torch.device, name: str) -> Iterator[Batch]:
    """``(index, inputs, targets or None)`` of a loader, a list of batches, one tensor, or a tuple ``(X, y)`` of them.

    A batch is ``(x, y)``, ``x``, ``(x,)``, ``(x, None)`` or a mapping with or without targets. Several inputs without
    targets are ``(x1, x2, None)``.

    Raises:
        InputError: nothing to read. NonFiniteError: NaN or infinity in the inputs.
    """
    index = -1
    for index, batch in enumerate(_batches(loader, name)):
        where = f"{name}, batch {index}"
        inputs, targets = split_batch(batch, where, unlabelled=True)
        if targets is inputs:
            targets = None
        inputs = to_device(inputs, device)
        check_inputs(inputs, where)
        if batch_size(inputs, where):
            yield index, inputs, None if targets is None else to_device(targets, device)
    if index < 0 and not isinstance(loader, Share):  # one process's share of them may hold none
        raise InputError(
            f"`{name}` yields no batches. A generator can be read only once: pass a DataLoader or "
            "a list of batches; and mind `drop_last=True` on a set smaller than one batch."
        )


def drawn(functional: FunctionalModel, batches: Iterable[Batch]) -> Iterator[Batch]:
    """``batches`` with each example once for every draw of the model's frozen randomness, where it has any."""
    for index, inputs, targets in batches:
        labels = targets if isinstance(targets, Tensor) else None
        inputs = functional.as_called(inputs, labels)
        if labels is not None:
            inputs, targets = functional.targets_for(inputs, labels, f"batch {index}")
        inputs, targets = functional.stacked(inputs, targets)
        known = functional.batch(inputs)
        # What all examples share (a mask as long as the batch) is not to be cut where some examples are kept.
        yield index, inputs if flags_of(known) == flags_of(inputs) else known, targets


def _batches(loader: Any, name: str) -> Iterable[Any]:
    if isinstance(loader, Tensor):
        return loader.split(ROWS_AT_ONCE)
    if isinstance(loader, tuple) and all(isinstance(t, Tensor) for t in loader):
        return zip(*(t.split(ROWS_AT_ONCE) for t in loader), strict=True)
    if not isinstance(loader, Iterable):
        raise InputError(
            f"`{name}` is {type(loader).__name__}, expected an iterable of batches, e.g. a DataLoader, or a tensor."
        )
    return loader


def gather(
    functional: FunctionalModel,
    blocks: Blocks,
    batches: Iterator[Batch] | Spread,
    ranks: list[int | None],
    seed: int,
    name: str,
    visit: Callable[[Tensor, Any], None] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Gathered:
    """Run the network over ``batches`` and add up what its layers receive.

    Args:
        ranks: by block, the rank of a sketch, or None for the whole matrix.
        seed: of the choice of examples that are kept.
        visit: called with each batch's outputs and targets.
        dtype: of products, see :func:`working_dtype`.

    Raises:
        NonFiniteError: a layer's inputs hold NaN or infinity; names the layer and the batch.
        InputError: every batch is empty, or the forward pass fails.
        ModelError: a later example uses a weight outside of its layer.
    """
    device = functional.device
    pairs = zip(blocks.blocks, ranks, strict=True)
    out = Gathered([BlockMoments.zeros(b, device, rank) for b, rank in pairs], Members())
    kept, collector, uses = (
        Reservoir(seed),
        Collector(blocks, out.sums, dtype),
        Uses(functional, blocks),
    )
    largest, spread = 1, None if isinstance(batches, Iterator) else batches
    for index, inputs, targets in batches:
        where = f"{name}, batch {index}"
        watched = uses.watched(inputs)
        with recording(blocks.sites, collector.receive, collector.summers), watched:
            outputs = functional.outputs(inputs, where)
        collector.end_batch(where)
        uses.check(inputs, where)
        if visit is not None:
            visit(outputs, targets)
        out.members.add(inputs)
        if spread is None:
            kept.add(inputs, targets)
        else:
            spread.keep(kept, inputs, targets)
        out.examples += batch_size(inputs) // functional.draws
        largest = max(largest, batch_size(inputs))
    collector.finish()
    if spread is not None:
        return spread.together(out, kept, functional, largest)
    if not out.examples:
        raise InputError(f"`{name}` holds no examples: every batch is empty. Pass a filled loader.")
    out.kept = joined(kept.groups(), functional, largest)
    return out


def joined(
    groups: list[tuple[Inputs, Any]], functional: FunctionalModel, at_most: int
) -> list[tuple[Inputs, Any]]:
    """Neighbouring groups as one where their examples have one shape, up to ``at_most`` examples: fewer passes."""
    out: list[tuple[Inputs, Any]] = []
    for group in groups:
        both = _both(out[-1], group, functional, at_most) if out else None
        if both is None:
            out.append(group)
        else:
            out[-1] = both
    return out


def _both(
    one: tuple[Inputs, Any], two: tuple[Inputs, Any], functional: FunctionalModel, at_most: int
) -> tuple[Inputs, Any] | None:
    if batch_size(one[0]) + batch_size(two[0]) > at_most or (one[1] is None) != (two[1] is None):
        return None
    leaves = [tensor_leaves(inputs) for inputs, _ in (one, two)]
    if len(leaves[0]) != len(leaves[1]) or any(
        flags != (True,) * len(leaves[0])
        for flags in (flags_of(functional.batch(inputs)) for inputs, _ in (one, two))
    ):
        return None
    inputs = concatenated(one[0], two[0], *(batch_size(group[0]) for group in (one, two)))
    if one[1] is None or inputs is None:
        return None if inputs is None else (inputs, None)
    targets = concatenated(one[1], two[1], *(batch_size(group[0]) for group in (one, two)))
    return None if targets is None else (inputs, targets)


def concatenated(a: Any, b: Any, first: int, second: int) -> Any:
    """``a`` and then ``b``; None where they are not examples of one shape."""
    (left, spec), (right, other) = tree_flatten(a), tree_flatten(b)
    if spec != other or not all(
        isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim and y.ndim
        and (len(x), len(y)) == (first, second)
        and (x.shape[1:], x.dtype) == (y.shape[1:], y.dtype)
        for x, y in zip(left, right, strict=True)
    ):  # fmt: skip
        return None
    return tree_unflatten([torch.cat(pair) for pair in zip(left, right, strict=True)], spec)


class Reservoir:
    """Examples drawn evenly from a stream of batches (Vitter, *Random sampling with a reservoir*, ACM TOMS 1985)."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.seen = self.next = 0  # examples, and the number of the next batch
        self.room: int | None = None
        self.places: list[tuple[int, int]] = []  # batch and position in its selection
        self.stored: dict[int, tuple[Inputs, Any, int]] = {}

    def add(self, inputs: Inputs, targets: Any) -> None:
        """Draw from one more batch."""
        size = batch_size(inputs)
        self.make_room(inputs)
        number, chosen = self.next, {}
        self.next += 1
        for i in range(size):
            slot = self._slot()
            if slot is not None:
                self.places[slot] = (number, i)
                chosen[slot] = i
        if chosen:
            self.stored[number] = (inputs, targets, size)
            self._compact(number)
        self._drop_unused()

    def make_room(self, inputs: Inputs) -> None:
        """For as many examples as the memory for them takes, by the first batch."""
        if self.room is None:
            each = max(1, sum(t.nbytes for t in tensor_leaves(inputs)) // batch_size(inputs))
            self.room = max(1, min(KEPT_EXAMPLES, KEPT_BYTES // each))

    def pass_over(self, count: int) -> None:
        """Draw for examples that another process reads."""
        for _ in range(count):
            slot = self._slot()
            if slot is not None:
                self.places[slot] = _ELSEWHERE
        self._drop_unused()

    def reduce(self, room: int) -> None:
        """Keep ``room`` of the examples at most, drawn evenly."""
        self.places = self.chance.sample(self.places, min(room, len(self.places)))
        self._drop_unused()

    def _slot(self) -> int | None:
        """Where the next example is kept, if it is."""
        assert self.room is not None
        self.seen += 1
        if len(self.places) < self.room:
            self.places.append(_ELSEWHERE)
            return len(self.places) - 1
        slot = self.chance.randrange(self.seen)
        return slot if slot < self.room else None

    def _drop_unused(self) -> None:
        used = {batch for batch, _ in self.places}
        self.stored = {batch: value for batch, value in self.stored.items() if batch in used}

    def _compact(self, number: int) -> None:
        """Copy the chosen examples out of their batch, so that the rest of it can go."""
        inputs, targets, size = self.stored[number]
        slots = [s for s, (batch, _) in enumerate(self.places) if batch == number]
        index = torch.tensor([self.places[s][1] for s in slots], dtype=torch.long)
        index = index.to(tensor_leaves(inputs)[0].device)
        some = select(inputs, index)
        labels = None
        if targets is not None:
            labels = select(targets, index) if _length(targets) == size else targets
        self.stored[number] = (some, labels, len(slots))
        for i, slot in enumerate(slots):
            self.places[slot] = (number, i)

    def groups(self) -> list[Group]:
        """The examples by batch, in the order in which they came."""
        return [group for _, _, group in self.numbered()]

    def numbered(self) -> list[tuple[int, list[int], Group]]:
        """The same with the number that each batch got, and the places of its examples, which are in their order."""
        out: list[tuple[int, list[int], Group]] = []
        for number, (inputs, targets, size) in sorted(self.stored.items()):
            found = sorted((i, s) for s, (batch, i) in enumerate(self.places) if batch == number)
            at, slots = [i for i, _ in found], [s for _, s in found]
            index = torch.tensor(at, dtype=torch.long).to(tensor_leaves(inputs)[0].device)
            if len(at) == size:
                out.append((number, slots, (inputs, targets)))
                continue
            labels = targets
            if targets is not None and _length(targets) == size:
                labels = select(targets, index)
            out.append((number, slots, (select(inputs, index), labels)))
        return out


def _length(value: Any) -> int:
    leaves = tensor_leaves(value)
    return len(leaves[0]) if leaves and leaves[0].ndim else -1


def first_batch(loader: Iterator[Batch]) -> tuple[Inputs, Iterator[Batch]]:
    """The first inputs, to prove rules on, and all batches including that one."""
    first = next(loader, None)
    if first is None:
        raise InputError(
            "the loader holds no examples: every batch is empty. Pass a filled loader."
        )

    def everything() -> Iterator[Batch]:
        yield first
        yield from loader

    return first[1], everything()


__all__ = ["Gathered", "drawn", "first_batch", "gather", "unlabelled"]
