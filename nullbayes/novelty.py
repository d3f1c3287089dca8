"""How much the training data leave open at an input: ``tr J(x) Σ J(x)ᵀ``, or its share of the prior's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nullbayes.assembly import Fit, Settings
from nullbayes.draws import (
    REVERSE_OUTPUTS_PER_SAMPLE,
    first_output,
    forward_mode,
    output_rows,
)
from nullbayes.errors import InputError, NotFittedError
from nullbayes.jacobian.build import capture_batch
from nullbayes.jacobian.functional import FunctionalModel, Inputs, take, to_device
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.jacobian.plan import CapturePlan
from nullbayes.likelihood import Likelihood
from nullbayes.solvers.base import relative

# Floating-point operations per example up to which novelty is computed exactly by itself.
EXACT_FLOPS = 3e8


def novelty_variance(
    functional: FunctionalModel,
    plan: CapturePlan,
    fit: Fit,
    settings: Settings,
    likelihood: Likelihood,
    x: Inputs,
    share: bool,
    exact: bool | None,
) -> Tensor:
    """``(B,)`` in the model's dtype; see :meth:`nullbayes.Posterior.novelty`."""
    outputs = first_output(functional, x, "`x`").numel()
    exact = is_exact(exact, fit, outputs)
    if not exact and not share and outputs > REVERSE_OUTPUTS_PER_SAMPLE * len(fit.unit):
        # Rows of many outputs cost too much.
        change = likelihood.centre(forward_mode(functional, plan, fit.unit, x))
        squares = change.double().square().mean(0).flatten(1).sum(1)
        return (squares / fit.alpha).to(functional.dtype)
    unit = isotropic(functional, fit, settings)
    # What no prediction depends on, a constant added to all logits, varies on training data as anywhere else: left
    # in, it hides what is new (experiments/ablation_items.py, `scores`).
    pieces = output_rows(
        functional, plan, x, outputs, unit, settings.scale_by_name, "`x`", likelihood.centre
    )
    operators = (operator for _, operator in pieces)
    return _variances(operators, outputs, unit, fit, share, exact).to(functional.dtype)


def loss_variance(
    functional: FunctionalModel,
    plan: CapturePlan,
    fit: Fit,
    settings: Settings,
    likelihood: Likelihood,
    x: Inputs,
    targets: Any,
    exact: bool | None,
) -> Tensor:
    """``Var(∇ℓ(f(x))ᵀ J(x) Δ) (B,)``: of each example's own loss, to first order; one row, however many outputs."""
    point = functional.outputs(x, "`x`")
    likelihood.validate(point, targets, "`x`")
    targets = likelihood.prepare_targets(point, targets)
    exact = is_exact(exact, fit, 1)
    unit = isotropic(functional, fit, settings)

    def gradient(outputs: Tensor, piece: slice) -> SimpleNamespace:
        some = take(targets, piece.start, piece.stop, len(point))
        return SimpleNamespace(values=likelihood.loss_gradient(outputs, some).unsqueeze(0))

    def operators() -> Iterator[JacobianOperator]:
        pieces = capture_batch(functional, plan, x, gradient, 1, settings.scale_by_name)
        for block, _, _ in pieces:
            yield JacobianOperator(functional.space, [block])

    return _variances(operators(), 1, unit, fit, False, exact).to(functional.dtype)


def loss_targets(likelihood: Likelihood, x: Inputs, targets: Any, device: torch.device) -> Any:
    """What the losses at ``x`` are taken against. Raises `InputError` where that is not known."""
    if targets is None and likelihood.layouts is None:
        raise InputError(
            "`score` is 'loss', which needs the targets of `x`: pass `targets=`. (A callable loss gets the inputs as "
            "targets where there are none.)"
        )
    return to_device(x if targets is None else targets, device)


def check_has_entropy(likelihood: Likelihood, score: str) -> None:
    """Raise `InputError` for a likelihood that says nothing of the spread of its targets."""
    if likelihood.layouts is not None:
        raise InputError(
            f"`score` is {score!r}, which a callable loss does not have; expected 'information', 'variance', 'share' "
            "or 'loss'."
        )


def is_exact(exact: bool | None, fit: Fit, outputs: int) -> bool:
    """What was asked for, or what costs little."""
    if exact is None:
        return fit.state is not None and fit.state.explained_flops(outputs) <= EXACT_FLOPS
    if exact and fit.state is None:
        raise NotFittedError(
            "exact novelty needs the factorisation, which is not stored in files; fit here, or "
            "use `exact=False`."
        )
    return exact


def isotropic(functional: FunctionalModel, fit: Fit, settings: Settings) -> Tensor:
    """Samples in the coordinates of the rows, where the prior is isotropic."""
    scales = functional.space.scales(settings.precision_by_name)
    return fit.unit if scales is None else fit.unit / scales


def _variances(
    operators: Iterable[JacobianOperator],
    outputs: int,
    unit: Tensor,
    fit: Fit,
    share: bool,
    exact: bool,
) -> Tensor:
    """Variance ``(B,)``, float64, summed over the ``outputs`` rows of each example, or its share of the prior's."""
    values = []
    for operator in operators:
        prior = operator.squared_norms() if exact or share else None
        if exact:
            assert fit.state is not None and prior is not None
            value = (prior - fit.state.explained(operator).flatten()).clamp(min=0)
        else:
            value = operator.matvec(unit).double().square().mean(0)
        total = value.reshape(-1, outputs).sum(1)
        if share:
            assert prior is not None
            total = relative(total, prior.reshape(-1, outputs).sum(1)).clamp(0, 1)
        else:
            total = total / fit.alpha
        values.append(total)
    return torch.cat(values)
