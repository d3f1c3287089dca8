"""Operations with derivatives of every order, in place of fused ones whose second derivative is the last, or wrong.

PyTorch's fused norms keep mean and scale from the forward pass and take them for constants in the derivative of their
second derivative: gradients of third order come out wrong in silence. Fused attention has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from nullbayes.common.switch import switch


class Mathematical(TorchFunctionMode):
    """Attention and transformer layers as the operations that they are made of, in this thread alone.

    Fused kernels have neither forward mode nor a derivative of their backward pass. A mode of this kind also keeps
    `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` off their fused path.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Separable(Mathematical):
    """The same, of `nn.MultiheadAttention` too, which calls its kernel out of a mode's sight.

    On a GPU the backward passes of fused kernels refuse what `is_grads_batched` makes of their saved tensors.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.multi_head_attention_forward and (kwargs or {}).get("need_weights") is False:
            # Asked for its weights, it writes attention out itself.
            return func(*args, **((kwargs or {}) | {"need_weights": True}))[0], None
        return super().__torch_function__(func, types, args, kwargs)


class _Smooth(Mathematical):
    """The same, and norms."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        norm = NORMS.get(func)
        if norm is not None:
            return norm(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


#: PyTorch's own switch for attention as the operations that it is made of.
written_out = switch(lambda: sdpa_kernel(SDPBackend.MATH))


@contextmanager
def smooth() -> Iterator[None]:
    """Within it, norms and attention have derivatives of every order.

    `nn.MultiheadAttention` calls its kernel out of a mode's sight, so PyTorch's own switch is set too, for the time.
    """
    with _Smooth(), written_out():
        yield


@contextmanager
def derivable(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it, a GPU uses no kernel that many cotangents at a time cannot be taken through; a CPU has none."""
    if device.type == "cpu":
        yield
        return
    # cuDNN's recurrent layers have a backward pass in training mode alone, and warn of weights in pieces.
    switched = torch.backends.cudnn.enabled and any(
        isinstance(part, nn.RNNBase) for part in module.modules()
    )
    try:
        if switched:
            torch.backends.cudnn.enabled = False
        with Separable() if torch.is_grad_enabled() else nullcontext():
            yield
    finally:
        if switched:
            torch.backends.cudnn.enabled = True


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """`scaled_dot_product_attention` by its mathematical kernel, which takes masks as numbers."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = zeros.masked_fill(attn_mask.logical_not(), -torch.inf)
    out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        *(query, key, value, attn_mask, *rest), **options
    )[0]
    return out


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    change = x - x.mean(dims, keepdim=True)
    return change * (change.square().mean(dims, keepdim=True) + eps).rsqrt()


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    return _scaled(_standardised(input, dims, eps), weight, bias)


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    least = torch.finfo(input.dtype).eps if eps is None else eps
    return _scaled(input * (input.square().mean(dims, keepdim=True) + least).rsqrt(), weight, None)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    grouped = input.reshape(len(input), num_groups, -1)
    out = _standardised(grouped, (2,), eps).reshape(input.shape)
    return _by_channel(out, weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        assert running_mean is not None and running_var is not None
        shape = (1, -1, *[1] * (input.ndim - 2))
        change = input - running_mean.reshape(shape)
        return _by_channel(change * (running_var.reshape(shape) + eps).rsqrt(), weight, bias)
    return _by_channel(_standardised(input, tuple(range(2, input.ndim)), eps), weight, bias)


def _by_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (1, -1, *[1] * (x.ndim - 2))
    parts = (None if t is None else t.reshape(shape) for t in (weight, bias))
    return _scaled(x, *parts)


NORMS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
}
