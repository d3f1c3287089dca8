"""Heads of distilled modules: from what layers of a network received to logarithms of novelty and variance.

:class:`Head` is two small matrices with a hinge between them, and nothing else: for a small network, what counts is the
number of operations. :class:`KernelHead` is for networks that read texts: they are large, their features are many and
the texts few, of which a hinge learns too much by heart. Logarithms, since novelty ranges over orders of magnitude, and
its order is what is asked for.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

# Hidden units of the head; steps, examples of each, step size and decay of its weights as it is fitted; noise on its
# inputs meanwhile, in their standard deviations.
HIDDEN, STEPS, AT_ONCE, RATE, DECAY, BLUR = 64, 3000, 128, 3e-3, 0.1, 0.05
# How far above what it was fitted to its answers may go: a factor of twenty.
MARGIN = 3.0
SMALL = 1e-6
# Examples at most that a kernel compares with, and of those that choose its width and noise.
ANCHORS, CHOOSING = 2048, 512
# Widths, as multiples of the median squared distance, and variances of the noise, as shares of the kernel's. With less
# noise, large weights of both signs leave of float32 too little.
WIDTHS, NOISES = (0.3, 1.0, 3.0, 10.0), (1e-2, 3e-2, 0.1, 0.3, 1.0)
# What a kernel says of an input far from all that it was fitted to: this quantile of their answers.
FAR = 0.9


class Head(nn.Module):
    """Features ``(B, d)`` to ``(B, 2)``: logarithms of novelty and variance.

    Made of the features of several layers, each ``(N, d_k)``, of the examples that it is fitted to, and ``targets (N,
    2)``.
    """

    first: Tensor
    shift: Tensor
    second: Tensor
    offset: Tensor
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
            "first": first.T,
            "shift": shift - first @ mean,
            "second": second.T * spread,
            "offset": offset * spread + middle,
            "high": targets.double().cpu().amax(0) + MARGIN,
        }.items():
            self.register_buffer(name, value.to(features[0]).contiguous())

    def forward(self, features: Tensor) -> Tensor:
        # Each look-up of an attribute of a module takes a tenth of the time of a small product.
        held = cast("dict[str, Tensor]", self._buffers)
        hidden = torch.relu_(torch.addmm(held["shift"], features, held["first"]))
        found = torch.addmm(held["offset"], hidden, held["second"])
        return torch.minimum(found, held["high"])


class KernelHead(nn.Module):
    """The same by a Gaussian process: examples that are near have like answers, and far from all the answer is high.

    The kernel is ``exp(-d² / w)``. Features are standardised and each layer counts alike, however many it has. Width
    and noise are those with the least leave-one-out error of both answers (Rasmussen & Williams 2006, section 5.4.2).
    """

    mean: Tensor
    scale: Tensor
    anchors: Tensor
    squares: Tensor
    weights: Tensor
    offset: Tensor

    def __init__(self, features: list[Tensor], targets: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        x, y = torch.cat(features, 1).double().cpu(), targets.double().cpu()
        order = torch.randperm(len(x), generator=generator)[:ANCHORS]
        mean, scale = x.mean(0), x.std(0).clamp_min(SMALL * float(x.std()) + 1e-30)
        wide = [t.shape[1] ** 0.5 for t in features for _ in range(t.shape[1])]
        scale = scale * torch.tensor(wide, dtype=torch.float64)
        offset = y.quantile(FAR, dim=0)
        x, y = ((x - mean) / scale)[order], (y - offset)[order]
        width, noise = _chosen(x[:CHOOSING], y[:CHOOSING])
        kernel = torch.exp(-_squares(x) / width)
        kernel.diagonal().add_(noise)
        anchors = x / width**0.5
        for name, value in {
            "mean": mean,
            "scale": scale * width**0.5,
            "anchors": anchors.T,
            "squares": anchors.square().sum(1),
            "weights": torch.linalg.solve(kernel, y),
            "offset": offset,
        }.items():
            self.register_buffer(name, value.to(features[0]).contiguous())

    def forward(self, features: Tensor) -> Tensor:
        x = (features - self.mean) / self.scale
        apart = x.square().sum(1, keepdim=True) + self.squares - 2 * (x @ self.anchors)
        return torch.exp(-apart.clamp_min(0)) @ self.weights + self.offset


def _squares(x: Tensor) -> Tensor:
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()


def _chosen(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Width and noise of the kernel for ``x (N, d)`` and ``y (N, 2)``, by the leave-one-out error in closed form."""
    apart, best = _squares(x), (float("inf"), 1.0, 1.0)
    middle = float(apart[apart > 0].median()) if bool((apart > 0).any()) else 1.0
    for width in (w * middle for w in WIDTHS):
        values, vectors = torch.linalg.eigh(torch.exp(-apart / width))
        turned = vectors.T @ y
        for noise in NOISES:
            inverse = 1 / (values.clamp_min(0) + noise)
            errors = (vectors @ (inverse[:, None] * turned)) / (vectors.square() @ inverse)[:, None]
            error = float((errors.square().mean(0) / y.var(0).clamp_min(SMALL)).sum())
            best = min(best, (error, width, noise))
    return best[1], best[2]


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
