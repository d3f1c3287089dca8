"""Scores of how new an input is to the layers of a network, without samples."""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.common.decompositions import eigvalsh
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.likelihood import Likelihood
from nullbayes.model.batch import Inputs
from nullbayes.posterior.layer_leverage import Leverages
from nullbayes.posterior.layer_rows import output_covariance
from nullbayes.posterior.layer_state import LayerState

SCORES = ("combined", "neighbours", "leverage", "information", "variance")


def leverage_score(leverages: Leverages, inputs: Inputs) -> Tensor:
    """``Σ_l log mean_t s_l(a_t) / ‖a_t‖²`` over layers that multiply vectors: one forward pass, ``(B,)``.

    Divided by its size an input counts by its direction alone: a class that was never seen often has small features,
    and plain leverage takes them for well known (benchmarks/layers.py). Scale and shift of normalisation layers do not
    count: two values of a channel say all of them.
    """
    _, directions, _ = leverages.means(inputs)
    # Layers that an example does not reach are left out.
    return directions.clamp_min(1e-300).log().nansum(1)


def information_score(
    state: LayerState, plan: CapturePlan, likelihood: Likelihood, inputs: Inputs
) -> Tensor:
    """``½ log det(I + J Σ Jᵀ)`` in nats ``(B,)``: what an observation of the outputs would tell (MacKay 1992).

    At the prior precision at which weights from the prior are as large as the trained ones, whatever the posterior's
    was set to since: calibration shall not change what is new.
    """
    covariance = output_covariance(state, plan, inputs, likelihood.observed)
    values = eigvalsh((covariance + covariance.mT) / 2).clamp(min=0)
    return 0.5 * torch.log1p(values / state.natural_precision).sum(1)


def variance_score(
    state: LayerState, plan: CapturePlan, likelihood: Likelihood, inputs: Inputs, alpha: float
) -> Tensor:
    """``tr J Σ Jᵀ (B,)``: epistemic variance of the outputs, without what no prediction depends on."""
    covariance = output_covariance(state, plan, inputs, likelihood.centre)
    return covariance.diagonal(dim1=1, dim2=2).sum(1) / alpha
