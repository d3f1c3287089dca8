"""Leverages by plain modules: for graphs that run where no hook can, `torch.export` and ONNX.

Each layer that counts is wrapped in a module that calls it and works out the leverage of what it receives, as
:class:`nullbayes.moments.leverage.Leverage` does from hooks. A leverage is a quadratic form ``Σ_g b_g ‖a_g‖² ± ‖R_g
a_g‖²``: either with a root of ``(C + δ I)⁻¹`` written out, or, where few directions of ``C`` are as large as ``δ``,
with what these take away from ``1 / δ``, which costs as many products as there are such directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nullbayes.common.decompositions import eigh
from nullbayes.errors import ModelError
from nullbayes.moments.blocks import Block, Blocks
from nullbayes.moments.factor import Edge
from nullbayes.moments.leverage import WHOLE, Leverage
from nullbayes.moments.second import BlockMoments, DenseMoments

# Blocks with no more columns are scales and shifts, which do not count in a leverage score.
SCALARS = 2
# An edge below this share of the mean eigenvalue leaves too little of `1 / δ` for single precision.
SMALLEST_EDGE = 1e-3
# Inputs of a layer up to which calls are finished together: of more, one sum for all would be mostly of zeros.
MERGED = 512
# Directions, of all columns, from which on the whole root is cheaper.
MOST = 0.8


@dataclass(frozen=True)
class Form:
    """``s(a) = Σ_g base_g ‖a_g‖² + sign ‖root_g a_g‖²``: ``root (G, k, I)``, ``base (G,)``, float64."""

    root: Tensor
    base: Tensor
    sign: float

    @staticmethod
    def of(
        moments: BlockMoments, edge: Edge, columns: int, tolerance: float, scorer: Leverage
    ) -> Form:
        """``aᵀ (C + δ I)⁻¹ a`` within ``tolerance`` of itself; as ``scorer`` has it where that is not cheaper.

        Directions with an eigenvalue below ``tolerance · δ`` share that of their mean, so that each counts for
        ``1 / (δ + λ)`` to within that share.
        """
        assert moments.inputs is not None
        delta = edge.inputs.double()
        if isinstance(moments.inputs, DenseMoments):
            assert scorer.root is not None
            whole = Form(scorer.root.double(), torch.zeros_like(delta), 1.0)
            scale = moments.inputs.trace.mean() / columns
            narrow = bool((delta < SMALLEST_EDGE * scale).any())
            if narrow or not tolerance or columns > WHOLE:
                return whole
            values, directions = eigh(moments.inputs.values)
            values, directions = values.flip(1).clamp_min(0), directions.flip(2)
            kept = int((values > tolerance * delta[:, None]).sum(1).amax())
            if kept >= MOST * columns:
                return whole
            rest = values[:, kept:].mean(1)
            values, directions = values[:, :kept], directions[:, :, :kept]
        else:
            directions, values, rest = moments.inputs.spectrum()
        base = (delta + rest).reciprocal()
        taken = (base[:, None] - (delta[:, None] + values).reciprocal()).clamp_min(0)
        return Form(taken.sqrt()[..., None] * directions.mT, base, -1.0)


class Probe(nn.Module):
    """What the leverages of one weight's inputs need, in the precision of ``dtype``.

    Leverages are relative to squared sizes, the constant one of a bias included: ``(Σ_g base_g (‖a_g‖² + one) + sign
    ‖R_g a_g‖²) / (Σ_g ‖a_g‖² + one)``. Norms instead of squares are kept for long: graphs have an operation for them.
    """

    root: Tensor
    shift: Tensor
    base: Tensor

    def __init__(self, form: Form, block: Block, column: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        groups, k, _ = form.root.shape
        self.sign, self.one = form.sign, 0.0 if column is None else 1.0
        #: whether what it receives changes before the pass ends, so that its norms have to be taken at once
        self.early = False
        shift = form.root.new_zeros(groups, k)
        if column is not None:
            shift = form.root[:, :, block.own + column]
        root = form.root[:, :, : block.own]
        #: whether all groups have the same form, as those of queries, keys and values of self-attention have
        self.alike = groups > 1 and bool((root == root[:1]).all() and (shift == shift[:1]).all())
        self.register_buffer("root", root.to(dtype).contiguous())
        self.register_buffer("shift", shift.to(dtype).contiguous())
        self.register_buffer("base", form.base.to(dtype))

    def forward(self, a: Tensor) -> Call | Put:
        """Inputs ``(*lead, G, I)``."""
        a = a[..., : self.root.shape[2]].to(self.root.dtype)
        if len(self.root) == 1:
            return self.of_one(a.squeeze(-2))
        along = torch.einsum("...gi,gki->...gk", a, self.root) + self.shift
        return Call(self, norm(a), norm(along))

    def of_one(self, a: Tensor, groups: int = 1) -> Call | Put:
        """Inputs ``(*lead, I)`` that every one of ``groups`` groups, which are alike, receives."""
        a = a.to(self.root.dtype)
        # Of vectors a product takes the shift with it; of more axes it is an operation of its own, later one for many.
        shifted = a.ndim == 2
        along = F.linear(a, self.root[0], self.shift[0] if shifted else None)
        put = Put(self, a, along, groups, shifted)
        return put.call() if self.early or a.shape[-1] > MERGED else put

    def whole(self, sizes: Tensor) -> Tensor:
        """Squared sizes with the constant one of a bias, from squares ``‖a‖²``."""
        return sizes + self.one if self.one else sizes.clamp_min(torch.finfo(sizes.dtype).tiny)

    def values(self, sizes: Tensor, along: Tensor) -> Tensor:
        """Leverages over squared sizes, from squares ``‖a‖²`` and ``‖R a‖²`` of one group."""
        values = along / self.whole(sizes)
        return values if self.sign > 0 else self.base[0] - values


def norm(values: Tensor, *, keepdim: bool = False) -> Tensor:
    """Over the last axis."""
    return torch.linalg.vector_norm(values, dim=-1, keepdim=keepdim)


@dataclass(frozen=True)
class Call:
    """Norms ``‖a_g‖`` and ``‖R_g a_g‖ (*lead, G)`` of one call; ``times``: groups that one of them stands for."""

    probe: Probe
    size: Tensor
    along: Tensor
    times: int = 1

    def plain(self) -> Tensor:
        """Leverages ``(*lead)``, not over squared sizes."""
        sizes = self.times * self.size.square().sum(-1)
        return self.values() * self.probe.whole(sizes)

    def values(self) -> Tensor:
        """Leverages over squared sizes, ``(*lead)``."""
        probe, times = self.probe, self.times
        sizes, along = self.size.square(), self.along.square()
        if times == 1 and sizes.shape[-1] == 1:
            return probe.values(sizes, along).squeeze(-1)
        whole = times * sizes.sum(-1) + probe.one
        taken = probe.sign * times * along.sum(-1)
        if probe.sign < 0:
            base = probe.base[: self.size.shape[-1]]
            taken = taken + times * ((sizes + probe.one) * base).sum(-1)
        return taken / whole.clamp_min(torch.finfo(whole.dtype).tiny)


@dataclass(frozen=True)
class Put:
    """What one call received ``a (*lead, I)``, and the product ``R a (*lead, k)``, ``shifted`` or not yet."""

    probe: Probe
    a: Tensor
    along: Tensor
    times: int
    shifted: bool

    def call(self) -> Call:
        """Its norms."""
        sizes, along = norm(self.a, keepdim=True), norm(self.moved(), keepdim=True)
        return Call(self.probe, sizes, along, self.times)

    def moved(self) -> Tensor:
        """The product with what a constant one adds."""
        return self.along if self.shifted else self.along + self.probe.shift[0]

    def plain(self) -> Tensor:
        """Not over squared sizes."""
        return self.call().plain()

    def values(self) -> Tensor:
        """Leverages over squared sizes, ``(*lead)``."""
        return self.call().values()


class Merged(nn.Module):
    """Calls of different blocks on inputs of one kind, ``(B, I)`` each or ``(B, T, I)``, finished together.

    Numerators and denominators of all leverages are one product of squares that the calls left: of norms; of vectors,
    where that takes fewer operations, of the numbers themselves.

    Args:
        places: of the calls in the pass.
        calls: as one pass left them.
    """

    weights: Tensor
    added: Tensor
    signs: Tensor

    def __init__(self, places: Sequence[int], calls: Sequence[Put]) -> None:
        super().__init__()
        self.places, count = tuple(places), len(calls)
        self.vectors = calls[0].a.ndim == 2
        first = calls[0].probe.root
        weights = torch.eye(2 * count, dtype=first.dtype, device=first.device)
        added = first.new_full((2 * count,), torch.finfo(first.dtype).tiny)
        for i, call in enumerate(calls):
            probe, times = call.probe, call.times
            weights[i, i], weights[count + i, count + i] = probe.sign * times, times
            added[count + i] += probe.one
            if probe.sign < 0:
                weights[count + i, i] = times * probe.base[0]
                added[i] += times * probe.base[0] * probe.one
        if self.vectors:
            widths = [c.along.shape[-1] for c in calls] + [c.a.shape[-1] for c in calls]
            weights = weights.repeat_interleave(torch.tensor(widths, device=first.device), 0)
        #: whether numerators and denominators are other than the squares themselves
        self.weighs = self.vectors or not torch.equal(weights, torch.eye(2 * count).to(weights))
        signs = torch.cat([first.new_ones(count), -first.new_ones(count)])
        for name, value in (("weights", weights), ("added", added), ("signs", signs)):
            self.register_buffer(name, value)

    @staticmethod
    def key(call: Call | Done | Put) -> torch.Size | None:
        """The same for calls that one of these may finish; None: none may."""
        if not isinstance(call, Put) or call.a.ndim not in (2, 3):
            return None
        return call.a.shape[1:-1]

    def forward(self, calls: Sequence[Put]) -> Tensor:
        """Sums over the calls of their log mean leverages over squared sizes ``(B,)``."""
        parts = [call.moved() for call in calls] + [call.a for call in calls]
        if not self.vectors:
            parts = [norm(part, keepdim=True) for part in parts]
        joined = torch.cat(parts, -1)
        pairs = joined * joined
        pairs = (pairs @ self.weights if self.weighs else pairs) + self.added
        tiny = torch.finfo(pairs.dtype).tiny
        if pairs.ndim == 2:
            return pairs.clamp_min(tiny).log() @ self.signs
        above, below = pairs.split(len(calls), -1)
        return (above / below).mean(1).clamp_min(tiny).log().sum(1)


@dataclass(frozen=True)
class Done:
    """Leverages ``(*lead)`` that are finished already, of looked-up rows for one; over ``whole``, if given."""

    found: Tensor
    whole: Tensor | None = None

    def values(self) -> Tensor:
        return self.found

    def plain(self) -> Tensor:
        """Not over squared sizes."""
        return self.found if self.whole is None else self.found * self.whole


class RowProbe(nn.Module):
    """Leverages of rows that are looked up."""

    rows: Tensor

    def __init__(self, moments: BlockMoments, edge: Edge, dtype: torch.dtype) -> None:
        super().__init__()
        assert moments.rows is not None
        rows = (moments.rows.double() + edge.rows).reciprocal()
        self.register_buffer("rows", rows.to(dtype))

    def forward(self, index: Tensor) -> Done:
        """Indices ``(*lead)``."""
        return Done(self.rows[index.long()])


class Tape:
    """What one forward pass left, call by call, with the number of its block."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Call | Done | Put]] = []
        #: how often what each call received had been changed in place, where that is asked for
        self.versions: list[int] | None = None

    def add(self, number: int, call: Call | Done | Put) -> None:
        self.calls.append((number, call))
        if self.versions is not None:
            self.versions.append(call.a._version if isinstance(call, Put) else 0)

    def taken(self) -> list[tuple[int, Call | Done | Put]]:
        """What was added since the last time."""
        out, self.calls = self.calls, []
        return out


def probes_of(
    blocks: Blocks,
    sums: list[BlockMoments],
    edges: list[Edge],
    scorers: Sequence[Leverage],
    tolerance: float,
) -> dict[tuple[str, str], tuple[int, nn.Module]]:
    """Probes of all weights that count in a leverage score. Raises `ModelError` where there are none."""
    dtype = scorers[0].dtype
    forms: dict[int, Form] = {}
    out: dict[tuple[str, str], tuple[int, nn.Module]] = {}
    for site in blocks.sites:
        table = {read.weight: read.table for read in site.rule.reads(site.module)}
        for name, (number, column) in site.places.items():
            block = blocks.blocks[number]
            if block.columns <= SCALARS or not block.own:
                continue
            if table[name]:
                out[site.path, name] = number, RowProbe(sums[number], edges[number], dtype)
                continue
            if number not in forms:
                parts = sums[number], edges[number], block.columns, tolerance
                forms[number] = Form.of(*parts, scorers[number])
            out[site.path, name] = number, Probe(forms[number], block, column, dtype)
    if not out:
        raise ModelError(
            "no layer that takes part multiplies vectors, so there is no leverage to export; choose weights of linear "
            "layers or convolutions (`parameters=`)."
        )
    return out


def means(
    calls: Sequence[tuple[int, Call | Done | Put]], split: Callable[[int, Tensor], Tensor]
) -> dict[int, tuple[Tensor, Tensor]]:
    """By block: means over its inputs of leverages, and of those over squared sizes, ``(B,)`` float64 each.

    Args:
        split: as for :func:`scores`.
    """
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for i, (number, call) in enumerate(calls):
        pair = split(i, call.plain()), split(i, call.values())
        parts.setdefault(number, []).append(pair)
    return {
        number: (
            torch.cat([a for a, _ in some], 1).double().mean(1),
            torch.cat([b for _, b in some], 1).double().mean(1),
        )
        for number, some in parts.items()
    }


def scores(
    calls: Sequence[tuple[int, Call | Done | Put]],
    split: Callable[[int, Tensor], Tensor],
    merged: Iterable[Merged] = (),
) -> Tensor:
    """``Σ_l log mean_t s_l``: ``(B,)``.

    Args:
        split: what call number ``i`` left, ``(*lead)``, as ``(B, T)``.
        merged: what finishes some of the calls together.
    """
    finished: set[int] = set()
    found: list[Tensor] = []
    for group in merged:
        own = [calls[i][1] for i in group.places]
        puts = [call for call in own if isinstance(call, Put)]
        # No comparison of batch sizes: they may be symbols, which it would make numbers.
        alike = all(Merged.key(call) == Merged.key(own[0]) for call in own)
        if alike and len(puts) == len(own):
            found.append(group(puts))
            finished.update(group.places)
    parts: dict[int, list[Tensor]] = {}
    for i, (number, call) in enumerate(calls):
        if i not in finished:
            parts.setdefault(number, []).append(split(i, call.values()))
    means = [
        (some[0] if len(some) == 1 else torch.cat(some, 1)).mean(1, keepdim=True)
        for some in parts.values()
    ]
    if means:
        joined = means[0] if len(means) == 1 else torch.cat(means, 1)
        found.append(joined.clamp_min(torch.finfo(joined.dtype).tiny).log().sum(1))
    total = found[0]
    for more in found[1:]:
        total = total + more
    return total
