"""Predictions from a closed-form Gaussian of the outputs, and samples as rows where a path needs them so."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from nullbayes.certificate.certificate import Certificate
from nullbayes.common.decompositions import eigh
from nullbayes.constraints.problem import Problem
from nullbayes.fit.result import Fit
from nullbayes.likelihood import Likelihood
from nullbayes.posterior.layer_fit import LayerFit
from nullbayes.posterior.layer_state import LayerState
from nullbayes.posterior.prediction import Prediction, make_prediction

METHODS = ("sampled", "linearised", "closed")
# Gaussian draws of the outputs, each with its mirror image.
DRAWS = 128
# Bytes of weight samples written out for a calibration.
SAMPLE_BYTES = 2**30


def closed_prediction(
    likelihood: Likelihood,
    point: Tensor,
    covariance: Tensor,
    seed: int,
    temperature: float = 1.0,
) -> Prediction:
    """A prediction from ``N(point, covariance)`` of the outputs ``(B, *out)``, ``covariance (B, O, O)`` float64.

    Variances are exact; means and entropies are averages over 128 draws and their mirror images, those of each input by
    itself (no draw is one function across inputs).
    """
    values, vectors = eigh((covariance + covariance.mT) / 2)
    root = vectors * values.clamp_min(0).sqrt()[:, None]
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(DRAWS, *root.shape[:2], generator=generator, dtype=torch.float64).to(root)
    change = torch.einsum("bop,sbp->sbo", root, z).reshape(DRAWS, *point.shape).to(point)
    made = make_prediction(likelihood, point, point + change, "linearised", temperature=temperature)
    variance = covariance.diagonal(dim1=1, dim2=2).reshape(point.shape).to(point)
    return replace(made, variance=variance, method="closed")


def as_fit(fit: LayerFit, likelihood: Likelihood) -> Fit:
    """What a calibration path needs of a fit: samples written out, at their prior precision."""
    problem = Problem.of(fit.state.functional, likelihood, "predictions", None, fit.alpha)
    certificate = cast(Certificate, fit.certificate)  # not asked for anything here
    samples = flat_samples(fit.state)
    return Fit(problem, samples, fit.alpha, fit.state.seed, certificate, fit.fingerprint)


def flat_samples(state: LayerState) -> Tensor:
    """Samples ``(S, P)`` at prior precision one, as many as fit in a gigabyte, and two at least."""
    space = state.functional.space
    count = min(
        state.num_samples, max(2, SAMPLE_BYTES // (space.total * state.functional.dtype.itemsize))
    )
    zeros = {n: torch.zeros_like(t) for n, t in state.functional.weights().items()}
    return torch.stack([space.flatten(zeros | state.change(i)) for i in range(count)])
