"""Figures of a classifier, their standard errors and the whole of an evaluation, against dense ones."""

import copy
import functools
import itertools
import json
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from sklearn import metrics as sk
from support import QUIET, network, says, unchanged
from torch import nn

import nullbayes as nb
from nullbayes.common.writing import read_signed_json
from nullbayes.posterior.measuring import estimates
from nullbayes.posterior.measuring.estimates import verdict
from nullbayes.posterior.measuring.records import METRICS, joint_nll
from tests.posterior.evaluation_setup import N, dense_ece, make, trained


@functools.cache
def classifier():
    x, y = make(0, 40)
    model = network().double()
    trained(model, x, lambda out: nn.functional.cross_entropy(out, y))
    posterior = nb.NullSpacePosterior(model).fit([(x, y)], num_samples=6, **QUIET)
    return posterior, (x, y)


@functools.cache
def evaluated():
    posterior, train = classifier()
    sets = {"far": make(2, 80, 2.5)[0], "near": make(3, 60, 0.5)}
    with unchanged(posterior.model):
        found = posterior.evaluate(
            make(1, N),
            shifted=sets,
            train=train,
            validation=make(4, 100),
            slices={"first": np.arange(N) < 30, "ones": lambda x, y: y == 1},
            **QUIET,
        )
    assert posterior.calibration is None  # a copy was calibrated
    return found


def dense_mean(posterior, x):
    """Mean probabilities of the samples and their mirror images, in NumPy: (N, O), and of each: (2S, N, O)."""
    p = posterior.predict(x)
    outputs, point = p.outputs.numpy(), p.point.numpy()
    each = scipy.special.softmax(np.concatenate([outputs, 2 * point - outputs]), -1)
    return each.mean(0), each


def dense_adaptive(confidence, hit, bins=15):
    order = np.argsort(-confidence, kind="stable")
    edges = np.round(np.linspace(0, len(hit), bins + 1)).astype(int)
    parts = [order[a:b] for a, b in itertools.pairwise(edges)]
    return sum(abs((confidence[p] - hit[p]).sum()) for p in parts) / len(hit)


def dense_selective(confidence, hit):
    order = np.argsort(-confidence)
    risks = [1 - hit[order[:k]].mean() for k in range(1, len(hit) + 1)]
    covered = [k / len(hit) for k, r in enumerate(risks, 1) if r <= 0.05]
    return np.mean(risks), max(covered, default=0.0)


def dense_joint(each, y):
    """Groups of ten from two anchors, over all 2^10 ways of choosing them."""
    n = len(y)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).numpy()
    logs = np.log(each[:, np.arange(n), y])
    total = []
    for a, b in zip(order[: n // 2], order[n // 2 : 2 * (n // 2)], strict=True):
        value = 0.0
        for ways in range(1024):
            k = bin(ways).count("1")
            joint = logs[:, a] * k + logs[:, b] * (10 - k)
            value -= (scipy.special.logsumexp(joint) - math.log(len(joint))) / 1024
        total.append(value)
    return np.mean(total)


def test_figures_of_a_classifier_against_dense_ones():
    found, (posterior, _) = evaluated(), classifier()
    x, y = make(1, N)
    mean, each = dense_mean(posterior, x)
    label, one = y.numpy(), np.eye(3)[y.numpy()]
    confidence, hit = mean.max(1), (mean.argmax(1) == label).astype(float)
    aurc, covered = dense_selective(confidence, hit)
    classwise = np.mean([dense_ece(mean[:, c], one[:, c]) for c in range(3)])
    wanted = {
        "accuracy": sk.accuracy_score(label, mean.argmax(1)),
        "nll": sk.log_loss(label, mean),
        "brier": ((mean - one) ** 2).sum(1).mean(),
        "ece": dense_ece(confidence, hit),
        "adaptive_ece": dense_adaptive(confidence, hit),
        "classwise_ece": classwise,
        "gap": confidence.mean() - hit.mean(),
        "aurc": aurc,
        "coverage_at_risk": covered,
    }
    figures = found.figures["evidence"]
    for name, value in wanted.items():
        assert figures[name].value == pytest.approx(value, abs=1e-9), name
    few = each[:, :8]  # the enumeration is long
    joint = estimates.mean(joint_nll(torch.from_numpy(np.log(few[:, np.arange(8), label[:8]]))))
    assert joint.value == pytest.approx(dense_joint(few, label[:8]), abs=1e-9)
    network_nll = found.figures["network"]["nll"].value
    assert found.figures["network"]["joint_nll"].value == pytest.approx(10 * network_nll, rel=1e-5)
    assert figures["joint_nll"].value < 10 * figures["nll"].value  # samples that err together


def test_standard_errors_and_paired_differences():
    found, (posterior, _) = evaluated(), classifier()
    x, y = make(1, N)
    label = y.numpy()
    mean, _ = dense_mean(posterior, x)
    point = scipy.special.softmax(posterior.predict(x).point.numpy(), -1)
    losses = [-np.log(p[np.arange(N), label]) for p in (mean, point)]
    nll = found.figures["evidence"]["nll"]
    assert nll.error == pytest.approx(scipy.stats.sem(losses[0]), rel=1e-6)
    difference = found.differences["evidence"]["nll"]
    assert difference.value == pytest.approx((losses[0] - losses[1]).mean(), rel=1e-6)
    assert difference.error == pytest.approx(scipy.stats.sem(losses[0] - losses[1]), rel=1e-6)
    # ECE: delete a group, every one of them anew.
    confidence, hit = mean.max(1), (mean.argmax(1) == label).astype(float)
    group = np.arange(N) % 50
    each = np.array([dense_ece(confidence[group != g], hit[group != g]) for g in range(50)])
    wanted = math.sqrt(49 / 50 * ((each - each.mean()) ** 2).sum())
    assert found.figures["evidence"]["ece"].error == pytest.approx(wanted, rel=1e-6)


def test_detection_against_scikit_learn():
    found, (posterior, _) = evaluated(), classifier()
    inside = make(1, N)[0]
    for shift, outside in {"far": make(2, 80, 2.5)[0], "near": make(3, 60, 0.5)[0]}.items():
        labels = np.r_[np.zeros(N), np.ones(len(outside))]
        both = torch.cat([inside, outside])
        prediction = posterior.predict(both)
        point = prediction.point
        wanted = {
            ("calibrated", "novelty"): posterior.novelty(both),
            ("evidence", "entropy"): prediction.total,
            ("evidence", "mutual_information"): prediction.epistemic,
            ("network", "max_softmax"): 1 - point.softmax(1).max(1).values,
            ("network", "energy"): -point.logsumexp(1),
        }
        rows = {(d["method"], d["score"]): d["sets"][shift] for d in found.detection}
        for key, scores in wanted.items():
            values = scores.numpy()
            assert rows[key]["auroc"].value == pytest.approx(
                sk.roc_auc_score(labels, values), abs=1e-6
            )
            fpr, tpr, _ = sk.roc_curve(labels, values, drop_intermediate=False)
            assert rows[key]["fpr95"].value == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-6)
    assert "difference" not in rows[("network", "max_softmax")]


def test_errors_of_two_samples_are_those_of_resampling():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, generator=g), torch.randn(200, generator=g) + 1.5
    c, d = a + 0.5 * torch.randn(300, generator=g), b + 0.5 * torch.randn(200, generator=g)
    area, other = estimates.auroc(a, b), estimates.auroc(c, d)
    rate = estimates.fpr95(a, b)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(150):
        i, j = (torch.from_numpy(rng.integers(0, n, n)) for n in (300, 200))
        pair = [estimates.auroc(x[i], y[j]).value for x, y in ((a, b), (c, d))]
        found.append([*pair, pair[0] - pair[1], estimates.fpr95(a[i], b[j]).value])
    sd = np.std(found, axis=0)
    assert area.error == pytest.approx(sd[0], rel=0.15)
    assert area.minus(other).error == pytest.approx(sd[2], rel=0.15)
    assert area.minus(other).error < 0.8 * area.error
    assert rate.error == pytest.approx(sd[3], rel=0.6)
    shared = estimates.averaged([area, estimates.auroc(a, d)], 300)
    assert shared.value == pytest.approx((area.value + estimates.auroc(a, d).value) / 2)
    assert shared.error < area.error


def test_the_temperature_is_the_best_one():
    posterior, _ = classifier()
    x, y = make(4, 100)
    logits = posterior.predict(x).point.numpy()
    best = scipy.optimize.minimize_scalar(
        lambda t: sk.log_loss(y.numpy(), scipy.special.softmax(logits / t, -1)), (0.3, 1, 3)
    )
    setting = evaluated().details["methods"]["temperature"]["setting"]
    assert float(setting.split()[-1]) == pytest.approx(best.x, rel=2e-3)


def test_calibrated_is_what_calibrate_gives():
    posterior = copy.copy(classifier()[0])
    x, y = make(1, N)
    with pytest.warns(nb.NullBayesWarning) if evaluated().details["notes"] else _nothing():
        posterior.calibrate([make(4, 100)], **QUIET)
    mean, _ = dense_mean(posterior, x)
    wanted = sk.log_loss(y.numpy(), mean)
    assert evaluated().figures["calibrated"]["nll"].value == pytest.approx(wanted, abs=1e-9)
    # Afterwards the two rows are the same ones, found from the path.
    again = posterior.evaluate((x, y), **QUIET)
    for key in ("evidence", "calibrated"):
        assert again.figures[key]["nll"].value == pytest.approx(
            evaluated().figures[key]["nll"].value, abs=1e-9
        )


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_slices_and_classes():
    found, (posterior, _) = evaluated(), classifier()
    x, y = make(1, N)
    mean, _ = dense_mean(posterior, x)
    label = y.numpy()
    for name, mask in {"first": np.arange(N) < 30, "ones": label == 1}.items():
        part = found.slices[name]
        assert part["examples"] == mask.sum()
        figures = part["methods"]["evidence"]
        assert figures["accuracy"].value == pytest.approx((mean.argmax(1) == label)[mask].mean())
        loss = -np.log(mean[np.arange(N), label])[mask]
        assert figures["nll"].value == pytest.approx(loss.mean())
        assert figures["nll"].error == pytest.approx(scipy.stats.sem(loss))
        hit = (mean.argmax(1) == label)[mask].astype(float)
        assert figures["ece"].value == pytest.approx(dense_ece(mean.max(1)[mask], hit))
    recall = sk.recall_score(label, mean.argmax(1), average=None)
    for c in range(3):
        entry = found.classes[f"class {c}"]
        assert entry["methods"]["evidence"]["accuracy"].value == pytest.approx(recall[c])
        assert entry["examples"] == (label == c).sum()


def test_the_threshold_and_its_interval():
    found, (posterior, _) = evaluated(), classifier()
    ordinary = np.sort(posterior.novelty(make(4, 100)[0]).numpy())
    test = posterior.novelty(make(1, N)[0]).numpy()
    assert found.thresholds["from"] == "validation" and found.thresholds["examples"] == 100
    for entry in found.thresholds["rates"]:
        q = 1 - entry["rate"]
        k = math.ceil(101 * q - 1e-9)
        assert entry["value"] == pytest.approx(ordinary[k - 1])
        assert entry["test"].value == pytest.approx((test > ordinary[k - 1]).mean())
        # The quantile lies between the two with probability 95 % at least: binomial, from SciPy.
        low = np.searchsorted(ordinary, entry["low"]) + 1
        high = 101 if entry["high"] is None else np.searchsorted(ordinary, entry["high"]) + 1
        law = scipy.stats.binom(100, q)
        assert law.cdf(high - 1) - law.cdf(low - 1) >= 0.95
        assert law.cdf(low) > 0.025
    assert estimates.threshold(torch.arange(20.0), 0.01).value is None


def test_training_figures_are_preserved():
    train = evaluated().train
    assert train["evidence"]["accuracy"] == train["network"]["accuracy"]
    assert train["evidence"]["nll"].value == pytest.approx(train["network"]["nll"].value, abs=0.02)


@pytest.mark.parametrize(
    ("difference", "error", "higher", "words"),
    [
        (0.021, 0.01, True, "better"),
        (0.019, 0.01, True, "same"),
        (-0.021, 0.01, True, "worse"),
        (-0.021, 0.01, False, "better"),
        (1.0, math.nan, True, "same"),
        (0.0, 0.0, True, "same"),
        (0.1, 0.0, False, "worse"),
        (9e-5, 1e-9, True, "same"),  # four digits may read alike
        (1.1e-4, 1e-9, True, "better"),
    ],
)
def test_better_only_beyond_two_standard_errors(difference, error, higher, words):
    assert verdict(difference, error, higher_is_better=higher, digits=4) == words


def test_verdicts_follow_the_differences():
    found = evaluated()
    for key, verdicts in found.verdicts.items():
        for name, word in verdicts.items():
            d = found.differences[key][name]
            sure = abs(d.value) > 2 * d.error
            seen = abs(d.value) > 10.0 ** -METRICS[name].digits
            assert (word != "same") == (sure and seen), (key, name)
    assert "gap" not in found.verdicts["evidence"]


# -- the whole -------------------------------------------------------------------------------------


def test_batches_do_not_matter():
    posterior, _ = classifier()
    x, y = make(1, N)
    wanted = evaluated().figures["evidence"]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=17)
    arrays = (x.numpy(), y.numpy())
    for data in (loader, loader.dataset, arrays):
        found = posterior.evaluate(data, **QUIET).figures["evidence"]
        for name in found:
            assert found[name] == pytest.approx(wanted[name], rel=1e-5), name


def test_against_and_names():
    posterior, train = classifier()
    other = nb.LaplacePosterior(posterior.model).fit([train], num_samples=4, **QUIET)
    x, y = make(1, N)
    found = posterior.evaluate((x, y), against=[other, other], **QUIET)
    assert list(found.figures) == ["network", "evidence", "LaplacePosterior", "LaplacePosterior 2"]
    mean, _ = dense_mean(other, x)
    value = found.figures["LaplacePosterior"]["nll"].value
    assert value == pytest.approx(sk.log_loss(y.numpy(), mean))
    named = posterior.evaluate((x, y), against={"mine": other}, **QUIET)
    assert "mine" in named.figures and "mine" in str(named)


def test_words_files_and_dictionaries(tmp_path):
    found = evaluated()
    text = str(found)
    for word in ("accuracy", "NLL", "AUROC", "novelty", "Temperature scaling", "±", "training"):
        assert word in text
    assert repr(found).startswith("Evaluation(120 test examples")
    assert "<pre>" in found._repr_html_()
    found.save(tmp_path / "deep" / "results.json")
    again = read_signed_json(tmp_path / "deep" / "results.json", "")
    assert again == json.loads(json.dumps(found.as_dict()))
    assert again["figures"]["evidence"]["nll"]["error"] == found.figures["evidence"]["nll"].error
    assert "seconds" not in found.as_dict()["environment"]


def test_examples_are_the_most_novel_and_the_most_confidently_wrong():
    found, (posterior, _) = evaluated(), classifier()
    x, y = make(1, N)
    novel = posterior.novelty(x).sort(descending=True).values[:6]
    shown = found.details["examples"]["test: novel"]
    assert [e["value"] for e in shown] == pytest.approx(novel.tolist(), rel=1e-6)
    wrong = [e["value"] for e in found.details["examples"]["test: wrong"]]
    assert wrong == sorted(wrong, reverse=True)
    assert all(
        e["caption"].split()[1] != e["caption"].split()[-1]
        for e in found.details["examples"]["test: wrong"]
    )
    pictures = posterior.evaluate((x, y), show=lambda v: v.reshape(1, 3), **QUIET)
    assert "png" in pictures.details["examples"]["test: novel"][0]
    assert found.details["units"]["test: wrong"] == "confidence"
    # Examples whose label is ignored are neither right nor wrong, and the others count as ever.
    _, y = make(1, N)
    y[::2] = -100
    half = posterior.evaluate((x, y), **QUIET).details["examples"]["test: wrong"]
    p = posterior.predict(x).mean
    right = (p.argmax(1) == y) | (y < 0)
    expected = p.max(1).values.masked_fill(right, 0).sort(descending=True).values[: len(half)]
    assert [e["value"] for e in half] == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shifted": {"odd": torch.zeros(4, 5).double()}}, ("shifted['odd'], batch 0", "(4, 5)")),
        ({"shifted": [1]}, ("`shifted` is list",)),
        ({"slices": {"s": np.ones(3, bool)}}, ("slices['s']", "(30,)")),
        ({"slices": {"s": np.zeros(30, bool)}}, ("slices['s']", "none")),
        ({"slices": {"s": lambda x, y: y}}, ("slices['s']", "bool")),
        ({"slices": {"s": lambda x, y: 1 / 0}}, ("slices['s'] failed", "ZeroDivisionError")),
        ({"against": [3]}, ("`against` holds int",)),
        ({"train": torch.zeros(3, 3).double()}, ("`train`", "targets are needed")),
        ({"validation": iter([])}, ("`validation` is an iterator",)),
        (
            {"validation": (torch.zeros(2, 3).double(), torch.tensor([0, 7]))},
            ("validation, batch 0", "7"),
        ),
        ({"show": lambda v: 1 / 0}, ("`show` failed", "ZeroDivisionError")),
        ({"show": lambda v: torch.zeros(2, 2, 2, 2)}, ("`show` returned", "(2, 2, 2, 2)")),
    ],
)
def test_bad_input_is_named(options, words):
    posterior, _ = classifier()
    with says(nb.InputError, *words), unchanged(posterior.model):
        posterior.evaluate(make(1, 30), **options, **QUIET)


def test_more_bad_input():
    posterior, _ = classifier()
    x, y = make(1, 30)
    with says(nb.InputError, "test, batch 0", "labels reach 9"):
        posterior.evaluate((x, y + 7), **QUIET)
    with says(nb.InputError, "`test` holds 30 inputs but 29 targets"):
        posterior.evaluate((x, y[:29]), **QUIET)
    with says(nb.InputError, "`test` holds no examples"):
        posterior.evaluate((x[:0], y[:0]), **QUIET)
    with says(nb.NotFittedError, "fit"):
        nb.NullSpacePosterior(posterior.model).evaluate((x, y), **QUIET)


def test_one_example_has_figures_and_no_errors():
    posterior, _ = classifier()
    x, y = make(1, 1)
    figure = posterior.evaluate((x, y), **QUIET).figures["evidence"]["nll"]
    assert math.isfinite(figure.value) and math.isnan(figure.error)
