"""A posterior's novelty and variance by a small head on the network's own features: one plain module, one forward pass.

Features are what the last layers receive. The logarithm of a leverage, a quadratic form of them, is among the head's
inputs, since novelty is one to first order; so is what is left of them outside of the data's leading directions (Wang,
Li, Feng, Zhang: *ViM*, CVPR 2022). Random hinges (Rahimi & Recht, NIPS 2008) and ridge regression do the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nullbayes.common.decompositions import eigh
from nullbayes.errors import ModelError
from nullbayes.likelihood import Likelihood
from nullbayes.model.functional import Forward
from nullbayes.posterior.exported import Exported

NAMES = ("outputs", "novelty", "variance")
# Directions of a layer's input that the head sees one by one, random hinges, and the largest size of its inputs.
DIRECTIONS, HINGES, REACH = 48, 256, 10.0
# Ridge penalties that are tried, relative to the mean square of the head's inputs.
PENALTIES = tuple(10.0**e for e in range(-6, 3))
SMALL = 1e-6


class Seen:
    """What tapped layers received in this pass; no tensor attribute of a module, which a graph would have to keep."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def taken(self) -> list[Tensor]:
        out, self.values = self.values, []
        return out


class Tap(nn.Module):
    """Calls a layer, and notes its input, pooled to ``(B, d)``."""

    def __init__(self, inner: nn.Module, seen: Seen) -> None:
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen.values.append(pooled(x))
        return self.inner(x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the network asks of the layer itself, its `weight` say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def pooled(x: Tensor) -> Tensor:
    """``(B, d)`` as it is; of ``(B, channels, ...)`` the mean and the root mean square of each channel."""
    if x.ndim == 2:
        return x
    flat = x.flatten(2)
    return torch.cat(
        [flat.mean(2), torch.linalg.vector_norm(flat, dim=2) / flat.shape[2] ** 0.5], 1
    )


class Whitened(nn.Module):
    """Features of several layers ``(B, d_k)`` by the leading directions of the data in each, ``(B, D)``.

    With the logarithms of what these directions and the rest hold. All layers side by side, for one product: for a
    small network, what counts is the number of operations.
    """

    mean: Tensor
    scale: Tensor
    directions: Tensor
    held: Tensor
    member: Tensor
    length: Tensor

    def __init__(self, features: list[Tensor]) -> None:
        super().__init__()
        parts = [_leading(x.double()) for x in features]
        widths = torch.tensor([x.shape[1] for x in features])
        member = torch.block_diag(*[torch.ones(1, int(w)) for w in widths])  # (L, d)
        along = torch.block_diag(*[torch.ones(1, len(values)) for *_, values in parts])
        held = torch.block_diag(*[values[None] for *_, values in parts])
        count = along.sum(1)
        for name, value in {
            "mean": torch.cat([mean for mean, *_ in parts]),
            "scale": torch.cat([1 / scale for _, scale, *_ in parts]),
            "directions": torch.block_diag(*[d.T / v.sqrt()[:, None] for *_, d, v in parts]),
            "member": member,
            # Of squares along directions: their mean, and what they take of a vector's squared length.
            "held": torch.cat([along / count[:, None], held]),
            "length": widths,
        }.items():
            self.register_buffer(name, value.to(features[0]).contiguous())

    def forward(self, features: list[Tensor]) -> Tensor:
        x = (torch.cat(features, 1) - self.mean) * self.scale
        y = nn.functional.linear(x, self.directions)
        size, held = nn.functional.linear(y * y, self.held).chunk(2, 1)
        rest = (nn.functional.linear(x * x, self.member) - held) / self.length
        logs = torch.cat([size, rest], 1).clamp_min(SMALL).log()
        return torch.cat([y, logs], 1).clamp(-REACH, REACH)


def _leading(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and scale ``(d,)``, leading directions ``(d, k)`` and their variances ``(k,)`` of ``x (N, d)``."""
    mean, scale = x.mean(0), x.std(0).clamp_min(SMALL * float(x.std()) + 1e-30)
    x = (x - mean) / scale
    values, directions = eigh(x.T @ x / len(x))
    kept = min(DIRECTIONS, len(values), max(1, len(x) // 8))
    return mean, scale, directions.flip(1)[:, :kept], values.flip(0)[:kept].clamp_min(SMALL)


class Head(nn.Module):
    """``(B, d_k)`` of several layers to ``(B, 2)``: logarithms of novelty and variance.

    Args:
        features: of the examples that it is fitted to; ``targets (N, 2)``.
    """

    hinge: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, features: list[Tensor], targets: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.whitened = Whitened(features)
        z = self.whitened(features)
        k = z.shape[1]
        hinge = torch.randn(HINGES, k, generator=generator, dtype=torch.float64) / k**0.5
        shift = torch.randn(HINGES, generator=generator, dtype=torch.float64)
        self.register_buffer("hinge", hinge.to(z))
        self.register_buffer("shift", shift.to(z))
        design = self._design(z).double()
        mean, wanted = design.mean(0), targets.double()
        weight = _ridge(design - mean, wanted - wanted.mean(0))
        self.register_buffer("weight", weight.T.to(z).contiguous())
        self.register_buffer("bias", (wanted.mean(0) - mean @ weight).to(z))
        margin = 3.0  # a factor of twenty beyond what was seen
        self.register_buffer("low", (wanted.amin(0) - margin).to(z))
        self.register_buffer("high", (wanted.amax(0) + margin).to(z))

    def _design(self, z: Tensor) -> Tensor:
        return torch.cat([z, torch.relu(nn.functional.linear(z, self.hinge, self.shift))], 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        found = nn.functional.linear(self._design(self.whitened(features)), self.weight, self.bias)
        return torch.minimum(torch.maximum(found, self.low), self.high)


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """Weights ``(d, t)`` of centred ``x (N, d)``, ``y (N, t)``, by the penalty with the least leave-one-out error."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    along, unit = u.T @ y, float(s.square().mean())
    best, found = float("inf"), vh.T @ (along * 0)
    for penalty in PENALTIES:
        shrink = s.square() / (s.square() + penalty * unit + 1e-300)
        leverage = (u.square() * shrink).sum(1) + 1 / len(x)
        left = (y - u @ (shrink[:, None] * along)) / (1 - leverage).clamp_min(1e-3)[:, None]
        error = float(left.square().mean())
        if error < best:
            best, found = error, vh.T @ ((shrink / s.clamp_min(1e-150))[:, None] * along)
    return found


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
        self.head: Head | None = None
        self.taps = 0
        self.fidelity: Any = None
        self.output_names = NAMES

    def features(self, given: Any) -> tuple[Tensor, list[Tensor]]:
        """The network's outputs, and what its tapped layers received, each ``(B, d)``."""
        self.seen.taken()  # of a pass that failed
        outputs = self._called(self.network, given)
        found = self.seen.taken()
        if self.taps and len(found) != self.taps:
            raise ModelError(
                f"{len(found)} of the layers that the head looks at were called, and {self.taps} when it was fitted: "
                "a module that is distilled has to call the same layers on all inputs."
            )
        return outputs, [*found, outputs.flatten(1)]

    def forward(self, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Called as the network is (a mapping may come as one argument); or with what ``forward=`` takes."""
        given: Any = named or (inputs if len(inputs) != 1 else inputs[0])
        outputs, features = self.features(given)
        assert self.head is not None
        logs = self.head(features)
        return outputs, logs[:, 0].exp(), logs[:, 1].exp()
