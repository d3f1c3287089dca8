"""Recurrent layers and cells: the inputs of all steps for one weight, the hidden states before them for the other.

What enters the layer and what it remembers are asked to stand each by itself, so the biases ``bias_ih`` and ``bias_hh``
belong to one weight each. The projection of an LSTM with ``proj_size`` stays fixed: its input is seen by no one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from nullbayes.moments.rule import InputRule, Layout, Read, Seen, argument, register


@register(nn.RNN, nn.LSTM, nn.GRU)
class RecurrentInputs(InputRule):
    """Any number of layers, one direction or two, padded or packed."""

    def reads(self, module: Any) -> tuple[Read, ...]:
        out = []
        for layer in range(module.num_layers):
            for suffix in _directions(module):
                end = f"l{layer}{suffix}"
                for kind in ("ih", "hh"):
                    name = f"weight_{kind}_{end}"
                    rows, inputs = getattr(module, name).shape
                    out.append(Read(name, Layout(1, rows, inputs), f"bias_{kind}_{end}"))
        return tuple(out)

    def inputs(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Iterator[Seen]:
        x, state = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "hx")
        if not isinstance(x, PackedSequence) and x.ndim == 2:  # one example without its batch axis
            x = x.unsqueeze(0 if module.batch_first else 1)
            state = mapped(state, lambda t: t.unsqueeze(1))
        ways = len(_directions(module))
        for layer in range(module.num_layers):
            own = mapped(state, lambda t, at=layer * ways: t[at : at + ways])
            out = _single(module, layer, x, own)
            yield from steps_seen(module, layer, x, own, out)
            x = out


def steps_seen(module: Any, layer: int, x: Any, state: Any, out: Any) -> Iterator[Seen]:
    """Inputs of the weights of layer number ``layer``, from what it is given, its first state, and what it gives."""
    ways = _directions(module)
    steps, lengths = _padded(x, batch_first=module.batch_first)
    hidden, _ = _padded(out, batch_first=module.batch_first)
    first = _initial(module, state, steps.shape[1], hidden)
    for way, suffix in enumerate(ways):
        mine = hidden.chunk(len(ways), dim=-1)[way]
        before = _before(mine, first[way], lengths, reverse=bool(way))
        yield Seen(f"weight_ih_l{layer}{suffix}", _tokens(steps, lengths))
        yield Seen(f"weight_hh_l{layer}{suffix}", _tokens(before, lengths))


def _directions(module: Any) -> tuple[str, ...]:
    return ("", "_reverse") if module.bidirectional else ("",)


def mapped(state: Any, change: Any) -> Any:
    """``change`` of each tensor of a state: None, ``h`` or ``(h, c)``."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else change(state)
    return tuple(change(t) for t in state)


def _single(module: Any, layer: int, x: Any, state: Any) -> Any:
    """What layer number ``layer`` gives at all steps."""
    weights = weights_of(module, layer)
    one = single(module, weights["weight_ih_l0"].shape[1], torch.device("meta"))
    return torch.func.functional_call(one, weights, (x, state))[0]


def weights_of(module: Any, layer: int) -> dict[str, Tensor]:
    """The parameters of one layer by the names that they have in a module with one."""
    return {
        name.replace(f"_l{layer}", "_l0"): value
        for name, value in module.named_parameters()
        if name.endswith((f"_l{layer}", f"_l{layer}_reverse"))
    }


def single(module: Any, inputs: int, device: torch.device) -> Any:
    """A recurrent module like ``module`` with one layer and ``inputs`` numbers a step; without weights of its own."""
    kind = next(k for k in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(module, k))
    options = {"nonlinearity": module.nonlinearity} if kind is nn.RNN else {}
    if kind is nn.LSTM:
        options["proj_size"] = module.proj_size
    return kind(
        inputs,
        module.hidden_size,
        bias=module.bias,
        batch_first=module.batch_first,
        bidirectional=module.bidirectional,
        device=device,
        **options,
    )


def _padded(x: Any, *, batch_first: bool) -> tuple[Tensor, Tensor | None]:
    """Steps ``(T, B, d)`` and how many of them each sequence has ``(B,)``; None: all."""
    if isinstance(x, PackedSequence):
        steps, lengths = pad_packed_sequence(x)
        return steps, lengths.to(steps.device)
    return x.transpose(0, 1) if batch_first else x, None


def _initial(module: Any, state: Any, batch: int, like: Tensor) -> Tensor:
    """The hidden state before the first step ``(directions, B, H)``."""
    if state is None:
        width = module.proj_size or module.hidden_size
        return like.new_zeros(len(_directions(module)), batch, width)
    return state if isinstance(state, Tensor) else state[0]


def _before(hidden: Tensor, first: Tensor, lengths: Tensor | None, *, reverse: bool) -> Tensor:
    """The hidden state that each step starts from ``(T, B, H)``."""
    if not reverse:
        return torch.cat([first[None], hidden[:-1]])
    after = torch.cat([hidden[1:], first[None]])
    if lengths is None:
        return after
    last = torch.arange(len(hidden), device=hidden.device)[:, None] + 1 >= lengths
    return torch.where(last[..., None], first[None], after)


def _tokens(steps: Tensor, lengths: Tensor | None) -> Tensor:
    """``(B, T, 1, d)``; of sequences of different lengths, the steps that there are: ``(all, 1, d)``."""
    rows = steps.transpose(0, 1)
    if lengths is None:
        return rows.unsqueeze(-2)
    real = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
    return (rows if bool(real.all()) else rows[real]).unsqueeze(-2)


@register(nn.RNNCell, nn.LSTMCell, nn.GRUCell)
class CellInputs(InputRule):
    """One step of a recurrent layer."""

    def reads(self, module: Any) -> tuple[Read, ...]:
        return tuple(
            Read(name, Layout(1, *getattr(module, name).shape), name.replace("weight", "bias"))
            for name in ("weight_ih", "weight_hh")
        )

    def inputs(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Iterator[Seen]:
        x, state = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "hx")
        if state is None:
            hidden = x.new_zeros(*x.shape[:-1], module.hidden_size)
        else:
            hidden = state if isinstance(state, Tensor) else state[0]
        yield Seen("weight_ih", x.unsqueeze(-2))
        yield Seen("weight_hh", hidden.unsqueeze(-2))
