"""Where captured rows are kept: in memory, on disk through memory maps, or computed anew for each pass.

Operators ask a block to be opened and never see the difference::

    with kept.opened() as block:
        for factor in block.factors.values():
            ...
"""

from __future__ import annotations

import copy
import mmap
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from nullbayes.common.memory import bounded, format_bytes, give_back, times_on
from nullbayes.errors import MemoryBudgetError
from nullbayes.jacobian.block import Block, Layout, common_layout, kinds
from nullbayes.jacobian.capture.checking import captured
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.factors.base import Factor
from nullbayes.model.batch import Inputs, tensor_leaves
from nullbayes.model.functional import FunctionalModel

# Rows that captured pieces are merged to: large enough for products to run at full speed and for memory
# to come in pieces of their own (small ones between freed temporaries cost as much again in holes), small
# enough that the lower triangle of blocks is not far from half the Gram matrix.
BLOCK_ROWS = 4096
BLOCK_BYTES = 2**28
# Bytes of merged pieces from which the memory that they leave is returned to the system, budget or not.
TRIMMED_BYTES = 2**26
# Share of the free disk that rows may take.
DISK_SHARE = 0.8
_ALIGNMENT = 64


class Kept(ABC):
    """Rows of some examples that are not in memory.

    Attributes:
        nbytes: what the rows take while open; ``resident``: what they take while closed.
        where: ``"disk"`` or ``"recomputed"``.
    """

    examples: int
    cotangents: int
    nbytes: int
    resident: int
    where: str

    @property
    def num_rows(self) -> int:
        return self.examples * self.cotangents

    @abstractmethod
    def opened(self) -> AbstractContextManager[Block]:
        """Gives the block, which is not to be used after the ``with`` statement."""


Change = Callable[[Block], Block]
# Rows of an example, and its length: what blocks that are merged have in common.
_Kind = tuple[int, int]


class Openable(Protocol):
    """What an operator needs of a block: ``Block`` itself, or something :class:`Kept`."""

    @property
    def examples(self) -> int: ...

    @property
    def cotangents(self) -> int: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def resident(self) -> int: ...

    @property
    def where(self) -> str: ...

    def opened(self) -> AbstractContextManager[Block]: ...


class OnDisk(Kept):
    """A block in a temporary file that has no name: it vanishes with the process, even a killed one."""

    where = "disk"
    resident = 0

    def __init__(self, block: Block) -> None:
        self.examples, self.cotangents, self.nbytes = block.examples, block.cotangents, block.nbytes
        places: list[tuple[Tensor, int]] = []
        with tempfile.TemporaryFile(prefix="nullbayes-") as file:
            at = 0
            for factor in block.factors.values():
                for value in _tensors(factor).values():
                    places.append((value, at))
                    file.seek(at)
                    file.write(value.detach().contiguous().numpy())  # type: ignore[arg-type]
                    at += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
            file.truncate(max(at, 1))
            file.flush()
            self._map = mmap.mmap(file.fileno(), max(at, 1))
        where = iter(places)

        def mapped(value: Tensor) -> Tensor:
            _, at = next(where)
            if not value.numel():
                return value
            flat = torch.frombuffer(self._map, dtype=value.dtype, count=value.numel(), offset=at)
            return flat.view(value.shape)

        factors = {names: replaced(factor, mapped) for names, factor in block.factors.items()}
        self._block = Block(factors, block.examples, block.cotangents)

    @contextmanager
    def opened(self) -> Iterator[Block]:
        """Maps the file; what was read leaves this process's memory again at the end."""
        if hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED)
        try:
            yield self._block
        finally:
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)
            give_back()


class Recomputed(Kept):
    """The inputs and cotangents of some examples; each opening captures their rows again."""

    where = "recomputed"

    def __init__(
        self,
        functional: FunctionalModel,
        plan: CapturePlan,
        inputs: Inputs,
        cotangents: Tensor,
        scales: dict[str, float] | None,
        nbytes: int,
        change: Change,
    ) -> None:
        self._change = change
        self._functional, self._plan, self._scales = functional, plan, scales
        self._inputs, self._cotangents = inputs, cotangents
        self.cotangents, self.examples = cotangents.shape[:2]
        self.nbytes = nbytes
        self.layout: Layout | None = None
        self.resident = sum(t.nbytes for t in tensor_leaves(inputs)) + cotangents.nbytes

    def scaled(self, scales: dict[str, float]) -> Recomputed:
        """The same rows, captured with other ``scales`` from now on."""
        new = copy.copy(self)
        new._scales = scales
        return new

    @contextmanager
    def opened(self) -> Iterator[Block]:
        """One more forward and backward pass."""
        values = SimpleNamespace(values=self._cotangents)
        block, _ = captured(
            self._functional, self._plan, self._inputs, lambda _: values, self._scales
        )
        block = self._change(block)
        yield block if self.layout is None else block.arranged(self.layout)


class Part:
    """Some consecutive examples of a block, wherever that is kept."""

    def __init__(self, whole: Openable, start: int, stop: int) -> None:
        self._whole, self._start, self._stop = whole, start, stop
        self.examples, self.cotangents = stop - start, whole.cotangents
        self.num_rows = self.examples * self.cotangents
        self.nbytes = whole.nbytes * self.examples // max(1, whole.examples)
        self.where = whole.where
        self.resident = whole.resident * self.examples // max(1, whole.examples)

    @contextmanager
    def opened(self) -> Iterator[Block]:
        """The same examples of the opened block, without a copy."""
        with self._whole.opened() as block:
            yield block.narrow(self._start, self._stop)


class Keeper:
    """Takes captured blocks, merges small ones, and keeps them where there is room.

    Args:
        room: bytes of memory that the rows may take; what is more goes to disk, or, where there is
            no room (or the device is an accelerator), is computed anew for each pass.
        block_bytes: at which a block is full, however few rows it has.
        change: was made to every block that is added, and is made to what is captured again.
    """

    def __init__(
        self,
        functional: FunctionalModel,
        plan: CapturePlan,
        scales: dict[str, float] | None,
        room: int,
        block_bytes: int = BLOCK_BYTES,
        change: Change = lambda block: block,
    ) -> None:
        self._change = change
        self._functional, self._plan, self._scales, self._room = functional, plan, scales, room
        self._block_bytes = block_bytes
        self._groups: dict[_Kind, list[tuple[Block, Inputs, Tensor]]] = {}
        self._numbers: dict[_Kind, list[Tensor]] = {}
        self._resident = 0
        # One empty block for each set of factors that came: rules may fail, or layers not be reached, in some batches.
        self._forms: dict[Any, Block] = {}
        self.kept: list[Openable] = []
        #: numbers of the examples in the order of the rows, a captured piece each, where they were given
        self.numbers: list[Tensor] = []

    def add(
        self,
        block: Block,
        inputs: Inputs,
        cotangents: Tensor,
        numbers: Tensor | None = None,
        length: int = 0,
    ) -> None:
        """``inputs`` and ``cotangents (C, B, *out)`` are those that ``block`` was captured from.

        Args:
            numbers: ``(B,)``, which examples of the data set these are.
            length: only blocks with the same are merged.
        """
        form = kinds(block)
        if form not in self._forms:
            self._forms[form] = _form(block)
        kind = block.cotangents, length
        group = self._groups.setdefault(kind, [])
        rows = sum(b.num_rows for b, _, _ in group) + block.num_rows
        held = sum(b.nbytes for b, _, _ in group) + block.nbytes
        if group and (rows > block_rows(self._functional.device) or held > self._block_bytes):
            self._flush(kind)
            group = self._groups[kind]
        group.append((block, inputs, cotangents))
        if numbers is not None:
            self._numbers.setdefault(kind, []).append(numbers)

    def finish(self) -> list[Openable]:
        """All blocks, in the order in which they came (those with as many rows and of one length), in the same factors.

        Raises:
            ModelError: a parameter that outputs depend on, and that no example leads to.
        """
        for kind in self._joined():
            self._flush(kind)
        self._plan.check_reached(self._functional)
        if len(self._forms) > 1:
            self._arrange(common_layout(self._forms.values()))
        return self.kept

    def _arrange(self, layout: Layout) -> None:
        """Bring all blocks into the same factors, one at a time: earlier rows are right as they are."""
        for i, kept in enumerate(self.kept):
            if isinstance(kept, Recomputed):
                kept.layout = layout
                continue
            with kept.opened() as block:
                new = block.arranged(layout)
                if new is block:
                    continue
                others = sum(k.resident for k in self.kept) - kept.resident
                if not isinstance(kept, OnDisk) and others + new.nbytes <= self._room:
                    self.kept[i] = new
                elif fits_on_disk(new.nbytes, self._functional.device):
                    self.kept[i] = _on_disk(new)
                else:
                    raise MemoryBudgetError(
                        f"the rows of {new.examples} examples take {format_bytes(new.nbytes)} written out, which some "
                        "batches need because no rule of a layer serves them; neither `memory=` nor the disk has room. "
                        "Raise `memory=`, free disk space, or make batches alike (padding to one length, no routing)."
                    )

    def _joined(self) -> list[_Kind]:
        """What is left, with groups of neighbouring lengths as one: products with small blocks read samples in vain."""
        kinds: list[_Kind] = []
        for kind in sorted(self._groups):
            group = self._groups[kind]
            last = kinds[-1] if kinds else None
            if last is not None and last[0] == kind[0]:
                pair = [*self._groups[last], *group]
                # The shorter ones are padded to the longest.
                longest = max(b.nbytes / max(1, b.examples) for b, _, _ in pair)
                if longest * sum(b.examples for b, _, _ in pair) <= self._block_bytes:
                    self._groups[last], self._groups[kind] = pair, []
                    more = self._numbers.pop(kind, [])
                    self._numbers.setdefault(last, []).extend(more)
                    continue
            kinds.append(kind)
        return kinds

    def _flush(self, kind: _Kind) -> None:
        group, self._groups[kind] = self._groups[kind], []
        if not group:
            return
        self.numbers += self._numbers.pop(kind, [])
        nbytes = sum(block.nbytes for block, _, _ in group)
        if self._fits(nbytes):
            self.kept.append(Block.merge([block for block, _, _ in group]))
        elif not self._written(group, nbytes):
            self.kept += [
                Recomputed(
                    self._functional,
                    self._plan,
                    inputs,
                    values,
                    self._scales,
                    b.nbytes,
                    self._change,
                )
                for b, inputs, values in group
            ]
        several = len(group) > 1
        del group
        if bounded(self._functional.device) or (several and nbytes >= TRIMMED_BYTES):
            # The pieces lay between temporaries that are gone by now, and leave holes.
            give_back()
        self._resident = sum(kept.resident for kept in self.kept)
        if self._resident > max(self._room, 1):
            examples = sum(kept.examples for kept in self.kept)
            raise MemoryBudgetError(
                f"what the rows of {examples} examples need in memory, {format_bytes(self._resident)}, "
                f"is more than the {format_bytes(self._room)} left for them by `memory=`, and the disk "
                "has no room for them either. Raise `memory=`, free disk space (TMPDIR says where), fit "
                "fewer examples (`max_examples=`), or keep less of each (`directions='auto'`, "
                "`preserve='loss'`)."
            )

    def _written(self, group: list[tuple[Block, Inputs, Tensor]], nbytes: int) -> bool:
        """Whether the disk took the rows of ``group``; it may be fuller than it said, or have a quota."""
        if not fits_on_disk(nbytes, self._functional.device):
            return False
        try:
            self.kept.append(OnDisk(Block.merge([block for block, _, _ in group])))
        except OSError:
            return False
        return True

    def _fits(self, nbytes: int) -> bool:
        return self._resident + nbytes <= self._room


def _on_disk(block: Block) -> OnDisk:
    """``block`` in a file. Raises `MemoryBudgetError` where the disk does not take it."""
    try:
        return OnDisk(block)
    except OSError as error:
        raise MemoryBudgetError(
            f"rows of {format_bytes(block.nbytes)} could not be written to the folder of temporary files "
            f"({tempfile.gettempdir()}): {error}. Free disk space there, let TMPDIR name another folder, or raise "
            "`memory=`."
        ) from error


def _form(block: Block) -> Block:
    """The factors of a block without its examples."""
    factors = {k: replaced(f.narrow(0, 0), torch.clone) for k, f in block.factors.items()}
    return Block(factors, 0, block.cotangents)


def block_rows(device: torch.device) -> int:
    """Rows at which a block on ``device`` is full."""
    return BLOCK_ROWS * times_on(device)


def merge_blocks(blocks: Sequence[Block], rows: int | None = None) -> list[Block]:
    """Join consecutive small blocks with the same number of cotangents and the same factors.

    Args:
        rows: at which one is full (None: `block_rows`).
    """
    if rows is None and blocks:
        rows = block_rows(blocks[0].device)
    out: list[Block] = []
    group: list[Block] = []
    for block in blocks:
        fits = sum(b.num_rows for b in group) + block.num_rows <= max(rows or 0, block.num_rows)
        if group and not (fits and group[0].cotangents == block.cotangents):
            out.append(Block.merge(group))
            group = []
        group.append(block)
    return [*out, Block.merge(group)] if group else out


def fits_on_disk(nbytes: int, device: torch.device) -> bool:
    """Whether rows of that size may go to the folder of temporary files."""
    if device.type != "cpu":
        return False
    return nbytes <= DISK_SHARE * shutil.disk_usage(tempfile.gettempdir()).free


def moved_out(blocks: Sequence[Openable], room: int) -> list[Openable]:
    """The same blocks with as many of them on disk as it takes to hold ``room`` bytes or less."""
    out = list(blocks)
    held = sum(block.resident for block in out)
    for i in reversed(range(len(out))):
        block = out[i]
        if held <= room:
            break
        if isinstance(block, Block) and fits_on_disk(block.nbytes, block.device):
            try:
                out[i] = OnDisk(block)
            except OSError:
                # A disk that is fuller than it said; the budget's own check speaks of it.
                break
            held -= block.nbytes
    return out


def _tensors(factor: Factor) -> dict[str, Tensor]:
    return {name: v for name, v in vars(factor).items() if isinstance(v, Tensor)}


def replaced(factor: Factor, make: Callable[[Tensor], Tensor]) -> Factor:
    """A copy of ``factor`` whose tensors are ``make(tensor)``, in the order of ``_tensors``."""
    new = copy.copy(factor)
    for name, value in _tensors(factor).items():
        setattr(new, name, make(value))
    return new
