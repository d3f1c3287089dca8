"""The library's own scores, and scores joined with them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

import nullbayes as nb
from experiments.detection.base import BATCH, Given, Score, score
from nullbayes.datasets import Split

SAMPLES = 30
MEMORY = "4GB"


def batched(split: Split) -> list[tuple[Tensor, Tensor]]:
    """In order, targets where the inputs are."""
    targets = split.targets.to(split.inputs.device)
    return list(zip(split.inputs.split(BATCH), targets.split(BATCH), strict=True))


class _NullSpace(Score):
    """``nb.NullSpacePosterior`` on as many examples as there is time for, by evidence."""

    source = "this library"
    any_output = True
    preserve: ClassVar[str]

    def fit(self, given: Given) -> None:
        some = given.train[: given.preserved]
        batches = batched(some)
        self.posterior = nb.NullSpacePosterior(
            given.network, given.kind, preserve=self.preserve, memory=MEMORY
        )
        self.posterior.fit(batches, SAMPLES, given.seed, progress=False)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([self.posterior.novelty(part) for part in x.split(BATCH)])


@score
class NullSpacePredictions(_NullSpace):
    name = family = "null space"
    preserve = "predictions"


@score
class NullSpaceOutputs(_NullSpace):
    name = "null space, outputs preserved"
    family = "null space"
    preserve = "outputs"


class _Layers(Score):
    """``nb.LayerNullSpacePosterior`` on all training examples."""

    source = "this library"
    any_output = True
    kind: ClassVar[str]

    def fit(self, given: Given) -> None:
        every = given.train
        batches = batched(every)
        self.posterior = nb.LayerNullSpacePosterior(given.network, given.kind)
        self.posterior.fit(batches, progress=False)

    def __call__(self, x: Tensor) -> Tensor:
        parts = [self.posterior.novelty(part, score=self.kind) for part in x.split(BATCH)]
        return torch.cat(parts)


@score
class LayerCombined(_Layers):
    """Its default: excess of leverages, and of the energy, over those of training examples."""

    name = family = "layer null space"
    kind = "combined"


@score
class LayerLeverage(_Layers):
    name = "layer null space, leverage"
    family = "layer null space"
    kind = "leverage"


@score
class LayerNeighbours(_Layers):
    """With distances to training examples at every layer. A family of its own: the default stands for the posterior."""

    name = family = "layer null space, neighbours"
    kind = "neighbours"
