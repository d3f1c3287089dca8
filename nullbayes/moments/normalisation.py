"""Scale and shift of normalisation layers: ``y = w x̂ + b``, for each channel a map of the two numbers ``(x̂, 1)``.

Two different values of ``x̂`` fix both, so these are free only where a channel is constant over all training data;
with a soft edge they have the closed-form posterior of a regression with one slope.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nullbayes.moments.rule import InputRule, Layout, Read, Seen, Summed, Summer, argument, register


def _each_channel(module: Any) -> tuple[Read, ...]:
    weight = getattr(module, "weight", None)
    if weight is None:
        return ()
    return (Read("weight", Layout(weight.numel(), 1, 1), "bias"),)


class _ChannelNorm(InputRule):
    """Channels on axis 1."""

    def reads(self, module: Any) -> tuple[Read, ...]:
        return _each_channel(module)

    def normed(self, module: Any, x: Tensor) -> Tensor:
        """``x̂``, of the shape of ``x (N, Ch, ...)``."""
        raise NotImplementedError

    def inputs(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Iterator[Seen]:
        x = self.normed(module, argument(args, kwargs, 0, "input"))
        yield Seen(
            "weight", x.flatten(2).transpose(1, 2).unsqueeze(-1) if x.ndim > 2 else x.unsqueeze(-1)
        )


class BatchNormSums(Summer):
    """Sums of the normalised input, channels on axis 1."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.squares: Tensor | None = None
        self.totals: Tensor | None = None
        self.count = 0

    def add(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
        x = _running(module, argument(args, kwargs, 0, "input")).to(self.dtype)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        squares = torch.linalg.vector_norm(x, dim=axes).double().square()
        totals = x.sum(axes).double()
        self.squares = squares if self.squares is None else self.squares + squares
        self.totals = totals if self.totals is None else self.totals + totals
        self.count += x.numel() // len(totals)
        return True

    def flush(self) -> Iterator[Summed]:
        if self.squares is not None and self.totals is not None:
            gram = self.squares[:, None, None]
            yield Summed("weight", gram, self.totals[:, None], self.count)
        self.squares = self.totals = None
        self.count = 0

    def mark(self) -> Tensor | None:
        return None if self.squares is None else self.squares.sum()


def _running(module: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
class BatchNormInputs(_ChannelNorm):
    """Evaluation mode only: the running statistics are constants."""

    def supports(self, module: Any) -> bool:
        return not module.training and module.running_mean is not None

    def normed(self, module: Any, x: Tensor) -> Tensor:
        return _running(module, x)

    def summer(self, module: Any, dtype: torch.dtype) -> Summer | None:
        return BatchNormSums(dtype)


@register(nn.GroupNorm)
class GroupNormInputs(_ChannelNorm):
    """Statistics of each group of channels of one example."""

    def normed(self, module: Any, x: Tensor) -> Tensor:
        return F.group_norm(x, module.num_groups, eps=module.eps)


@register(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormInputs(_ChannelNorm):
    """Statistics of each channel of one example, or the running ones where they are tracked."""

    def normed(self, module: Any, x: Tensor) -> Tensor:
        own = module.training or module.running_mean is None
        mean, var = (None, None) if own else (module.running_mean, module.running_var)
        if x.ndim < self._axes(module):  # a single example without its batch axis
            x = x.unsqueeze(0)
        return F.instance_norm(x, mean, var, use_input_stats=own, eps=module.eps)

    @staticmethod
    def _axes(module: Any) -> int:
        kinds = ((nn.InstanceNorm1d, 3), (nn.InstanceNorm2d, 4), (nn.InstanceNorm3d, 5))
        return next(axes for kind, axes in kinds if isinstance(module, kind))


class _TrailingNorm(InputRule):
    """Weights over the trailing axes ``normalized_shape``; all axes before them are examples and tokens."""

    def reads(self, module: Any) -> tuple[Read, ...]:
        return _each_channel(module)

    def normed(self, module: Any, x: Tensor) -> Tensor:
        """``x̂``, of the shape of ``x``."""
        raise NotImplementedError

    def inputs(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Iterator[Seen]:
        x = self.normed(module, argument(args, kwargs, 0, "input"))
        size = torch.Size(module.normalized_shape)
        yield Seen("weight", x.reshape(*x.shape[: x.ndim - len(size)], size.numel(), 1))


@register(nn.LayerNorm)
class LayerNormInputs(_TrailingNorm):
    """Statistics over the trailing axes."""

    def normed(self, module: Any, x: Tensor) -> Tensor:
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)


@register(nn.RMSNorm)
class RMSNormInputs(_TrailingNorm):
    """Root mean square over the trailing axes; no bias."""

    def normed(self, module: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, module.normalized_shape, eps=module.eps)
