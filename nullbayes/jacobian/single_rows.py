"""Single rows of an operator as an operator of their own: copies, where a part of the blocks would be views."""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.jacobian.block import Block, kinds
from nullbayes.jacobian.block_storage import block_rows
from nullbayes.jacobian.operator import DenseOperator, JacobianOperator, RowOperator
from nullbayes.jacobian.shared import SharedOperator


def single_rows(operator: RowOperator, index: Tensor) -> RowOperator:
    """The rows of ``index (k,)``, ascending, without those that ``operator`` has between them.

    ``chosen`` says in which order they are: that of ``index``, or process by process where several hold them.
    """
    if isinstance(operator, SharedOperator):
        ordered, places = operator.index.sort()
        here = index[torch.isin(index, operator.index)]
        mine = _of_blocks(operator.mine, places[torch.searchsorted(ordered, here)].sort().values)
        assert mine.chosen is not None
        made: RowOperator = SharedOperator(mine, operator.others)
        made.chosen = operator.others.joined(operator.index[mine.chosen], 0)
        return made
    if isinstance(operator, JacobianOperator):
        return _of_blocks(operator, index)
    made = DenseOperator(operator.rows(index.to(operator.device)))
    made.chosen = index
    return made


def _of_blocks(operator: JacobianOperator, index: Tensor) -> JacobianOperator:
    """Blocks are opened once, in turn; what is taken of neighbours that are alike becomes one block."""
    groups: list[list[Block]] = []
    full = block_rows(operator.device)
    for kept, start in zip(operator.blocks, operator.starts, strict=False):
        some = index[(index >= start) & (index < start + kept.num_rows)] - start
        if not len(some):
            continue
        with kept.opened() as block:
            rows = some.to(operator.device)
            factors = {names: factor.single(rows) for names, factor in block.factors.items()}
        taken = Block(factors, len(some), 1)
        last = groups[-1] if groups else None
        if last and _alike(last[0], taken) and _size(last) + taken.num_rows <= full:
            last.append(taken)
        else:
            groups.append([taken])
    made = JacobianOperator(operator.space, [Block.merge(group) for group in groups])
    made.chosen = index
    return made


def _alike(one: Block, other: Block) -> bool:
    return kinds(one) == kinds(other)


def _size(blocks: list[Block]) -> int:
    return sum(block.num_rows for block in blocks)


def row_bytes(operator: RowOperator) -> int:
    """Bytes of the copy of a row, about, by the first one of this process and the sizes of its blocks."""
    if not isinstance(operator, JacobianOperator):
        return operator.shape[1] * operator.dtype.itemsize
    each = 0
    if operator.blocks:
        with operator.blocks[0].opened() as block:
            example = block.narrow(0, 1)
            first = torch.zeros(1, dtype=torch.long, device=operator.device)
            row = sum(factor.single(first).nbytes for factor in example.factors.values())
            sizes = [kept.nbytes / max(1, kept.examples) for kept in operator.blocks]
            each = int(row * max(sizes) / max(1, sizes[0]))
    return max(operator.others.gather(each)) if isinstance(operator, SharedOperator) else each
