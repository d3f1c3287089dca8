"""Which inputs to label next: chosen one after the other, each given those chosen before it.

An input is worth what its label would tell. Labels are counted in the likelihood's own units: an observation of ``x``
has the Fisher information ``H(x) = L Lᵀ`` of its outputs at the prediction, so features ``Φ(x) = Lᵀ J(x) Σ^½``
have a covariance in nats. Conditioning on a chosen input is a step of Gaussian linear regression, and needs no label.

``"pool"``: how much a label would reduce the variance of the predictions on the whole pool together,
``Σ_* tr(C_*x (I + C_xx)⁻¹ C_x*)`` (A-optimal design for the pool; Cohn, Ghahramani & Jordan, *Active learning with
statistical models*, 1996; with logarithms Bickford Smith et al., *Prediction-oriented Bayesian active learning*, 2023).
``"weights"``: what a label would tell of the weights, ``½ log det(I + C_xx)`` (MacKay, *Information-based objective
functions*, 1992; in batches Kirsch, van Amersfoort & Gal, *BatchBALD*, 2019). It favours inputs that are unlike all
others, whether anybody will ask about their like or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.common.decompositions import solve
from nullbayes.common.processes import Processes
from nullbayes.common.shapes import merged
from nullbayes.errors import InputError
from nullbayes.fit.result import Fit
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.linearise import linearised_outputs
from nullbayes.likelihood import Likelihood
from nullbayes.model.batch import Inputs

CRITERIA = ("pool", "weights")


@dataclass(frozen=True)
class Features:
    """``Φ (N, C, S)`` float64: of each input, the samples' changes in units of what a label tells."""

    values: Tensor

    @classmethod
    def of(
        cls,
        fit: Fit,
        plan: Callable[[Inputs], CapturePlan],
        batches: Iterable[Inputs],
        processes: Processes | None = None,
    ) -> Features:
        """Of all inputs, of which this process has the ``batches``, in the order of the pool.

        Args:
            plan: how rows at inputs are captured.
            processes: those that have the other ones.

        Raises:
            InputError: inputs have outputs of different shapes.
        """
        parts = [_features(fit, plan(x), x) for x in batches]
        shapes = {tuple(part.shape[1:]) for part in parts}
        if processes is not None:
            shapes = set.union(*processes.gather(shapes))
        if len(shapes) != 1:
            raise InputError(
                f"`pool` holds inputs with outputs of different sizes ({sorted(shapes)}); select among one kind at a "
                "time."
            )
        empty = fit.unit.new_empty((0, *shapes.pop()), dtype=torch.float64)
        found = torch.cat([empty, *parts])
        return cls(found if processes is None else processes.joined(found, 0))

    def __len__(self) -> int:
        return len(self.values)


def _features(fit: Fit, plan: CapturePlan, x: Inputs) -> Tensor:
    functional, likelihood = fit.problem.functional, fit.problem.likelihood
    point, change = linearised_outputs(functional, plan, fit.stored, x, "`pool`")
    change = fit.crowd.joined(change)
    factor = merged(expected_factor(likelihood, point).double(), 2)  # (C, B, D)
    change = merged(change.double(), 2)  # (S, B, D)
    scale = (len(change) * fit.alpha) ** -0.5
    return torch.einsum("cbd,sbd->bcs", factor, change) * scale


def expected_factor(likelihood: Likelihood, point: Tensor) -> Tensor:
    """Factor ``(C, B, *out)`` of the Fisher information of one label, at the prediction of ``point (B, *out)``."""
    return likelihood.hessian_factor(point, likelihood.inverse_link(point[None])[0])


def select(features: Features, k: int, criterion: str) -> tuple[Tensor, Tensor]:
    """Indices ``(k,)`` in the order of choice, and what each was worth when it was chosen ``(k,)`` float64."""
    phi = features.values  # (N, C, S)
    count, _, samples = phi.shape
    eye = torch.eye(samples, dtype=phi.dtype, device=phi.device)
    small = torch.eye(phi.shape[1], dtype=phi.dtype, device=phi.device)
    inner = eye.clone()  # (I + Σ_chosen Φᵀ Φ)⁻¹
    asked = torch.einsum("ncs,nct->st", phi, phi)
    free = torch.ones(count, dtype=torch.bool, device=phi.device)
    indices, gains = [], []
    for _ in range(k):
        left = phi @ inner  # (N, C, S)
        own = left @ phi.mT + small  # (N, C, C)
        if criterion == "weights":
            gain = 0.5 * torch.linalg.slogdet(own)[1]
        else:
            gain = solve(own, left @ asked @ left.mT).diagonal(dim1=1, dim2=2).sum(1)
        gain = torch.where(free, gain, torch.full_like(gain, -torch.inf))
        best = int(gain.argmax())
        indices.append(best)
        gains.append(gain[best])
        free[best] = False
        row = left[best]
        inner = inner - row.mT @ solve(own[best], row)
        inner = (inner + inner.mT) / 2
    return torch.tensor(indices), torch.stack(gains)
