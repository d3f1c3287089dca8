"""How much the training data leave unconstrained at an input: one number an example, under several scores.

``"information"``: what an observation at an input would tell of the weights, in nats, ``½ log det(I + J(x) Σ J(x)ᵀ)``
(MacKay, *Information-based objective functions for active data selection*, Neural Computation 1992, eq. 4). Outputs are
observed with the noise of the likelihood, logits with variance one. Where the variance adds up what is unconstrained,
this asks in how many directions it is: an input at which one class wavers has less novelty than one at which all do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nullbayes.common.decompositions import eigvalsh
from nullbayes.common.shapes import merged
from nullbayes.common.work import ENDLESS, LAYER_SECONDS, Work
from nullbayes.constraints.problem import Problem
from nullbayes.errors import InputError, NotFittedError
from nullbayes.fit.result import Fit
from nullbayes.jacobian.capture.batches import capture_batch
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.linearise import (
    REVERSE_OUTPUTS_PER_SAMPLE,
    blaming_inputs,
    forward_mode,
    output_rows,
    output_shape,
)
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.likelihood import Likelihood
from nullbayes.model.batch import Inputs, plain, take, to_device
from nullbayes.solvers.base import State, relative
from nullbayes.solvers.block_cg import blocks

# Examples at a time for which exact novelty has to pay, one as well as many: whether it is exact shall not depend on
# the company.
COMPANY = (1, 32)
# Numbers of written-out rows up to which their products are taken of those, and not layer by layer.
WRITTEN = 2**18


@dataclass(frozen=True)
class Scorer:
    """What every score of an input is computed from.

    Attributes:
        plan: how rows at these inputs are captured.
        exact: from the factorisation, or from the samples; None: exactly where that costs little.
    """

    fit: Fit
    plan: CapturePlan
    exact: bool | None = None

    @property
    def problem(self) -> Problem:
        return self.fit.problem

    @property
    def likelihood(self) -> Likelihood:
        return self.problem.likelihood

    @cached_property
    def isotropic(self) -> Tensor:
        """Samples ``(S, P)`` in the coordinates of the rows, where the prior is isotropic."""
        problem, fit = self.problem, self.fit
        if problem.within is None and problem.precision_by_name is None:
            return fit.stored  # rows widen what is stored in half precision, some of it at a time
        return problem.isotropic(fit.unit)

    def outputs(self, x: Inputs) -> int:
        """Numbers in the output of one example."""
        return output_shape(self.problem.functional, self.plan, x, "`x`").numel()

    def is_exact(self, outputs: int) -> bool:
        """What was asked for, or what costs little."""
        state = self.fit.state
        if self.exact is None:
            return state is not None and exact_pays(state, outputs, self.fit.num_samples)
        if self.exact and state is None:
            raise NotFittedError(
                "exact novelty needs the factorisation, which is not stored in files; fit here, or "
                "use `exact=False`."
            )
        searched = state is not None and state.explained_work(outputs) == ENDLESS
        if self.exact and searched and state is not None and not state.alone:
            raise InputError(
                "exact novelty of a solver that iterates, on several processes: use `exact=False`, or fit with "
                "`solver=nb.solvers.DualCholesky()` or `PrimalQR()`."
            )
        return self.exact

    def too_many_rows(self, outputs: int) -> bool:
        """Whether one pass for each sample costs less than one row for each output."""
        return outputs > REVERSE_OUTPUTS_PER_SAMPLE * self.fit.num_samples

    def changes(self, x: Inputs) -> Tensor:
        """``J(x) Δ_s (S, B, *out)`` at prior precision one, sample by sample."""
        found = forward_mode(self.problem.functional, self.plan, self.fit.stored, x)
        return self.fit.crowd.joined(found)

    def rows(
        self, x: Inputs, outputs: int, centre: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Tensor, JacobianOperator]]:
        """Outputs ``(b, *out)`` and the rows of them that ``centre`` leaves, some examples at a time."""
        problem, unit = self.problem, self.isotropic
        scales = problem.scale_by_name
        with blaming_inputs(problem.functional, x, "`x`"):
            rows = output_rows(problem.functional, self.plan, x, outputs, unit, scales, centre)
            for point, operator in rows:
                yield point, self.in_coordinates(operator)

    def in_coordinates(self, operator: JacobianOperator) -> JacobianOperator:
        """Rows as they were captured, in the coordinates in which the prior is isotropic."""
        problem = self.problem
        if problem.within is None:
            return operator
        blocks = []
        for kept in operator.blocks:
            with kept.opened() as block:
                blocks.append(problem.in_coordinates(block))
        return JacobianOperator(problem.space, blocks)

    def natural_precision(self) -> float:
        """The prior precision at which information is counted: ``γ / ‖θ̂‖²``, whatever it was set to since.

        With another one the order of inputs would be another; `calibrate` shall not change the novelty of an input.
        One where the weights have no size.
        """
        return self.fit.natural_precision


def exact_pays(state: State, outputs: int, samples: int) -> bool:
    """Whether exact scores of inputs with so many outputs cost at most twice those from samples, by what is counted.

    Both begin with the same rows; exact is chosen where the rest of it takes no longer than these rows and the products
    with samples. Of the rows, less is counted than they take.
    """
    each, itemsize = state.operator.row_work, state.operator.dtype.itemsize
    if any(block.where != "memory" for block in getattr(state.operator.mine, "blocks", ())):
        return False  # read from a disk, or computed anew
    for size in COMPANY:
        rows = size * outputs
        captured = Work(rows * each.captured, nbytes=rows * each.read * itemsize)
        products = Work(rows * samples * each.product, nbytes=samples * each.read * itemsize)
        others = LAYER_SECONDS * each.layers + captured.seconds + products.seconds
        if state.explained_work(rows).seconds > others:
            return False
    return True


# -- the scores ------------------------------------------------------------------------------------


def information(scorer: Scorer, x: Inputs, targets: Any) -> Tensor:
    """``½ log det(I + J(x) Σ J(x)ᵀ)``, nats ``(B,)``."""
    outputs = scorer.outputs(x)
    precision = scorer.natural_precision()
    if scorer.is_exact(outputs):
        exact = exact_covariances(scorer, x, outputs, scorer.likelihood.observed)
        told = [_log_det(part, precision) for part in exact]
    else:
        told = [_log_det(_sampled(part), precision) for part in _changes(scorer, x, outputs)]
    return torch.cat(told).to(scorer.problem.dtype)


def variance(scorer: Scorer, x: Inputs, targets: Any) -> Tensor:
    """``tr J(x) Σ J(x)ᵀ (B,)``, in the units of the outputs squared."""
    outputs = scorer.outputs(x)
    # What no prediction depends on, a constant added to all logits, varies on training data as anywhere else: left
    # in, it hides what has higher novelty (experiments/ablation_items.py, `scores`).
    centre = scorer.likelihood.centre
    if not scorer.is_exact(outputs) and scorer.too_many_rows(outputs):
        squares = centre(scorer.changes(x)).double().square().mean(0)
        squares = merged(squares, 1).sum(1)
        return (squares / scorer.fit.alpha).to(scorer.problem.dtype)
    operators = (operator for _, operator in scorer.rows(x, outputs, centre))
    total = _summed(scorer, operators, outputs) / scorer.fit.alpha
    return total.to(scorer.problem.dtype)


def information_and_variance(scorer: Scorer, x: Inputs) -> Tensor:
    """Both scores ``(B, 2)`` from the same rows, for about what one of them costs."""
    outputs, precision = scorer.outputs(x), scorer.natural_precision()
    if not _observed_as_they_are(scorer.likelihood):
        return torch.stack([information(scorer, x, None), variance(scorer, x, None)], 1)
    if scorer.is_exact(outputs):
        parts = exact_covariances(scorer, x, outputs, scorer.likelihood.centre)
    else:
        parts = map(_sampled, _changes(scorer, x, outputs))
    found = []
    for part in parts:
        total = part.diagonal(dim1=1, dim2=2).sum(1).clamp(min=0) / scorer.fit.alpha
        found.append(torch.stack([_log_det(part, precision), total], 1))
    return torch.cat(found).to(scorer.problem.dtype)


def _observed_as_they_are(likelihood: Likelihood) -> bool:
    """Whether outputs are observed with variance one: what both scores are then of."""
    return type(likelihood).observed is Likelihood.observed


def share(scorer: Scorer, x: Inputs, targets: Any) -> Tensor:
    """The variance as a share of the prior's ``(B,)``, in [0, 1]. Raises `InputError` where that is not isotropic."""
    if not scorer.problem.plain_prior:
        raise InputError(
            "`score` is 'share', the share of an isotropic prior, and this posterior's prior is `within=`; expected "
            "'information' or 'variance'."
        )
    outputs = scorer.outputs(x)
    values = []
    for _, operator in scorer.rows(x, outputs, scorer.likelihood.centre):
        left = _per_row(scorer, operator, outputs).reshape(-1, outputs).sum(1)
        prior = operator.squared_norms().reshape(-1, outputs).sum(1)
        values.append(relative(left, prior).clamp(0, 1))
    return torch.cat(values).to(scorer.problem.dtype)


def loss_variance(scorer: Scorer, x: Inputs, targets: Any) -> Tensor:
    """``Var(∇ℓ(f(x))ᵀ J(x) Δ) (B,)``: of each example's own loss, to first order; one row, however many outputs."""
    functional, likelihood = scorer.problem.functional, scorer.likelihood
    targets = _targets(likelihood, plain(x), targets, functional.device)
    point = functional.outputs(x, "`x`")
    targets = scorer.problem.checked_targets(point, targets, "`x`")

    def gradient(outputs: Tensor, piece: slice) -> SimpleNamespace:
        some = take(targets, piece.start, piece.stop, len(point))
        return SimpleNamespace(values=likelihood.loss_gradient(outputs, some).unsqueeze(0))

    def operators() -> Iterator[JacobianOperator]:
        scales = scorer.problem.scale_by_name
        for block, _, _ in capture_batch(functional, scorer.plan, x, gradient, 1, scales):
            yield scorer.in_coordinates(JacobianOperator(functional.space, [block]))

    total = _summed(scorer, operators(), 1) / scorer.fit.alpha
    return total.to(scorer.problem.dtype)


Score = Callable[[Scorer, Inputs, Any], Tensor]
#: by name, from the posterior's rows; entropies of predictions are scores too
ROW_SCORES: dict[str, Score] = {
    "information": information,
    "variance": variance,
    "share": share,
    "loss": loss_variance,
}
ENTROPIES = ("entropy", "mutual_information")
SCORES = (*ROW_SCORES, *ENTROPIES)


def _targets(likelihood: Likelihood, x: Inputs, targets: Any, device: torch.device) -> Any:
    """What the losses at ``x`` are taken against. Raises `InputError` where that is not known."""
    if targets is None and not likelihood.inputs_are_targets:
        raise InputError(
            "`score` is 'loss', which needs the targets of `x`: pass `targets=`. (A callable loss gets the inputs as "
            "targets where there are none.)"
        )
    return to_device(x if targets is None else targets, device)


def check_has_entropy(likelihood: Likelihood, score: str) -> None:
    """Raise `InputError` for a likelihood that says nothing of the spread of its targets."""
    if not likelihood.describes_targets:
        raise InputError(
            f"`score` is {score!r}, which a callable loss does not have; expected 'information', 'variance', 'share' "
            "or 'loss'."
        )


# -- from rows -------------------------------------------------------------------------------------


def _per_row(scorer: Scorer, operator: JacobianOperator, outputs: int) -> Tensor:
    """Variance along each row at prior precision one, float64 ``(R,)``."""
    if not scorer.is_exact(outputs):
        moved = scorer.fit.crowd.joined(operator.matvec(scorer.isotropic))
        return moved.double().square().mean(0)
    state = scorer.fit.state
    assert state is not None
    return (operator.squared_norms() - state.explained(operator).flatten()).clamp(min=0)


def _summed(scorer: Scorer, operators: Iterable[JacobianOperator], outputs: int) -> Tensor:
    """Variance at prior precision one, summed over the ``outputs`` rows of each example: ``(B,)`` float64."""
    values = [_per_row(scorer, o, outputs).reshape(-1, outputs).sum(1) for o in operators]
    return torch.cat(values)


def _changes(scorer: Scorer, x: Inputs, outputs: int) -> Iterator[Tensor]:
    """What samples at prior precision one do to observed outputs, ``(S, b, *out)``, some examples at a time."""
    observed, unit = scorer.likelihood.observed, scorer.isotropic
    if scorer.too_many_rows(outputs):
        yield observed(scorer.changes(x))
        return
    for point, operator in scorer.rows(x, outputs, observed):
        moved = scorer.fit.crowd.joined(operator.matvec(unit))
        yield moved.reshape(len(moved), *point.shape)


def exact_covariances(
    scorer: Scorer, x: Inputs, outputs: int, centre: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """Exact covariances of what ``centre`` leaves of outputs, at prior precision one, ``(b, O, O)`` float64."""
    state = scorer.fit.state
    assert state is not None
    for _, operator in scorer.rows(x, outputs, centre):
        if operator.shape[0] * operator.shape[1] <= WRITTEN:
            written = operator.iter_rows(operator.shape[0])
            prior = torch.cat([blocks(values.double().T, outputs) for values in written])
        else:
            prior = operator.own_products()
        covariance = prior - state.explained(operator, outputs)
        yield (covariance + covariance.mT) / 2


def _sampled(part: Tensor) -> Tensor:
    """A matrix ``(b, k, k)`` with the nonzero eigenvalues of the covariance of ``(S, b, *out)``, k at most S."""
    changes = merged(part.double(), 2)
    samples, _, outputs = changes.shape
    between = "sbo,tbo->bst" if samples < outputs else "sbo,sbp->bop"
    return torch.einsum(between, changes, changes) / samples


def _log_det(covariance: Tensor, precision: float) -> Tensor:
    """``½ log det(I + C / precision) (b,)`` float64."""
    values = eigvalsh(covariance).clamp(min=0)
    return 0.5 * torch.log1p(values / precision).sum(-1)
