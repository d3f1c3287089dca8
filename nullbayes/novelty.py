"""How much the training data leave open at an input: ``tr J(x) Σ J(x)ᵀ``, or its share of the prior's."""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.assembly import Fit, Settings
from nullbayes.draws import output_rows
from nullbayes.errors import NotFittedError
from nullbayes.jacobian.capture import CapturePlan
from nullbayes.jacobian.functional import FunctionalModel, Inputs
from nullbayes.solvers.base import relative

# Floating-point operations per example up to which novelty is computed exactly by itself.
EXACT_FLOPS = 3e8


def novelty_variance(
    functional: FunctionalModel,
    plan: CapturePlan,
    fit: Fit,
    settings: Settings,
    x: Inputs,
    point: Tensor,
    share: bool,
    exact: bool | None,
) -> Tensor:
    """``(B,)`` in the model's dtype; see :meth:`nullbayes.Posterior.novelty`.

    Args:
        point: ``(B, *out)``, the outputs at ``x``.
    """
    outputs = point[0].numel()
    if exact is None:
        exact = fit.state is not None and _exact_flops(fit, outputs) <= EXACT_FLOPS
    if exact and fit.state is None:
        raise NotFittedError(
            "exact novelty needs the factorisation, which is not stored in files; fit here, or "
            "use `exact=False`."
        )
    scales = functional.space.scales(settings.precision_by_name)
    unit = fit.unit if scales is None else fit.unit / scales
    values = []
    scale_by_name = settings.scale_by_name
    for _, operator in output_rows(functional, plan, x, outputs, unit, scale_by_name, "`x`"):
        prior = operator.squared_norms() if exact or share else None
        if exact:
            assert fit.state is not None and prior is not None
            value = (prior - fit.state.explained(operator)).clamp(min=0)
        else:
            value = operator.matvec(unit).double().square().mean(0)
        total = value.reshape(-1, outputs).sum(1)
        if share:
            assert prior is not None
            total = relative(total, prior.reshape(-1, outputs).sum(1)).clamp(0, 1)
        else:
            total = total / fit.alpha
        values.append(total.to(functional.dtype))
    return torch.cat(values)


def _exact_flops(fit: Fit, outputs: int) -> float:
    assert fit.state is not None
    return fit.state.explained_flops(outputs)
