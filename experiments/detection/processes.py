"""Variances of Gaussian processes whose mean is the network: FMGP and GAPA."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.detection.base import BATCH, Given, Score, score
from experiments.methods.fixed_mean import Activations, FixedMean, Seen, total


@score
class FixedMeanProcess(Score):
    """Variance of the outputs, without what all have in common; its kernel is over the inputs, as in the paper."""

    name = family = "FMGP"
    source = "Ortega, Rodríguez-Santana, Hernández-Lobato, 2024"
    any_output = True

    def fit(self, given: Given) -> None:
        x = given.train.inputs
        places = x.flatten(1).cpu()
        seen = Seen(places, given.logits(x), given.train.targets, given.kind)
        self.process = FixedMean(seen, given.seed)

    def __call__(self, x: Tensor) -> Tensor:
        parts = x.flatten(1).cpu().split(BATCH)
        return torch.cat([total(self.process.covariance(part)) for part in parts])


@score
class GaussianActivations(Score):
    """Of the last activations before the head; see :class:`.Activations`."""

    name = family = "GAPA"
    source = "Bergna et al., 2026"
    any_output = True

    def fit(self, given: Given) -> None:
        self.given = given
        weight = given.head_here.weight
        self.process = Activations(given.train_features, weight, given.seed)

    def __call__(self, x: Tensor) -> Tensor:
        return self.process.share(self.given.features(x))
