"""Leverages of one input at all layers from few operations.

At one input most layers are small, and leverages cost by the number of operations. So during the forward pass each
layer only puts what it receives into a place of its own, in one or two operations. After it, layers of one size share a
product, and all layers a square and a sum.

Which layers are called, and on inputs of which sizes, is what an earlier pass has shown (:class:`Visit`); a pass in
which something else happens counts as missed, and its input goes the general way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nullbayes.moments.blocks import Site
from nullbayes.moments.convolution import ConvInputs, columns_of, places_of
from nullbayes.moments.leverage import Leverage
from nullbayes.moments.linear import LinearInputs

# Numbers that one layer, and all together, may put aside: more are better used while they are near.
LARGE, ALL = 2**17, 2**21
# Numbers, together and of one input, up to which one sum over unequal stretches takes less than a norm a group.
FEW, LONGEST = 2**15, 2**11


class Part(NamedTuple):
    """What one weight received in a visit: its block, its bias's column, how many inputs; whether those of the weight
    before were the same tensor.
    """

    block: int
    column: int | None
    size: int
    again: bool


class Visit(NamedTuple):
    """One call of a module in a pass by the general way; ``inputs`` None: not of a kind that is put aside."""

    site: int
    inputs: torch.Size | None
    outputs: torch.Size | None
    parts: tuple[Part, ...]


def simple(site: Site, thin: int | None) -> bool:
    """Whether the module's one weight receives its one argument, or some patches of it."""
    kind = type(site.rule)
    patched = kind is ConvInputs and thin is not None and getattr(site.module, "groups", 0) == 1
    return len(site.places) == 1 and (kind is LinearInputs or patched)


class Step:
    """How one visit puts its input aside, as ``(T, I)``."""

    def __init__(self, visit: Visit, layer: Leverage, module: Any, thin: int | None) -> None:
        assert visit.inputs is not None and visit.outputs is not None
        self.site, self.shape, self.layer = visit.site, visit.inputs, layer
        self.column, self.count = visit.parts[0].column, visit.parts[0].size
        # And those of the weights that receive the same tensor.
        self.blocks = [visit.parts[0].block]
        self.order: Tensor | None = None  # of its columns, if not that of the weight
        self.index: Tensor | None = None
        self.map: Tensor | None = None
        if not hasattr(module, "kernel_size"):
            self.own = visit.inputs[-1]
            return
        space = visit.inputs[-len(module.kernel_size) :]
        places = places_of(visit.outputs[-len(space) :], thin or 1)
        index, outside = columns_of(module, space, places, torch.device("cpu"))
        taps, channels = len(index), module.in_channels
        self.own = taps * channels
        self.index = index.T.flatten()  # (T · taps,)
        self.order = torch.arange(self.own).view(channels, taps).T.flatten()
        if outside or math.prod(space) <= len(self.index):
            # The whole map with its channels last; the row after it stays zero.
            self.map = torch.zeros(math.prod(space) + 1, channels, dtype=layer.dtype)
            self.into = self.map[:-1].T.unflatten(1, space)

    @property
    def size(self) -> int:
        """Numbers put aside."""
        return self.count * self.own

    def place(self, slot: Tensor) -> None:
        """Put it into ``slot (T, I)`` from now on."""
        self.slot = slot.view(self.shape if self.index is None else (len(self.index), -1))

    def put(self, x: Tensor) -> None:
        """Put aside what the module receives."""
        if self.index is None:
            self.slot.copy_(x)
        elif self.map is not None:
            self.into.copy_(x if x.ndim == self.into.ndim else x[0])
            torch.index_select(self.map, 0, self.index, out=self.slot)
        else:
            rows = x.reshape(self.slot.shape[1], -1)
            self.slot.copy_(rows.index_select(1, self.index).T)

    def root(self) -> tuple[Tensor, Tensor | None]:
        """``(I, k)``, and what a constant one adds ``(1, k)``."""
        root, one = self.layer.part(self.own, self.column)
        return root[0] if self.order is None else root[0][self.order], None if one is None else one[
            0
        ]


class Group:
    """Steps with inputs and roots of one size: one product of ``received (n, T, I)``, into ``found (n, T, k)``."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        roots = [step.root() for step in steps]
        self.rows, self.own, self.width = steps[0].count, steps[0].own, roots[0][0].shape[1]
        self.roots = roots[0][0] if len(steps) == 1 else torch.stack([root for root, _ in roots])
        ones = [one for _, one in roots if one is not None]
        self.ones: Tensor | None = None
        if ones:
            self.ones = ones[0] if len(steps) == 1 else torch.stack(ones)

    @staticmethod
    def key(step: Step) -> tuple[int, ...]:
        """The same for steps that make one group."""
        root, one = step.layer.part(step.own, step.column)
        return step.count, step.own, root.shape[2], one is not None

    def place(self, received: Tensor, found: Tensor) -> None:
        """Use these stretches of memory from now on."""
        n = len(self.steps)
        self.received = received.view(n, self.rows, self.own)
        self.found = found.view(n, self.rows, self.width)
        for step, slot in zip(self.steps, self.received, strict=True):
            step.place(slot)
        self.operands = (self.received, self.found) if n > 1 else (self.received[0], self.found[0])

    def multiply(self) -> None:
        """One product."""
        received, found = self.operands
        if self.ones is None:
            torch.matmul(received, self.roots, out=found)
        elif len(self.steps) == 1:
            torch.addmm(self.ones, received, self.roots, out=found)
        else:
            torch.baddbmm(self.ones, received, self.roots, out=found)


class Joined:
    """A pass whose leverages are found together. Used by one thread at a time.

    Args:
        visits: of an earlier pass on inputs of the same sizes.
        sites: of the visits.
        layers: by number of the block.
        ordered: numbers of the blocks that count.
        thin: positions of each convolution.
    """

    def __init__(
        self,
        visits: Sequence[Visit],
        sites: Sequence[Site],
        layers: Sequence[Leverage],
        ordered: Sequence[int],
        thin: int | None,
    ) -> None:
        self.visits = [visit.site for visit in visits]
        # By visit: what puts it aside; True: the tensor before is there already; None: the general way.
        self.steps: list[Step | bool | None] = []
        self.others: list[tuple[int, bool, int]] = []
        self._choose(visits, sites, layers, thin)
        self.at, self.missed = 0, False
        self.last: tuple[Tensor, int] | None = None
        steps = [step for step in self.steps if isinstance(step, Step)]
        keys = dict.fromkeys(Group.key(step) for step in steps)
        self.groups = [Group([s for s in steps if Group.key(s) == key]) for key in keys]
        self._lay_out(layers[0].dtype)
        self._weigh(ordered)

    def __len__(self) -> int:
        return sum(len(group.steps) for group in self.groups)

    def _choose(
        self,
        visits: Sequence[Visit],
        sites: Sequence[Site],
        layers: Sequence[Leverage],
        thin: int | None,
    ) -> None:
        total, last = 0, None
        for visit in visits:
            if len(visit.parts) == 1 and visit.parts[0].again and last is not None:
                last.blocks.append(visit.parts[0].block)
                self.steps.append(True)
                continue
            last = None
            if visit.inputs is not None and len(visit.parts) == 1 and visit.inputs.numel() <= LARGE:
                layer = layers[visit.parts[0].block]
                if layer.root is not None and layer.low is None:
                    step = Step(visit, layer, sites[visit.site].module, thin)
                    if step.size <= LARGE and total + step.size <= ALL:
                        last, total = step, total + step.size
            if last is None:
                self.others += [(p.block, p.column is not None, p.size) for p in visit.parts]
            self.steps.append(last)

    def _lay_out(self, dtype: torch.dtype) -> None:
        """One stretch of memory: what all receive, then what all products give."""
        sizes = [len(g.steps) * g.rows * g.own for g in self.groups]
        sizes += [len(g.steps) * g.rows * g.width for g in self.groups]
        self.flat = torch.zeros(sum(sizes), dtype=dtype)
        stretches = self.flat.split(sizes)
        for i, group in enumerate(self.groups):
            group.place(stretches[i], stretches[len(self.groups) + i])
        rows = [len(g.steps) * g.rows for g in self.groups]
        lengths = [g.own for g, n in zip(self.groups, rows, strict=True) for _ in range(n)]
        lengths += [g.width for g, n in zip(self.groups, rows, strict=True) for _ in range(n)]
        self.total = sum(rows)
        self.offsets: Tensor | None = None
        if len(self.flat) <= FEW and max(lengths, default=0) <= LONGEST:
            self.offsets = torch.tensor([0, *lengths]).cumsum(0)
        self.squares = torch.zeros(2, self.total, dtype=dtype)
        self.norms = [
            (part, out.view(part.shape[:2]))
            for k, parts in enumerate(
                ([g.received for g in self.groups], [g.found for g in self.groups])
            )
            for part, out in zip(parts, self.squares[k].split(rows), strict=True)
        ]

    def _weigh(self, ordered: Sequence[int]) -> None:
        """What makes means of all inputs ``(T, L)``, and the ones of biases ``(T,)``."""
        places = {block: i for i, block in enumerate(ordered)}
        rows: list[tuple[list[int], float]] = []
        tiny = torch.finfo(torch.float32).tiny
        for group in self.groups:
            for step in group.steps:
                one = tiny if step.column is None else 1.0
                rows += [(step.blocks, one)] * step.count
        for block, biased, count in self.others:
            rows += [([block], 1.0 if biased else tiny)] * count
        weights = torch.zeros(len(rows), len(ordered), dtype=torch.float64)
        for i, (blocks, _) in enumerate(rows):
            for block in blocks:
                weights[i, places[block]] += 1
        counts = weights.sum(0)
        self.weights = weights / counts.clamp_min(1)
        self.ones = torch.tensor([one for _, one in rows], dtype=torch.float64)
        self.absent: Tensor | None = None  # NaN for blocks that are not reached ``(L,)``
        if not bool((counts > 0).all()):
            self.absent = torch.where(counts > 0, 0.0, torch.nan).double()

    # -- a pass --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Before a pass."""
        self.at, self.missed, self.last = 0, False, None

    def takes(self, site: int, x: Any) -> bool:
        """What a module received was put aside; else it goes the general way."""
        at = self.at
        self.at = at + 1
        if self.missed or at >= len(self.steps) or self.visits[at] != site:
            self.missed = True
            return False
        step = self.steps[at]
        if step is None:
            return False
        if step is True:
            before = self.last
            if before is None or x._version != before[1] or not _same(x, before[0]):
                self.missed = True
            return not self.missed
        assert isinstance(step, Step)
        if type(x) is not Tensor or x.shape != step.shape:
            self.missed = True
            return False
        step.put(x)
        self.last = (x, x._version)
        return True

    def finish(self, others: Sequence[tuple[int, bool, Tensor, Tensor]]) -> Tensor | None:
        """Means ``(2, L)`` of leverages, and of those over squared sizes, float64; zero where a block was not reached.

        None: the pass was missed.

        Args:
            others: of the general way: block, whether it has a bias, roots of leverages, lengths ``(n,)``.
        """
        self.last = None
        seen = [(block, biased, len(roots)) for block, biased, roots, _ in others]
        if self.missed or self.at != len(self.steps) or seen != self.others:
            return None
        for group in self.groups:
            group.multiply()
        if self.offsets is not None:
            found = torch.segment_reduce(
                self.flat * self.flat, "sum", offsets=self.offsets, unsafe=True
            ).view(2, -1).double()  # fmt: skip
        else:
            for part, out in self.norms:
                torch.linalg.vector_norm(part, dim=2, out=out)
            found = self.squares.double().square_()
        if others:
            roots, lengths = (torch.cat([other[i] for other in others]) for i in (3, 2))  # type: ignore[misc]
            more = torch.stack([roots, lengths]).double().square_()
            found = torch.cat([found, more], 1)
        sizes = found[1]
        return torch.stack([sizes, sizes / found[0].add_(self.ones)]) @ self.weights


def _same(x: Tensor, before: Tensor) -> bool:
    return x is before or (
        x.data_ptr() == before.data_ptr()
        and x.shape == before.shape
        and x.stride() == before.stride()
    )
