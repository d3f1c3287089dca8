"""Normalisation layers: ``y = x̂ · weight + bias``, with ``x̂`` recomputed from the input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nullbayes.jacobian.layers.rule import Contribution, LayerRule, Rows, register


def _channel_rows(module: Any, normed: Tensor, g: Tensor) -> Iterator[Contribution]:
    """Channels on axis 1 of ``normed (N, Ch, ...)``; all later axes are summed."""
    c, n, channels = g.shape[:3]
    if module.weight is not None:
        yield Rows("weight", (g * normed).reshape(c, n, channels, -1).sum(3))
    if module.bias is not None:
        yield Rows("bias", g.reshape(c, n, channels, -1).sum(3))


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
class BatchNormRule(LayerRule):
    """Evaluation mode only: the running statistics are constants."""

    def supports(self, module: Any) -> bool:
        return not module.training and module.running_mean is not None

    def contributions(self, module: Any, x: Tensor, g: Tensor) -> Iterator[Contribution]:
        normed = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
        yield from _channel_rows(module, normed, g)


@register(nn.GroupNorm)
class GroupNormRule(LayerRule):
    """Statistics of each group of channels of one example."""

    def contributions(self, module: Any, x: Tensor, g: Tensor) -> Iterator[Contribution]:
        yield from _channel_rows(module, F.group_norm(x, module.num_groups, eps=module.eps), g)


@register(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormRule(LayerRule):
    """Statistics of each channel of one example, or the running ones where they are tracked."""

    def contributions(self, module: Any, x: Tensor, g: Tensor) -> Iterator[Contribution]:
        own = module.training or module.running_mean is None
        mean, var = (None, None) if own else (module.running_mean, module.running_var)
        normed = F.instance_norm(x, mean, var, use_input_stats=own, eps=module.eps)
        yield from _channel_rows(module, normed, g)


def _trailing_rows(module: Any, normed: Tensor, g: Tensor) -> Iterator[Contribution]:
    """Weights over the trailing axes ``normalized_shape``; all axes before them are tokens."""
    c, n = g.shape[:2]
    size = int(torch.Size(module.normalized_shape).numel())
    if module.weight is not None:
        yield Rows("weight", (g * normed).reshape(c, n, -1, size).sum(2))
    if getattr(module, "bias", None) is not None:
        yield Rows("bias", g.reshape(c, n, -1, size).sum(2))


@register(nn.LayerNorm)
class LayerNormRule(LayerRule):
    """Statistics over the trailing axes."""

    def contributions(self, module: Any, x: Tensor, g: Tensor) -> Iterator[Contribution]:
        yield from _trailing_rows(
            module, F.layer_norm(x, module.normalized_shape, eps=module.eps), g
        )


@register(nn.RMSNorm)
class RMSNormRule(LayerRule):
    """Root mean square over the trailing axes; no bias."""

    parameters = ("weight",)

    def contributions(self, module: Any, x: Tensor, g: Tensor) -> Iterator[Contribution]:
        yield from _trailing_rows(module, F.rms_norm(x, module.normalized_shape, eps=module.eps), g)
