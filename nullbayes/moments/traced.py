"""Leverages by plain modules: for graphs that run where no hook can, `torch.export` and ONNX.

Each layer that counts is wrapped in a module that calls it and works out the leverage of what it receives, as
:class:`nullbayes.moments.leverage.Leverage` does from hooks. A leverage is a quadratic form ``Σ_g b_g ‖a_g‖² ± ‖R_g
a_g‖²``: either with a root of ``(C + δ I)⁻¹`` written out, or, where few directions of ``C`` are as large as ``δ``,
with what these take away from ``1 / δ``, which costs as many products as there are such directions.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nullbayes.errors import ModelError
from nullbayes.moments.blocks import Block, Blocks, Site
from nullbayes.moments.convolution import ConvInputs, middles, padded
from nullbayes.moments.factor import DenseFactor, Edge, factorise
from nullbayes.moments.recurrent import mapped, single, steps_seen, weights_of
from nullbayes.moments.rule import InputRule, argument
from nullbayes.moments.second import BlockMoments, DenseMoments

# Blocks with no more columns are scales and shifts, which do not count in a leverage score.
SCALARS = 2
# An edge below this share of the mean eigenvalue leaves too little of `1 / δ` for single precision.
SMALLEST_EDGE = 1e-3
# Directions, of all columns, from which on the whole root is cheaper.
MOST = 0.8


@dataclass(frozen=True)
class Form:
    """``s(a) = Σ_g base_g ‖a_g‖² + sign ‖root_g a_g‖²``: ``root (G, k, I)``, ``base (G,)``, float64."""

    root: Tensor
    base: Tensor
    sign: float

    @staticmethod
    def of(moments: BlockMoments, edge: Edge, columns: int, tolerance: float) -> Form:
        """``aᵀ (C + δ I)⁻¹ a`` within ``tolerance`` of itself.

        Directions with an eigenvalue below ``tolerance · δ`` share that of their mean, so that each counts for
        ``1 / (δ + λ)`` to within that share.
        """
        assert moments.inputs is not None
        delta = edge.inputs.double()
        zero = torch.zeros_like(delta)
        if isinstance(moments.inputs, DenseMoments):
            scale = moments.inputs.trace.mean() / columns
            values, directions = torch.linalg.eigh(moments.inputs.values)
            values, directions = values.flip(1).clamp_min(0), directions.flip(2)
            kept = int((values > tolerance * delta[:, None]).sum(1).amax())
            if kept >= MOST * columns or bool((delta < SMALLEST_EDGE * scale).any()):
                factor = factorise(BlockMoments(moments.inputs, None), edge, columns)
                assert isinstance(factor, DenseFactor)
                return Form(factor.root / delta.sqrt()[:, None, None], zero, 1.0)
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
        shift = form.root.new_zeros(groups, k)
        if column is not None:
            shift = form.root[:, :, block.own + column]
        root = form.root[:, :, : block.own]
        #: whether all groups have the same form, as those of queries, keys and values of self-attention have
        self.alike = groups > 1 and bool((root == root[:1]).all() and (shift == shift[:1]).all())
        self.register_buffer("root", root.to(dtype).contiguous())
        self.register_buffer("shift", shift.to(dtype).contiguous())
        self.register_buffer("base", form.base.to(dtype))

    def forward(self, a: Tensor) -> Call:
        """Inputs ``(*lead, G, I)``."""
        a = a[..., : self.root.shape[2]].to(self.root.dtype)
        if len(self.root) == 1:
            return self.of_one(a.squeeze(-2), 1)
        along = torch.einsum("...gi,gki->...gk", a, self.root) + self.shift
        return Call(self, norm(a), norm(along))

    def of_one(self, a: Tensor, groups: int) -> Call:
        """Inputs ``(*lead, I)`` that every one of ``groups`` groups, which are alike, receives."""
        a = a.to(self.root.dtype)
        along = F.linear(a, self.root[0], self.shift[0])
        return Call(self, norm(a).unsqueeze(-1), norm(along).unsqueeze(-1), groups)


def norm(values: Tensor) -> Tensor:
    """Over the last axis."""
    return torch.linalg.vector_norm(values, dim=-1)


@dataclass(frozen=True)
class Call:
    """Norms ``‖a_g‖`` and ``‖R_g a_g‖ (*lead, G)`` of one call; ``times``: groups that one of them stands for."""

    probe: Probe
    size: Tensor
    along: Tensor
    times: int = 1

    @property
    def lead(self) -> torch.Size:
        return self.size.shape[:-1]

    @property
    def simple(self) -> bool:
        """One group and one position an example: many of these can be finished at once."""
        return self.times == 1 and self.size.ndim == 2 and self.size.shape[1] == 1

    def values(self) -> Tensor:
        """Leverages over squared sizes, ``(*lead)``."""
        probe = self.probe
        sizes, along = self.size.square(), self.along.square()
        whole = self.times * sizes.sum(-1) + probe.one
        taken = probe.sign * self.times * along.sum(-1)
        if probe.sign < 0:
            base = probe.base[: self.size.shape[-1]]
            taken = taken + self.times * ((sizes + probe.one) * base).sum(-1)
        return taken / whole.clamp_min(torch.finfo(whole.dtype).tiny)


@dataclass(frozen=True)
class Rows:
    """Leverages ``(*lead)`` of rows that were looked up."""

    found: Tensor
    simple = False

    @property
    def lead(self) -> torch.Size:
        return self.found.shape

    def values(self) -> Tensor:
        return self.found


class RowProbe(nn.Module):
    """Leverages of rows that are looked up."""

    rows: Tensor

    def __init__(self, moments: BlockMoments, edge: Edge, dtype: torch.dtype) -> None:
        super().__init__()
        assert moments.rows is not None
        rows = (moments.rows.double() + edge.rows).reciprocal()
        self.register_buffer("rows", rows.to(dtype))

    def forward(self, index: Tensor) -> Rows:
        """Indices ``(*lead)``."""
        return Rows(self.rows[index.long()])


class Tape:
    """What one forward pass left, call by call, with the number of its block."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Call | Rows]] = []

    def add(self, number: int, call: Call | Rows) -> None:
        self.calls.append((number, call))

    def taken(self) -> list[tuple[int, Call | Rows]]:
        """What was added since the last time."""
        out, self.calls = self.calls, []
        return out


class Watched(nn.Module):
    """A layer, and the leverages of what it receives. For everybody else it is the layer: attributes are its own."""

    def __init__(
        self,
        layer: nn.Module,
        rule: InputRule,
        probes: Mapping[str, tuple[int, nn.Module]],
        tape: Tape,
        positions: int,
    ) -> None:
        super().__init__()
        self.layer, self.rule, self.tape, self.positions = layer, rule, tape, positions
        self.probes = nn.ModuleList([probe for _, probe in probes.values()])
        self.places = {name: (i, number) for i, (name, (number, _)) in enumerate(probes.items())}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives."""
        out = self.layer(*args, **kwargs)
        self.watch(args, kwargs, out)
        return out

    def watch(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Put the leverages of one call on the tape."""
        self.see(self.rule.thinned(self.layer, args, kwargs, out, self.positions))

    def see(self, inputs: Any) -> None:
        """Leverages of what a rule yields."""
        for seen in inputs:
            if seen.weight not in self.places:
                continue
            place, number = self.places[seen.weight]
            call = self.probes[place](seen.a if seen.index is None else seen.index)
            if seen.follows:  # the rest of a call that a rule took in parts
                call = _continued(self.tape.calls.pop()[1], call)
            self.tape.add(number, call)


class WatchedConvolution(Watched):
    """Leverages at some positions by a convolution of its own, whose stride skips the others."""

    def watch(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Put the leverages of one call on the tape."""
        layer: Any = self.layer
        spatial = len(layer.kernel_size)
        x = argument(args, kwargs, 0, "input")
        x = x if x.ndim == spatial + 2 else x.unsqueeze(0)
        x, strides = padded(layer, x), []
        cuts = middles(out.shape[-spatial:], self.positions)
        for axis, (start, step, count) in enumerate(cuts):
            stride, dilation = layer.stride[axis], layer.dilation[axis]
            begin = start * stride
            length = (count - 1) * step * stride + dilation * (layer.kernel_size[axis] - 1) + 1
            x = x.narrow(axis + 2, begin, length)
            strides.append(step * stride)
        [(place, number)] = self.places.values()
        probe = self.probes[place]
        assert isinstance(probe, Probe)
        groups, k, _ = probe.root.shape
        convolve = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
        x = x.to(probe.root.dtype)
        weight = probe.root.reshape(groups * k, -1, *layer.kernel_size)
        along = convolve(
            x, weight, probe.shift.flatten(), strides, dilation=layer.dilation, groups=groups
        )
        squares = x.square().unflatten(1, (groups, -1)).sum(2)
        ones = torch.ones(groups, 1, *layer.kernel_size, dtype=x.dtype, device=x.device)
        sizes = convolve(squares, ones, None, strides, dilation=layer.dilation, groups=groups)
        along = torch.linalg.vector_norm(along.unflatten(1, (groups, k)), dim=2)
        self.tape.add(number, Call(probe, sizes.sqrt().movedim(1, -1), along.movedim(1, -1)))


def _continued(before: Call | Rows, more: Call | Rows) -> Call | Rows:
    if isinstance(before, Call) and isinstance(more, Call):
        size, along = (torch.cat(p) for p in ((before.size, more.size), (before.along, more.along)))
        return Call(before.probe, size, along, before.times)
    return Rows(torch.cat([before.values(), more.values()]))


class WatchedAttention(Watched):
    """``nn.MultiheadAttention``, which hands ``out_proj`` to a function: here it gives what enters that layer."""

    def __init__(self, layer: Any, *rest: Any) -> None:
        super().__init__(layer, *rest)
        self.outer = copy.deepcopy(layer.out_proj)
        with torch.no_grad():
            layer.out_proj.weight.copy_(torch.eye(len(layer.out_proj.weight)))
            if layer.out_proj.bias is not None:
                layer.out_proj.bias.zero_()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives."""
        heads, weights = self.layer(*args, **kwargs)
        query, key, value = (argument(args, kwargs, i, n) for i, n in enumerate(_ARGUMENTS))
        layer: Any = self.layer
        packed = self.places.get("in_proj_weight")
        probe = None if packed is None else self.probes[packed[0]]
        if packed and isinstance(probe, Probe) and probe.alike and query is key and key is value:
            self.tape.add(packed[1], probe.of_one(query, len(probe.root)))
        else:
            one = layer._qkv_same_embed_dim and query.shape == key.shape == value.shape
            # The last that the rule yields is what enters `out_proj`, from a second call.
            self.see(itertools.islice(self.rule.inputs(layer, args, kwargs, None), 1 if one else 3))
        place = self.places.get("out_proj.weight")
        if place is not None:
            self.tape.add(place[1], self.probes[place[0]](heads.unsqueeze(-2)))
        return F.linear(heads, self.outer.weight, self.outer.bias), weights


class WatchedRecurrent(Watched):
    """Recurrent layers one after the other, each in a module of its own, so that all their steps are seen."""

    def __init__(self, layer: Any, *rest: Any) -> None:
        super().__init__(layer, *rest)
        self.singles = nn.ModuleList()
        for number in range(layer.num_layers):
            weights = weights_of(layer, number)
            first = weights["weight_ih_l0"]
            one = single(layer, first.shape[1], first.device).to(first.dtype)
            one.load_state_dict(weights)
            self.singles.append(one)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives."""
        layer: Any = self.layer
        x, state = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "hx")
        if isinstance(x, Tensor) and x.ndim == 2:
            raise ModelError(
                "a recurrent layer is called on one sequence without a batch axis, which has no exported form; call it "
                "on a batch."
            )
        ways = 2 if layer.bidirectional else 1
        ends = []
        for number, one in enumerate(self.singles):
            at = number * ways
            own = mapped(state, lambda t, at=at: t[at : at + ways])
            out, end = one(x, own)
            self.see(steps_seen(layer, number, x, own, out))
            ends.append(end)
            x = out
        if isinstance(layer, nn.LSTM):
            return x, tuple(torch.cat([end[i] for end in ends]) for i in range(2))
        return x, torch.cat(ends)


_ARGUMENTS = ("query", "key", "value")


def watched(
    model: nn.Module,
    blocks: Blocks,
    probes: Mapping[tuple[str, str], tuple[int, nn.Module]],
    tape: Tape,
    positions: int,
) -> nn.Module:
    """``model``, a private copy, with every layer that counts wrapped; changed in place and returned.

    Args:
        probes: by path of the module and local name of the weight, its block and its probe.
    """
    modules = dict(model.named_modules())
    wrapped: dict[int, Watched] = {}
    for site in blocks.sites:
        own = {name: probes[site.path, name] for name in site.places if (site.path, name) in probes}
        if own:
            layer = modules[site.path]
            kind = _kind_of(site, layer)
            wrapped[id(layer)] = kind(layer, site.rule, own, tape, positions)
    for module in list(modules.values()):
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused path calls no module
        for name, child in list(module._modules.items()):
            if id(child) in wrapped:
                module._modules[name] = wrapped[id(child)]
    return wrapped.get(id(model), model)


def _kind_of(site: Site, layer: nn.Module) -> type[Watched]:
    if isinstance(site.rule, ConvInputs):
        return WatchedConvolution
    if isinstance(layer, nn.RNNBase):
        return WatchedRecurrent
    return WatchedAttention if isinstance(layer, nn.MultiheadAttention) else Watched


def probes_of(
    blocks: Blocks,
    sums: list[BlockMoments],
    edges: list[Edge],
    dtype: torch.dtype,
    tolerance: float,
) -> dict[tuple[str, str], tuple[int, nn.Module]]:
    """Probes of all weights that count in a leverage score. Raises `ModelError` where there are none."""
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
                forms[number] = Form.of(*parts)
            out[site.path, name] = number, Probe(forms[number], block, column, dtype)
    if not out:
        raise ModelError(
            "no layer that takes part multiplies vectors, so there is no leverage to export; choose weights of linear "
            "layers or convolutions (`parameters=`)."
        )
    return out


def scores(calls: list[tuple[int, Call | Rows]], split: Callable[[int, Tensor], Tensor]) -> Tensor:
    """``Σ_l log mean_t s_l``: ``(B,)``.

    Args:
        split: what call number ``i`` left, ``(*lead)``, as ``(B, T)``.
    """
    several = Counter(number for number, _ in calls)
    simple: list[Call] = []
    totals: dict[int, Tensor] = {}
    counts: dict[int, Any] = {}
    for i, (number, call) in enumerate(calls):
        if isinstance(call, Call) and call.simple and several[number] == 1:
            simple.append(call)
            continue
        values = split(i, call.values())
        total = values.sum(1)
        totals[number] = totals[number] + total if number in totals else total
        counts[number] = counts.get(number, 0) + values.shape[1]
    parts = [total / counts[number] for number, total in totals.items()]
    means = [torch.stack(parts, 1)] if parts else []
    if simple:
        means.append(_together(simple))
    joined = torch.cat(means, 1)
    return joined.clamp_min(torch.finfo(joined.dtype).tiny).log().sum(1)


def _together(calls: list[Call]) -> Tensor:
    """Values of calls with one group and one position each, ``(B, L)``."""
    along = torch.cat([call.along for call in calls], 1).square()
    sizes = torch.cat([call.size for call in calls], 1).square()
    ones = along.new_tensor([call.probe.one for call in calls])
    signs = along.new_tensor([call.probe.sign for call in calls])
    base = torch.cat([call.probe.base for call in calls]) * (signs < 0)
    whole = (sizes + ones).clamp_min(torch.finfo(sizes.dtype).tiny)
    return base + along * signs / whole
