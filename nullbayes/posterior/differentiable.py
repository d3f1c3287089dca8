"""Predictions with a graph behind them: gradients of mean, variance and covariance by the inputs.

The ordinary prediction takes rows from hooks, without a graph. Here the network is differentiated along each sample
while the graph to the inputs stays: forward mode where its operations allow, two reverse passes otherwise. Values are
compared with the ordinary ones, since an operation may drop out of a derivative in silence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.errors import InputError, ModelError
from nullbayes.jacobian.linearise import Mathematical, differentiable_change
from nullbayes.model.batch import Inputs, plain, tensor_leaves
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.precision import tolerance
from nullbayes.posterior.joint import Joint, check_size, factorised, joint
from nullbayes.posterior.novelty import Scorer

# How many times the rounding of a forward pass two ways to compute the same thing may differ.
SLACK = 100.0


def check_requires_grad(x: Inputs) -> None:
    """Raise `InputError` where there is nothing to differentiate by."""
    if not any(t.requires_grad for t in tensor_leaves(plain(x))):
        raise InputError(
            "`differentiable=True`, but no tensor of `x` requires a gradient; call `x.requires_grad_()` first."
        )


def point_with_graph(functional: FunctionalModel, x: Inputs) -> Tensor:
    """``f(θ̂, x) (B, *out)``."""
    with torch.enable_grad():
        return functional(functional.weights(), x)


def changes_with_graph(
    functional: FunctionalModel, samples: Tensor, x: Inputs, expected: Tensor
) -> Tensor:
    """``J(x) Δ_s (S, B, *out)`` with a graph to ``x``.

    Args:
        expected: the same without a graph.

    Raises:
        ModelError: an operation of the network has no second derivative.
    """
    x = functional.batch(x)
    changes = [differentiable_change(functional, delta, x) for delta in samples]
    found = [c for c in changes if c is not None]
    change = torch.stack(found) if len(found) == len(samples) else None
    check_agreement(functional, change, expected)
    assert change is not None
    return change


def check_agreement(functional: FunctionalModel, found: Tensor | None, expected: Tensor) -> None:
    """Raise `ModelError` where what was computed with a graph is not there, or not what it is without one."""
    if found is not None:
        allowed = SLACK * tolerance(functional.rounding, functional.device)
        off = (found.detach() - expected).norm()
        if bool(off <= allowed * expected.norm() + torch.finfo(expected.dtype).tiny):
            return
    raise ModelError(
        "the network cannot be differentiated by its weights and its inputs at once: an operation has no second "
        "derivative (a fused kernel, say). Use its plain form in the forward pass, or `differentiable=False`."
    )


def joint_with_graph(scorer: Scorer, x: Inputs) -> Joint:
    """As :func:`nullbayes.posterior.joint.joint`, differentiable once by ``x``."""
    functional, fit = scorer.problem.functional, scorer.fit
    check_size(scorer, x)
    with torch.no_grad():
        values = joint(scorer, x)
    point = point_with_graph(functional, x)
    with torch.enable_grad():
        if factorised(scorer):
            moved = covariance_term(scorer, x, point)
            check_agreement(functional, moved / 2, values.covariance)
            return Joint(point, values.covariance + moved - moved.detach())
        expected = scorer.changes(x)
        flat = changes_with_graph(functional, fit.unit, x, expected).flatten(1)
        return Joint(point, flat.T @ flat / (len(flat) * fit.alpha))


def covariance_term(scorer: Scorer, x: Inputs, point: Tensor) -> Tensor:
    """``R V + (R V)ᵀ (B·D, B·D)`` with rows ``R = J(x)``, and ``V = Σ Rᵀ`` without a graph.

    Its derivative is that of ``R Σ Rᵀ``, whatever the factorisation of ``Σ``; its value is twice as large.
    """
    state = scorer.fit.state
    assert state is not None
    rows = rows_with_graph(scorer, x, len(point.reshape(-1)))
    solved = state.covariance_times(rows.detach())
    half = rows @ solved.T / scorer.fit.alpha
    return half + half.T


def rows_with_graph(scorer: Scorer, x: Inputs, count: int) -> Tensor:
    """``J(x) (B·D, P)`` in the coordinates in which the prior is isotropic, with a graph to ``x``."""
    problem = scorer.problem
    functional, space = problem.functional, problem.space
    leaves = functional.weights(requires_grad=True)
    with torch.enable_grad(), Mathematical():
        flat = functional(leaves, functional.batch(x)).reshape(-1)
        rows = []
        for value in flat:
            found = torch.autograd.grad(
                value, list(leaves.values()), create_graph=True, materialize_grads=True
            )
            rows.append(space.flatten(dict(zip(leaves, found, strict=True))))
        out = torch.stack(rows)
        assert len(out) == count
        return out * problem.weight_changes(torch.ones_like(out[:1]).detach())
