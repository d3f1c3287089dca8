"""Prior precision by the evidence: ``α* = γ / ‖θ̂‖²`` (MacKay, Bayesian interpolation, 1992, eq. 32).

``γ`` counts the directions that the data determine. Published code for null-space posteriors uses the
reciprocal, which is a variance; a precision is what stands here.
"""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from nullbayes.errors import InputError, NullBayesWarning
from nullbayes.solvers.base import Spectrum

# Bounds on the prior precision that agree as well as this are good enough: a posterior hardly changes with it.
AGREED = 1.2


def null_space_precision(gamma: float, parameters: int, weights: Tensor) -> float:
    """Stationary point for the null-space posterior, where ``γ = P - tr Π``.

    Args:
        gamma: directions that the data determine: the rank, or measured with the samples.
        parameters: ``P``; stands in for ``γ`` (with a warning) where the data determine nothing.
        weights: trained weights ``(P,)``.
    """
    if gamma <= 0:
        warnings.warn(
            "the training rows determine no direction at all (every row is zero), so the evidence "
            "has no maximum; the prior precision is set to P / ‖θ̂‖². Check the labels "
            "(`ignore_index`) or pass `prior_precision=`.",
            NullBayesWarning,
            stacklevel=3,
        )
    return (gamma if gamma > 0 else parameters) / _squared_norm(weights)


def fixed_point(spectrum: Spectrum, weights: Tensor, delta: float = 1.0) -> float:
    """Solution of ``α ‖θ̂‖² = γ(δα) = Σ λ/(λ + δα)``; ``δ = 1``: the full linearised Laplace posterior.

    ``γ`` falls and the left side grows with ``α``: there is one solution, found by bisection.
    """
    norm = _squared_norm(weights)
    low, high = 1e-12, max(1.0, float(spectrum.weights.sum()) / norm)
    if spectrum.effective_rank(delta * low) <= low * norm:
        return high
    for _ in range(200):
        middle = math.sqrt(low * high)
        if spectrum.effective_rank(delta * middle) > middle * norm:
            low = middle
        else:
            high = middle
        if high / low < 1 + 1e-10:
            break
    return math.sqrt(low * high)


def interval(spectrum: Spectrum, weights: Tensor, delta: float = 1.0) -> tuple[float, float]:
    """:func:`fixed_point` of the bounds of an estimated spectrum; of an exact one twice the same."""
    low, high = spectrum.bounds or (spectrum, spectrum)
    return fixed_point(low, weights, delta), fixed_point(high, weights, delta)


def apart(spectrum: Spectrum, weights: Tensor, delta: float = 1.0) -> float:
    """How far the bounds are from agreeing on the fixed point: at most one where they do, up to ``AGREED``."""
    low, high = interval(spectrum, weights, delta)
    return math.log(high / low) / math.log(AGREED)


def _squared_norm(weights: Tensor) -> float:
    norm = float(weights.double().square().sum())
    if norm == 0:
        raise InputError(
            "all chosen weights are zero (or at `prior_mean`), so the evidence has no maximum; is the model "
            "trained? Otherwise pass `prior_precision=` as a number."
        )
    return norm
