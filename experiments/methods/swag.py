"""SWAG: Maddox, Garipov, Izmailov, Vetrov, Wilson, *A simple baseline for Bayesian uncertainty*, NeurIPS 2019.

From the trained network SGD goes on at a constant learning rate; the mean of the weights after each epoch, their
diagonal variance and their last 20 deviations make a Gaussian. BatchNorm statistics are computed anew for each draw.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from experiments.methods.base import Case, Draws, Method, Tuned, Variant, network_outputs, tune
from experiments.tasks import Scale
from nullbayes.datasets import Split
from nullbayes.demo.training import SMALL, threads

RANK = 20
LEARNING_RATES = (1e-3, 1e-2, 5e-2)
MOMENTUM = 0.9
BATCHNORM_EXAMPLES = 1000
# Multiples of the covariance's standard deviation: SWAG's own is 1. The path is shorter than others because each value
# means as many passes as there are draws.
EXPONENTS = (-2.0, -1.0, 0.0, 0.5, 1.0, 1.5)
FINER = (-0.25, 0.25)


class Moments:
    """Running mean, mean square and last deviations of flat weight vectors ``(P,)``."""

    def __init__(self, rank: int = RANK) -> None:
        self.count = 0
        self.mean = torch.zeros(0)
        self.square = torch.zeros(0)
        self.deviations: deque[Tensor] = deque(maxlen=rank)

    def add(self, weights: Tensor) -> None:
        weights = weights.detach().double()
        if not self.count:
            self.mean, self.square = torch.zeros_like(weights), torch.zeros_like(weights)
        self.count += 1
        self.mean = self.mean + (weights - self.mean) / self.count
        self.square = self.square + (weights.square() - self.square) / self.count
        # From the mean so far, as the paper's algorithm 1 has it.
        self.deviations.append(weights - self.mean)

    @property
    def diagonal(self) -> Tensor:
        """``(P,)`` variance of each weight over all that were added."""
        return (self.square - self.mean.square()).clamp_min(0)

    def changes(self, count: int, seed: int) -> Tensor:
        """``(count, P)`` draws around the mean, with covariance ``½ diag + ½ D Dᵀ / (K - 1)``."""
        generator = torch.Generator().manual_seed(seed)
        kept = torch.stack(list(self.deviations))  # (K, P)
        if len(kept) < 2:
            raise ValueError(f"SWAG needs two deviations at least, got {len(kept)}.")
        first = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)
        second = torch.randn(count, len(kept), generator=generator, dtype=torch.float64)
        low_rank = second @ kept / (2 * (len(kept) - 1)) ** 0.5
        return first * (self.diagonal / 2).sqrt() + low_rank


class SWAG(Method):
    """Weights drawn from the Gaussian; learning rate and scale chosen on validation data."""

    name = "swag"

    def build(self, case: Case) -> None:
        self.candidates = {
            rate: trajectory(
                case.network, case.train, case.task.loss, case.task.scale, rate, case.seed
            )
            for rate in LEARNING_RATES
        }

    def tune(self, case: Case) -> dict[str, Variant]:
        found: dict[float, Tuned] = {}
        for rate, moments in self.candidates.items():
            changes = moments.changes(case.samples, case.seed)

            def nll(values: list[float], m: Moments = moments, c: Tensor = changes) -> list[float]:
                return [self._nll(case, m, c, value) for value in values]

            found[rate] = tune(1.0, nll, EXPONENTS, FINER)
        rate = min(found, key=lambda r: min(found[r].path["nll"]))
        best, moments = found[rate], self.candidates[rate]
        changes = moments.changes(case.samples, case.seed)
        self.scales = {"swag": 1.0, "swag_tuned": best.value}
        self.drawn = {
            key: self._networks(case, moments, changes, scale) for key, scale in self.scales.items()
        }
        self.candidates = {rate: moments}
        self.details = {"learning_rate": rate, "snapshots": moments.count}
        return {
            "swag": Variant("SWAG, its own scale", "learning rate of its SGD", 1.0),
            "swag_tuned": Variant(
                "SWAG",
                "learning rate of its SGD, scale",
                best.value,
                headline=True,
                path=best.path,
            ),
        }

    def _nll(self, case: Case, moments: Moments, changes: Tensor, scale: float) -> float:
        outputs = [
            network_outputs(network, case.validation.inputs)
            for network in self._networks(case, moments, changes, scale)
        ]
        return case.nll(Draws(torch.stack(outputs)), case.validation.targets)

    def _networks(
        self, case: Case, moments: Moments, changes: Tensor, scale: float
    ) -> list[nn.Module]:
        made = []
        for change in changes:
            network = copy.deepcopy(case.network)
            flat = moments.mean + scale * change
            load(network, flat)
            refresh_batchnorm(network, case.train.inputs[:BATCHNORM_EXAMPLES])
            made.append(network)
        return made

    def batch(self, x: Tensor, only: Sequence[str]) -> dict[str, Draws]:
        return {
            key: Draws(torch.stack([network_outputs(network, x) for network in self.drawn[key]]))
            for key in only
        }


def trajectory(
    network: nn.Module,
    train: Split,
    loss: Callable[[Tensor, Tensor], Tensor],
    scale: Scale,
    rate: float,
    seed: int,
) -> Moments:
    """Moments of the weights after each epoch of SGD from the trained network on."""
    moving, moments = copy.deepcopy(network), Moments()
    moving.train()
    # Without weight decay: AdamW's is decoupled from the gradient and has no counterpart here.
    optimiser = torch.optim.SGD(moving.parameters(), lr=rate, momentum=MOMENTUM)
    order, size = torch.Generator().manual_seed(seed), scale.recipe.batch_size
    small = size * train.inputs[0].numel() < SMALL
    with threads(1 if small else torch.get_num_threads()):
        for _ in range(scale.collected):
            for index in torch.randperm(len(train), generator=order).split(size):
                optimiser.zero_grad()
                loss(moving(train.inputs[index]), train.targets[index]).backward()
                optimiser.step()
            flat = parameters_to_vector(moving.parameters())
            if not bool(flat.isfinite().all()):  # this rate is too high: keep what came before
                break
            moments.add(flat)
    return moments


def load(network: nn.Module, flat: Tensor) -> None:
    """Write a flat vector into the network's weights."""
    first = next(network.parameters())
    with torch.no_grad():
        vector_to_parameters(flat.to(first), network.parameters())


def refresh_batchnorm(network: nn.Module, inputs: Tensor) -> None:
    """Statistics of BatchNorm layers, averaged anew over ``inputs``; nothing where there are none."""
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average over batches
        layer.train()
    with torch.no_grad():
        for part in inputs.split(500):
            network(part)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
