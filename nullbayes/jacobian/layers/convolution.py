"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nullbayes.jacobian.layers.rule import Contribution, LayerRule, Outer, Rows, register


def patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    positions: Sequence[int],
) -> Tensor:
    """What each kernel tap sees: ``(N, Ch, *space)`` -> ``(N, Ch, K, *positions)``.

    Tap ``k`` at position ``p`` reads ``x[p * stride + k * dilation]``; ``x`` is already padded.
    One strided slice per tap, for any number of spatial axes.
    """
    taps = []
    for tap in itertools.product(*(range(k) for k in kernel)):
        cut = [slice(None), slice(None)] + [
            slice(t * d, t * d + s * (n - 1) + 1, s)
            for t, d, s, n in zip(tap, dilation, stride, positions, strict=True)
        ]
        taps.append(x[tuple(cut)])
    return torch.stack(taps, dim=2)


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvRule(LayerRule):
    """Stride, dilation, groups and every padding mode; positions are tokens."""

    def contributions(self, module: Any, x: Tensor, g: Tensor) -> Iterator[Contribution]:
        # PyTorch keeps the amount of padding per side, last axis first, also for "same".
        amount = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = pad(x, amount, mode=mode)
        groups, positions = module.groups, g.shape[3:]
        seen = patches(x, module.kernel_size, module.stride, module.dilation, positions)
        n = x.shape[0]
        a = seen.reshape(n, groups, -1, positions.numel()).permute(0, 3, 1, 2)
        grads = g.reshape(g.shape[0], n, groups, -1, positions.numel()).permute(0, 1, 4, 2, 3)
        yield Outer("weight", a, grads, None if module.bias is None else "bias")


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeRule(LayerRule):
    """The adjoint of a convolution: patches are taken of the output's gradient."""

    def contributions(self, module: Any, x: Tensor, g: Tensor) -> Iterator[Contribution]:
        c, n = g.shape[:2]
        positions, groups = x.shape[2:], module.groups
        # Tap k of input position p writes output p*stride + k*dilation - padding. The last taps may
        # fall outside the output (then their gradient is zero), hence the padding on the far side.
        amount: list[int] = []
        for p, s, d, k, size, out in reversed(
            list(
                zip(
                    module.padding,
                    module.stride,
                    module.dilation,
                    module.kernel_size,
                    positions,
                    g.shape[3:],
                    strict=True,
                )
            )
        ):
            reach = (size - 1) * s + (k - 1) * d + 1 - p
            amount += [p, max(0, reach - out)]
        flat = pad(g.reshape(c * n, *g.shape[2:]), amount)
        seen = patches(flat, module.kernel_size, module.stride, module.dilation, positions)
        taps = seen.shape[2]
        count = positions.numel()
        grads = seen.reshape(c, n, groups, -1, taps, count).permute(0, 1, 5, 2, 3, 4)
        a = x.reshape(n, groups, -1, count).permute(0, 3, 1, 2)
        yield Outer("weight", a, grads.flatten(4), transposed=True)
        if module.bias is not None:
            yield Rows("bias", g.flatten(3).sum(3))
