"""The two posteriors around a trained network: in the null space of its training rows, and full Laplace."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from nullbayes.constraints.preserve import Preserve
from nullbayes.errors import InputError
from nullbayes.fit.result import DELTA, LAPLACE, NULL_SPACE
from nullbayes.likelihood import Likelihood, LossFunction
from nullbayes.posterior.base import CLASSIFICATION, Posterior


class NullSpacePosterior(Posterior):
    """``N(θ̂, Π Λ⁻¹)`` with ``Π`` the projection onto the null space of the constraint rows.

    Every sample keeps the training predictions of the linearised network, so the Bayesian prediction
    does not underfit (Miani, Roy & Hauberg 2025). See :class:`Posterior` for the arguments.

    The null space of a trained network's rows has no sharp edge: their spectrum decays over twenty
    decades. ``delta`` says where it ends. A direction counts as free if moving along it as far as the
    prior allows changes what is preserved, over the whole training set, by less than ``√delta`` (for
    predictions in Fisher units: by less than ``delta / 2`` nats of Kullback-Leibler divergence). Much
    smaller values freeze directions that no prediction notices, and with them the uncertainty off
    the data; see the page on the guarantee for measurements.

    Args:
        preserve: ``"predictions"`` (default), ``"outputs"``, ``"loss"``, or an object.
        delta: the edge of the null space, relative to the prior precision; 0: the exact projection,
            refined until ``tolerance``.
        options: see :class:`Posterior`.
    """

    kind = NULL_SPACE

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | LossFunction = CLASSIFICATION,
        preserve: str | Preserve = "predictions",
        *,
        delta: float = DELTA,
        **options: Any,
    ) -> None:
        if (
            isinstance(delta, bool)
            or not isinstance(delta, (int, float))
            or not 0 <= delta < math.inf
        ):
            raise InputError(f"`delta` is {delta!r}; expected a number, 0 (exact) or more.")
        super().__init__(model, likelihood, preserve, delta=float(delta), **options)


class LaplacePosterior(Posterior):
    """The full linearised Laplace posterior ``(Λ + G)⁻¹``: the sibling that does not keep predictions.

    The same rows, solvers and methods, with ``δ = 1``. ``calibrate`` and ``prior_precision = ...``
    rescale its covariance as a whole (a tempered posterior); fit anew for another prior.
    """

    kind = LAPLACE

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | LossFunction = CLASSIFICATION,
        **options: Any,
    ) -> None:
        if "delta" in options:
            raise InputError(
                "`delta` is 1 for a Laplace posterior; use NullSpacePosterior to set it."
            )
        super().__init__(model, likelihood, delta=1.0, **options)
