"""Metrics against values worked out by hand, against definitions, and at the edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from nullbayes import metrics
from nullbayes.errors import InputError, NonFiniteError


def test_classification_by_hand():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    targets = torch.tensor([0, 1, 2, 2])
    got = metrics.classification_metrics(probs, targets, bins=10)
    assert got["accuracy"] == 0.75
    assert got["confidence"] == pytest.approx((0.7 + 0.6 + 0.5 + 0.8) / 4)
    assert got["nll"] == pytest.approx(
        -(math.log(0.7) + math.log(0.6) + math.log(0.2) + math.log(0.8)) / 4
    )
    brier = [0.09 + 0.04 + 0.01, 0.01 + 0.16 + 0.09, 0.25 + 0.09 + 0.64, 0.01 + 0.01 + 0.04]
    assert got["brier"] == pytest.approx(sum(brier) / 4, abs=1e-7)
    # Four bins with one example each: |1 - .7|, |1 - .6|, |0 - .5|, |1 - .8|.
    assert got["ece"] == pytest.approx((0.3 + 0.4 + 0.5 + 0.2) / 4, abs=1e-6)
    assert got["mce"] == pytest.approx(0.5, abs=1e-6)


def test_confident_and_wrong_costs_the_documented_maximum_and_no_nan():
    got = metrics.classification_metrics(
        torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0])
    )
    assert got["nll"] == pytest.approx(-math.log(metrics.SMALLEST_PROBABILITY) / 2)
    assert got["ece"] == pytest.approx(0.5) and got["mce"] == pytest.approx(0.5)
    assert all(math.isfinite(value) for value in got.values())


def test_certain_predictions_share_a_bin_with_nearly_certain_ones():
    """torchmetrics alone puts confidence 1 in a bin of its own, which doubles the error below."""
    probs = torch.tensor([[1.0, 0.0], [0.99, 0.01]], dtype=torch.float64)
    got = metrics.classification_metrics(probs, torch.tensor([1, 0]))
    assert got["ece"] == pytest.approx(abs(0.5 - 0.995), abs=1e-9)
    both = metrics.calibration_error(probs[:, 0], torch.tensor([False, True]))
    assert both == pytest.approx((0.495, 0.495), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(50, 4, generator=generator, dtype=torch.float64).softmax(1)
    targets = torch.randint(4, (50,), generator=generator)
    exact = metrics.classification_metrics(probs, targets)
    got = metrics.classification_metrics(probs.to(dtype), targets)
    assert got["nll"] == pytest.approx(exact["nll"], rel=20 * torch.finfo(dtype).eps)


def naive_ece(probs, targets, bins):
    top, predicted = probs.max(1)
    total = 0.0
    for k in range(bins):
        low, high = k / bins, (k + 1) / bins
        inside = (top >= low) & ((top < high) | (k == bins - 1))
        if inside.any():
            gap = (predicted == targets)[inside].double().mean() - top[inside].mean()
            total += float(gap.abs()) * float(inside.double().mean())
    return total


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 80), st.integers(2, 6), st.integers(1, 20), st.integers(0, 10**6))
def test_ece_is_its_definition_and_the_curve_adds_up_to_it(n, classes, bins, seed):
    generator = torch.Generator().manual_seed(seed)
    probs = (4 * torch.randn(n, classes, generator=generator, dtype=torch.float64)).softmax(1)
    targets = torch.randint(classes, (n,), generator=generator)
    got = metrics.classification_metrics(probs, targets, bins)
    assert got["ece"] == pytest.approx(naive_ece(probs, targets, bins), abs=1e-9)
    theirs = multiclass_calibration_error(probs, targets, classes, n_bins=bins)
    if probs.max() < 1 - 1e-6:  # closer to 1 is 1 in its float32, and a bin of its own
        assert got["ece"] == pytest.approx(float(theirs), abs=1e-5)
    curve = metrics.reliability_curve(probs, targets, bins)
    gaps = zip(curve["count"], curve["accuracy"], curve["confidence"], strict=True)
    assert sum(c / n * abs(a - p) for c, a, p in gaps) == pytest.approx(got["ece"], abs=1e-9)
    assert sum(curve["count"]) == n and len(curve["edges"]) == bins + 1


@pytest.mark.parametrize(
    ("probs", "targets", "error", "words"),
    [
        (torch.randn(3, 2), torch.tensor([0, 1, 1]), InputError, "not logits"),
        (torch.full((3, 2), 0.5), torch.tensor([0, 1, 2]), InputError, "2 classes"),
        (torch.full((3, 2), 0.5), torch.tensor([0, 1]), InputError, "shape"),
        (torch.full((3, 2), 0.5), torch.tensor([0.0, 1.0, 1.0]), InputError, "integer"),
        (torch.full((0, 2), 0.5), torch.zeros(0, dtype=torch.long), InputError, "at least 1"),
        (torch.tensor([[math.nan, 0.5]]), torch.tensor([0]), NonFiniteError, "NaN"),
    ],
)
def test_bad_probabilities_are_refused(probs, targets, error, words):
    with pytest.raises(error, match=words):
        metrics.classification_metrics(probs, targets)


def test_regression_by_hand():
    mean, variance = torch.zeros(4, 1), torch.full((4, 1), 4.0)
    targets = torch.tensor([[0.0], [1.0], [-3.0], [6.0]])
    got = metrics.regression_metrics(mean, variance, targets)
    assert got["rmse"] == pytest.approx(math.sqrt((0 + 1 + 9 + 36) / 4))
    assert got["nll"] == pytest.approx(0.5 * (46 / 4 / 4 + math.log(4) + math.log(2 * math.pi)))
    # In standard deviations: 0, .5, 1.5, 3; the central 50 % reaches .674, 90 % 1.645, 95 % 1.96.
    assert (got["coverage_50"], got["coverage_90"], got["coverage_95"]) == (0.5, 0.75, 0.75)


def test_coverage_of_a_calibrated_prediction():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(20_000, generator=generator)
    sd = 0.1 + torch.rand(20_000, generator=generator)
    targets = mean + sd * torch.randn(20_000, generator=generator)
    got = metrics.regression_metrics(mean, sd**2, targets)
    for level in (0.5, 0.9, 0.95):
        stderr = math.sqrt(level * (1 - level) / 20_000)
        assert abs(got[f"coverage_{100 * level:g}"] - level) < 4 * stderr


def test_regression_refuses_what_has_no_density():
    with pytest.raises(InputError, match="positive"):
        metrics.regression_metrics(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(InputError, match="one shape"):
        metrics.regression_metrics(torch.zeros(2), torch.ones(2), torch.zeros(2, 1))


def naive_auroc(inside, outside):
    return float(
        (outside[:, None] > inside).double().mean()
        + 0.5 * (outside[:, None] == inside).double().mean()
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 10**6))
def test_auroc_is_its_definition(n, m, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    inside = torch.randn(n, generator=generator, dtype=torch.float64)
    outside = torch.randn(m, generator=generator, dtype=torch.float64) + 0.5
    if ties:
        inside, outside = inside.round(), outside.round()
    got = metrics.ood_metrics(inside, outside)
    assert got["auroc"] == pytest.approx(naive_auroc(inside, outside), abs=1e-6)
    thresholds = torch.cat([inside, outside]).unique()
    rates = [
        (float((inside >= t).double().mean()), float((outside >= t).double().mean()))
        for t in thresholds
    ]
    assert got["fpr95"] == pytest.approx(min(f for f, t in rates if t >= 0.95), abs=1e-6)


def test_scale_of_scores_does_not_matter():
    """Squashed by a sigmoid, as torchmetrics does with scores outside [0, 1], these would all be ties."""
    inside, outside = torch.tensor([100.0, 200.0, 300.0]), torch.tensor([250.0, 400.0, 500.0])
    expected = naive_auroc(inside, outside)
    for scale in (1e-30, 1.0, 1e30):
        assert metrics.ood_metrics(scale * inside, scale * outside)["auroc"] == pytest.approx(
            expected
        )


def test_ood_refuses_nan_and_nothing():
    with pytest.raises(NonFiniteError):
        metrics.ood_metrics(torch.tensor([1.0, math.nan]), torch.ones(2))
    with pytest.raises(InputError, match="at least one"):
        metrics.ood_metrics(torch.ones(0), torch.ones(2))


def test_roc_curve_ends_in_the_corners_and_encloses_the_auroc():
    generator = torch.Generator().manual_seed(0)
    inside, outside = (
        torch.randn(3000, generator=generator),
        torch.randn(2000, generator=generator) + 1,
    )
    curve = metrics.roc_curve(inside, outside, points=100)
    fpr, tpr = torch.tensor(curve["fpr"]), torch.tensor(curve["tpr"])
    assert len(fpr) <= 102
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert float(torch.trapezoid(tpr, fpr)) == pytest.approx(
        metrics.ood_metrics(inside, outside)["auroc"], abs=2e-3
    )


def test_risk_coverage_by_hand():
    curve = metrics.risk_coverage(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 1, 0, 1]))
    assert curve["coverage"] == [0.25, 0.5, 0.75, 1.0]
    assert curve["risk"] == pytest.approx([0, 0, 1 / 3, 1 / 4])
    assert metrics.aurc(
        torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 1, 0, 1])
    ) == pytest.approx((1 / 3 + 1 / 4) / 4)


def test_tied_uncertainties_are_answered_together():
    score, correct = torch.ones(4), torch.tensor([1, 0, 1, 0])
    assert metrics.aurc(score, correct) == metrics.aurc(score, correct.flip(0)) == 0.5
