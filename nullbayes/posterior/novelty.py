"""How much the training data leave open at an input: ``tr J(x) Σ J(x)ᵀ``, or its share of the prior's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nullbayes.errors import InputError, NotFittedError
from nullbayes.fit.result import Fit, Settings
from nullbayes.jacobian.capture.batches import capture_batch
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.linearise import (
    REVERSE_OUTPUTS_PER_SAMPLE,
    first_output,
    forward_mode,
    output_rows,
)
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.likelihood import Likelihood
from nullbayes.model.batch import Inputs, take, to_device
from nullbayes.model.functional import FunctionalModel
from nullbayes.solvers.base import relative

# Floating-point operations per example up to which novelty is computed exactly by itself.
EXACT_FLOPS = 3e8


@dataclass(frozen=True)
class Scorer:
    """What every score of an input is computed from: the model at its weights, and the posterior around them."""

    functional: FunctionalModel
    plan: CapturePlan
    fit: Fit
    settings: Settings
    likelihood: Likelihood

    @cached_property
    def isotropic(self) -> Tensor:
        """Samples ``(S, P)`` in the coordinates of the rows, where the prior is isotropic."""
        scales = self.functional.space.scales(self.settings.precision_by_name)
        return self.fit.unit if scales is None else self.fit.unit / scales

    def outputs(self, x: Inputs) -> int:
        """Numbers in the output of one example."""
        return first_output(self.functional, x, "`x`").numel()

    def is_exact(self, exact: bool | None, outputs: int) -> bool:
        """What was asked for, or what costs little."""
        state = self.fit.state
        if exact is None:
            return state is not None and state.explained_flops(outputs) <= EXACT_FLOPS
        if exact and state is None:
            raise NotFittedError(
                "exact novelty needs the factorisation, which is not stored in files; fit here, or "
                "use `exact=False`."
            )
        return exact

    def too_many_rows(self, outputs: int) -> bool:
        """Whether one pass for each sample costs less than one row for each output."""
        return outputs > REVERSE_OUTPUTS_PER_SAMPLE * len(self.fit.unit)

    def changes(self, x: Inputs) -> Tensor:
        """``J(x) Δ_s (S, B, *out)`` at prior precision one, sample by sample."""
        return forward_mode(self.functional, self.plan, self.fit.unit, x)

    def rows(
        self, x: Inputs, outputs: int, centre: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Tensor, JacobianOperator]]:
        """Outputs ``(b, *out)`` and the rows of them that ``centre`` leaves, some examples at a time."""
        scales = self.settings.scale_by_name
        unit = self.isotropic
        return output_rows(self.functional, self.plan, x, outputs, unit, scales, "`x`", centre)


def novelty_variance(scorer: Scorer, x: Inputs, share: bool, exact: bool | None) -> Tensor:
    """``(B,)`` in the model's dtype; see :meth:`nullbayes.Posterior.novelty`."""
    outputs = scorer.outputs(x)
    exact = scorer.is_exact(exact, outputs)
    # What no prediction depends on, a constant added to all logits, varies on training data as anywhere else: left
    # in, it hides what is new (experiments/ablation_items.py, `scores`).
    centre = scorer.likelihood.centre
    if not exact and not share and scorer.too_many_rows(outputs):
        squares = centre(scorer.changes(x)).double().square().mean(0).flatten(1).sum(1)
        return (squares / scorer.fit.alpha).to(scorer.functional.dtype)
    operators = (operator for _, operator in scorer.rows(x, outputs, centre))
    return _variances(scorer, operators, outputs, share, exact)


def loss_variance(scorer: Scorer, x: Inputs, targets: Any, exact: bool | None) -> Tensor:
    """``Var(∇ℓ(f(x))ᵀ J(x) Δ) (B,)``: of each example's own loss, to first order; one row, however many outputs."""
    functional, likelihood = scorer.functional, scorer.likelihood
    point = functional.outputs(x, "`x`")
    likelihood.validate(point, targets, "`x`")
    targets = likelihood.prepare_targets(point, targets)

    def gradient(outputs: Tensor, piece: slice) -> SimpleNamespace:
        some = take(targets, piece.start, piece.stop, len(point))
        return SimpleNamespace(values=likelihood.loss_gradient(outputs, some).unsqueeze(0))

    def operators() -> Iterator[JacobianOperator]:
        scales = scorer.settings.scale_by_name
        for block, _, _ in capture_batch(functional, scorer.plan, x, gradient, 1, scales):
            yield JacobianOperator(functional.space, [block])

    return _variances(scorer, operators(), 1, False, scorer.is_exact(exact, 1))


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


def _variances(
    scorer: Scorer,
    operators: Iterable[JacobianOperator],
    outputs: int,
    share: bool,
    exact: bool,
) -> Tensor:
    """Variance ``(B,)`` summed over the ``outputs`` rows of each example, or its share of the prior's."""
    fit, unit, values = scorer.fit, scorer.isotropic, []
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
    return torch.cat(values).to(scorer.functional.dtype)
