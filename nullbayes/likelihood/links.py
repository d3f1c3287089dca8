"""Mean probabilities of Gaussian outputs without samples: the probit approximation and the Laplace bridge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nullbayes.errors import InputError
from nullbayes.likelihood.base import Likelihood
from nullbayes.likelihood.binary import Binary
from nullbayes.likelihood.classification import Classification

#: ``"samples"`` averages over samples, which is exact up to their number
LINKS = ("samples", "probit", "bridge")


def linked(
    likelihood: Likelihood, point: Tensor, covariance: Tensor, link: str
) -> tuple[Tensor, Tensor]:
    """Mean probabilities ``(B, *out)``, and their entropies in nats as `Likelihood.moments` has them.

    Outputs have the mean ``point (B, *out)`` and the ``covariance (B, D, D)``.

    ``"probit"``: ``softmax(f_o / √(1 + π σ_o² / 8))``, for one logit the sigmoid (MacKay, *The evidence framework
    applied to classification networks*, 1992). ``"bridge"``: the mean of the Dirichlet of the Laplace bridge (Hobbhahn,
    Kristiadi & Hennig, *Fast predictive uncertainty for classification with Bayesian deep networks*, 2022). It does not
    turn into the network's own probabilities where the variance vanishes, so training predictions do not stand under
    it.

    Raises:
        InputError: a likelihood without probabilities; the bridge where an example has several positions.
    """
    variance = covariance.diagonal(dim1=1, dim2=2).reshape(point.shape).clamp(min=0)
    if isinstance(likelihood, (Classification, Binary)) and link == "probit":
        return _told(likelihood, point / (1 + math.pi / 8 * variance).sqrt())
    if link == "bridge" and isinstance(likelihood, Classification) and point.ndim == 2:
        return _told(likelihood, _bridge(point, covariance).log())
    wanted = "a classification" if link == "probit" else "a classification of whole inputs"
    raise InputError(
        f"link={link!r} needs {wanted}, not {likelihood!r} with outputs (B, "
        f"{', '.join(map(str, point.shape[1:]))}); use link='samples'."
    )


def _told(likelihood: Likelihood, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """What outputs ``(B, *out)`` that are known say."""
    moments = likelihood.moments(outputs[None], outputs, linearised=True)
    return moments.mean, moments.total


def _bridge(point: Tensor, covariance: Tensor) -> Tensor:
    classes = point.shape[1]
    # Probabilities do not depend on the sum of the logits: they are conditioned on its being zero.
    row = covariance.sum(2)
    total = row.sum(1, keepdim=True).clamp(min=torch.finfo(point.dtype).tiny)
    mean = point - row * point.sum(1, keepdim=True) / total
    variance = covariance.diagonal(dim1=1, dim2=2) - row.square() / total
    variance = variance.clamp(min=torch.finfo(point.dtype).eps)
    others = torch.exp(-mean).sum(1, keepdim=True)
    alpha = (1 - 2 / classes + mean.exp() * others / classes**2) / variance
    return alpha / alpha.sum(1, keepdim=True)
