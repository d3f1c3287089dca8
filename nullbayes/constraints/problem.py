"""The question that a posterior answers, as one value: of which network, preserving what, under which prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nullbayes.common.arguments import BY_LAYER, CheckedPrior, PriorPrecision, check_prior
from nullbayes.constraints.directions import Cotangents, Directions, resolve_directions
from nullbayes.constraints.preserve import Preserve, resolve_preserve
from nullbayes.constraints.within import LayerPrior
from nullbayes.errors import InputError, ModelError
from nullbayes.jacobian.block import Block
from nullbayes.likelihood import Likelihood
from nullbayes.model.fingerprint import check_unchanged
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace
from nullbayes.model.randomness import FrozenRandomness

PriorMean = str | float | Tensor | Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Problem:
    """What is asked, resolved once from the user's arguments and handed on whole.

    How it is answered (solver, tolerances, memory) is `nullbayes.fit.result.Settings`.

    Attributes:
        functional: the network as a function of the chosen weights.
        likelihood: how its outputs explain the targets.
        preserve, directions: what gives each training example its rows of the constraint matrix.
        within: covariance of the prior, in place of the identity, at prior precision one.
        prior: ``"evidence"``, ``"evidence-by-layer"``, one prior precision, or one for each parameter tensor.
        prior_mean: ``(P,)``, what the evidence measures weights from; None: zero.
        layers: precisions by parameter tensor that the evidence found, once it did.
        without: the prior was that of a layer posterior, and a file, which does not hold it, is all that is left.
    """

    functional: FunctionalModel
    likelihood: Likelihood
    preserve: Preserve
    directions: Directions
    prior: CheckedPrior
    within: LayerPrior | None = None
    prior_mean: Tensor | None = None
    layers: dict[str, float] | None = None
    without: bool = False

    @classmethod
    def of(
        cls,
        functional: FunctionalModel,
        likelihood: Likelihood,
        preserve: str | Preserve,
        directions: Directions,
        prior: PriorPrecision,
        within: LayerPrior | None = None,
        prior_mean: PriorMean = None,
    ) -> Problem:
        """From a user's arguments.

        Raises:
            InputError: an argument that cannot be used, alone or beside the others.
        """
        chosen, limit = resolve_preserve(preserve), resolve_directions(directions)
        if limit is not None and not chosen.takes_directions:
            chosen.rows(likelihood, (2,), limit)  # raises, saying why
        checked = check_prior(prior)
        if checked == BY_LAYER:
            check_curvature(chosen, limit, f"prior_precision={BY_LAYER!r}")
        mean = resolve_prior_mean(prior_mean, functional.space)
        problem = cls(functional, likelihood, chosen, limit, checked, within, mean)
        by_name = problem.precision_by_name is not None or checked == BY_LAYER
        if within is not None and by_name:
            raise InputError(
                "`prior_precision` is one for each parameter or layer, beside `within`, which is a prior of its own; "
                'pass a number, or "evidence".'
            )
        functional.space.scales(problem.precision_by_name)  # raises on wrong names
        functional.serve(likelihood)
        return problem

    @property
    def plain_prior(self) -> bool:
        """Whether the prior is the same in all directions, but for scales."""
        return self.within is None and not self.without

    def check_within(self) -> None:
        """Raise unless the prior is one that a fit can begin from.

        Raises:
            InputError: it is in no file, and this posterior comes from one.
            ModelError: its network has other weights now.
        """
        if self.without:
            raise InputError(
                "this posterior was fitted with `within=` and comes from a file, which does not hold the layer "
                "posterior; make a new one, `NullSpacePosterior(model, within=layers)`, to fit it."
            )
        if self.within is None:
            return
        try:
            check_unchanged(self.functional.model, self.within.weights)
        except ModelError as error:
            raise ModelError(
                "`within` is a layer posterior of the weights that the model had then: fit it anew, and make this "
                f"posterior with it. ({error})"
            ) from error

    # -- its parts -------------------------------------------------------------------------------

    @property
    def space(self) -> ParameterSpace:
        return self.functional.space

    @property
    def device(self) -> torch.device:
        return self.functional.device

    @property
    def dtype(self) -> torch.dtype:
        return self.functional.dtype

    @property
    def randomness(self) -> FrozenRandomness | None:
        return self.functional.randomness

    def explained_by(self, likelihood: Likelihood) -> Problem:
        """The same question with another likelihood, one whose observation noise was estimated, say."""
        return replace(self, likelihood=likelihood)

    def trained_weights(self) -> Tensor:
        """``θ̂ (P,)``."""
        return self.space.flatten(self.functional.weights())

    def departure(self) -> Tensor:
        """``θ̂ - prior mean (P,)``, what the prior has to explain; zero at weights that stay where they are."""
        away = self.trained_weights()
        if self.prior_mean is not None:
            away = away - self.prior_mean
        return self.space.masked_(away)

    # -- the prior -------------------------------------------------------------------------------

    @property
    def by_evidence(self) -> bool:
        """Whether the evidence sets the prior precision."""
        return self.prior in ("evidence", BY_LAYER)

    @property
    def by_layer(self) -> bool:
        """Whether the evidence sets one precision for each layer, and has not done so yet."""
        return self.prior == BY_LAYER and self.layers is None

    @property
    def given_precision(self) -> float | None:
        """The one prior precision that the user set, if there is one."""
        return self.prior if isinstance(self.prior, float) else None

    @property
    def precision_by_name(self) -> dict[str, float] | None:
        """One precision for each tensor, where the prior is that."""
        return self.prior if isinstance(self.prior, dict) else self.layers

    @property
    def scale_by_name(self) -> dict[str, float] | None:
        """Prior standard deviations where there is one precision for each tensor."""
        by_name = self.precision_by_name
        return by_name and {name: value**-0.5 for name, value in by_name.items()}

    def weight_changes(self, isotropic: Tensor) -> Tensor:
        """``(S, P)`` from the solver's coordinates, in which the prior is isotropic, to weights."""
        if self.within is not None:
            return self.space.fix_(self.within.spread(isotropic))
        scales = self.space.scales(self.precision_by_name)
        # Exactly, and not but for rounding: a solver's products leave something at coordinates that are fixed.
        return self.space.fix_(isotropic if scales is None else isotropic * scales)

    def isotropic(self, changes: Tensor) -> Tensor:
        """The inverse of :meth:`weight_changes`."""
        if self.within is not None:
            return self.within.collect(changes)
        scales = self.space.scales(self.precision_by_name)
        return changes if scales is None else changes / scales

    def in_coordinates(self, block: Block) -> Block:
        """Rows as they were captured (with ``scale_by_name``), in the coordinates in which the prior is isotropic."""
        return block if self.within is None else self.within.rows(block)

    # -- the rows --------------------------------------------------------------------------------

    def rows_per_example(self, outputs: Tensor) -> int:
        """C for ``outputs (B, *out)``; for ``directions="auto"`` an upper bound."""
        return self.preserve.rows(self.likelihood, tuple(outputs.shape[1:]), self.directions)

    def cotangents(
        self, outputs: Tensor, targets: Any, numbers: Tensor | None = None
    ) -> Cotangents:
        """What turns the Jacobian of these examples into their rows.

        Args:
            numbers: ``(B,)``, which of the training data these are; None: the first ones.
        """
        if self.preserve.numbered:
            which = torch.arange(len(outputs)) if numbers is None else numbers
            return self.preserve.numbered_cotangents(self.likelihood, outputs, targets, which)
        return self.preserve.cotangents(self.likelihood, outputs, targets, self.directions)

    def change(self, point: Tensor, outputs: Tensor, targets: Any, *, linear: bool) -> Tensor:
        """How far sampled ``outputs (S, B, *out)`` move what is preserved, element by element."""
        return self.preserve.change(self.likelihood, point, outputs, targets, linear=linear)

    def checked_targets(self, outputs: Tensor, targets: Any, where: str) -> Any:
        """The targets of one batch, validated, as the likelihood works with them."""
        return self.likelihood.checked_targets(outputs, targets, where)


def check_curvature(preserve: Preserve, directions: Directions, asking: str) -> None:
    """Raise `InputError` unless the rows are those of a whole curvature of the log likelihood."""
    if not preserve.curvature or directions is not None:
        raise InputError(
            f"{asking} needs the whole Gauss-Newton matrix, not preserve={preserve.name!r} with "
            f"directions={directions!r}; use preserve='predictions' and directions=None."
        )


def resolve_prior_mean(value: PriorMean, space: ParameterSpace) -> Tensor | None:
    """``prior_mean=`` as one vector ``(P,)``, None for zero.

    Raises:
        InputError: neither ``"zero"``, a number, a vector of all chosen weights, nor one tensor for each of them.
    """
    if value is None or (isinstance(value, str) and value == "zero"):
        return None
    expected = (
        f"`prior_mean` has to be 'zero', a number, a vector of {space.total} weights, or a tensor for each of "
        f"{list(space.names)[:4]}"
    )
    if isinstance(value, Mapping):
        missing = sorted(set(space.names) - set(value))
        wrong = [s.name for s in space.slots if s.name in value and value[s.name].shape != s.shape]
        if missing or wrong:
            raise InputError(f"{expected}; missing {missing}, of another shape {wrong}.")
        value = space.flatten({n: value[n].detach().to(space.device) for n in space.names})
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number:
        value = torch.full((space.total,), float(value))
    if not isinstance(value, Tensor) or value.shape != (space.total,):
        found = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
        raise InputError(f"{expected}; found {found}.")
    mean = value.detach().to(device=space.device, dtype=space.dtype).clone()
    if not bool(mean.isfinite().all()):
        raise InputError("`prior_mean` holds NaN or infinity; every entry has to be finite.")
    return mean
