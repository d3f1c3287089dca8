"""A score of the layer posterior with neighbours: how far each layer's input lies from those of training examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nullbayes.errors import InputError
from nullbayes.likelihood import Likelihood
from nullbayes.model.batch import Inputs, batch_size, take
from nullbayes.posterior.layer_combined import BATCH, LEAST, ONE_DEVIATION, last_reached
from nullbayes.posterior.layer_leverage import Leverages

_TINY = 1e-12
# What the last layer's direction weighs beside the means over layers and the energy. Chosen, as the form of the score,
# on the tuning problems of docs/evaluation/layers.md.
LAST_WEIGHT = 0.5


class Neighbours:
    """``mean_l (z_l)₊² + mean_l (d_l)₊² + mean_l (u_l)₊² + ½ (z_L)₊² + (z_E)₊²``, ``(B,)``, from one forward pass.

    ``z_l``, ``z_L`` and ``z_E`` are those of :class:`.Combined`. ``d_l``: log distance of what layer ``l`` receives,
    averaged over an example's positions, to the nearest of the training examples that the fit kept (up to 128);
    ``u_l``: the same of inputs scaled to length one (of the last layer: Sun, Ming, Zhu, Li, ICML 2022). Each is in
    deviations above the median of these examples, of which each has itself left out. Leverage asks for directions that
    training inputs do not have; between two clusters of them there may be none, and still no example is near.

    Args:
        leverages: with pooled inputs.
        kept: training examples.

    Raises:
        InputError: fewer than two examples were kept, as in a posterior from a file.
    """

    def __init__(
        self,
        leverages: Leverages,
        likelihood: Likelihood,
        kept: Sequence[tuple[Inputs, object]],
    ) -> None:
        self.leverages, self.likelihood = leverages, likelihood
        if sum(batch_size(inputs) for inputs, _ in kept) < 2:
            raise InputError(
                "score='neighbours' needs two training examples at least, and this posterior holds "
                f"{sum(batch_size(inputs) for inputs, _ in kept)}; a file holds none. Fit it here, or use "
                "score='combined'."
            )
        parts = []
        for inputs, _ in kept:
            size = batch_size(inputs)
            starts = range(0, size, BATCH)
            parts += [self._found(take(inputs, s, min(s + BATCH, size), size)) for s in starts]
        logs, energies = (torch.cat([part[i] for part in parts]) for i in (0, 2))  # type: ignore[misc]
        layers = len(leverages.ordered)
        self.last = layers + last_reached(logs[:, layers:])
        self.known: list[Tensor | None] = []
        for i in range(layers):
            own = [vectors for part in parts if (vectors := part[1][i]) is not None]
            self.known.append(torch.cat(own) if len(own) == len(parts) else None)
        every = torch.cat(
            [logs, self._distances(self.known, len(logs), themselves=True), energies], 1
        )
        self.centre = every.nanquantile(0.5, 0)
        spread = every.nanquantile(ONE_DEVIATION, 0) - self.centre
        self.spread = spread.clamp_min(LEAST)

    def score(self, inputs: Inputs) -> Tensor:
        """See the class."""
        logs, vectors, energy = self._found(inputs)
        every = torch.cat([logs, self._distances(vectors, len(logs)), energy], 1)
        excess = ((every - self.centre) / self.spread).clamp_min(0).nan_to_num(0.0).square()
        layers = len(self.leverages.ordered)
        sizes, _, plain, scaled, energies = excess.split([layers] * 4 + [energy.shape[1]], 1)
        means = sizes.mean(1) + plain.mean(1) + scaled.mean(1)
        return means + LAST_WEIGHT * excess[:, self.last] + energies.sum(1)

    def _found(self, inputs: Inputs) -> tuple[Tensor, list[Tensor | None], Tensor]:
        """Log leverages of sizes, then directions ``(B, 2 L)``; mean inputs of layers ``(B, I)``; energies ``(B, 1)``.

        Without logits energies are ``(B, 0)``.
        """
        sizes, directions, outputs, vectors = self.leverages.pooled(inputs)
        energy = self.likelihood.energy(outputs)
        column = sizes.new_zeros(len(sizes), 0)
        if energy is not None:
            column = energy.double().reshape(len(energy), -1).mean(1, keepdim=True)
        return torch.cat([sizes, directions], 1).clamp_min(1e-300).log(), vectors, column

    def _distances(
        self, vectors: Sequence[Tensor | None], size: int, *, themselves: bool = False
    ) -> Tensor:
        """Log distances to the nearest known example ``(B, 2 L)``: of inputs as they are, then of those of length one.

        NaN where a layer has none. ``themselves``: of the known ones, each to another.
        """
        plain, scaled = [], []
        for found, known in zip(vectors, self.known, strict=True):
            if found is None or known is None:
                none = self.leverages.layers[0].scale.new_full((size,), torch.nan)
                plain.append(none.double())
                scaled.append(none.double())
                continue
            plain.append(_nearest(found, known, themselves=themselves))
            scaled.append(_nearest(_unit(found), _unit(known), themselves=themselves))
        return torch.stack(plain + scaled, 1)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(_TINY)


def _nearest(vectors: Tensor, known: Tensor, *, themselves: bool) -> Tensor:
    apart = torch.cdist(vectors, known, compute_mode="donot_use_mm_for_euclid_dist")
    if themselves:
        apart.fill_diagonal_(torch.inf)
    return apart.amin(1).clamp_min(_TINY).log()
