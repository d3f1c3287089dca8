"""Heads of distilled modules: from what layers of a network received to logarithms of novelty and variance.

The small one has few operations, the fine one follows with fewer examples. The logarithm of a leverage, a quadratic
form of features, is among the inputs of the latter, since novelty is one to first order; so is what is left of them
outside of the data's leading directions (Wang, Li, Feng, Zhang: *ViM*, CVPR 2022). Random hinges (Rahimi & Recht, NIPS
2008) and ridge regression do the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nullbayes.common.decompositions import eigh

# Directions of a layer's input that the head sees one by one, random hinges, and the largest size of its inputs.
DIRECTIONS, HINGES, REACH = 48, 256, 10.0
# Ridge penalties that are tried, relative to the mean square of the head's inputs.
PENALTIES = tuple(10.0**e for e in range(-6, 3))
# Hidden units of the head; steps, examples of each, step size and decay of its weights as it is fitted; noise on its
# inputs meanwhile, in their standard deviations.
HIDDEN, STEPS, AT_ONCE, RATE, DECAY, BLUR = 64, 4000, 128, 3e-3, 0.1, 0.05
# How far beyond what it was fitted to its answers may go: a factor of twenty.
MARGIN = 3.0
SMALL = 1e-6
# By how much more its novelty must be correlated for the fine head to be taken.
CLOSE = 0.02


class Head(nn.Module):
    """Features ``(B, d)`` to ``(B, 2)``: logarithms of novelty and variance.

    Made of the features of several layers, each ``(N, d_k)``, of the examples that it is fitted to, and ``targets (N,
    2)``.
    """


class SmallHead(Head):
    """Two small matrices with a hinge between them: for a small network, what counts is the number of operations."""

    first: Tensor
    shift: Tensor
    second: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, features: list[Tensor], targets: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        x, y = torch.cat(features, 1).double().cpu(), targets.double().cpu()
        mean, scale = x.mean(0), x.std(0).clamp_min(SMALL * float(x.std()) + 1e-30)
        middle, spread = y.mean(0), y.std(0).clamp_min(SMALL)
        x, y = (x - mean) / scale, (y - middle) / spread
        first, shift, second, offset = _fitted(x.float(), y.float(), generator)
        # What standardises the features and their answers is part of the two matrices.
        first = first / scale
        for name, value in {
            "first": first,
            "shift": shift - first @ mean,
            "second": second * spread[:, None],
            "offset": offset * spread + middle,
            "low": targets.double().cpu().amin(0) - MARGIN,
            "high": targets.double().cpu().amax(0) + MARGIN,
        }.items():
            self.register_buffer(name, value.to(features[0]).contiguous())

    def forward(self, features: Tensor) -> Tensor:
        hidden = torch.relu(nn.functional.linear(features, self.first, self.shift))
        found = nn.functional.linear(hidden, self.second, self.offset)
        return torch.clamp(found, self.low, self.high)


def _fitted(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Matrices and offsets of the head, float64, for standardised ``x (N, d)`` and ``y (N, 2)``."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    weights = [drawn(HIDDEN, x.shape[1]), torch.zeros(HIDDEN), drawn(2, HIDDEN), torch.zeros(2)]
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_()
        optimiser = torch.optim.AdamW(weights, RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
        order = torch.zeros(0, dtype=torch.long)
        for _ in range(STEPS):
            if len(order) < min(AT_ONCE, len(x)):
                order = torch.randperm(len(x), generator=generator)
            some, order = order[:AT_ONCE], order[AT_ONCE:]
            seen = x[some] + BLUR * torch.randn(len(some), x.shape[1], generator=generator)
            hidden = torch.relu(seen @ weights[0].T + weights[1])
            loss = (hidden @ weights[2].T + weights[3] - y[some]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return tuple(weight.detach().double() for weight in weights)


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

    def forward(self, features: Tensor) -> Tensor:
        x = (features - self.mean) * self.scale
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


class FineHead(Head):
    """Directions of the data one by one, logarithms of what they and the rest hold, random hinges, and a ridge."""

    hinge: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, features: list[Tensor], targets: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.whitened = Whitened(features)
        z = self.whitened(torch.cat(features, 1))
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
        self.register_buffer("low", (wanted.amin(0) - MARGIN).to(z))
        self.register_buffer("high", (wanted.amax(0) + MARGIN).to(z))

    def _design(self, z: Tensor) -> Tensor:
        return torch.cat([z, torch.relu(nn.functional.linear(z, self.hinge, self.shift))], 1)

    def forward(self, features: Tensor) -> Tensor:
        found = nn.functional.linear(self._design(self.whitened(features)), self.weight, self.bias)
        return torch.clamp(found, self.low, self.high)


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


def better(
    features: list[Tensor],
    targets: Tensor,
    kinds: Sequence[int],
    left_out: Sequence[int],
    generator: torch.Generator,
) -> type[Head]:
    """Which head follows better on kinds of examples that it was not fitted to; the small one where both do as well.

    Args:
        kinds: of each example; ``left_out``: those that judge here.
    """
    kind = torch.tensor(kinds)
    judges = torch.isin(kind, torch.tensor(left_out))
    # Some of those that it was fitted to as well: what is to be told from one another.
    asked = judges | (kind == 0)
    found = []
    for make in (SmallHead, FineHead):
        head = make([x[~judges] for x in features], targets[~judges], generator)
        with torch.no_grad():
            ours = head(torch.cat(features, 1)[asked])[:, 0]
        found.append(rank_correlation(ours.double(), targets[asked, 0].double()))
    return FineHead if found[1] > found[0] + CLOSE else SmallHead


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two vectors ``(N,)``; ties share their mean rank; zero where one of them is constant."""
    ranks = []
    for values in (a, b):
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        last = count.cumsum(0).double()
        mean = last - (count.double() - 1) / 2
        ranks.append(mean[place] - mean[place].mean())
    size = float(ranks[0].norm() * ranks[1].norm())
    return float(ranks[0] @ ranks[1]) / size if size > 0 else 0.0
