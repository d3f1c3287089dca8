"""Predictions with a graph behind them: gradients of mean, variance and covariance by the inputs.

The ordinary prediction takes rows from hooks, without a graph. Here the network is differentiated along each sample
while the graph to the inputs stays: forward mode where its operations allow, two reverse passes otherwise. Values are
compared with the ordinary ones, since an operation may drop out of a derivative in silence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nullbayes.errors import InputError, ModelError
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.linearise import differentiable_change, linearised_outputs
from nullbayes.model.batch import Inputs, plain, tensor_leaves
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.precision import tolerance
from nullbayes.model.smooth import smooth
from nullbayes.posterior.joint import Joint, check_size, factorised, joint
from nullbayes.posterior.novelty import Scorer

# How many times the rounding of a forward pass two ways to compute the same thing may differ.
SLACK = 100.0
# Of a gradient, between automatic differentiation and differences: a wrong one is off by about itself.
GRADIENT_SLACK = 0.02


def check_requires_grad(x: Inputs) -> None:
    """Raise `InputError` where there is nothing to differentiate by."""
    if not any(t.requires_grad for t in tensor_leaves(plain(x))):
        raise InputError(
            "`differentiable=True`, but no tensor of `x` requires a gradient; call `x.requires_grad_()` first."
        )


def point_with_graph(functional: FunctionalModel, x: Inputs) -> Tensor:
    """``f(θ̂, x) (B, *out)``."""
    with torch.enable_grad(), smooth():
        return functional(functional.weights(), functional.batch(x))


def changes_with_graph(
    functional: FunctionalModel,
    plan: CapturePlan,
    samples: Tensor,
    x: Inputs,
    expected: Tensor,
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
    check_agreement(functional, change, expected, lambda: _usual(functional, samples, x))
    assert change is not None
    if not functional.differentiated:
        _check_gradient(functional, plan, samples, x, change)
        functional.differentiated = True
    return change


def _usual(functional: FunctionalModel, samples: Tensor, x: Inputs) -> float:
    """Norm of the output changes by weight changes as large as ``samples``, in a random direction.

    Those of a null-space posterior are nothing but rounding at its training inputs.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(samples.shape[1:], generator=generator, dtype=torch.float64).to(samples)
    change = differentiable_change(functional, drawn * (samples.norm() / drawn.norm()), x)
    return 0.0 if change is None else float(change.detach().norm())


def _check_gradient(
    functional: FunctionalModel, plan: CapturePlan, samples: Tensor, x: Inputs, change: Tensor
) -> None:
    """Compare the gradient of ``change`` along one random direction with a central difference, coarsely.

    An operation whose derivative of higher order is wrong says nothing: PyTorch's own have been.
    """
    leaves = [t for t in tensor_leaves(plain(x)) if t.requires_grad]
    generator = torch.Generator().manual_seed(0)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    weights, moves = drawn(change), [drawn(t) for t in leaves]
    found = torch.autograd.grad(
        (change * weights).sum(), leaves, retain_graph=True, materialize_grads=True
    )
    slope = sum(float((g * m).double().sum()) for g, m in zip(found, moves, strict=True))
    step = torch.finfo(change.dtype).eps ** (1 / 3)
    size = max(float(t.detach().abs().mean()) for t in leaves) or 1.0

    def at(steps: float) -> float:
        moved = {
            id(t): t.detach() + steps * step * size * m for t, m in zip(leaves, moves, strict=True)
        }
        there = tree_map(lambda t: moved.get(id(t), t), x)
        values = linearised_outputs(functional, plan, samples, there)[1]
        return float((values * weights).double().sum())

    with torch.no_grad():
        wanted = (at(1.0) - at(-1.0)) / (2 * step * size)
        scale = float(change.detach().norm()) / size
        allowed = GRADIENT_SLACK * (abs(wanted) + scale)
        if abs(slope - wanted) > allowed:
            # Differences that another step does not confirm say nothing: in float32, where a network bends within one.
            other = (at(0.5) - at(-0.5)) / (step * size)
            allowed += 2 * abs(other - wanted)
    if abs(slope - wanted) > allowed:
        raise ModelError(
            f"the gradient of the posterior's samples by `x` is {slope:.4g} along a random direction by automatic "
            f"differentiation, and {wanted:.4g} by differences: an operation of the network has a wrong derivative "
            "of third order, or none at this point. Write it in plain operations, or use `differentiable=False`."
        )


def check_agreement(
    functional: FunctionalModel,
    found: Tensor | None,
    expected: Tensor,
    usual: Callable[[], float],
) -> None:
    """Raise `ModelError` where what was computed with a graph is not there, or not what it is without one.

    Args:
        usual: the size of such values where the training data say nothing; what is left of them where they do is a
            difference of numbers of that size, and as exact as these are.
    """
    if found is not None:
        allowed = SLACK * tolerance(functional.rounding, functional.device)
        off = float((found.detach() - expected).norm())
        size = float(expected.norm()) + torch.finfo(expected.dtype).tiny
        if off <= allowed * size or off <= allowed * (size + usual()):
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
            rows = rows_with_graph(scorer, x, len(point.reshape(-1)))
            moved = covariance_term(scorer, rows)
            prior = float(rows.detach().norm()) ** 2 / fit.alpha
            check_agreement(functional, moved / 2, values.covariance, lambda: prior)
            return Joint(point, values.covariance + moved - moved.detach())
        expected = scorer.changes(x)
        flat = changes_with_graph(functional, scorer.plan, fit.unit, x, expected).flatten(1)
        return Joint(point, flat.T @ flat / (len(flat) * fit.alpha))


def covariance_term(scorer: Scorer, rows: Tensor) -> Tensor:
    """``R V + (R V)ᵀ (B·D, B·D)`` with rows ``R = J(x) (B·D, P)``, and ``V = Σ Rᵀ`` without a graph.

    Its derivative is that of ``R Σ Rᵀ``, whatever the factorisation of ``Σ``; its value is twice as large.
    """
    state = scorer.fit.state
    assert state is not None
    solved = state.covariance_times(rows.detach())
    half = rows @ solved.T / scorer.fit.alpha
    return half + half.T


def rows_with_graph(scorer: Scorer, x: Inputs, count: int) -> Tensor:
    """``J(x) (B·D, P)`` in the coordinates in which the prior is isotropic, with a graph to ``x``."""
    problem = scorer.problem
    functional, space = problem.functional, problem.space
    leaves = functional.weights(requires_grad=True)
    with torch.enable_grad(), smooth():
        flat = functional(leaves, functional.batch(x)).reshape(-1)
        rows = []
        for value in flat:
            found = torch.autograd.grad(
                value, list(leaves.values()), create_graph=True, materialize_grads=True
            )
            rows.append(space.flatten(dict(zip(leaves, found, strict=True))))
        out = torch.stack(rows)
        assert len(out) == count
        if problem.within is not None:
            return problem.within.whiten(out)
        return out * problem.weight_changes(torch.ones_like(out[:1]).detach())
