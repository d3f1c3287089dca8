"""Sums over all inputs of a block of weights: what the layer null space is made of.

Of a weight that multiplies inputs ``a``: ``C = Σ a aᵀ``, float64, or a sketch of it where that is too wide
(``sketch.py``). Of a table: how often each row was read, which is the diagonal of the same sum over one-hot inputs.
A table that is tied to a linear layer has both. Sums of data sets are sums of these, so data can come and go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.errors import InputError
from nullbayes.moments.blocks import Block
from nullbayes.moments.rule import Summed
from nullbayes.moments.sketch import Sketch


class DenseMoments:
    """``C (G, I, I)`` in float64, the columns of the biases last."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def zeros(cls, block: Block, device: torch.device) -> DenseMoments:
        groups, _, columns = block.size
        return cls(torch.zeros(groups, columns, columns, dtype=torch.float64, device=device))

    def add_sums(self, seen: Summed, own: int, column: int | None) -> None:
        """Add what was summed up elsewhere."""
        if own:
            self.values[:, :own, :own] += seen.gram
        self.add_totals(seen.sums, seen.count, own, column)

    def add_totals(self, totals: Tensor, count: int, own: int, column: int | None) -> None:
        """Add ``totals (G, own)`` of ``count`` inputs to the column of their bias, if they have one."""
        if column is None:
            return
        if own:
            self.values[:, :own, own + column] += totals
            self.values[:, own + column, :own] += totals
        self.values[:, own + column, own + column] += count

    def plus(self, other: DenseMoments, sign: float = 1.0) -> DenseMoments:
        """The sum, or with ``sign=-1`` the difference."""
        return DenseMoments(self.values + sign * other.values)

    @property
    def trace(self) -> Tensor:
        """``(G,)``."""
        return self.values.diagonal(dim1=1, dim2=2).sum(1)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


@dataclass
class BlockMoments:
    """The sums of one block.

    Attributes:
        inputs: of the inputs that the weight multiplies; None where it is only a table.
        rows: ``(O,)`` how often each row was read, int64; None where it is not a table.
        count: how many inputs there were, of both kinds.
    """

    inputs: DenseMoments | Sketch | None
    rows: Tensor | None
    count: int = 0

    @classmethod
    def zeros(cls, block: Block, device: torch.device, rank: int | None) -> BlockMoments:
        """Empty sums; ``rank``: of a sketch in place of the whole matrix."""
        groups, outputs, _ = block.size
        rows = (
            torch.zeros(groups * outputs, dtype=torch.int64, device=device) if block.table else None
        )
        inputs: DenseMoments | Sketch | None
        if block.table and not block.biases and not block.multiplied:
            inputs = None
        elif rank is None:
            inputs = DenseMoments.zeros(block, device)
        else:
            inputs = Sketch(groups, block.columns, rank, device)
        return cls(inputs, rows)

    def add(self, a: Tensor, own: int, column: int | None) -> None:
        """Inputs ``(N, G, I)`` for a sketch; only the first ``own`` numbers of each are used."""
        assert isinstance(self.inputs, Sketch)
        self.inputs.add(a[..., :own], own, column)
        self.count += a.shape[0]

    def add_sums(self, seen: Summed, own: int, column: int | None) -> None:
        """What was summed up elsewhere."""
        assert isinstance(self.inputs, DenseMoments)
        self.inputs.add_sums(seen, own, column)
        self.count += seen.count

    def read(self, index: Tensor) -> None:
        """Rows of a table that were looked up."""
        assert self.rows is not None
        flat = index.reshape(-1).to(device=self.rows.device, dtype=torch.int64)
        self.rows += torch.bincount(flat, minlength=len(self.rows))
        self.count += flat.numel()

    def plus(self, other: BlockMoments, sign: int = 1) -> BlockMoments:
        """Sums over both sets of data, or of the first without the second. Raises `InputError` for a sketch."""
        inputs: DenseMoments | Sketch | None = None
        if isinstance(self.inputs, DenseMoments):
            assert isinstance(other.inputs, DenseMoments)
            inputs = self.inputs.plus(other.inputs, sign)
        elif self.inputs is not None:
            assert isinstance(other.inputs, Sketch)
            if sign < 0:
                raise InputError(
                    "data cannot be removed from a layer whose inputs were sketched; fit with more `memory=`, "
                    "so that its second moments are kept whole."
                )
            inputs = self.inputs.plus(other.inputs)
        rows = None if self.rows is None or other.rows is None else self.rows + sign * other.rows
        return BlockMoments(inputs, rows, self.count + sign * other.count)

    @property
    def finite(self) -> bool:
        """Whether no input held NaN or infinity."""
        return self.inputs is None or bool(self.inputs.trace.isfinite().all())

    @property
    def nbytes(self) -> int:
        inputs = 0 if self.inputs is None else self.inputs.nbytes
        return inputs + (0 if self.rows is None else self.rows.nbytes)
