"""Variances of Gaussian processes whose mean is the network: FMGP and GAPA."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from experiments.detection.base import BATCH, Given, Score, score
from experiments.methods.fixed_mean import Activations, FixedMean, Seen, total


class _FixedMean(Score):
    """Variance of the outputs, without what all have in common."""

    family = "FMGP"
    source = "Ortega, Rodríguez-Santana, Hernández-Lobato, 2024"
    any_output = True
    of_features: ClassVar[bool]

    def fit(self, given: Given) -> None:
        self.given = given
        x = given.train.inputs
        outputs = given.logits(x)
        seen = Seen(self.places(x), outputs, given.train.targets, given.kind)
        self.process = FixedMean(seen, given.seed)

    def places(self, x: Tensor) -> Tensor:
        return self.given.features(x) if self.of_features else x.flatten(1).cpu()

    def __call__(self, x: Tensor) -> Tensor:
        places = self.places(x)
        return torch.cat([total(self.process.covariance(part)) for part in places.split(BATCH)])


@score
class FixedMeanOfInputs(_FixedMean):
    name, of_features = "FMGP, of inputs", False


@score
class FixedMeanOfFeatures(_FixedMean):
    name, of_features = "FMGP, of features", True


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
