"""How a layer posterior scores inputs: which score, from which parts, against which references."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from nullbayes.common.arguments import check_choice
from nullbayes.model.batch import Inputs
from nullbayes.model.undisturbed import undisturbed_method
from nullbayes.posterior.layer_combined import Combined, References
from nullbayes.posterior.layer_fit import leverages
from nullbayes.posterior.layer_leverage import Leverages
from nullbayes.posterior.layer_neighbours import Neighbours
from nullbayes.posterior.layer_novelty import (
    SCORES,
    information_score,
    leverage_score,
    variance_score,
)

if TYPE_CHECKING:
    from nullbayes.posterior.layers import LayerNullSpacePosterior


class LayerScored:
    """Mixin of `nullbayes.LayerNullSpacePosterior`."""

    # Made when they are first asked for, of the fit that stands.
    _leverages: Leverages | None = None
    _near: Neighbours | None = None

    @undisturbed_method
    def novelty(self, x: Inputs, score: str = "combined") -> Tensor:
        """How much of each input the layers of the network have not seen, ``(B,)``; higher is less known. No samples.

        Where the model draws random numbers: the mean over the draws that were fitted.

        Args:
            score: ``"combined"`` (default): by how much leverages, and the energy of logits, exceed those of training
                examples, see :class:`.Combined`; ``"neighbours"``: the same with distances to training examples at
                every layer, see :class:`.Neighbours`; it needs training examples and so is not there after `nb.load`;
                ``"leverage"``: the sum over layers of the log leverage of what they receive, relative to its size; each
                one forward pass. ``"information"``: ``½ log det(I + J Σ Jᵀ)`` in nats, one backward pass an output;
                ``"variance"``: ``tr J Σ Jᵀ``.

        Raises:
            InputError: inputs that cannot be used; ``"combined"`` of a posterior from a file without references;
                ``"neighbours"`` of any from a file.
        """
        check_choice(score, SCORES, "score")
        own = cast("LayerNullSpacePosterior", self)
        draws = range(own.functional.draws)
        values = [self._score(own._inputs(x, draw), score) for draw in draws]
        mean = values[0] if len(values) == 1 else torch.stack(values).mean(0)
        return mean.to(own.functional.dtype)

    def _score(self, x: Inputs, score: str) -> Tensor:
        own = cast("LayerNullSpacePosterior", self)
        fit = own._fitted()
        if score == "combined":
            return self._combined().score(self._references(), x)
        if score == "neighbours":
            if self._near is None:
                scorer = leverages(fit.state, pooling=True)
                self._near = Neighbours(scorer, own.likelihood, fit.gathered.kept)
            return self._near.score(x)
        if score == "leverage":
            return leverage_score(self._of_layers(), x)
        plan = own._plan_of_rows(x)
        if score == "information":
            return information_score(fit.state, plan, own.likelihood, x)
        return variance_score(fit.state, plan, own.likelihood, x, fit.alpha)

    def _of_layers(self) -> Leverages:
        if self._leverages is None:
            self._leverages = leverages(cast("LayerNullSpacePosterior", self)._fitted().state)
        return self._leverages

    def _combined(self) -> Combined:
        return Combined(self._of_layers(), cast("LayerNullSpacePosterior", self).likelihood)

    def _references(self) -> References:
        state = cast("LayerNullSpacePosterior", self)._fitted().state
        if state.references is None:
            state.references = self._combined().references(state.gathered.kept)
        found: References = state.references
        return found

    def _forget_scores(self) -> None:
        self._leverages = self._near = None
