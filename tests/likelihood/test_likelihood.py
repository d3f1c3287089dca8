"""Likelihoods against automatic differentiation, exact sums and defining identities."""

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

from nullbayes.errors import InputError, NonFiniteError, NotFittedError
from nullbayes.likelihood import (
    Binary,
    Classification,
    Likelihood,
    Moments,
    Regression,
    epistemic_variance,
    likelihood_from_config,
    register_likelihood,
    resolve_likelihood,
    softmax_directions,
    softmax_factor,
)

F64 = torch.float64


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=F64).to(dtype)


def labels(classes: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(classes, shape, generator=rng(seed))


def gram(factor: Tensor) -> Tensor:
    """``Σ_c l_c l_cᵀ`` of a factor (C, B, *out): (B, D, D)."""
    flat = factor.flatten(2) if factor.ndim > 2 else factor.unsqueeze(-1)
    return torch.einsum("cni,cnj->nij", flat, flat)


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


SOFT = normal(3, 5, seed=7).softmax(-1)
WEIGHT = [0.5, 2.0, 0.0, 1.0, 3.0]
IGNORED = torch.tensor([[1, -100, 4, 0], [-100, -100, -100, -100], [2, 3, -100, 1]])
CASES = {
    "classes": (Classification(), normal(3, 5), labels(5, 3)),
    "classes-uint8": (Classification(), normal(3, 5), labels(5, 3).to(torch.uint8)),
    "two-classes-bool": (Classification(), normal(4, 2), labels(2, 4).bool()),
    "soft": (Classification(), normal(3, 5), SOFT),
    "weight": (Classification(weight=WEIGHT), normal(3, 5), labels(5, 3)),
    "soft-weight": (Classification(weight=WEIGHT), normal(3, 5), SOFT),
    "tokens": (Classification(), normal(3, 4, 5), labels(5, 3, 4)),
    "tokens-first": (Classification(), normal(3, 5, 4), labels(5, 3, 4)),
    "tokens-square": (Classification(), normal(3, 5, 5), labels(5, 3, 5)),
    "tokens-axis": (Classification(class_axis=1), normal(3, 5, 5), labels(5, 3, 5)),
    "tokens-ignored": (Classification(), normal(3, 4, 5), IGNORED),
    "tokens-ignored-weight": (Classification(weight=WEIGHT), normal(3, 4, 5), IGNORED),
    "tokens-soft": (Classification(), normal(3, 4, 5), normal(3, 4, 5, seed=8).softmax(-1)),
    "ignore-zero": (Classification(ignore_index=0), normal(6, 5), torch.tensor([0, 1, 0, 2, 3, 4])),
    "pixels": (Classification(), normal(2, 4, 2, 3), labels(4, 2, 2, 3)),
    "pixels-last": (Classification(), normal(2, 2, 3, 4), labels(4, 2, 2, 3)),
    "binary": (Binary(), normal(4, 1), labels(2, 4)),
    "binary-flat": (Binary(), normal(4), labels(2, 4).bool()),
    "binary-column": (Binary(), normal(4), labels(2, 4, 1)),
    "multi-label": (Binary(), normal(4, 3), labels(2, 4, 3)),
    "binary-soft": (Binary(), normal(4, 2, 3), normal(4, 2, 3, seed=3).sigmoid()),
    "gauss": (Regression(0.3), normal(4, 3), normal(4, 3, seed=5)),
    "gauss-flat": (Regression(0.3), normal(4), normal(4, seed=5)),
    "gauss-column": (Regression(0.3), normal(4, 1), normal(4, seed=5)),
    "gauss-channels": (Regression([0.1, 1.0, 9.0]), normal(4, 3), normal(4, 3, seed=5)),
    "gauss-image": (Regression([0.1, 4.0]), normal(3, 2, 2, 2), normal(3, 2, 2, 2, seed=5)),
    "gauss-elements": (
        Regression(normal(2, 3, seed=4).exp()),
        normal(4, 2, 3),
        normal(4, 2, 3, seed=5),
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


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


# -- messages ------------------------------------------------------------------------------------

BAD = [
    (
        Classification(),
        normal(3, 10),
        torch.tensor([0, 10, 3]),
        "labels reach 10, model has 10 outputs, expected 0..9",
    ),
    (Classification(), normal(3, 10), torch.tensor([0, -1, 3]), r"down to -1.*ignore_index=-1"),
    (Classification(), normal(3, 3), torch.tensor([1, 2, 3]), r"start at 1: pass `targets - 1`"),
    (
        Classification(),
        normal(3, 10),
        torch.zeros(3),
        r"float32 and shape \(3,\).*targets.long\(\).*regression",
    ),
    (
        Classification(),
        normal(3, 10),
        labels(10, 3, 1),
        r"expected \(3,\)\. `targets.reshape\(\(3,\)\)`",
    ),
    (Classification(), normal(3, 5), F.one_hot(labels(5, 3), 5), "one-hot"),
    (Classification(), normal(3, 5, 4), labels(5, 3, 7), r"classes on axis 2.*class_axis"),
    (Classification(), normal(3, 1), labels(1, 3), 'likelihood="binary"'),
    (Classification(), normal(3), labels(2, 3), 'likelihood="binary"'),
    (Classification(), normal(3, 5), torch.full((3, 5), 0.5), r"sum to 2\.5 .* expected 1"),
    (Classification(), normal(3, 5), normal(3, 5), "soft labels go down to -"),
    (Classification(weight=[1, 2]), normal(3, 5), labels(5, 3), "`weight` has 2 entries"),
    (Classification(), normal(3, 5), labels(5, 4), "one target per example, 3"),
    (Classification(), labels(5, 3, 5), labels(5, 3), "dtype torch.int64, expected real floating"),
    (Classification(), normal(0, 5), labels(5, 0), "at least one example"),
    (Classification(), normal(3, 5), [1, 2, 3], "targets are a list"),
    (Classification(), {"logits": 1}, labels(5, 3), r"outputs are a dict.*forward="),
    (Binary(), normal(3, 4), labels(4, 3), 'likelihood="classification"'),
    (Binary(), normal(3, 4), labels(2, 3, 5), "expected the same shape"),
    (Binary(), normal(3), torch.tensor([-1, 1, 1]), r"\(targets \+ 1\) / 2"),
    (Binary(), normal(3, 1), torch.tensor([0, 1, 2]), r"lie in \[0, 2\].*classification"),
    (Regression(1.0), normal(3, 2), normal(3), "broadcasting"),
    (Regression([1.0, 2.0]), normal(3, 4), normal(3, 4), r"noise_variance has shape \(2,\)"),
    (Regression(), normal(3, 1), normal(3, 1).to(torch.complex64), "complex64"),
]


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "message"), BAD, ids=[b[3] for b in BAD]
)
def test_refusals_name_place_finding_and_mend(likelihood, outputs, targets, message):
    with pytest.raises(InputError, match=r"(?s)^train_loader, batch 3: .*" + message):
        likelihood.validate(outputs, targets, "train_loader, batch 3")


@pytest.mark.parametrize(
    "likelihood", [Classification(), Binary(), Regression(1.0)], ids=lambda x: x.name
)
def test_nan_and_infinity_are_refused(likelihood):
    good = torch.full((4, 2), 0.5)
    for value in (math.nan, math.inf):
        bad = good.clone()
        bad[2, 0] = value
        with pytest.raises(NonFiniteError, match=r"batch 3: the outputs .* 1 of 4 .*example 2"):
            likelihood.validate(bad, good, "batch 3")
        with pytest.raises(NonFiniteError, match=r"batch 3: the targets .* 1 of 4 .*example 2"):
            likelihood.validate(good, bad, "batch 3")
    likelihood.validate(good, good, "batch 3")


def test_bad_settings_are_refused():
    for weight in ([-1.0, 2.0], [[1.0]], [0.0, 0.0], [math.nan, 1.0]):
        with pytest.raises(InputError, match="weight is"):
            Classification(weight=weight)
    for noise in (0.0, -1.0, [1.0, math.nan], [], "fitted"):
        with pytest.raises(InputError, match="noise_variance is"):
            Regression(noise)
    for value in ("softmax", None, Classification, 3):
        with pytest.raises(InputError, match=r"'binary', .*'classification'.*'regression'"):
            resolve_likelihood(value)


# -- moments and scores --------------------------------------------------------------------------


@each_case
def test_draws_that_agree_carry_no_epistemic_part(case):
    likelihood, point, targets = case
    draws = point.expand(7, *point.shape)
    for linearised in (True, False):
        moments = likelihood.moments(draws, point, linearised=linearised)
        assert_close(moments.variance, torch.zeros_like(point), atol=1e-14, rtol=0)
        assert_close(moments.epistemic, torch.zeros_like(moments.epistemic), atol=1e-14, rtol=0)
        assert_close(moments.total, moments.aleatoric)
        assert moments.aleatoric.max() > 0
    # One draw at the point: the predictive density is the likelihood of the point itself.
    if not isinstance(likelihood, Classification) or likelihood.weight is None:
        assert_close(likelihood.log_predictive(draws, targets), -likelihood.loss(point, targets))


@each_case
def test_moments_add_up(case):
    likelihood, point, _ = case
    draws = point + 1.5 * normal(9, *point.shape, seed=11)
    for linearised in (True, False):
        moments = likelihood.moments(draws, point, linearised=linearised)
        assert moments.mean.shape == moments.variance.shape == point.shape
        assert_close(moments.total, moments.aleatoric + moments.epistemic)
        assert moments.epistemic.min() >= 0 and moments.epistemic.max() > 1e-3
        centre = point if linearised else draws.mean(0)
        spread = (draws - centre).square().sum(0) / (9 if linearised else 8)
        assert_close(moments.variance, spread)


def test_classification_moments_by_hand():
    draws = normal(5, 2, 4, 3)
    p = draws.softmax(-1)
    moments = Classification().moments(draws, draws[0], linearised=False)
    assert_close(moments.mean, p.mean(0))
    assert_close(moments.total, torch.distributions.Categorical(probs=p.mean(0)).entropy())
    assert_close(moments.aleatoric, torch.distributions.Categorical(probs=p).entropy().mean(0))
    assert moments.total.shape == (2, 4)
    moments = Classification().moments(normal(5, 2, 3), normal(2, 3), linearised=True)
    assert moments.total.shape == moments.epistemic.shape == (2,)


def test_binary_moments_by_hand():
    draws = 3 * normal(5, 4, 2)
    p = draws.sigmoid()
    moments = Binary().moments(draws, draws[0], linearised=False)
    assert_close(moments.mean, p.mean(0))
    assert_close(moments.total, torch.distributions.Bernoulli(probs=p.mean(0)).entropy())
    assert_close(moments.aleatoric, torch.distributions.Bernoulli(probs=p).entropy().mean(0))


def test_regression_moments_by_hand():
    draws, point = normal(5, 4, 2), normal(4, 2, seed=3)
    moments = Regression([0.5, 2.0]).moments(draws, point, linearised=True)
    assert_close(moments.mean, point)
    assert_close(moments.aleatoric, torch.tensor([[0.5, 2.0]] * 4, dtype=F64))
    assert_close(Regression(1.0).moments(draws, point, linearised=False).mean, draws.mean(0))


def test_moments_at_extreme_logits_are_finite_in_float32():
    draws = torch.tensor([[[300.0, -300.0]], [[-300.0, 300.0]]])
    for likelihood, shape in ((Classification(), (1,)), (Binary(), (1, 2))):
        moments = likelihood.moments(draws, draws.mean(0), linearised=True)
        # Two confident samples that contradict each other: all of ln 2 is epistemic.
        assert_close(moments.total, torch.full(shape, math.log(2)))
        assert_close(moments.epistemic, moments.total)
        assert torch.equal(moments.aleatoric, torch.zeros(shape))


@pytest.mark.parametrize(
    "likelihood", [Classification(), Binary(), Regression(1.0)], ids=lambda x: x.name
)
def test_too_few_samples_are_refused(likelihood):
    point = normal(3, 2)
    likelihood.moments(point[None], point, linearised=True)
    with pytest.raises(InputError, match="got 1 samples of the outputs, expected at least 2"):
        likelihood.moments(point[None], point, linearised=False)
    with pytest.raises(InputError, match="got 0 samples"):
        likelihood.moments(point[None][:0], point, linearised=True)


def test_mutual_information_is_never_negative():
    # Nearly equal draws: the difference of the entropies is rounding, of either sign.
    for likelihood in (Classification(), Binary()):
        point = normal(500, 5, dtype=torch.float32)
        draws = point + 1e-5 * normal(4, 500, 5, seed=1, dtype=torch.float32)
        moments = likelihood.moments(draws, point, linearised=True)
        assert (moments.total < moments.aleatoric).any()
        assert moments.epistemic.min() == 0


def test_masked_classes_have_no_entropy():
    draws = normal(4, 3, 5)
    masked = draws.clone()
    masked[..., 3:] = -math.inf
    moments = Classification().moments(masked, masked[0], linearised=True)
    expected = Classification().moments(draws[..., :3], draws[0, :, :3], linearised=True)
    assert_close(moments.total, expected.total)
    assert_close(moments.aleatoric, expected.aleatoric)


def test_log_predictive_by_hand():
    draws = 2 * normal(6, 3, 4)
    targets = labels(4, 3)
    p = draws.softmax(-1).mean(0)
    assert_close(Classification().log_predictive(draws, targets), p[range(3), targets].log())
    weighted = Classification(weight=[1, 2, 3, 4])
    assert_close(weighted.log_predictive(draws, targets), p[range(3), targets].log())
    soft = normal(3, 4, seed=4).softmax(-1)
    assert_close(Classification().log_predictive(draws, soft), (soft * p.log()).sum(-1))
    hits = labels(2, 3, 4)
    q = draws.sigmoid().mean(0)
    assert_close(
        Binary().log_predictive(draws, hits), torch.where(hits == 1, q, 1 - q).log().sum(-1)
    )
    wanted = normal(3, 4, seed=5)
    density = torch.distributions.Normal(draws, 0.7**0.5).log_prob(wanted).exp().mean(0)
    assert_close(Regression(0.7).log_predictive(draws, wanted), density.log().sum(-1))


def test_scores_add_up_over_batches():
    likelihood = Classification()
    means, targets = normal(10, 3).softmax(-1), labels(3, 10)
    parts = [likelihood.score(means[:4], targets[:4]), likelihood.score(means[4:], targets[4:])]
    total, count = map(sum, zip(*parts, strict=True))
    accuracy = float((means.argmax(-1) == targets).double().mean())
    assert likelihood.score_name == "accuracy" and 0 < accuracy < 1
    assert likelihood.final_score(total, count) == pytest.approx(accuracy)
    assert likelihood.correct(means, means).mean() == 1  # soft labels: same most probable class
    assert Binary().correct(torch.tensor([0.4, 0.6]), torch.tensor([[0], [0]])).tolist() == [1, 0]
    regression = Regression(1.0)
    total, count = regression.score(normal(4, 1), normal(4, seed=2))
    rmse = float((normal(4) - normal(4, seed=2)).square().mean().sqrt())
    assert regression.score_name == "rmse" and regression.final_score(
        total, count
    ) == pytest.approx(rmse)
    assert math.isnan(regression.final_score(0.0, 0))


# -- observation noise ---------------------------------------------------------------------------


class Unread:
    def __iter__(self):
        raise AssertionError("the batches were read")


def test_noise_is_the_mean_squared_residual_of_each_channel():
    outputs, targets = normal(7, 2, dtype=torch.float32), normal(7, 2, seed=2, dtype=torch.float32)
    regression = Regression()
    assert regression.needs_noise_fit and regression.noise_variance is None
    with pytest.raises(NotFittedError, match="fit_noise"):
        regression.loss(outputs, targets)
    regression.validate(outputs, targets, "batch 0")  # possible before the fit
    regression.fit_noise(iter([(outputs[:3], targets[:3]), (outputs[3:], targets[3:])]))
    expected = (outputs.double() - targets.double()).square().mean(0)
    assert_close(regression.noise_variance, expected)
    # The estimate is the minimum of the summed loss over the noise.
    variance = expected.clone().requires_grad_()
    nll = (
        -torch.distributions.Normal(outputs.double(), variance.sqrt())
        .log_prob(targets.double())
        .sum()
    )
    assert_close(regression.loss(outputs.double(), targets.double()).sum(), nll.detach())
    assert_close(
        torch.autograd.grad(nll, variance)[0], torch.zeros(2, dtype=F64), atol=1e-10, rtol=0
    )
    regression.fit_noise([(2 * outputs, 2 * targets)])  # new data fits it anew
    assert_close(regression.noise_variance, 4 * expected)


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((6,), (0,)), ((6, 3), (0,)), ((6, 4, 3), (0, 1)), ((6, 3, 2, 2), (0, 2, 3))],
)
def test_noise_channels_by_output_shape(shape, dims):
    outputs, targets = normal(*shape), normal(*shape, seed=2)
    regression = Regression()
    regression.fit_noise([(outputs, targets)])
    expected = (outputs - targets).square().mean(dims, keepdim=True)
    assert_close(regression.noise_variance, expected.flatten())
    aleatoric = regression.moments(outputs[None], outputs, linearised=True).aleatoric
    assert_close(aleatoric, expected.expand(shape))


def test_noise_refusals():
    with pytest.raises(InputError, match="no examples"):
        Regression().fit_noise([])
    with pytest.raises(InputError, match=r"fits an output exactly.*noise_variance="):
        Regression().fit_noise([(normal(3, 2), normal(3, 2))])
    with pytest.raises(InputError, match="batch 1: 3 output channels"):
        Regression().fit_noise([(normal(3, 2), 2 * normal(3, 2)), (normal(3, 3), 2 * normal(3, 3))])
    with pytest.raises(InputError, match=r"batch 0: .*same shape"):
        Regression().fit_noise([(normal(3, 2), normal(3))])


@pytest.mark.parametrize(
    "likelihood", [Classification(), Binary(), Regression(2.0)], ids=lambda x: x.name
)
def test_noise_fit_leaves_batches_unread_when_there_is_nothing_to_fit(likelihood):
    assert not likelihood.needs_noise_fit
    before = likelihood.config()
    likelihood.fit_noise(Unread())
    assert likelihood.config() == before


# -- registry, storage and subclasses ------------------------------------------------------------


@each_case
def test_config_round_trip(case):
    likelihood, outputs, targets = case
    stored = json.loads(json.dumps(likelihood.config()))
    loaded = likelihood_from_config(stored)
    assert type(loaded) is type(likelihood) and loaded.config() == stored
    assert_close(loaded.loss(outputs, targets), likelihood.loss(outputs, targets), rtol=0, atol=0)
    assert repr(loaded) == repr(likelihood)


def test_settings_are_kept_in_float64():
    assert Regression(0.1).noise_variance.item() == 0.1
    assert Classification(weight=[0.1, 0.7]).weight.tolist() == [0.1, 0.7]
    own = torch.tensor([0.5, 2.0], dtype=F64)
    regression = Regression(own)
    own.zero_()  # the caller's tensor stays the caller's
    assert regression.noise_variance.tolist() == [0.5, 2.0]


def test_fitted_noise_survives_storage():
    regression = Regression()
    regression.fit_noise([(normal(5, 2), normal(5, 2, seed=1))])
    loaded = likelihood_from_config(json.loads(json.dumps(regression.config())))
    assert_close(loaded.noise_variance, regression.noise_variance, rtol=0, atol=0)
    assert loaded.needs_noise_fit


def test_resolve_and_registry():
    for name in ("classification", "binary", "regression"):
        assert resolve_likelihood(name).name == name
        assert resolve_likelihood(name) is not resolve_likelihood(name)
    own = Classification(ignore_index=None)
    assert resolve_likelihood(own) is own
    with pytest.raises(InputError, match=r"'nobody'.*register_likelihood"):
        likelihood_from_config({"name": "nobody"})
    with pytest.raises(InputError, match="stored settings"):
        likelihood_from_config({"name": "binary", "colour": "red"})
    with pytest.raises(InputError, match="belongs to Binary"):
        register_likelihood(type("Impostor", (Poisson,), {"name": "binary"}))


@register_likelihood
class Poisson(Likelihood):
    """What a user writes: `loss` and `moments`, nothing else."""

    name = "poisson"

    def loss(self, outputs, targets):
        nll = outputs.exp() - targets * outputs + torch.lgamma(targets + 1)
        return nll.flatten(1).sum(1)

    def moments(self, draws, point, linearised):
        rate, variance = draws.exp(), epistemic_variance(draws, point, linearised=linearised)
        return Moments(
            rate.mean(0), variance, rate.mean(0) + rate.var(0), rate.mean(0), rate.var(0)
        )


def test_a_subclass_gets_the_rest():
    likelihood, outputs, targets = (
        resolve_likelihood("poisson"),
        normal(4, 3),
        1.0 * labels(5, 4, 3),
    )
    likelihood.validate(outputs, targets, "batch 0")
    assert_close(likelihood.loss_gradient(outputs, targets), outputs.exp() - targets)
    factor = likelihood.hessian_factor(outputs, targets)
    assert factor.shape[0] == likelihood.hessian_rank((3,)) == 3
    assert_close(gram(factor), torch.diag_embed(outputs.exp()))
    draws = outputs + normal(6, 4, 3, seed=9)
    joint = torch.distributions.Poisson(draws.exp()).log_prob(targets).sum(-1).exp().mean(0).log()
    assert_close(likelihood.log_predictive(draws, targets), joint)
    assert_close(
        likelihood_from_config(likelihood.config()).loss(outputs, targets),
        likelihood.loss(outputs, targets),
    )
    with pytest.raises(NonFiniteError, match="batch 1: the outputs"):
        likelihood.validate(outputs / 0, targets, "batch 1")


class Odd(Poisson):
    """A loss set by the test, not registered."""

    def __init__(self, function):
        self.function = function

    def loss(self, outputs, targets):
        return self.function(outputs)


def test_default_factor_of_awkward_losses():
    outputs, targets = normal(4, 2), normal(4, 2)
    linear = Odd(lambda f: f.sum(1))  # no second derivative at all
    assert linear.hessian_factor(outputs, targets).count_nonzero() == 0
    saddle = Odd(lambda f: (f[:, 0].square() - f[:, 1].square()) / 2)  # Hessian diag(1, -1)
    positive = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=F64)
    assert_close(gram(saddle.hessian_factor(outputs, targets)), positive.expand(4, 2, 2))
    with pytest.raises(InputError, match=r"one value per example, shape \(4,\), got \(\)"):
        Odd(lambda f: f.square().mean()).hessian_factor(outputs, targets)
