"""Frozen layers in half precision, computed in float32 without a float32 copy of their weights.

An adapter's network is mostly a frozen base. Rows are computed in float32, since in half precision they prove nothing;
a copy of the base in float32 would take twice the base's own memory. Here each product widens the weights of its layer
for its own length, and once more in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Product(torch.autograd.Function):
    """``x Wᵀ`` for ``x (*, in)`` and a frozen ``W (out, in)`` in half precision: only ``W`` itself is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return _Product.apply(grads[0], weight.t()), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        (weight,) = ctx.saved_tensors
        return None if tangents[0] is None else F.linear(tangents[0], weight.to(tangents[0].dtype))


def product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x Wᵀ + b`` in ``dtype``, for a frozen weight in half precision."""
    # Whoever watches the precision of results (``precision.py``) is to see that of the product, not of the weight.
    with torch._C.DisableTorchFunction():
        out: Tensor = _Product.apply(x.to(dtype), weight)
        return out if bias is None else out + bias.to(dtype)


class _Linear:
    """Stands in for a linear layer in a private copy of a model; its state is the layer's."""

    weight: Tensor
    bias: Tensor | None
    widened: torch.dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias, self.widened)


class _Transposed(_Linear):
    """The same for the transformers library's ``Conv1D``, whose weight is ``(in, out)``."""

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            weight = self.weight.t()
        return product(x, weight, self.bias, self.widened)


class _Embedding:
    """Rows are picked first and widened then."""

    weight: Tensor
    padding_idx: int | None
    widened: torch.dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return F.embedding(x, self.weight, self.padding_idx).to(self.widened)


def stand_in(module: nn.Module) -> type[nn.Module] | None:
    """The class of a module that computes with a frozen half-precision weight as it is; None: there is none."""
    kind = type(module)
    if kind is nn.Linear:
        return joined(_Linear, kind)
    if kind is nn.Embedding and getattr(module, "max_norm", None) is None:
        return joined(_Embedding, kind)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return joined(_Transposed, kind)
    return None


_MADE: dict[tuple[type, type], type[nn.Module]] = {}


def joined(ours: type, kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``kind`` with the forward pass of ``ours``; one of them, however often it is asked for."""
    if (ours, kind) not in _MADE:
        _MADE[ours, kind] = type(f"Frozen{kind.__name__}", (ours, kind), {})
    return _MADE[ours, kind]
