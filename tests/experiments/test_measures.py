"""Measures and shifts of the experiments against scikit-learn, scipy and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import generator
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from experiments import (
    measures,
    shifts,
)
from experiments.methods.base import Draws, information, tune
from nullbayes import metrics


def some_probabilities(count: int = 300, classes: int = 4) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(count, classes, generator=generator(), dtype=torch.float64)
    logits[:5] *= 100  # confidences of exactly one
    probs = logits.softmax(1)
    return probs, torch.multinomial(probs, 1, generator=generator(1)).flatten()


# -- measures --------------------------------------------------------------------------------------


def test_classification_figures_are_scikit_learns() -> None:
    from sklearn.metrics import accuracy_score, log_loss

    probs, targets = some_probabilities()
    found = measures.classification(probs, targets)
    onehot = F.one_hot(targets, 4).double()
    assert found["accuracy"] == pytest.approx(accuracy_score(targets, probs.argmax(1)))
    assert found["nll"] == pytest.approx(
        log_loss(targets, probs.clamp_min(1e-300), labels=range(4))
    )
    assert found["brier"] == pytest.approx(float((probs - onehot).square().sum(1).mean()))
    assert found["confidence"] == pytest.approx(float(probs.amax(1).mean()))


def test_calibration_errors_are_those_of_a_plain_loop() -> None:
    probs, targets = some_probabilities()
    top, predicted = probs.max(1)
    gaps, shares = [], []
    for k in range(15):
        inside = (top >= k / 15) & ((top < (k + 1) / 15) | (k == 14))
        if inside.any():
            hits = (predicted[inside] == targets[inside]).double().mean()
            gaps.append(float((hits - top[inside].mean()).abs()))
            shares.append(float(inside.double().mean()))
    assert int((top == 1).sum()) >= 1
    found = measures.classification(probs, targets)
    assert found["ece"] == pytest.approx(
        sum(g * s for g, s in zip(gaps, shares, strict=True)), abs=1e-6
    )
    assert found["mce"] == pytest.approx(max(gaps), abs=1e-6)
    ours = metrics.classification_metrics(probs, targets, 15)
    assert found["ece"] == pytest.approx(ours["ece"], abs=1e-6)


def test_what_ece_is_by_chance() -> None:
    # One bin of two answers at 0.75: both right, one of them, none; the gaps are 0.25, 0.25 and 0.75.
    two = torch.tensor([[0.75, 0.25]] * 2)
    wanted = 0.75**2 * 0.25 + 2 * 0.75 * 0.25 * 0.25 + 0.25**2 * 0.75
    assert measures.chance_calibration_error(two) == pytest.approx(wanted, abs=0.03)
    probs, _ = some_probabilities()
    drawn = [
        measures.classification(
            probs, torch.multinomial(probs, 1, generator=generator(seed)).squeeze(1)
        )
        for seed in range(200)
    ]
    excess = torch.tensor([found["ece_excess"] for found in drawn])
    ece = torch.tensor([found["ece"] for found in drawn])
    assert abs(float(excess.mean())) < 4 * float(ece.std()) / 200**0.5  # nothing but chance
    wrong = measures.classification(probs, probs.argmin(1))
    assert wrong["ece_excess"] > 0.5 * wrong["ece"] > 0


@pytest.mark.parametrize("samples", [3, 40])
def test_information_is_a_log_determinant(samples: int) -> None:
    changes = torch.randn(samples, 7, 5, generator=generator(), dtype=torch.float64)
    found = information(changes)
    for b in range(7):
        covariance = changes[:, b].T @ changes[:, b] / samples
        wanted = 0.5 * np.log(np.linalg.eigvalsh(np.eye(5) + covariance.numpy())).sum()
        assert float(found[b]) == pytest.approx(wanted, rel=1e-12)


def test_detection_is_scikit_learns_and_flags_95_per_cent() -> None:
    from sklearn.metrics import roc_auc_score

    inside = torch.randn(200, generator=generator(), dtype=torch.float64)
    outside = torch.randn(100, generator=generator(1), dtype=torch.float64) + 1
    found = measures.detection(inside, outside)
    labels = np.r_[np.zeros(200), np.ones(100)]
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, torch.cat([inside, outside])))
    threshold = outside.sort().values[5]  # 95 of the 100 are at or above it
    assert found["fpr95"] == pytest.approx(float((inside >= threshold).double().mean()))


def test_aurc_is_the_mean_risk_over_coverages() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    targets = torch.tensor([0, 1, 0, 1])  # right, wrong, right, wrong
    assert measures.classification(probs, targets)["aurc"] == pytest.approx(
        (0 + 1 / 2 + 1 / 3 + 1 / 2) / 4
    )


def test_regression_figures_are_scipys() -> None:
    from scipy.stats import norm

    mean = torch.randn(400, 1, generator=generator(), dtype=torch.float64)
    total = 0.5 + torch.rand(400, 1, generator=generator(1), dtype=torch.float64)
    targets = mean + 2 * total.sqrt() * torch.randn(
        400, 1, generator=generator(2), dtype=torch.float64
    )
    found = measures.regression(mean, total, targets)
    density = norm.logpdf(targets, mean, total.sqrt())
    assert found["nll"] == pytest.approx(-density.mean())
    gaps = []
    for level in np.arange(1, 10) / 10:
        low, high = norm.interval(level, mean, total.sqrt())
        gaps.append(abs(((targets.numpy() >= low) & (targets.numpy() <= high)).mean() - level))
    assert found["interval_error"] == pytest.approx(np.mean(gaps))
    assert found["interval_error"] > 0.1  # the noise is twice what was said


def test_scores_of_draws_follow_their_definitions() -> None:
    outputs = torch.randn(6, 3, 4, generator=generator(), dtype=torch.float64)
    centre = outputs.mean(0) + 0.1
    found = Draws(outputs, centre, temperature=2.0).novelty()
    probs = (torch.cat([outputs, 2 * centre - outputs]) / 2).softmax(-1)
    entropy = -(probs.mean(0) * probs.mean(0).log()).sum(-1)
    inner = -(probs * probs.log()).sum(-1).mean(0)
    assert_close(found["entropy"], entropy)
    assert_close(found["mutual_information"], entropy - inner)
    around = outputs - centre
    around = around - around.mean(-1, keepdim=True)  # a softmax does not see what all logits share
    assert_close(found["variance"], around.square().mean(0).sum(-1))
    single = Draws(outputs[:1]).novelty()
    assert set(single) == {"entropy", "energy"}
    assert_close(single["energy"], -outputs[0].exp().sum(-1).log())


def test_tuning_finds_the_least_and_survives_what_is_not_finite() -> None:
    seen: list[float] = []

    def nll(values: list[float]) -> list[float]:
        seen.extend(values)
        return [math.nan if v > 1e5 else (math.log10(v) - 1.4) ** 2 for v in values]

    best = tune(2.0, nll)
    assert abs(math.log10(best.value) - 1.4) <= 1 / 6 + 1e-9  # thirds of a decade
    assert best.path["value"] == sorted(best.path["value"])
    assert len(seen) == len(best.path["nll"]) == 17


# -- shifts ----------------------------------------------------------------------------------------


def images(count: int = 3, side: int = 28) -> Tensor:
    return torch.rand(count, 1, side, side, generator=generator())


def test_blur_is_scipys_and_scales_with_the_image() -> None:
    from scipy.ndimage import gaussian_filter

    x = images()
    for sd in (0.5, 1.0, 3.0):
        reach = max(1, math.ceil(3 * sd))
        wanted = np.stack(
            [gaussian_filter(i[0].double(), sd, mode="nearest", radius=reach) for i in x]
        )
        assert_close(
            shifts.blurred(x, sd, 0)[:, 0], torch.from_numpy(wanted).float(), atol=1e-6, rtol=0
        )
    flat = torch.full((1, 1, 8, 8), 0.3)
    assert_close(shifts.blurred(flat, 2.0, 0), flat)
    small, large = images(1, 8), images(1, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(  # 28/8 pixels of a 28-pixel image are one pixel here
        shifts.blurred(small, 3.5, 0)[0, 0],
        torch.from_numpy(
            gaussian_filter(small[0, 0].double(), 1.0, mode="nearest", radius=3)
        ).float(),
        atol=1e-6,
        rtol=0,
    )
    assert large.shape[-1] == 16


def test_other_shifts_do_what_they_say() -> None:
    x = images()
    assert_close(shifts.rotated(x, 90, 0), torch.rot90(x, 1, (2, 3)), atol=1e-5, rtol=0)
    faded = shifts.low_contrast(x, 0.25, 0)
    assert_close(faded.mean((1, 2, 3)), x.mean((1, 2, 3)))
    assert_close(faded.std((1, 2, 3)), 0.25 * x.std((1, 2, 3)))
    noise = shifts.noisy(torch.full((4, 1, 28, 28), 0.5), 0.1, 7)
    assert float(noise.std()) == pytest.approx(0.1, rel=0.05)
    assert_close(noise, shifts.noisy(torch.full((4, 1, 28, 28), 0.5), 0.1, 7))
    assert_close(shifts.inverted(x), 1 - x)


def test_patches_change_places_and_nothing_else() -> None:
    x = images(5, 8)
    moved = shifts.patch_shuffled(x, 4)

    def patches(image: Tensor) -> list[tuple[float, ...]]:
        found = image.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 4)
        return sorted(tuple(p.tolist()) for p in found)

    for before, after in zip(x, moved, strict=True):
        assert patches(before) == patches(after)
        assert not torch.equal(before, after)
    with pytest.raises(ValueError, match="divides both sides"):
        shifts.patch_shuffled(x, 3)


def test_every_strength_keeps_the_order_of_the_images() -> None:
    found = shifts.graded(images(), 0)
    assert list(found["rotation"]) == [str(a) for a in range(15, 181, 15)]
    assert all(i.shape == (3, 1, 28, 28) for kind in found.values() for i in kind.values())
    # Full turns, no noise: a check that strengths are what they are called.
    assert shifts.graded(
        images(), 0, {"rotation": (360,), "noise": (0,), "blur": (1,), "contrast": (1,)}
    )
    assert_close(shifts.rotated(images(), 360, 0), images(), atol=1e-4, rtol=0)
