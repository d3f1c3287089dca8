"""Evaluations of regressions, labels, masks, tokens and losses of one's own."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from sklearn import metrics as sk
from support import QUIET, network
from torch import nn

import nullbayes as nb
from nullbayes.posterior.measuring import passing
from tests.posterior.evaluation_setup import N, dense_ece, make, trained

# -- other likelihoods -----------------------------------------------------------------------------


def regressor(outputs=1, noise=None):
    x, _ = make(0, 40)
    y = torch.stack([x.sum(1) + 0.3 * k * x[:, 0] for k in range(outputs)], 1)
    y = y + 0.3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
    model = network(outputs=outputs).double()
    trained(model, x, lambda out: (out - y).square().mean())
    likelihood = nb.Regression(noise) if noise else "regression"
    return nb.NullSpacePosterior(model, likelihood).fit([(x, y)], num_samples=5, **QUIET)


@pytest.mark.parametrize("outputs", [1, 2])
def test_regression(outputs):
    posterior = regressor(outputs)
    x, _ = make(1, N)
    y = torch.stack([x.sum(1) for _ in range(outputs)], 1)
    found = posterior.evaluate((x, y), validation=(x[:50], y[:50]), shifted={"far": 3 * x}, **QUIET)
    p = posterior.predict(x)
    mean, sd, target = p.mean.numpy(), p.total.sqrt().numpy(), y.numpy()
    z = (target - mean) / sd
    normal = scipy.stats.norm
    crps = sd * (z * (2 * normal.cdf(z) - 1) + 2 * normal.pdf(z) - 1 / np.sqrt(np.pi))
    wanted = {
        "rmse": math.sqrt(sk.mean_squared_error(target, mean)),
        "crps": crps.mean(),
        "coverage_90": (abs(z) <= normal.ppf(0.95)).mean(),
        "width_90": (2 * normal.ppf(0.95) * sd).mean(),
        "z_squared": (z**2).mean(),
        "nll": float(-posterior.likelihood.log_predictive(_both(p), y).mean()),
    }
    for name, value in wanted.items():
        assert found.figures["evidence"][name].value == pytest.approx(value, rel=1e-9), name
    squares = ((target - mean) ** 2).mean(1)
    error = scipy.stats.sem(squares) / (2 * wanted["rmse"])
    assert found.figures["evidence"]["rmse"].error == pytest.approx(error, rel=1e-9)
    # One number fitted to the network's residuals: the noise.
    point = posterior.predict(x[:50])
    factor = ((y[:50] - point.point) ** 2 / point.aleatoric).mean()
    setting = found.details["methods"]["temperature"]["setting"]
    assert float(setting.split()[-1]) == pytest.approx(float(factor), rel=1e-3)
    assert (len(found.classes) == 2) == (outputs == 2)
    if outputs == 2:
        rmse = math.sqrt(((target - mean)[:, 1] ** 2).mean())
        second = found.classes["output 1"]["methods"]["evidence"]
        assert second["rmse"].value == pytest.approx(rmse)
        inside = abs(z[:, 1]) <= normal.ppf(0.95)
        assert second["coverage_90"].value == pytest.approx(inside.mean(), rel=1e-9)
        assert second["coverage_90"].error == pytest.approx(scipy.stats.sem(inside), rel=1e-9)
        assert second["z_squared"].value == pytest.approx((z[:, 1] ** 2).mean(), rel=1e-9)
    curve = found.details["curves"]["coverage"]["evidence"]
    assert curve["found"][8] == pytest.approx(wanted["coverage_90"])


def _both(p):
    return torch.cat([p.outputs, 2 * p.point - p.outputs])


def test_given_noise_has_nothing_to_scale():
    x, _ = make(1, 30)
    y = x.sum(1, keepdim=True)
    found = regressor(1, noise=0.1).evaluate((x, y), validation=(x, y), **QUIET)
    assert "temperature" not in found.figures


@pytest.mark.parametrize("outputs", [1, 3])
def test_binary_and_multi_label(outputs):
    x, _ = make(0, 40)
    y = (x[:, :outputs] > 0).double()
    model = network(outputs=outputs).double()
    trained(model, x, lambda o: nn.functional.binary_cross_entropy_with_logits(o, y))
    posterior = nb.NullSpacePosterior(model, "binary").fit([(x, y)], num_samples=5, **QUIET)
    x, _ = make(1, N)
    y = (x[:, :outputs] + 0.5 * make(5, N)[0][:, :outputs] > 0).double()
    found = posterior.evaluate((x, y), validation=(x[:60], y[:60]), shifted={"far": 3 * x}, **QUIET)
    p = posterior.predict(x)
    prob = scipy.special.expit(_both(p).numpy()).mean(0)
    target = y.numpy()
    figures = found.figures["evidence"]
    hit = ((prob >= 0.5) == (target >= 0.5)).astype(float)
    top = np.maximum(prob, 1 - prob)
    nll = -(target * np.log(prob) + (1 - target) * np.log(1 - prob)).sum(1)
    assert figures["accuracy"].value == pytest.approx(hit.mean())
    assert figures["nll"].value == pytest.approx(nll.mean())
    assert figures["nll"].error == pytest.approx(scipy.stats.sem(nll))
    assert figures["brier"].value == pytest.approx(sk.mean_squared_error(target, prob))
    assert figures["ece"].value == pytest.approx(dense_ece(top.flatten(), hit.flatten()))
    # Labels of one example are not independent: the error is that of examples.
    assert figures["accuracy"].error == pytest.approx(scipy.stats.sem(hit.mean(1)))
    classwise = np.mean([dense_ece(prob[:, k], target[:, k]) for k in range(outputs)])
    assert figures["classwise_ece"].value == pytest.approx(classwise)
    if outputs == 3:
        entry = found.classes["label 2"]["methods"]["evidence"]
        assert entry["accuracy"].value == pytest.approx(hit[:, 2].mean())
    else:
        assert set(found.classes) == {"class 0", "class 1"}
    energy = next(d for d in found.detection if d["score"] == "energy")
    both = np.concatenate([p.point.numpy(), posterior.predict(3 * x).point.numpy()])
    wanted = sk.roc_auc_score(np.r_[np.zeros(N), np.ones(N)], -np.logaddexp(0, both).mean(1))
    assert energy["sets"]["far"]["auroc"].value == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("positions", [5, 300])
def test_masks_and_tokens_with_ignored_positions(positions, monkeypatch):
    monkeypatch.setattr(passing, "MOST_NUMBERS", 10 * positions * 12)  # three examples at a time
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Conv1d(2, 3, 3, padding=1).double().eval()
        x = torch.randn(9, 2, positions).double()
        y = torch.randint(0, 3, (9, positions))
        ignored = torch.rand(9, positions) < 0.2
    y[ignored] = -100
    few = (x[:2, :, :5], y[:2, :5])
    posterior = nb.NullSpacePosterior(model, preserve="loss").fit([few], num_samples=6, **QUIET)
    found = posterior.evaluate([(x[:7], y[:7]), (x[7:], y[7:])], **QUIET)
    p = posterior.predict(x)
    mean = scipy.special.softmax(_both(p).numpy(), -2).mean(0)  # (N, 3, T)
    kept, label = ~ignored.numpy(), np.where(ignored, 0, y.numpy())
    picked = np.take_along_axis(mean, label[:, None], 1)[:, 0]
    hit = mean.argmax(1) == label
    figures = found.figures["evidence"]
    assert figures["nll"].value == pytest.approx(-(np.log(picked) * kept).sum(1).mean())
    assert figures["accuracy"].value == pytest.approx(hit[kept].mean())
    one = np.eye(3)[label].transpose(0, 2, 1)
    brier = ((mean - one) ** 2).sum(1)
    assert figures["brier"].value == pytest.approx(brier[kept].mean())
    # At most 256 positions of an example, evenly spaced among those that count, enter the ECE.
    taken = np.zeros_like(kept)
    for n in range(9):
        here = np.flatnonzero(kept[n])
        steps = torch.linspace(0, len(here) - 1, min(256, len(here))).round().long().numpy()
        taken[n, here[steps]] = True
    wanted = dense_ece(mean.max(1)[taken], hit[taken].astype(float))
    assert figures["ece"].value == pytest.approx(wanted)
    worst = int((-np.log(picked) * kept).sum(1).argmax())
    shown = found.details["examples"]["test: wrong"][0]
    wrong = int((~hit[worst])[kept[worst]].sum())
    assert shown["caption"].startswith(f"{wrong} of {kept[worst].sum()} positions wrong, mean")
    assert f"{mean[worst].max(0).mean():.3f}" in shown["caption"]
    assert found.details["units"]["test: wrong"] == "NLL"
    assert found.details["data"]["test"]["examples"] == 9


def test_callable_loss():
    x, _ = make(0, 40)

    def loss(outputs, targets):
        return (outputs - targets.sum(1, keepdim=True)).square().sum(1)

    model = network(outputs=1).double()
    posterior = nb.NullSpacePosterior(model, loss=loss).fit([x], num_samples=5, **QUIET)
    x, _ = make(1, N)
    found = posterior.evaluate([x[:70], x[70:]], shifted={"far": [3 * x]}, **QUIET)
    p = posterior.predict(x)
    losses = torch.stack([loss(draw, x) for draw in _both(p)])
    figures = found.figures["evidence"]
    assert figures["loss"].value == pytest.approx(float(losses.mean()), rel=1e-6)
    assert found.figures["network"]["loss"].value == pytest.approx(float(loss(p.point, x).mean()))
    nll = scipy.special.logsumexp(-losses.numpy(), 0) - math.log(len(losses))
    assert figures["nll"].value == pytest.approx(-nll.mean(), rel=1e-6)
    assert {d["score"] for d in found.detection} == {"novelty", "epistemic_variance"}
