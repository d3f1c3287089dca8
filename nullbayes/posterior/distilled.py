"""A posterior's novelty and variance by a small head on the network's own features: one plain module, one forward pass.

Features are what the last layers receive, of images the means over quarters, and of texts the mean of what the first
layer receives; `heads.py` says what is made of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nullbayes.errors import ModelError
from nullbayes.likelihood import Likelihood
from nullbayes.model.functional import Forward, as_tensor_output
from nullbayes.posterior.exported import Exported
from nullbayes.posterior.heads import Head, KernelHead

NAMES = ("outputs", "novelty", "variance")


_POOLS = {1: nn.functional.avg_pool1d, 2: nn.functional.avg_pool2d, 3: nn.functional.avg_pool3d}


def pooled(x: Tensor) -> Tensor:
    """``(B, d)`` as it is; of ``(B, channels, ...)`` the means over halves of each axis."""
    if x.ndim == 2:
        return x
    window = [max(1, length // 2) for length in x.shape[2:]]
    return _POOLS[x.ndim - 2](x, window, window).flatten(1)


class Seen:
    """What tapped layers received in this pass, ``(B, d)`` each: pooled at once, while a map is near at hand.

    No tensor attribute of a module, which a graph would have to keep.

    Attributes:
        mask: ``(B, T)``, which tokens are no padding; None where the batch does not say.
    """

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.mask: Tensor | None = None

    def tokens(self, x: Tensor) -> Tensor:
        """``(B, T, d)`` as the mean over tokens that are no padding."""
        if self.mask is None or self.mask.shape != x.shape[:2]:
            return x.mean(1)
        weight = self.mask.to(x.dtype).unsqueeze(1)
        return (weight @ x).squeeze(1) / weight.sum(2).clamp_min(1)


class Tap(nn.Module):
    """Calls a layer, and notes its input."""

    def __init__(self, inner: nn.Module, seen: Seen) -> None:
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens = x.ndim == 3 and isinstance(self.inner, nn.Linear)
        self.seen.values.append(self.seen.tokens(x) if tokens else pooled(x))
        return self.inner(x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the network asks of the layer itself, its `weight` say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class TappedLinear(nn.Linear):
    """Notes its input; without a module around it, whose call would take as long as a small layer."""

    seen: Seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.values.append(x if x.ndim == 2 else self.seen.tokens(x))
        return nn.functional.linear(x, self.weight, self.bias)


class TappedConv2d(nn.Conv2d):
    """Notes its input."""

    seen: Seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.values.append(pooled(x))
        return self._conv_forward(x, self.weight, self.bias)


_NOTING: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: TappedLinear,
    nn.Conv2d: TappedConv2d,
}


def tap(layer: nn.Module, seen: Seen) -> nn.Module:
    """``layer``, which nobody else uses, as it notes its inputs."""
    noting = _NOTING.get(type(layer))
    if noting is None or "forward" in vars(layer):
        return Tap(layer, seen)
    layer.__class__ = noting
    layer.__dict__["seen"] = seen
    return layer


class Distilled(Exported):
    """The network with its posterior's novelty, in one forward pass: ``module(x)`` gives ``outputs``, ``novelty (B,)``
    and ``variance (B,)``, the scores ``"information"`` and ``"variance"``. A copy, which the posterior does not need.

    Attributes:
        fidelity: how closely it follows the posterior on examples that it was not fitted to; None before that is known.
        output_names: of what it returns, in order; for ``torch.onnx.export(output_names=...)``.
    """

    def __init__(
        self,
        network: nn.Module,
        seen: Seen,
        likelihood: Likelihood,
        user_forward: Forward | None,
    ) -> None:
        super().__init__()
        self.network, self.seen = network, seen
        self.likelihood, self.user_forward = likelihood, user_forward
        self.head: Head | KernelHead | None = None
        # Whether one of the layers that the head looks at receives tokens.
        self.reads_tokens = False
        self.taps = 0
        self.fidelity: Any = None
        self.output_names = NAMES

    def features(self, given: Any) -> tuple[Tensor, list[Tensor]]:
        """The network's outputs, and what its tapped layers received, each ``(B, d)``, with the outputs."""
        seen = self.seen
        seen.values = []  # of a pass that failed
        # The short way: small networks take microseconds.
        short = self.user_forward is None and self.own_outputs is None
        if short and isinstance(given, Tensor) and self.likelihood.reading is None:
            outputs = as_tensor_output(self.network(given))
        else:
            seen.mask = given.get("attention_mask") if isinstance(given, Mapping) else None
            outputs = self._called(self.network, given)
        last = outputs if outputs.ndim == 2 else self._shortened(outputs)
        found, seen.values, seen.mask = seen.values, [], None
        if self.taps and len(found) != self.taps:
            raise ModelError(
                f"{len(found)} of the layers that the head looks at were called, and {self.taps} when it was fitted: "
                "a module that is distilled has to call the same layers on all inputs."
            )
        return outputs, [*found, last]

    def _shortened(self, outputs: Tensor) -> Tensor:
        """Outputs as a vector for each example: of texts, whose lengths differ, mean and root mean square of tokens."""
        if outputs.ndim == 1:
            return outputs.unsqueeze(1)
        if not self.reads_tokens:
            return outputs.flatten(1)
        spans = self.own_outputs is not None and self.own_outputs.kind == "questions"
        each = outputs.transpose(1, 2) if spans else outputs.flatten(2)
        return torch.cat([self.seen.tokens(each), self.seen.tokens(each.square()).sqrt()], 1)

    def forward(self, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Called as the network is (a mapping may come as one argument); or with what ``forward=`` takes."""
        given: Any = named or (inputs if len(inputs) != 1 else inputs[0])
        outputs, features = self.features(given)
        head = self.head
        assert head is not None
        # Not called as a module: that alone would take as long as one of its operations.
        novelty, variance = head.forward(torch.cat(features, 1)).exp_().unbind(1)
        return outputs, novelty, variance
