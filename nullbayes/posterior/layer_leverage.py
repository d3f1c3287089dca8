"""Leverages of inputs, layer by layer: how little each layer's training inputs say of what it receives now."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nullbayes.errors import NonFiniteError
from nullbayes.model.batch import Inputs, batch_size, plain, take, tensor_leaves
from nullbayes.model.functional import FunctionalModel
from nullbayes.moments.blocks import Blocks, Site
from nullbayes.moments.capture import hooks_of, plain_paths
from nullbayes.moments.factor import Edge, Factor
from nullbayes.moments.gather import Gathered
from nullbayes.moments.joined import Joined, Part, Visit, simple
from nullbayes.moments.leverage import DIRECTIONS, Leverage
from nullbayes.moments.rule import Seen, argument

# Edge of the leverage, as a share of the mean eigenvalue, where the posterior's own is zero.
EXACT_EDGE = 1e-6
# Positions of a convolution's output at which its inputs are looked at: all of them cost many times the layer itself.
POSITIONS = 16
# Examples on which it is found which axis of a layer's input belongs to the batch.
PROBE = 3
# Kinds of calls whose weights are remembered, by the numbers of inputs that examples have.
MEANS = 64
# Sizes of one input for which its pass is planned, and how often one that does not go as planned is planned again.
PLANS, TRIES = 8, 3
# In place of an axis: all examples have this call in common (positions that are looked up).
SHARED = -1

# Calls in order: by each its block, and how many of its inputs an example has.
Calls = tuple[tuple[int, int, bool], ...]


class Call(NamedTuple):
    """What a block received in one call.

    ``roots``, ``lengths``: of leverages, and of the inputs without the constant one of a bias; ``(*lead)`` flat.
    ``inputs``: themselves ``(*lead, I)``, if they were asked for.
    """

    block: int
    biased: bool
    lead: torch.Size
    roots: Tensor
    lengths: Tensor
    inputs: Tensor | None = None

    @property
    def parts(self) -> tuple[int, bool, Tensor, Tensor]:
        """As :class:`Joined` has it."""
        return self.block, self.biased, self.roots, self.lengths

    @property
    def directions(self) -> Tensor:
        """Leverages over squared sizes ``(*lead)``."""
        sizes = self.lengths.double().square() + float(self.biased)
        found = self.roots.double().square() / sizes.clamp_min(_TINY)
        return found.reshape(self.lead)


_TINY = torch.finfo(torch.float32).tiny


class Leverages:
    """Leverages of all blocks, and the same over the squared size of the input, from one forward pass.

    Which axis of a layer's input is that of the examples is found by comparing a small batch with its examples one by
    one: the first (each example's share in one piece), or the second. Where neither is, examples go through the network
    one at a time.

    Args:
        positions: of each convolution, evenly spaced; None: all.
        factors: of the blocks at this ``delta``, where they are known.
        directions: see :class:`Leverage`.
        pooling: inputs are averaged over each example's positions too, see :meth:`pooled`.
    """

    def __init__(
        self,
        functional: FunctionalModel,
        blocks: Blocks,
        gathered: Gathered,
        delta: float,
        *,
        positions: int | None = POSITIONS,
        factors: Sequence[Factor] | None = None,
        directions: int | None = DIRECTIONS,
        pooling: bool = False,
    ) -> None:
        self.functional, self.blocks = functional, blocks
        self.positions, self.pooling = positions, pooling
        self._pools: list[list[Tensor | None]] = []  # of each piece of a batch, by block
        self.layers: list[Leverage] = []
        known = factors if factors is not None and delta else [None] * len(blocks.blocks)
        for i, (block, sums, factor) in enumerate(
            zip(blocks.blocks, gathered.sums, known, strict=True)
        ):
            if factor is not None and i and factor is known[i - 1]:
                self.layers.append(self.layers[-1])  # queries, keys and values: one input
                continue
            edge = Edge.of(sums, delta or EXACT_EDGE)
            self.layers.append(
                Leverage(sums, edge, block.columns, functional.dtype, factor, directions)
            )
        # Scale and shift of normalisation layers say nothing about an input.
        self.counted = {i for i, b in enumerate(blocks.blocks) if b.columns > 2}
        if not self.counted:
            self.counted = set(range(len(blocks.blocks)))
        self.ordered = sorted(self.counted)
        self._axes: list[int] | None = None  # by call; empty: one example at a time
        self._network: Callable[[Inputs], Tensor] | None = None
        self._found: list[Call] = []
        self._last: tuple[Any, ...] | None = None
        self._lock = threading.Lock()
        # Of passes of one input: by its sizes how they are planned, and how often such an input was met; the plan of
        # the pass that runs; what modules received in it, by call and by weight.
        self._plans: dict[tuple[torch.Size, ...], Joined] = {}
        self._tries: dict[tuple[torch.Size, ...], int] = {}
        self._joined: Joined | None = None
        self._visits: list[Visit] = []
        self._parts: list[Part] = []
        self._sites: list[Site] = []
        self._parameters: list[Tensor] = []
        self._weights: list[int] = []
        self._means: dict[Calls, tuple[Tensor, Tensor | None, Tensor]] = {}

    def _pass(self, inputs: Inputs) -> tuple[list[Call], Tensor]:
        """One forward pass: its calls, and its outputs."""
        with self._lock, torch.no_grad(), plain_paths():
            return self._run(inputs)

    def _run(self, inputs: Inputs) -> tuple[list[Call], Tensor]:
        current = [p.data_ptr() for p in self._parameters]
        if self._network is None or current != self._weights:
            hooks = self._hooks()
            self._network = self.functional.bound(self.functional.weights(), hooks)
            self._parameters = list(self.functional.model.parameters())
            self._weights = [p.data_ptr() for p in self._parameters]
        self._visits, self._parts = [], []
        try:
            outputs = self._network(inputs)
            found = self._found
        finally:
            self._found, self._last = [], None
        return found, outputs

    def _hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """By path of each module that counts: its input is put aside where that is planned, or goes the general way."""
        self._sites = [
            site
            for site in self.blocks.sites
            if any(i in self.counted for i, _ in site.places.values())
        ]
        general = hooks_of(self._sites, self._receive, thin=self.positions)
        return [
            (path, self._hook_of(number, self._sites[number], hook))
            for number, (path, hook) in enumerate(general)
        ]

    def _hook_of(
        self, number: int, site: Site, general: Callable[..., None]
    ) -> Callable[..., None]:
        single, name = simple(site, self.positions), "input"

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            joined = self._joined
            x = (args[0] if args else argument(args, kwargs, 0, name)) if single else None
            if joined is not None:
                if not joined.takes(number, x):
                    general(module, args, kwargs, out)
                return
            before = len(self._parts)
            general(module, args, kwargs, out)
            parts = tuple(self._parts[before:])
            if type(x) is Tensor and isinstance(out, Tensor):
                self._visits.append(Visit(number, x.shape, out.shape, parts))
            else:
                self._visits.append(Visit(number, None, None, parts))

        return hook

    def _of_one(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Of one input: with all layers' leverages together where its pass can be planned."""
        kind = tuple(leaf.shape for leaf in tensor_leaves(plain(inputs)))
        with self._lock, torch.no_grad(), plain_paths():
            joined = self._plans.get(kind)
            if joined is not None:
                joined.start()
                self._joined = joined
                try:
                    calls, outputs = self._run(inputs)
                    found = joined.finish([call.parts for call in calls])
                finally:
                    self._joined = None
                if found is not None:
                    return self._checked(found[:, None], outputs, joined.absent)
                del self._plans[kind]
            calls, outputs = self._run(inputs)
            self._plan(kind)
        return self._averaged(calls, [0] * len(calls), 1, outputs)

    def _plan(self, kind: tuple[torch.Size, ...]) -> None:
        """Plan passes of inputs like that of the last one, from the second that is met on."""
        tries = self._tries[kind] = self._tries.get(kind, 0) + 1
        planned = self.functional.device.type == "cpu" and not self.pooling
        if not planned or not 1 < tries <= 1 + TRIES:
            return
        joined = Joined(self._visits, self._sites, self.layers, self.ordered, self.positions)
        if len(joined):
            if len(self._plans) >= PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[kind] = joined

    def _receive(self, site: int, number: int, column: int | None, seen: Seen) -> None:
        if number not in self.counted:
            return
        layer = self.layers[number]
        if seen.index is not None:
            roots, lead = layer.of_rows(seen.index).sqrt().reshape(-1), seen.index.shape
            call, again = Call(number, True, lead, roots, torch.zeros_like(roots)), False
        else:
            a = seen.a
            assert a is not None
            same = (id(layer), column, a.data_ptr(), a.shape, a.stride(), a._version)
            again = self._last is not None and self._last[0] == same  # the tensor just seen
            if self._last is None or not again:
                found = layer.lengths(a, self.blocks.blocks[number].own, column)
                self._last = (same, a, found)
            inputs = a.flatten(-2) if self.pooling else None
            roots, lengths = self._last[2]
            call = Call(number, column is not None, a.shape[:-2], roots, lengths, inputs)
        if seen.follows:
            before, again = self._found.pop(), False
            self._parts.pop()
            lead = torch.Size((before.lead[0] + call.lead[0], *call.lead[1:]))
            roots, lengths = (
                torch.cat(pair)
                for pair in ((before.roots, call.roots), (before.lengths, call.lengths))
            )
            inputs = None
            if before.inputs is not None and call.inputs is not None:
                inputs = torch.cat([before.inputs, call.inputs])
            call = Call(number, call.biased, lead, roots, lengths, inputs)
        self._found.append(call)
        self._parts.append(
            Part(number, column if seen.index is None else 0, len(call.roots), again)
        )

    def means(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Means for each example ``(B, L)`` over what the blocks that count receive, and outputs ``(B, *out)``.

        Of leverages, and of those over squared sizes; float64, NaN where an example does not reach a layer.

        Raises:
            NonFiniteError: outputs, or what a layer receives, hold NaN or infinity.
        """
        size = batch_size(inputs)
        if size == 1:
            return self._of_one(inputs)
        if self._axes is None:
            self._axes = self._find_axes(take(inputs, 0, min(size, PROBE)))
        if self._axes:
            calls, outputs = self._pass(inputs)
            pairs = zip(calls, self._axes, strict=False)
            if len(calls) == len(self._axes) and all(_fits(c.lead, a, size) for c, a in pairs):
                return self._averaged(calls, self._axes, size, outputs)
        singles = [self.means(take(inputs, i, i + 1, size)) for i in range(size)]
        sizes, directions, outs = (torch.cat(parts) for parts in zip(*singles, strict=True))
        return sizes, directions, outs

    def pooled(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        """What :meth:`means` says, and the mean input of each block that counts ``(B, I)``.

        None: of a block that no example reaches, and of one whose rows are looked up.
        """
        self._pools = []
        sizes, directions, outputs = self.means(inputs)
        found, self._pools = self._pools, []
        every = [[part[i] for part in found] for i in range(len(self.ordered))]
        whole = [
            torch.cat([p for p in parts if p is not None])
            if all(p is not None for p in parts)
            else None
            for parts in every
        ]
        return sizes, directions, outputs, whole

    def _pooled(self, calls: Sequence[Call], axes: Sequence[int], size: int) -> list[Tensor | None]:
        """Mean input of each block over positions and calls, ``(B, I)``."""
        parts: dict[int, list[Tensor]] = {}
        for call, axis in zip(calls, axes, strict=True):
            if call.inputs is None:
                continue
            columns = call.inputs.shape[-1]
            by_example = _split_vectors(call.inputs, axis, size) if size > 1 else call.inputs
            parts.setdefault(call.block, []).append(by_example.reshape(size, -1, columns))
        return [
            torch.cat(parts[block], 1).mean(1).double() if block in parts else None
            for block in self.ordered
        ]

    def _averaged(
        self, calls: Sequence[Call], axes: Sequence[int], size: int, outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Means over the calls of each block, for all of them at once."""
        if self.pooling:
            self._pools.append(self._pooled(calls, axes, size))
        if not calls:
            none = outputs.new_full((size, len(self.ordered)), torch.nan, dtype=torch.float64)
            return none, none, outputs
        # Few operations rather than few numbers: of one input of a small network each costs as much as a layer.
        roots, lengths = [call.roots for call in calls], [call.lengths for call in calls]
        if size == 1:
            counts = [len(part) for part in roots]
            both = torch.cat(roots + lengths).view(2, 1, -1)
        else:
            parts = [
                [
                    _split(v, c.lead, axis, size)
                    for v, c, axis in zip(some, calls, axes, strict=True)
                ]
                for some in (roots, lengths)
            ]
            counts = [part.shape[1] for part in parts[0]]
            both = torch.stack([torch.cat(some, 1) for some in parts])
        shapes = tuple((c.block, n, c.biased) for c, n in zip(calls, counts, strict=True))
        weights, absent, ones = self._weights_of(shapes, outputs.device)
        sizes, lengths = both.double().square_()
        found = torch.stack([sizes, sizes / lengths.add_(ones)]) @ weights
        return self._checked(found, outputs, absent)

    @staticmethod
    def _checked(
        found: Tensor, outputs: Tensor, absent: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Means ``(2, B, L)`` one by one, NaN where ``absent (L,)`` is. Raises `NonFiniteError`."""
        if not math.isfinite(found.sum() + outputs.sum()):
            raise NonFiniteError(
                "the outputs, or what layers receive, hold NaN or infinity on these inputs; check that they are finite "
                "and scaled as in training."
            )
        if absent is not None:
            found = found + absent
        return found[0], found[1], outputs

    def _weights_of(
        self, calls: Calls, device: torch.device
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What makes means of all inputs ``(T, L)``; NaN for blocks without a call ``(L,)``, if there are any; and the
        ones of biases ``(T,)``.
        """
        if calls not in self._means:
            if len(self._means) >= MEANS:
                self._means.clear()
            kind: dict[str, Any] = {"dtype": torch.float64, "device": device}
            blocks = torch.tensor([block for block, count, _ in calls for _ in range(count)])
            each_one = [
                1.0 if biased else _TINY for _, count, biased in calls for _ in range(count)
            ]
            ones = torch.tensor(each_one, **kind)
            each = (blocks[:, None] == torch.tensor(self.ordered)).to(**kind)
            counts = each.sum(0)
            absent: Tensor | None = None
            if not bool((counts > 0).all()):
                absent = torch.where(counts > 0, 0.0, torch.nan).to(**kind)
            self._means[calls] = each / counts.clamp_min(1), absent, ones
        return self._means[calls]

    def _find_axes(self, few: Inputs) -> list[int]:
        size = batch_size(few)
        together = self._pass(few)[0]
        alone = [self._pass(take(few, i, i + 1, size))[0] for i in range(size)]
        if any(len(a) != len(together) for a in alone):
            return []
        axes = []
        for number, call in enumerate(together):
            values, singles = call.directions, [a[number].directions for a in alone]
            want = torch.stack([one.sum() for one in singles])
            if all(_shared(one, values) for one in singles):
                axes.append(SHARED)
                continue
            for axis in (0, 1):
                if _fits(call.lead, axis, size) and torch.allclose(
                    _split(values, call.lead, axis, size).sum(1), want, rtol=1e-2, atol=1e-12
                ):
                    axes.append(axis)
                    break
            else:
                return []
        return axes


def _shared(one: Tensor, values: Tensor) -> bool:
    """Whether a call is the same for a batch and an example alone: what does not depend on the example."""
    return one.shape == values.shape and bool(torch.allclose(one, values, rtol=1e-4))


def _fits(lead: torch.Size, axis: int, size: int) -> bool:
    """Whether inputs ``(*lead)`` can have ``size`` examples on ``axis``, or on the first in whole pieces."""
    if axis == SHARED:
        return True
    if len(lead) <= axis or not lead.numel():
        return False
    return lead[axis] % size == 0 if axis == 0 else lead[axis] == size


def _split_vectors(values: Tensor, axis: int, size: int) -> Tensor:
    """``(*lead, I)`` with the examples, which are on ``axis``, in front."""
    if axis == SHARED:
        return values.reshape(1, -1, values.shape[-1]).expand(size, -1, -1)
    return values if axis == 0 else values.movedim(1, 0)


def _split(values: Tensor, lead: torch.Size, axis: int, size: int) -> Tensor:
    """``(*lead)`` as ``(B, T)`` with the examples on ``axis``."""
    if axis == SHARED:
        return values.reshape(1, -1).expand(size, -1)
    if axis == 0:
        return values.reshape(size, -1)
    return values.reshape(lead).movedim(1, 0).reshape(size, -1)
