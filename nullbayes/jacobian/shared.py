"""The constraint matrix whose rows are spread over processes: each holds its own, and products are exchanged.

To a solver it is one operator of all rows. Products with all rows are sums over the processes (``rmatvec``, ``normal``,
one exchange of ``S × P`` numbers), or put together from theirs (``matvec``). Every method that is not said to be local
is called by all processes alike.

Rows are numbered in the order of the data. Those of one call of ``fit`` follow each other process by process; those of
a later ``update`` come behind them all, so that a process then holds several stretches of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nullbayes.common.processes import Processes
from nullbayes.common.work import RowWork
from nullbayes.errors import InputError
from nullbayes.jacobian.block import Block
from nullbayes.jacobian.block_storage import Openable, replaced
from nullbayes.jacobian.factors.base import Factor
from nullbayes.jacobian.operator import JacobianOperator, RowOperator, Tick, chosen_parts


class Stretch(NamedTuple):
    """Consecutive rows that one process holds.

    Attributes:
        start: the number of the first among all; ``rows``: how many.
        owner: the process; ``blocks``: which of its blocks these are.
    """

    start: int
    rows: int
    owner: int
    blocks: range


class SharedOperator(JacobianOperator):
    """``A (M, P)``.

    Args:
        mine: the rows of this process, possibly none.
        stretches: of all processes, by their starts; None: the rows of process 0 come first.

    Attributes:
        index: the numbers of this process's rows among all.
    """

    def __init__(
        self,
        mine: JacobianOperator,
        processes: Processes,
        stretches: Sequence[Stretch] | None = None,
    ) -> None:
        super().__init__(mine.space, mine.blocks)
        self._mine, self.processes = mine, processes
        self.others: Processes = processes
        everyone = processes.gather(
            (
                *(mine.shape[0], mine.examples, mine.product_flops, _per_pair(mine)),
                *(len(mine.blocks), mine.row_work),
            )
        )
        rows = [each[0] for each in everyone]
        self.number = processes.register(self)
        if stretches is None:
            stretches = [
                Stretch(sum(rows[:rank]), count, rank, range(each[4]))
                for rank, (count, each) in enumerate(zip(rows, everyone, strict=True))
            ]
        self.stretches = list(stretches)
        #: this process's, in the order in which it holds them
        self._own = _of(self.stretches, processes.rank)
        self.index = _numbers(self._own)
        # Where the rows of all numbers are, once those of the processes were put one after the other.
        joined = [_numbers(_of(self.stretches, rank)) for rank in range(processes.size)]
        self._order: Tensor | None = torch.cat(joined).argsort()
        if bool((self._order == torch.arange(len(self._order))).all()):
            self._order = None
        self.shape = (sum(rows), mine.shape[1])
        self._examples = sum(each[1] for each in everyone)
        self._product = sum(each[2] for each in everyone)
        self._pair = max(each[3] for each in everyone)
        # Those of the first process that has rows: all must come to the same choices.
        self._row_work = next((each[5] for each in everyone if each[0]), mine.row_work)

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

    def followed_by(self, more: JacobianOperator) -> SharedOperator:
        assert isinstance(more, SharedOperator)
        counts = self.others.gather(len(self.blocks))
        behind = [
            Stretch(
                s.start + self.shape[0],
                s.rows,
                s.owner,
                range(s.blocks.start + counts[s.owner], s.blocks.stop + counts[s.owner]),
            )
            for s in more.stretches
        ]
        both = self.mine.followed_by(more.mine)
        return SharedOperator(both, self.others, [*self.stretches, *behind])

    def over(self, blocks: Sequence[Openable]) -> SharedOperator:
        return SharedOperator(JacobianOperator(self.space, blocks), self.others, self.stretches)

    def move_out(self, room: int) -> None:
        """Local: see `JacobianOperator`."""
        self.mine.move_out(room)
        self.blocks = self.mine.blocks

    # -- products ----------------------------------------------------------------------------------

    def matvec(self, vectors: Tensor) -> Tensor:
        return self.joined(self.mine.matvec(vectors), 1)

    def rmatvec(self, weights: Tensor) -> Tensor:
        return self.others.sum_(self.mine.rmatvec(self.own(weights)))

    def own(self, values: Tensor) -> Tensor:
        """Local: this process's part of ``values (S, M)``."""
        if len(self._own) == 1:
            first = self._own[0]
            return values[:, first.start : first.start + first.rows]
        return values[:, self.index.to(values.device)]

    @property
    def turns(self) -> list[tuple[int, slice]]:
        spans = [(s.owner, slice(s.start, s.start + s.rows)) for s in self.stretches]
        return [
            (who, self.own_span(s) if who == self.others.rank else slice(0, 0)) for who, s in spans
        ]

    def joined(self, values: Tensor, dim: int) -> Tensor:
        """What the processes have of all rows, as long as their own along ``dim``, in the order of the data."""
        found = self.others.joined(values, dim)
        return (
            found if self._order is None else found.index_select(dim, self._order.to(found.device))
        )

    def subtract_(self, vectors: Tensor, weights: Tensor) -> Tensor:
        return vectors.sub_(self.rmatvec(weights))

    def normal(self, vectors: Tensor, row_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        some = None if row_scale is None else self.own(row_scale[None])[0]
        out, square = self.mine.normal(vectors, some)
        return self.others.sum_(out), self.others.sum_(square)

    def image_norms(self, vectors: Tensor, row_scale: Tensor | None = None) -> Tensor:
        image = self.mine.matvec(vectors)
        if row_scale is not None:
            image = image * self.own(row_scale[None])
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
        return self.joined(own, 0)

    # -- rows --------------------------------------------------------------------------------------

    def rows(self, index: Tensor) -> Tensor:
        """Some rows written out, ``index (k,)`` alike everywhere: ``(k, P)``."""
        out = torch.zeros(len(index), self.shape[1], dtype=self.dtype, device=self.device)
        here = torch.isin(index.cpu(), self.index).nonzero()[:, 0]
        if len(here):
            out[here] = self.own_rows(index.cpu()[here])
        return self.others.sum_(out)

    def _place(self, span: slice) -> int | None:
        """Where in this process the rows of ``span`` begin; None where it does not hold them."""
        before = 0
        for s in self._own:
            if s.start <= span.start and span.stop <= s.start + s.rows:
                return before + span.start - s.start
            before += s.rows
        return None

    def holds(self, span: slice) -> bool:
        """Local: whether this process has these rows, by their numbers among all."""
        return self._place(span) is not None

    def own_span(self, span: slice) -> slice:
        """Local: where this process's rows ``span`` are in products of ``mine``."""
        start: int = span.start
        place = self._place(span)
        assert place is not None
        return slice(place, place + span.stop - start)

    def own_rows(self, index: Tensor) -> Tensor:
        """Local: rows of this process, by their numbers among all."""
        ordered, places = self.index.sort()
        return self.mine.rows(places[torch.searchsorted(ordered, index.cpu())])

    def iter_rows(self, at_most: int) -> Iterator[Tensor]:
        for stretch in self.stretches:
            owner, blocks = stretch.owner, stretch.blocks
            ours = self.blocks[blocks.start : blocks.stop] if owner == self.others.rank else []
            own = JacobianOperator(self.space, ours).iter_rows(at_most)
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
        where = [(s.owner, i) for s in self.stretches for i in s.blocks]
        sizes = [counts[rank][i] for rank, i in where]
        chosen = list(chosen_parts(sizes, rows / self.shape[0], generator)) or [(0, 0, 1)]
        own = [
            (where[which][1], start, count)
            for which, start, count in chosen
            if where[which][0] == ours
        ]
        mine = self.mine.parts(own, self._starts())
        made = SharedOperator(mine, self.others)
        assert mine.chosen is not None
        made.chosen = self.others.joined(mine.chosen, 0)
        return made

    # -- products of rows --------------------------------------------------------------------------

    def gram(self, tick: Tick | None = None) -> Tensor:
        """``A Aᵀ`` on every process. Blocks go round; of two processes' rows each multiplies half."""
        m, ours = self.shape[0], self.others.rank
        out = torch.zeros(m, m, dtype=torch.float64, device=self.device)
        self._place_own(self.mine.gram(), out)
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

    def _place_own(self, gram: Tensor, out: Tensor) -> None:
        """The products ``gram (M', M')`` of this process's rows, where they belong among all."""
        for row in self._own:
            for column in self._own:
                spans = (
                    slice(row.start, row.start + row.rows),
                    slice(column.start, column.start + column.rows),
                )
                if row.rows and column.rows:
                    out[spans] = gram[self.own_span(spans[0]), self.own_span(spans[1])]

    def _multiply(self, theirs: Block, start: int, out: Tensor, *, first: bool) -> None:
        """Products of own rows (those of the ``first`` half of each block, or all) with another process's."""
        for kept, at in zip(self.blocks, self._starts(), strict=True):
            stop = kept.examples // 2 if first else kept.examples
            if not stop:
                continue
            with kept.opened() as whole:
                block = whole.narrow(0, stop)
                rows = slice(at, at + block.num_rows)
                columns = slice(start, start + theirs.num_rows)
                block.gram(theirs, out[rows, columns])
                out[columns, rows] = out[rows, columns].T

    def _starts(self) -> list[int]:
        """The numbers of the first rows of this process's blocks."""
        out = []
        for s in self._own:
            at = s.start
            for block in self.blocks[s.blocks.start : s.blocks.stop]:
                out.append(at)
                at += block.num_rows
        return out

    def _everyones(self) -> Iterator[tuple[int, int, Block]]:
        """Every block of every process in turn, and the number of its first row; each process gets them all."""
        for owner in range(self.others.size):
            kept = list(self.blocks) if owner == self.others.rank else []
            for i, start in enumerate(self.others.shared(self._starts, owner)):
                if kept:
                    with kept[i].opened() as block:
                        given = give_block(block, owner, self.others, self.device)
                else:
                    given = give_block(None, owner, self.others, self.device)
                yield owner, start, given

    def cross_gram(self, other: RowOperator) -> Tensor:
        """With rows of this process's own, the others come with theirs, or :func:`serve`; or with rows that are shared
        like these, on every process.
        """
        if isinstance(other, SharedOperator) and other.others is self.others:
            return self._cross_gram(other)
        asked = other if isinstance(other, JacobianOperator) else None
        if asked is None or asked.processes is not None:
            raise InputError(
                f"products with rows of {type(other).__name__} are not taken over several processes; fit on all of the "
                "data in one call."
            )
        found = _round(self.others, (self.number, asked))
        assert found is not None
        return found

    def _cross_gram(self, other: SharedOperator) -> Tensor:
        shape = self.shape[0], other.shape[0]
        out = torch.zeros(shape, dtype=torch.float64, device=self.device)
        for _, start, theirs in other._everyones():
            for kept, at in zip(self.blocks, self._starts(), strict=True):
                with kept.opened() as block:
                    part = out[at : at + block.num_rows, start : start + theirs.num_rows]
                    block.gram(theirs, part)
        return self.others.sum_(out)


def _of(stretches: Sequence[Stretch], owner: int) -> list[Stretch]:
    """Those of one process, in the order in which it holds them."""
    return sorted((s for s in stretches if s.owner == owner), key=lambda s: s.blocks.start)


def _numbers(stretches: Sequence[Stretch]) -> Tensor:
    return torch.cat([torch.arange(s.start, s.start + s.rows) for s in stretches])


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
        found = operator.joined(operator.mine.cross_gram(theirs), 0)
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
