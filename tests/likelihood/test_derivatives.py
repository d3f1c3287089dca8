"""Gradients and Hessian factors against automatic differentiation in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from nullbayes.errors import InputError
from nullbayes.likelihood import (
    Binary,
    Classification,
    Likelihood,
    likelihood_from_config,
    softmax_directions,
    softmax_factor,
)
from tests.likelihood.likelihood_setup import F64, IGNORED, each_case, gram, labels, normal


def dense_hessian(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    """Hessian of the loss by torch.func, example by example: (B, D, D)."""
    width = math.prod(outputs.shape[1:])
    one = [
        torch.func.hessian(lambda f, t=targets[n : n + 1]: likelihood.loss(f[None], t)[0])(
            outputs[n]
        )
        for n in range(outputs.shape[0])
    ]
    return torch.stack(one).reshape(outputs.shape[0], width, width)


# -- the closed forms ----------------------------------------------------------------------------


@each_case
def test_gradient_and_hessian_are_the_derivatives_of_the_loss(case):
    likelihood, outputs, targets = case
    likelihood.validate(outputs, targets, "test")
    point = outputs.clone().requires_grad_()
    loss = likelihood.loss(point, targets)
    assert loss.shape == outputs.shape[:1]
    gradient = torch.autograd.grad(loss.sum(), point)[0]
    assert_close(likelihood.loss_gradient(outputs, targets), gradient)
    factor = likelihood.hessian_factor(outputs, targets)
    assert factor.shape == (likelihood.hessian_rank(tuple(outputs.shape[1:])), *outputs.shape)
    hessian = dense_hessian(likelihood, outputs, targets)
    assert hessian.abs().max() > 1e-3  # or the comparison would be one of zeros
    assert_close(gram(factor), hessian)


@each_case
def test_defaults_of_the_base_class_agree(case):
    likelihood, outputs, targets = case
    assert_close(
        Likelihood.loss_gradient(likelihood, outputs, targets),
        likelihood.loss_gradient(outputs, targets),
    )
    assert_close(
        gram(Likelihood.hessian_factor(likelihood, outputs, targets)),
        gram(likelihood.hessian_factor(outputs, targets)),
    )


@each_case
def test_dtype_grad_mode_and_rng_are_left_alone(case):
    likelihood, outputs, targets = case
    state = torch.get_rng_state()
    with torch.inference_mode():
        outputs = outputs.float().clone()
        targets = targets.clone()
        for result in (
            likelihood.loss(outputs, targets),
            likelihood.loss_gradient(outputs, targets),
            likelihood.hessian_factor(outputs, targets),
            Likelihood.loss_gradient(likelihood, outputs, targets),
            Likelihood.hessian_factor(likelihood, outputs, targets),
            likelihood.log_predictive(outputs[None], targets),
            likelihood.moments(outputs[None], outputs, linearised=True).total,
        ):
            assert result.dtype == torch.float32
            assert not result.requires_grad
    grown = outputs.detach().clone().requires_grad_()
    assert not likelihood.hessian_factor(grown, targets).requires_grad
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 0.1, 1.0, 3.0]])
def test_cross_entropy_matches_torch(weight):
    outputs, targets = normal(6, 5), torch.tensor([0, 4, -100, 2, 3, 1])
    torch_weight = None if weight is None else torch.tensor(weight, dtype=F64)
    expected = F.cross_entropy(outputs, targets, weight=torch_weight, reduction="none")
    assert_close(Classification(weight=weight).loss(outputs, targets), expected)
    soft = normal(6, 5, seed=3).softmax(-1)
    expected = F.cross_entropy(outputs, soft, weight=torch_weight, reduction="none")
    assert_close(Classification(weight=weight).loss(outputs, soft), expected)


@given(
    values=st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=12),
    shift=st.floats(-100, 100, width=32),
)
@settings(max_examples=150, deadline=None)
def test_softmax_factor_in_float32_at_any_confidence(values, shift):
    logits = (torch.tensor([values], dtype=torch.float32) + shift).float()
    factor = softmax_factor(logits)
    assert factor.shape == (len(values) - 1, 1, len(values))
    assert torch.isfinite(factor).all()
    p = logits.double().softmax(-1)[0]
    # diag(p) - p pᵀ without the cancellation: p_i (Σ_{j≠i} p_j) on the diagonal.
    dense = -torch.outer(p, p)
    dense.diagonal().copy_(
        torch.stack([p[i] * (p[:i].sum() + p[i + 1 :].sum()) for i in range(len(p))])
    )
    error = (gram(factor.double())[0] - dense).norm() / dense.norm()
    assert error < 1e-6, error


def test_softmax_factor_at_fixed_extremes():
    logits = torch.tensor([[60.0, -60.0, -60.0], [-60.0, 60.0, -60.0], [-60.0, -60.0, 60.0]])
    H = gram(softmax_factor(logits).double())
    # Trace of the Hessian here is about 4 e^-120: far below float32, and still right.
    assert_close(
        H.diagonal(dim1=1, dim2=2).sum(1),
        torch.full((3,), 4 * math.exp(-120), dtype=F64),
        rtol=1e-5,
        atol=0,
    )
    beyond = softmax_factor(
        torch.tensor([[2000.0, -2000.0, 0.0], [-2000.0, 0.0, 2000.0]], dtype=F64)
    )
    assert torch.equal(beyond, torch.zeros_like(beyond))  # underflows even float64: zeros, not NaN
    # One class surely out in the middle: the other two share the mass as a coin does.
    coin = gram(softmax_factor(torch.tensor([[0.0, -5000.0, 0.0]], dtype=F64)))[0]
    assert_close(coin, torch.tensor([[0.25, 0, -0.25], [0, 0, 0], [-0.25, 0, 0.25]], dtype=F64))


def test_softmax_factor_in_blocks(monkeypatch):
    logits = normal(3, 9)
    whole = softmax_factor(logits)
    monkeypatch.setattr("nullbayes.likelihood.softmax._BLOCK", 3 * 9 * 3)
    assert_close(softmax_factor(logits), whole, rtol=0, atol=0)


@given(
    values=st.lists(st.floats(-60, 60), min_size=2, max_size=12),
    ties=st.integers(0, 3),
    directions=st.integers(1, 12),
)
@settings(max_examples=150, deadline=None)
def test_softmax_directions_are_the_eigenvectors(values, ties, directions):
    logits = torch.tensor([values + values[:1] * ties], dtype=F64)
    keep = min(directions, logits.shape[1] - 1)
    rows, eigenvalues, traces = softmax_directions(logits, keep)
    H = gram(softmax_factor(logits))[0]
    size = H.norm()
    assert_close(traces[0], H.trace(), rtol=1e-9, atol=0)
    assert_close(
        eigenvalues[0] / size, torch.linalg.eigvalsh(H).flip(0)[:keep] / size, rtol=0, atol=1e-9
    )
    assert_close(rows[0] @ rows[0].T / size, torch.diag(eigenvalues[0]) / size, rtol=0, atol=1e-9)
    assert_close(H @ rows[0].T / size, rows[0].T * eigenvalues[0] / size, rtol=1e-9, atol=1e-9)


def test_softmax_directions_at_fixed_extremes(monkeypatch):
    logits = torch.zeros(4, 20, dtype=F64)
    logits[1] = -2000 * torch.arange(20)  # all but one probability underflow
    logits[2, 0] = 300
    logits[3, :2] = 5000
    rows, eigenvalues, traces = softmax_directions(logits, 3)
    assert torch.isfinite(rows).all()
    assert_close(eigenvalues[0], torch.full((3,), 1 / 20, dtype=F64))
    assert rows[1].count_nonzero() == 0 and traces[1] == 0
    small = math.exp(-300)
    expected = torch.tensor([20 * small, small, small], dtype=F64)
    assert_close(eigenvalues[2], expected, rtol=1e-9, atol=0)
    assert_close(eigenvalues[3], torch.tensor([0.5, 0, 0], dtype=F64))
    monkeypatch.setattr("nullbayes.likelihood.softmax._BLOCK", 3 * 20)
    for got, wanted in zip(softmax_directions(logits, 3), (rows, eigenvalues, traces), strict=True):
        assert_close(got, wanted, rtol=1e-12, atol=1e-15)


def test_confident_gradients_keep_their_digits_in_float32():
    logits = torch.tensor([[40.0, 0.0, 3.0]])
    gradient = Classification().loss_gradient(logits, torch.tensor([0]))
    p = logits.double().softmax(-1)
    expected = torch.stack([-(p[0, 1] + p[0, 2]), p[0, 1], p[0, 2]])[None]
    assert_close(gradient.double(), expected, rtol=1e-5, atol=0)
    gradient = Binary().loss_gradient(torch.tensor([[60.0], [-60.0]]), torch.tensor([1, 0]))
    assert_close(
        gradient.double(),
        torch.tensor([[-1.0], [1.0]], dtype=F64) * math.exp(-60),
        rtol=1e-5,
        atol=0,
    )
    root = Binary().hessian_factor(torch.tensor([[60.0], [-60.0]]), torch.tensor([1, 0]))
    assert_close(root.double(), torch.full((1, 2, 1), math.exp(-30), dtype=F64), rtol=1e-5, atol=0)


def test_ignored_positions_count_for_nothing():
    likelihood, outputs = Classification(), normal(3, 4, 5)
    assert likelihood.loss(outputs, IGNORED)[1] == 0
    gone = IGNORED == -100
    assert likelihood.loss_gradient(outputs, IGNORED)[gone].count_nonzero() == 0
    factor = likelihood.hessian_factor(outputs, IGNORED)
    assert factor[:, gone].count_nonzero() == 0
    assert (factor[:, ~gone].abs().amax((0, 2)) > 0).all()
    assert likelihood.log_predictive(outputs[None], IGNORED)[1] == 0
    assert likelihood.correct(outputs, IGNORED).numel() == 6


# -- the class axis ------------------------------------------------------------------------------


def test_axis_seen_in_training_is_used_for_predictions():
    likelihood, outputs = Classification(), normal(3, 5, 4)
    assert likelihood.hessian_rank((5, 4)) == 5 * 3  # nothing seen: the last axis
    likelihood.validate(outputs, labels(5, 3, 4), "train_loader, batch 0")
    assert likelihood.hessian_rank((5, 4)) == 4 * 4
    mean = likelihood.moments(outputs[None], outputs, linearised=True).mean
    assert_close(mean.sum(1), torch.ones(3, 4, dtype=F64))
    loaded = likelihood_from_config(json.loads(json.dumps(likelihood.config())))
    assert_close(loaded.moments(outputs[None], outputs, linearised=True).mean, mean)
    with pytest.raises(
        InputError, match=r"batch 1: the labels put the classes on axis 2.*class_axis=2"
    ):
        likelihood.validate(outputs, labels(4, 3, 5), "train_loader, batch 1")


def test_a_refused_batch_leaves_no_trace():
    likelihood = Classification()
    with pytest.raises(InputError, match="labels reach 9"):
        likelihood.validate(normal(3, 5, 4), torch.full((3, 4), 9), "batch 0")
    likelihood.validate(normal(3, 4, 5), labels(5, 3, 4), "batch 0")


def test_negative_class_axis():
    outputs, targets = normal(2, 3, 3, 3), labels(3, 2, 3, 3)
    last = Classification(class_axis=-1).loss(outputs, targets)
    assert_close(last, Classification().loss(outputs.movedim(-1, 1), targets))
    assert (last - Classification().loss(outputs, targets)).abs().max() > 1e-3
    with pytest.raises(InputError, match="class_axis is 0"):
        Classification(class_axis=0)
    with pytest.raises(InputError, match="class_axis=3 is no class axis"):
        Classification(class_axis=3).validate(normal(3, 5), labels(5, 3), "b")
