"""The library's own scores, and scores joined with them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

import nullbayes as nb
from experiments.detection.base import BATCH, Given, Score, score
from experiments.detection.published import Energy

SAMPLES = 30
MEMORY = "4GB"


class _NullSpace(Score):
    """``nb.NullSpacePosterior`` on as many examples as there is time for, by evidence."""

    source = "this library"
    any_output = True
    preserve: ClassVar[str]

    def fit(self, given: Given) -> None:
        some = given.train[: given.preserved]
        batches = list(zip(some.inputs.split(BATCH), some.targets.split(BATCH), strict=True))
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
        batches = list(zip(every.inputs.split(BATCH), every.targets.split(BATCH), strict=True))
        self.posterior = nb.LayerNullSpacePosterior(given.network, given.kind)
        self.posterior.fit(batches, progress=False)

    def __call__(self, x: Tensor) -> Tensor:
        parts = [self.posterior.novelty(part, score=self.kind) for part in x.split(BATCH)]
        return torch.cat(parts)


@score
class LayerLeverage(_Layers):
    name = family = "layer null space"
    kind = "leverage"


class _Combined(Score):
    """The largest of several scores, each in standard deviations above its mean on reference inputs.

    Ranks among the reference inputs cannot tell inputs beyond all of them apart; deviations of the logarithm can.
    """

    source = "this library"
    parts: ClassVar[tuple[type[Score], ...]]
    mean: ClassVar[bool] = False

    def fit(self, given: Given) -> None:
        self.made = [part() for part in self.parts]
        self.centre, self.spread = [], []
        for part in self.made:
            part.fit(given)
            found = part(given.reference).double()
            self.centre.append(found.median())
            low, high = found.quantile(0.16), found.quantile(0.84)
            self.spread.append((0.5 * (high - low)).clamp_min(1e-12))

    def __call__(self, x: Tensor) -> Tensor:
        found = [
            (part(x).double() - centre) / spread
            for part, centre, spread in zip(self.made, self.centre, self.spread, strict=True)
        ]
        stacked = torch.stack(found)
        return stacked.mean(0) if self.mean else stacked.amax(0)


class _Logarithm(_Layers):
    """Leverage is a sum of squares; its logarithm has the tails of the other scores."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x).clamp_min(1e-30).log()


class _LayersLog(_Logarithm):
    name = family = "layers, log"
    kind = "leverage"


class _NullLog(NullSpacePredictions):
    name = "null, log"

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x).clamp_min(1e-30).log()


@score
class CombinedLayers(_Combined):
    name = "combined, layers and energy"
    family = "combined"
    parts = (_LayersLog, Energy)


@score
class CombinedNull(_Combined):
    name = "combined, null space and energy"
    family = "combined"
    parts = (_NullLog, Energy)


@score
class CombinedAll(_Combined):
    name = "combined, layers, null space and energy"
    family = "combined"
    parts = (_LayersLog, _NullLog, Energy)


@score
class CombinedMean(_Combined):
    name = "combined, mean of layers, null space and energy"
    family = "combined"
    parts = (_LayersLog, _NullLog, Energy)
    mean = True


@score
class CombinedBoth(_Combined):
    name = "combined, layers and null space"
    family = "combined"
    any_output = True
    parts = (_LayersLog, _NullLog)
