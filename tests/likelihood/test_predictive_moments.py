"""Moments, densities and scores of predictions, by hand and against torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from nullbayes.errors import InputError
from nullbayes.likelihood import (
    Binary,
    Classification,
    Regression,
)
from tests.likelihood.likelihood_setup import F64, each_case, labels, normal

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
