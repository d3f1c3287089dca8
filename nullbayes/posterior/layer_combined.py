"""The layer posterior's own score: by how much leverages exceed those of training examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.errors import InputError
from nullbayes.likelihood import Likelihood
from nullbayes.model.batch import Inputs, batch_size, take
from nullbayes.posterior.layer_leverage import Leverages

# Training examples that give the scale, and how many of them go through the network at a time.
EXAMPLES, BATCH = 300, 100
# What counts as one standard deviation above the median: this quantile. In logarithms it is a hundredth at least.
ONE_DEVIATION, LEAST = 0.84, 1e-2
# What the energy weighs beside the leverages. Chosen, as the form of the score, on the tuning problems of
# docs/evaluation/detection.md.
ENERGY_WEIGHT = 0.5


@dataclass(frozen=True)
class References:
    """Median of training examples and one deviation above it, ``(2, K)`` float64; which layer is the last."""

    values: Tensor
    last: int

    def excess(self, found: Tensor) -> Tensor:
        """``(B, K)``: deviations above the median, squared; nothing below it, nor where a layer was not reached."""
        centre, spread = self.values
        return ((found - centre) / spread).clamp_min(0).nan_to_num(0.0).square()


class Combined:
    """``mean_l (z_l)₊² + (z_L)₊² + ½ (z_E)₊²``, ``(B,)``, from one forward pass.

    ``z_l``: log leverage of what layer ``l`` receives, ``z_L``: that of the last layer relative to the input's size,
    ``z_E``: the energy ``-log Σ exp`` of the outputs, where they are logits (Liu, Wang, Owens, Li 2020); each in
    deviations above the median of training examples. Inputs beyond the range of the training data have *large* leverage
    in usual directions; classes that were never seen often have *small* features in unusual ones. What lies below the
    median counts for nothing, so a layer, or a confidence, that says nothing does not hide what another one says.

    Args:
        leverages: of the layers, see :class:`Leverages`.
    """

    def __init__(self, leverages: Leverages, likelihood: Likelihood) -> None:
        self.leverages, self.likelihood = leverages, likelihood

    def score(self, references: References, inputs: Inputs) -> Tensor:
        """See the class."""
        sizes, directions, energy = self._found(inputs)
        layers = len(self.leverages.ordered)
        parts = [sizes, directions[:, references.last, None]]
        if energy is not None:
            parts.append(energy[:, None])
        excess = references.excess(torch.cat(parts, 1))
        total = excess[:, :layers].mean(1) + excess[:, layers]
        return total if energy is None else total + ENERGY_WEIGHT * excess[:, layers + 1]

    def references(self, kept: Sequence[tuple[Inputs, object]]) -> References:
        """Of training examples, about 300 of those that the pass over the data kept.

        Raises:
            InputError: none were kept, as in a posterior from a file that holds no references either.
        """
        if not kept:
            raise InputError(
                "score='combined' is measured against training examples, and this posterior comes from a file that "
                "holds none of their figures. Fit and save it again, or use score='leverage'."
            )
        share = min(1.0, EXAMPLES / sum(batch_size(inputs) for inputs, _ in kept))
        found = []
        for inputs, _ in kept:
            size = batch_size(inputs)
            wanted = max(1, round(share * size))
            for start in range(0, wanted, BATCH):
                part = take(inputs, start, min(start + BATCH, wanted), size)
                found.append(self._found(part))
        sizes, directions = (torch.cat([f[i] for f in found]) for i in (0, 1))  # type: ignore[misc]
        last = last_reached(directions)
        parts = [sizes, directions[:, last, None]]
        if found[0][2] is not None:
            parts.append(torch.cat([f[2] for f in found if f[2] is not None])[:, None])
        every = torch.cat(parts, 1)
        centre = every.nanquantile(0.5, 0)
        spread = (every.nanquantile(ONE_DEVIATION, 0) - centre).clamp_min(LEAST)
        return References(torch.stack([centre, spread]), last)

    def _found(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log leverages of sizes and of directions ``(B, L)`` each, and energies ``(B,)``; float64."""
        sizes, directions, outputs = self.leverages.means(inputs)
        energy = self.likelihood.energy(outputs)
        logs = [part.clamp_min(1e-300).log() for part in (sizes, directions)]
        if energy is not None:
            energy = energy.double().reshape(len(energy), -1).mean(1)
        return logs[0], logs[1], energy


def last_reached(directions: Tensor) -> int:
    """The last layer of ``(B, L)`` that any example reaches."""
    reached = [i for i in range(directions.shape[1]) if bool(directions[:, i].isfinite().any())]
    return max(reached, default=0)
