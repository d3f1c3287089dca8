"""Linear layers: ``y = x Wᵀ + b`` over the last axis; all axes before it are examples and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from nullbayes.moments.rule import InputRule, Layout, Read, Seen, argument, register


@register(nn.Linear)
class LinearInputs(InputRule):
    """``weight (O, I)``."""

    def reads(self, module: Any) -> tuple[Read, ...]:
        return (Read("weight", Layout(1, module.out_features, module.in_features), "bias"),)

    def inputs(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Iterator[Seen]:
        yield Seen("weight", argument(args, kwargs, 0, "input").unsqueeze(-2))


@register("transformers.pytorch_utils.Conv1D")
class TransposedLinearInputs(InputRule):
    """GPT-2's layer, which keeps its ``weight (I, O)`` the other way round."""

    def reads(self, module: Any) -> tuple[Read, ...]:
        inputs, outputs = module.weight.shape
        return (Read("weight", Layout(1, outputs, inputs, taps=1), "bias"),)

    def inputs(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Iterator[Seen]:
        yield Seen("weight", argument(args, kwargs, 0, "x").unsqueeze(-2))


@register(nn.Bilinear)
class BilinearInputs(InputRule):
    """``y_o = x₁ᵀ W_o x₂ + b_o``: the input of ``W`` read as ``(O, I₁ I₂)`` is the product ``x₁ x₂ᵀ``."""

    def reads(self, module: Any) -> tuple[Read, ...]:
        inputs = module.in1_features * module.in2_features
        return (Read("weight", Layout(1, module.out_features, inputs), "bias"),)

    def inputs(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Iterator[Seen]:
        first = argument(args, kwargs, 0, "input1")
        second = argument(args, kwargs, 1, "input2")
        product = first.unsqueeze(-1) * second.unsqueeze(-2)
        yield Seen("weight", product.flatten(-2).unsqueeze(-2))
