"""Linear layers and lookup tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nullbayes.jacobian.layers.rule import (
    Contribution,
    LayerRule,
    Lookup,
    Outer,
    Rows,
    grad_tokens,
    register,
    tokens,
)


@register(nn.Linear)
class LinearRule(LayerRule):
    """``y = x Wᵀ + b`` over the last axis; all axes between it and the batch are tokens."""

    def contributions(self, module: nn.Linear, x: Tensor, g: Tensor) -> Iterator[Contribution]:
        bias = None if module.bias is None else "bias"
        yield Outer("weight", tokens(x).unsqueeze(2), grad_tokens(g).unsqueeze(3), bias)


@register("transformers.pytorch_utils.Conv1D")
class TransposedLinearRule(LayerRule):
    """``y = x W + b``: GPT-2's layer, which keeps its ``weight (I, O)`` the other way round."""

    def contributions(self, module: Any, x: Tensor, g: Tensor) -> Iterator[Contribution]:
        grads = grad_tokens(g)
        yield Outer("weight", tokens(x).unsqueeze(2), grads.unsqueeze(3), transposed=True)
        yield Rows("bias", grads.sum(2))


@register(nn.Embedding)
class EmbeddingRule(LayerRule):
    """Lookup of rows of a table. ``padding_idx`` receives no gradient, as in PyTorch."""

    parameters = ("weight",)

    def supports(self, module: nn.Embedding) -> bool:
        # Frequency scaling is a training trick, not a derivative: leave it to automatic
        # differentiation, where the probe will say what it does.
        return not module.scale_grad_by_freq

    def contributions(self, module: nn.Embedding, x: Tensor, g: Tensor) -> Iterator[Contribution]:
        index = x.reshape(x.shape[0], -1).long()
        if module.padding_idx is not None:
            index = torch.where(index == module.padding_idx, -1, index)
        yield Lookup("weight", index, grad_tokens(g))
