"""Packed attention: queries, keys and values through one weight, and what the heads give through another.

``nn.MultiheadAttention`` hands its weights to one function and calls no module inside, so their inputs are taken
here: those of the projections are the arguments; that of ``out_proj`` is the output of the same call with the identity
in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nullbayes.moments.rule import InputRule, Layout, Read, Seen, argument, register


@register(nn.MultiheadAttention)
class AttentionInputs(InputRule):
    """``in_proj_weight (3E, E)`` or its three parts, and ``out_proj``. ``bias_k`` and ``bias_v`` stay fixed.

    Where keys and values have sizes of their own, the three parts share one bias, which stays fixed as well.
    """

    def reads(self, module: Any) -> tuple[Read, ...]:
        width = module.embed_dim
        out = Read("out_proj.weight", Layout(1, width, width), "out_proj.bias")
        if module._qkv_same_embed_dim:
            return (Read("in_proj_weight", Layout(3, width, width), "in_proj_bias"), out)
        sizes = (
            ("q_proj_weight", width),
            ("k_proj_weight", module.kdim),
            ("v_proj_weight", module.vdim),
        )
        return (*(Read(name, Layout(1, width, size)) for name, size in sizes), out)

    def inputs(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Iterator[Seen]:
        query, key, value = (
            argument(args, kwargs, i, name) for i, name in enumerate(("query", "key", "value"))
        )
        if module._qkv_same_embed_dim:
            # One input for the three, which is multiplied out once.
            if query is key and key is value:
                yield Seen("in_proj_weight", query.unsqueeze(-2).expand(*query.shape[:-1], 3, -1))
            elif query.shape == key.shape == value.shape:
                yield Seen("in_proj_weight", torch.stack((query, key, value), dim=-2))
            else:  # the three have different numbers of tokens: one at a time, the others at zero
                for place, x in enumerate((query, key, value)):
                    a = x.new_zeros(*x.shape[:-1], 3, x.shape[-1])
                    a[..., place, :] = x
                    yield Seen("in_proj_weight", a)
        else:
            for name, x in (
                ("q_proj_weight", query),
                ("k_proj_weight", key),
                ("v_proj_weight", value),
            ):
                yield Seen(name, x.unsqueeze(-2))
        weight = module.out_proj.weight
        identity = {
            "out_proj.weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        }
        if module.out_proj.bias is not None:
            identity["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
        heads = torch.func.functional_call(module, identity, args, kwargs)[0]
        yield Seen("out_proj.weight", heads.unsqueeze(-2))
