"""Maximise a function that is costly to evaluate: a network's posterior, beside a Gaussian process and chance.

    python -m examples.bayesian_optimisation [--small]

Each method starts from the same few random points and chooses the others one at a time, where the expected improvement
(its logarithm, Ament et al., NeurIPS 2023) of its model is largest. The network is trained anew on all points before
each choice; its model is a ``LaplacePosterior`` in ``nullbayes.botorch.PosteriorModel``. The Gaussian process is
BoTorch's ``SingleTaskGP``, chance draws uniformly. Regret is the maximum minus the best value found.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.model import Model
from botorch.optim import optimize_acqf
from botorch.test_functions import Ackley, Branin, Hartmann, SyntheticTestFunction
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor, nn

import nullbayes as nb
from examples import _common as common
from nullbayes.botorch import PosteriorModel

NOISE = 1e-3  # observation variance of standardised values; there is none, but rounding


@dataclass(frozen=True)
class Sizes:
    """Random points at first, points in all, repetitions, steps of training, and how an acquisition is optimised."""

    first: int = 8
    points: int = 30
    seeds: int = 5
    steps: int = 150
    first_seed: int = 20
    restarts: int = 4
    raw: int = 128


SMALL = Sizes(first=4, points=6, seeds=1, steps=50, restarts=1, raw=16)
FUNCTIONS: dict[str, Callable[[], SyntheticTestFunction]] = {
    "Branin (2)": lambda: Branin(negate=True),
    "Hartmann (3)": lambda: Hartmann(dim=3, negate=True),
    "Ackley (4)": lambda: Ackley(dim=4, bounds=[(-4.0, 6.0)] * 4, negate=True),
}
Maker = Callable[[Tensor, Tensor, Sizes], Model]


class Waves(nn.Module):
    """Random sines of the inputs (Rahimi & Recht, NeurIPS 2007): features that vary alike all over the unit cube."""

    def __init__(self, inputs: int, count: int = 128) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(inputs, count) / (0.4 * inputs**0.5))
        self.register_buffer("phase", 2 * math.pi * torch.rand(count))

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2) * (x @ self.weight + self.phase).sin()


def network(x: Tensor, y: Tensor, sizes: Sizes) -> Model:
    """A perceptron on waves, trained on all points, and its posterior."""
    net = nn.Sequential(Waves(x.shape[1]), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    optimiser = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=sizes.steps)
    for _ in range(sizes.steps):
        optimiser.zero_grad()
        (net(x) - y).square().mean().backward()
        optimiser.step()
        schedule.step()
    posterior = nb.LaplacePosterior(
        net.eval(), nb.Regression(NOISE), prior_precision=prior_precision(net, x, y)
    )
    return PosteriorModel(posterior.fit((x, y), num_samples=2, progress=False))


def prior_precision(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """From the values, as the amplitude of a Gaussian process: where ``yᵀ (J Jᵀ / α + σ²)⁻¹ y`` is their number.

    The evidence counts the size of the trained weights instead, and its prior is much wider here. The network has seen
    the values, so its features explain them with too small an amplitude: it is doubled.
    """
    rows = []
    for value in net(x).flatten():
        gradients = torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    gram = torch.stack(rows) @ torch.stack(rows).T
    alpha = float(gram.diagonal().mean())
    for _ in range(20):
        noise = alpha * NOISE * torch.eye(len(x), dtype=gram.dtype)
        alpha = len(x) / float(y.T @ torch.linalg.solve(gram + noise, y))
    return alpha / 4


def process(x: Tensor, y: Tensor, sizes: Sizes) -> Model:
    """BoTorch's Gaussian process with its default prior."""
    model = SingleTaskGP(x, y)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


METHODS: dict[str, Maker | None] = {"chance": None, "Gaussian process": process, "network": network}


def search(
    function: SyntheticTestFunction, maker: Maker | None, sizes: Sizes, seed: int
) -> list[float]:
    """Regret after each point. The first points depend on the seed alone."""
    torch.manual_seed(seed)
    low, high = function.bounds
    unit = torch.stack([torch.zeros_like(low), torch.ones_like(high)])
    x = torch.rand(sizes.first, function.dim, dtype=low.dtype)
    values = function(low + (high - low) * x)
    while len(x) < sizes.points:
        if maker is None:
            chosen = torch.rand(1, function.dim, dtype=low.dtype)
        else:
            y = ((values - values.mean()) / values.std())[:, None]
            acquisition = LogExpectedImprovement(maker(x, y, sizes), best_f=y.max())
            chosen = optimize_acqf(acquisition, unit, 1, sizes.restarts, sizes.raw)[0]
        x = torch.cat([x, chosen])
        values = torch.cat([values, function(low + (high - low) * chosen)])
    best = values.cummax(0).values
    return [function.optimal_value - v for v in best.tolist()]


def run(sizes: Sizes, functions: list[str] | None = None) -> dict[str, Any]:
    """Regrets by function, method and seed, after each point; seconds in all."""
    started = time.perf_counter()
    seeds = range(sizes.first_seed, sizes.first_seed + sizes.seeds)
    found: dict[str, Any] = {}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of BoTorch, about how its optimisers ended
        for name in functions or FUNCTIONS:
            found[name] = {
                method: [search(FUNCTIONS[name]().double(), maker, sizes, s) for s in seeds]
                for method, maker in METHODS.items()
            }
    return {"first": sizes.first, "regret": found, "seconds": time.perf_counter() - started}


def summary(figures: dict[str, Any]) -> str:
    """Median regret at the end, and in how many of the repetitions the network ends below the others."""
    rows = [["function", *METHODS, "better than chance", "better than the process"]]
    for name, found in figures["regret"].items():
        ends = {method: [curve[-1] for curve in curves] for method, curves in found.items()}
        cells = [f"{statistics.median(ends[m]):.2g}" for m in METHODS]
        for other in ("chance", "Gaussian process"):
            pairs = list(zip(ends["network"], ends[other], strict=True))
            cells.append(f"{sum(a < b for a, b in pairs)} of {len(pairs)}")
        rows.append([name, *cells])
    return common.table(rows) + f"\nseconds: {figures['seconds']:.0f}"


def main() -> None:
    """The command line."""
    chosen = common.options(__doc__)
    figures = run(SMALL if chosen.small else Sizes())
    common.write_figures("bayesian_optimisation", figures, chosen.out)
    print(summary(figures))


if __name__ == "__main__":
    main()
