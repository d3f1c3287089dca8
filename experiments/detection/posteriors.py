"""The library's own scores, and scores joined with them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

import nullbayes as nb
from experiments.detection.base import BATCH, Given, Score, score
from nullbayes.posterior.layer_leverage import Leverages

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


class _Excess(_Layers):
    """By how much leverages exceed those of training examples: sizes at every layer, the direction at the last.

    Logarithms, in standard deviations above the median of training examples (by quantiles); what lies below counts for
    nothing, so a layer that says nothing adds nothing. Unseen classes often have *small* features in unusual
    directions, inputs beyond the range of a column have *large* ones in usual directions: one of the two is seen.
    """

    kind = "leverage"
    weight: ClassVar[float] = 0.0  # of the energy

    def fit(self, given: Given) -> None:
        super().fit(given)
        self.given = given
        state = self.posterior._fitted().state
        self.sizes, self.directions = (
            Leverages(state.functional, state.blocks, state.gathered, state.delta, relative=r)
            for r in (False, True)
        )
        some = given.train.inputs[:REFERENCES]
        self.references = [_centre_and_spread(part) for part in self.parts(some)]

    def parts(self, x: Tensor) -> list[Tensor]:
        """Log leverages ``(B, L)`` of all layers, ``(B, 1)`` of the last one's direction, and the energy ``(B, 1)``."""
        sizes, directions = (self._logs(of, x) for of in (self.sizes, self.directions))
        out = [sizes, directions[:, -1:]]
        if self.weight:
            out.append(-self.given.logits(x).double().logsumexp(1, keepdim=True))
        return out

    def _logs(self, of: Leverages, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        for part in x.split(BATCH):
            values = {
                n: v for n, v in of.by_example(part).items() if of.blocks.blocks[n].columns > 2
            }
            means = [values[n].double().nanmean(1) for n in sorted(values)]
            found.append(torch.stack(means, 1).clamp_min(1e-300).log())
        return torch.cat(found)

    def __call__(self, x: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        weights = (1.0, 1.0, self.weight)
        for part, weight, (centre, spread) in zip(
            self.parts(x), weights, self.references, strict=False
        ):
            total = total + weight * ((part - centre) / spread).clamp_min(0).square().mean(1)
        assert isinstance(total, Tensor)
        return total


REFERENCES = 300  # training examples that give the scale


def _centre_and_spread(values: Tensor) -> tuple[Tensor, Tensor]:
    centre = values.quantile(0.5, 0)
    return centre, (values.quantile(0.84, 0) - centre).clamp_min(1e-2)


@score
class Excess(_Excess):
    name = "layers, excess"
    family = "layer null space"


@score
class ExcessEnergy(_Excess):
    name = family = "combined"
    any_output = False
    weight = 0.5
