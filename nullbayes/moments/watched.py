"""Layers in the place of layers: each works out leverages of what it receives while it gives what the other gives."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nullbayes.errors import ModelError
from nullbayes.moments.blocks import Blocks, Site
from nullbayes.moments.convolution import ConvInputs, middles, padded
from nullbayes.moments.recurrent import mapped, single, steps_seen, weights_of
from nullbayes.moments.rule import InputRule, argument
from nullbayes.moments.traced import Call, Done, Probe, Put, Tape


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


class WatchedLinear(Watched):
    """``nn.Linear``: its input is that of the weight."""

    def watch(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Put the leverages of one call on the tape."""
        [(place, number)] = self.places.values()
        probe = self.probes[place]
        assert isinstance(probe, Probe)
        self.tape.add(number, probe.of_one(argument(args, kwargs, 0, "input")))


class WatchedConvolution(Watched):
    """Leverages at some positions by a convolution of its own, whose stride skips the others."""

    def watch(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Put the leverages of one call on the tape."""
        layer: Any = self.layer
        [(place, number)] = self.places.values()
        probe = self.probes[place]
        assert isinstance(probe, Probe)
        spatial = len(layer.kernel_size)
        x = argument(args, kwargs, 0, "input")
        x = (x if x.ndim == spatial + 2 else x.unsqueeze(0)).to(probe.root.dtype)
        x, strides = self._cut(x, middles(out.shape[-spatial:], self.positions))
        groups, k, _ = probe.root.shape
        convolve = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
        options = {"dilation": layer.dilation, "groups": groups}
        weight = probe.root.reshape(groups * k, -1, *layer.kernel_size)
        along = convolve(x, weight, probe.shift.flatten(), strides, **options)
        ones = torch.ones(groups, 1, *layer.kernel_size, dtype=x.dtype, device=x.device)
        if groups == 1:
            sizes = convolve(x.square().sum(1, keepdim=True), ones, None, strides, **options)
            along = torch.linalg.vector_norm(along, dim=1, keepdim=True).square()
            self.tape.add(number, Done(probe.values(sizes, along), probe.whole(sizes)))
            return
        squares = x.square().unflatten(1, (groups, -1)).sum(2)
        sizes = convolve(squares, ones, None, strides, **options).sqrt()
        along = torch.linalg.vector_norm(along.unflatten(1, (groups, k)), dim=2)
        self.tape.add(number, Call(probe, sizes.movedim(1, -1), along.movedim(1, -1)))

    def _cut(self, x: Tensor, cuts: list[tuple[int, int, int]]) -> tuple[Tensor, list[int]]:
        """The padded input from its first position on, and strides from one position to the next."""
        layer: Any = self.layer
        begins = [cut[0] * stride for cut, stride in zip(cuts, layer.stride, strict=True)]
        strides = [cut[1] * stride for cut, stride in zip(cuts, layer.stride, strict=True)]
        if layer.padding_mode == "zeros":
            amounts = list(layer._reversed_padding_repeated_twice)
        else:
            x, amounts = padded(layer, x), [0] * (2 * len(cuts))
        for axis, begin in enumerate(reversed(begins)):  # the last axis comes first there
            amounts[2 * axis] -= begin
        return (F.pad(x, amounts) if any(amounts) else x), strides


def _continued(before: Call | Done | Put, more: Call | Done | Put) -> Call | Done:
    before, more = (part.call() if isinstance(part, Put) else part for part in (before, more))
    if isinstance(before, Call) and isinstance(more, Call):
        size, along = (torch.cat(p) for p in ((before.size, more.size), (before.along, more.along)))
        return Call(before.probe, size, along, before.times)
    found = torch.cat([before.values(), more.values()])
    return Done(found, torch.cat([before.plain(), more.plain()]) / found)


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
    if type(layer).forward is nn.Linear.forward:
        return WatchedLinear
    if isinstance(layer, nn.RNNBase):
        return WatchedRecurrent
    return WatchedAttention if isinstance(layer, nn.MultiheadAttention) else Watched
