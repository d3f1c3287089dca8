"""The constraint matrix whose rows are spread over processes: each holds its own, and products are exchanged.

To a solver it is one operator of all rows. Products with all rows are sums over the processes (``rmatvec``, ``normal``,
one exchange of ``S × P`` numbers), or put together from theirs (``matvec``). Every method that is not said to be local
is called by all processes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nullbayes.common.processes import Processes
from nullbayes.common.work import RowWork
from nullbayes.errors import InputError
from nullbayes.jacobian.block import Block
from nullbayes.jacobian.block_storage import Part, replaced
from nullbayes.jacobian.factors.base import Factor
from nullbayes.jacobian.operator import JacobianOperator, RowOperator, Tick, chosen_parts


class SharedOperator(JacobianOperator):
    """``A (M, P)``, the rows of process 0 first.

    Args:
        mine: the rows of this process, possibly none.

    Attributes:
        part: which of all rows these are.
    """

    def __init__(self, mine: JacobianOperator, processes: Processes) -> None:
        super().__init__(mine.space, mine.blocks)
        self._mine, self.processes = mine, processes
        self.others: Processes = processes
        everyone = processes.gather(
            (mine.shape[0], mine.examples, mine.product_flops, _per_pair(mine), mine.row_work)
        )
        rows = [each[0] for each in everyone]
        self.number = processes.register(self)
        self.offsets = [sum(rows[:rank]) for rank in range(processes.size + 1)]
        self.part = slice(self.offsets[processes.rank], self.offsets[processes.rank + 1])
        self.shape = (self.offsets[-1], mine.shape[1])
        self._examples = sum(each[1] for each in everyone)
        self._product = sum(each[2] for each in everyone)
        self._pair = max(each[3] for each in everyone)
        # Those of the first process that has rows: all must come to the same choices.
        self._row_work = next((each[4] for each in everyone if each[0]), mine.row_work)

    @property
    def mine(self) -> JacobianOperator:
        """The rows of this process as an operator of their own."""
        return self._mine

    @property
    def examples(self) -> int:
        return self._examples

    @property
    def product_flops(self) -> float:
        return self._product

    @property
    def gram_flops(self) -> float:
        return self._pair * self.shape[0] ** 2 / 2

    @property
    def row_work(self) -> RowWork:
        return self._row_work

    def move_out(self, room: int) -> None:
        """Local: see `JacobianOperator`."""
        self.mine.move_out(room)
        self.blocks = self.mine.blocks

    # -- products ----------------------------------------------------------------------------------

    def matvec(self, vectors: Tensor) -> Tensor:
        return self.others.joined(self.mine.matvec(vectors), 1)

    def rmatvec(self, weights: Tensor) -> Tensor:
        return self.others.sum_(self.mine.rmatvec(weights[:, self.part]))

    def normal(self, vectors: Tensor, row_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        some = None if row_scale is None else row_scale[self.part]
        out, square = self.mine.normal(vectors, some)
        return self.others.sum_(out), self.others.sum_(square)

    def image_norms(self, vectors: Tensor, row_scale: Tensor | None = None) -> Tensor:
        image = self.mine.matvec(vectors)
        if row_scale is not None:
            image = image * row_scale[self.part]
        return self.norms(image)

    def norms(self, image: Tensor) -> Tensor:
        """``‖A v‖ (S,)`` float64 from this process's part ``(S, M')`` of ``A v``."""
        return self.others.sum_(image.double().square().sum(1)).sqrt()

    def squared_norms(self) -> Tensor:
        mine = self.mine
        own = (
            mine.squared_norms()
            if mine.blocks
            else torch.zeros(0, dtype=torch.float64, device=self.device)
        )
        return self.others.joined(own, 0)

    # -- rows --------------------------------------------------------------------------------------

    def rows(self, index: Tensor) -> Tensor:
        """Some rows written out, ``index (k,)`` alike everywhere: ``(k, P)``."""
        out = torch.zeros(len(index), self.shape[1], dtype=self.dtype, device=self.device)
        here = ((index >= self.part.start) & (index < self.part.stop)).nonzero()[:, 0]
        if len(here):
            out[here] = self.mine.rows(index[here] - self.part.start)
        return self.others.sum_(out)

    def holds(self, span: slice) -> bool:
        """Whether this process has these rows, by their numbers among all."""
        return self.part.start <= span.start and span.stop <= self.part.stop

    def own_rows(self, index: Tensor) -> Tensor:
        """Local: rows of this process, by their numbers among all."""
        return self.mine.rows(index - self.part.start)

    def iter_rows(self, at_most: int) -> Iterator[Tensor]:
        for owner in range(self.others.size):
            own = self.mine.iter_rows(at_most) if owner == self.others.rank else iter(())
            while True:
                values = next(own, None)
                shape = self.others.shared(
                    lambda values=values: None if values is None else tuple(values.shape),  # type: ignore[misc]
                    owner,
                )
                if shape is None:
                    break
                if values is None:
                    values = torch.empty(shape, dtype=self.dtype, device=self.device)
                yield self.others.give_(values.contiguous(), owner)

    def pieces(self, rows: int) -> Iterator[JacobianOperator]:
        """Local: pieces of the rows of this process."""
        return self.mine.pieces(rows)

    def subset(self, rows: int, generator: torch.Generator) -> JacobianOperator:
        if rows >= self.shape[0]:
            return self
        # What one process with all these blocks would take: the same examples, however they are spread.
        counts = self.others.gather([block.examples for block in self.blocks])
        ours = self.others.rank
        where = [(rank, i) for rank, found in enumerate(counts) for i in range(len(found))]
        sizes = [count for found in counts for count in found]
        parts, taken = [], 0
        for which, start, count in chosen_parts(sizes, rows / self.shape[0], generator):
            rank, i = where[which]
            taken += count
            if rank == ours:
                parts.append(Part(self.blocks[i], start, start + count))
        if not taken and ours == where[0][0]:
            parts = [Part(self.blocks[0], 0, 1)]
        return SharedOperator(JacobianOperator(self.space, parts), self.others)

    # -- products of rows --------------------------------------------------------------------------

    def gram(self, tick: Tick | None = None) -> Tensor:
        """``A Aᵀ`` on every process. Blocks go round; of two processes' rows each multiplies half."""
        m, ours = self.shape[0], self.others.rank
        out = torch.zeros(m, m, dtype=torch.float64, device=self.device)
        out[self.part, self.part] = self.mine.gram()
        for owner, start, block in self._everyones():
            if owner == ours:
                continue
            half = block.examples // 2
            if ours < owner:
                self._multiply(block, start, out, first=True)
            elif half < block.examples:
                at = start + half * block.cotangents
                self._multiply(block.narrow(half, block.examples), at, out, first=False)
            if tick:
                tick((start + block.num_rows) / m)
        return self.others.sum_(out)

    def _multiply(self, theirs: Block, start: int, out: Tensor, *, first: bool) -> None:
        """Products of own rows (those of the ``first`` half of each block, or all) with another process's."""
        for kept, at in zip(self.mine.blocks, self.mine.starts, strict=False):
            stop = kept.examples // 2 if first else kept.examples
            if not stop:
                continue
            with kept.opened() as whole:
                block = whole.narrow(0, stop)
                rows = slice(self.part.start + at, self.part.start + at + block.num_rows)
                columns = slice(start, start + theirs.num_rows)
                block.gram(theirs, out[rows, columns])
                out[columns, rows] = out[rows, columns].T

    def _everyones(self) -> Iterator[tuple[int, int, Block]]:
        """Every block of every process in turn, and the number of its first row; each process gets them all."""
        for owner in range(self.others.size):
            kept = list(self.mine.blocks) if owner == self.others.rank else []
            count = self.others.shared(lambda kept=kept: len(kept), owner)  # type: ignore[misc]
            start = self.offsets[owner]
            for i in range(count):
                if kept:
                    with kept[i].opened() as block:
                        given = give_block(block, owner, self.others, self.device)
                else:
                    given = give_block(None, owner, self.others, self.device)
                yield owner, start, given
                start += given.num_rows

    def cross_gram(self, other: RowOperator) -> Tensor:
        """With rows of this process's own; the others come with theirs, or :func:`serve`."""
        asked = other if isinstance(other, JacobianOperator) else None
        if asked is None or asked.processes is not None:
            raise InputError(
                f"products with rows of {type(other).__name__} are not taken over several processes; fit on all of the "
                "data in one call."
            )
        found = _round(self.others, (self.number, asked))
        assert found is not None
        return found


def serve(processes: Processes) -> None:
    """Multiply rows of this process with those that others ask about, until none of them does any more."""
    while _round(processes, None) is not None:
        pass


def _round(processes: Processes, request: tuple[int, JacobianOperator] | None) -> Tensor | None:
    """One question of every process: products of the rows of all with those that it brings.

    Returns:
        ``(M, R)`` float64 for what was asked here; nothing in it where only others asked; None where nobody did.
    """
    numbers = processes.gather(None if request is None else request[0])
    if not any(numbers):
        return None
    answer = torch.zeros(0)
    for owner, number in enumerate(numbers):
        if number is None:
            continue
        operator: SharedOperator = processes.known[number]
        ours = request[1].blocks if request is not None and owner == processes.rank else []
        count = processes.shared(lambda ours=ours: len(ours), owner)  # type: ignore[misc]
        given: list[Block] = []
        for i in range(count):
            if ours:
                with ours[i].opened() as block:
                    given.append(give_block(block, owner, processes, operator.device))
            else:
                given.append(give_block(None, owner, processes, operator.device))
        theirs = JacobianOperator(operator.space, given)
        found = processes.joined(operator.mine.cross_gram(theirs), 0)
        if owner == processes.rank:
            answer = found
    return answer


def _per_pair(operator: JacobianOperator) -> float:
    return 2 * operator.gram_flops / max(1, operator.shape[0]) ** 2


def give_block(
    block: Block | None, owner: int, processes: Processes, device: torch.device
) -> Block:
    """The block of the process ``owner``, on every process."""

    def described() -> Block | None:
        return block and _each(block, lambda t: t.detach().to("meta"))

    form = processes.shared(described, owner)
    assert form is not None
    if block is not None:
        _each(block, lambda t: processes.give_(t.detach().contiguous(), owner))
        return block

    def received(form: Tensor) -> Tensor:
        return processes.give_(torch.empty(form.shape, dtype=form.dtype, device=device), owner)

    return _each(form, received)


def _each(block: Block, make: Callable[[Tensor], Tensor]) -> Block:
    factors: dict[tuple[str, ...], Factor] = {
        k: replaced(f, make) for k, f in block.factors.items()
    }
    return Block(factors, block.examples, block.cotangents)
