"""The evaluation's own tools: measures, shifts, the store that resumes, SWAG, tables, claims, one run end to end."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from experiments import __main__ as command
from experiments import (
    claims,
    digits_heldout,
    measures,
    networks,
    overview,
    page,
    regression,
    reports,
    shifts,
    tables,
    tabular,
)
from experiments.methods.base import Draws, information, tune
from experiments.methods.swag import Moments, refresh_batchnorm
from experiments.methods.weights import Linearised, last_weights, sampled
from experiments.runner import Job, Unavailable, isolated, run
from experiments.store import RESULTS, Key, Store, collected, rounded
from experiments.tables import Column, Row, at, markdown, summarise
from experiments.tasks import Recipe
from nullbayes import metrics


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


# -- the store, and runs that are stopped ----------------------------------------------------------


def key(number: int, method: str = "m") -> Key:
    return Key("e", "small", number, method)


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    store, calls = Store(tmp_path), []

    def work(number: int, stop: bool) -> dict[str, Any]:
        calls.append(number)
        if stop and number == 2:
            raise KeyboardInterrupt
        return {"number": number, "odd": math.nan}

    def jobs(stop: bool, config: int = 0) -> list[Job]:
        return [Job(key(n), {"c": config}, work, (n, stop)) for n in range(4)]

    quiet = Console(quiet=True)
    with pytest.raises(KeyboardInterrupt):
        run(jobs(True), store, console=quiet, fresh=False)
    (tmp_path / "small" / "e" / ".m-seed2.json.abc.part").write_text("{")  # what a kill may leave
    outcome = run(jobs(False), store, console=quiet, fresh=False)
    assert calls == [0, 1, 2, 2, 3]
    assert [r["result"]["number"] for r in outcome.runs] == [0, 1, 2, 3]
    assert outcome.runs[0]["result"]["odd"] is None  # strict JSON
    assert outcome.runs[0]["environment"]["torch"] == torch.__version__
    # Other settings: nothing is reused.
    run(jobs(False, config=1), store, console=quiet, fresh=False)
    assert calls[5:] == [0, 1, 2, 3]


def test_pieces_behind_a_table_can_be_adopted(tmp_path: Path) -> None:
    """So a method, or a seed, can be added to committed tables without measuring the rest again."""
    far, near = Store(tmp_path / "far"), Store(tmp_path / "near")
    runs = [far.put(key(n), {"lr": 0.1}, {"value": n}, 1.0) for n in range(3)]
    near.put(key(0), {"lr": 0.1}, {"value": 7}, 1.0)  # measured here: stays
    assert near.adopt(runs) == 2 and near.adopt(runs) == 0
    found = [near.get(key(n), {"lr": 0.1}) for n in range(3)]
    assert [f and f["result"]["value"] for f in found] == [7, 1, 2]
    assert near.get(key(1), {"lr": 0.2}) is None  # of other settings
    less = far.put(key(3), {"lr": 0.1}, {}, 1.0)
    assert near.adopt([{**less, "partial": True}]) == 0  # a table without the maps of its pictures


def test_pieces_of_a_written_table_are_those_of_its_settings(tmp_path: Path) -> None:
    """Tables are written with six digits; that must not make their pieces those of other settings."""
    config = {"grid": [10**0.5, 1.0], "lr": 0.1}
    measured = Store(tmp_path / "far").put(key(0), config, {"value": 1.23456789}, 1.0)
    tables.Page("toy", "T").write(tmp_path / "results" / "small", [measured])
    runs = collected("small", "toy", tmp_path / "results")
    assert runs[0]["config"] != config
    store = Store(tmp_path / "near")
    store.adopt(runs)
    assert store.get(key(0), config) is not None
    assert store.get(key(0), {**config, "grid": [3.163, 1.0]}) is None


def test_a_broken_file_is_measured_again_and_failures_do_not_stop_the_rest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(key(0), {}, {"fine": 1}, 1.0)
    store.path(key(0)).write_text("{")
    assert store.get(key(0), {}) is None

    def work(kind: str) -> dict[str, Any]:
        if kind == "bad":
            raise ValueError("no good")
        if kind == "missing":
            raise Unavailable("not installed")
        return {}

    jobs = [Job(key(n, kind), {}, work, (kind,)) for n, kind in enumerate(("bad", "missing", "ok"))]
    outcome = run(jobs, store, console=Console(quiet=True), fresh=False)
    assert [r["method"] for r in outcome.runs] == ["ok"]
    assert outcome.skipped == {"missing": "not installed"}
    assert list(outcome.failures.values()) == ["no good"]


def test_processes_of_their_own() -> None:
    found: Any = isolated(os.getpid)  # type: ignore[arg-type]
    assert found != os.getpid()
    with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
        isolated(int, "a word")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="exit code 9 and no result"):
        isolated(os._exit, 9)


# -- methods ---------------------------------------------------------------------------------------


def test_swag_moments_are_those_of_a_dense_reference() -> None:
    weights = torch.randn(30, 6, generator=generator(), dtype=torch.float64)
    moments = Moments(rank=5)
    for row in weights:
        moments.add(row)
    assert_close(moments.mean, weights.mean(0))
    assert_close(moments.diagonal, weights.var(0, correction=0))
    running = torch.stack([weights[: k + 1].mean(0) for k in range(30)])
    deviations = (weights - running)[-5:]
    assert_close(torch.stack(list(moments.deviations)), deviations)
    wanted = 0.5 * torch.diag(weights.var(0, correction=0)) + 0.5 * deviations.T @ deviations / 4
    count = 100_000
    drawn = moments.changes(count, seed=3)
    found = drawn.T @ drawn / count
    error = ((wanted.diagonal()[:, None] * wanted.diagonal() + wanted.square()) / count).sqrt()
    assert bool(((found - wanted).abs() <= 5 * error).all())
    assert bool((drawn.mean(0).abs() <= 5 * (wanted.diagonal() / count).sqrt()).all())


def test_batchnorm_statistics_are_those_of_the_data() -> None:
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    x = 2 * torch.randn(500, 3, generator=generator()) + 5
    refresh_batchnorm(network, x)
    norm = network[0]
    assert isinstance(norm, nn.BatchNorm1d) and norm.momentum == 0.1 and not norm.training
    assert norm.running_mean is not None and norm.running_var is not None
    assert_close(norm.running_mean, x.mean(0))
    assert_close(norm.running_var, x.var(0))


def test_linearised_and_sampled_agree_to_first_order() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double().eval()
    names = [n for n, _ in network.named_parameters()]
    x = torch.randn(4, 3, generator=generator(), dtype=torch.float64)
    changes = torch.randn(2, 32, generator=generator(1), dtype=torch.float64)
    point, change = Linearised(network, names, x)(changes, x)
    assert_close(point, network(x).detach())
    step = 1e-6
    slope = (sampled(network, names, changes, x, step) - point) / step
    assert_close(change, slope, atol=1e-4, rtol=1e-4)


# -- tables and claims -----------------------------------------------------------------------------


def test_cells_are_mean_and_standard_error_and_the_best_is_bold() -> None:
    cell = summarise([1.0, 2.0, 4.0])
    assert cell.mean == pytest.approx(7 / 3)
    assert cell.error == pytest.approx(np.std([1, 2, 4], ddof=1) / 3**0.5)
    assert summarise([1.0]).error is None and summarise([None]).shown(2) == "–"
    rows = [Row("a", [{"x": 1.0}, {"x": 2.0}]), Row("b", [{"x": 1.0}]), Row("c", [{}])]
    lines = markdown(rows, [Column("up", at("x"), 1, 1), Column("down", at("x"), -1, 1)], "m")
    assert lines[0] == "| m | up | down |"
    assert lines[2] == "| a | **1.5 ± 0.5** | 1.5 ± 0.5 |"
    assert lines[3:] == ["| b | 1.0 | **1.0** |", "| c | – | – |"]
    assert rounded({"a": [1.23456789, 3]}) == {"a": [1.23457, 3]}


def synthetic(
    train: float, nll: float, auroc: float, point_auroc: float = 0.8
) -> list[dict[str, Any]]:
    """Runs of the point estimate and ours with these figures."""

    def variant(
        title: str, declared: str, score: str, t: float, n: float, a: float
    ) -> dict[str, Any]:
        shifted = {"blur": {"1": {"nll": n, "ece": n / 3, "accuracy": 0.9}}}
        return {
            "title": title,
            "declared": declared,
            "headline": True,
            "train": {"accuracy": t},
            "test": {"accuracy": 0.9, "nll": n, "ece": 0.05, "ece_excess": 0.01},
            "shifted": shifted,
            "outside": {"noise": {score: {"auroc": a, "fpr95": 0.5}}},
        }

    def record(method: str, variants: dict[str, Any]) -> dict[str, Any]:
        result = {
            "method": method,
            "single_network": True,
            "variants": variants,
            "point_train_accuracy": 0.95,
        }
        return {"method": method, "seed": 0, "result": result}

    ours = variant("null-space", "variance", "variance", train, nll, auroc)
    return [
        record("point", {"point": variant("point", "", "entropy", 0.95, 0.3, point_auroc)}),
        record("null_predictions", {"null_predictions": ours, "null_predictions_evidence": ours}),
    ]


def verdicts(runs: list[dict[str, Any]]) -> dict[str, bool]:
    return {f.claim: f.held for f in claims.check("t", runs) if f.variant == "calibrated"}


def test_claims_are_judged_by_the_figures() -> None:
    good = verdicts(synthetic(0.95, 0.29, 0.9))
    assert len(good) == 9 and all(good.values())  # no ensemble: nothing is said of it
    assert not verdicts(synthetic(0.94, 0.29, 0.9))["training accuracy equal (within 0.1 points)"]
    worse = verdicts(synthetic(0.95, 0.31, 0.7))
    assert not worse["NLL no worse than the point estimate"] and not worse["NLL under shift better"]
    assert not worse["mean AUROC best of all single-network methods"]
    assert worse["ECE no worse than the point estimate"]


def test_what_a_certificate_advises_is_judged_beside_the_default() -> None:
    runs = synthetic(0.95, 0.31, 0.7)
    better = synthetic(0.95, 0.29, 0.9)[1]["result"]["variants"]["null_predictions"]
    part = {"null_part": better, "null_part_evidence": better}
    runs.append({**runs[1], "method": "null_part"})
    runs[2]["result"] = {**runs[1]["result"], "method": "null_part", "variants": part}
    found = claims.check("swin", runs)
    held = {task: all(f.held for f in found if f.task == task) for task in {f.task for f in found}}
    assert held == {"swin": False, "swin, last twentieth": True}
    assert {f.task for f in claims.check("swin", runs[:2])} == {"swin"}  # not measured: not judged


def test_the_overview_has_a_column_for_each_task_and_a_row_for_each_method(tmp_path: Path) -> None:
    for task, auroc in (("digits_heldout", 0.9), ("fashion_lenet", 0.7)):
        runs = synthetic(0.95, 0.29, auroc)
        if task == "fashion_lenet":
            runs = [r for r in runs if r["method"] != "point"]
        folder = tmp_path / "small"
        folder.mkdir(exist_ok=True)
        (folder / f"{task}.json").write_text(json.dumps({"runs": runs}))
    overview.write("small", claims.CLASSIFICATION, folder)
    text = (folder / "overview.md").read_text()
    table = text.split("## AUROC")[1]
    assert "| method | digits_heldout (1 seed) | fashion_lenet (1 seed) |" in table
    assert "| **null-space** | **0.900** | 0.700 |" in table
    assert "| **point** | 0.800 | – |" in table  # what a task lacks is no figure
    overview.write("full", claims.CLASSIFICATION, tmp_path / "full")
    assert not (tmp_path / "full").exists()


# -- end to end ------------------------------------------------------------------------------------

TINY = replace(
    digits_heldout.SMALL,
    seeds=1,
    train=40,
    validation=30,
    test=30,
    shifted=10,
    outside=15,
    measured=40,
    recipe=Recipe(epochs=3, batch_size=20, learning_rate=3e-3),
    samples=4,
    members=2,
    collected=3,
    strengths={"rotation": (90,), "noise": (0.2,), "blur": (1.0,), "contrast": (0.5,)},
)
SOME = ("point", "temperature", "ensemble", "swag", "null_predictions")


def test_an_experiment_from_training_to_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(digits_heldout.SCALES, "small", TINY)
    monkeypatch.setattr(networks, "FOLDER", tmp_path / "networks")
    where = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results"), "--here"]
    arguments = ["digits_heldout", "--setting", "small", "--only-method", *SOME, *where]
    state = torch.random.get_rng_state()
    assert command.main(arguments) == 0
    assert torch.equal(state, torch.random.get_rng_state())
    results = tmp_path / "results" / "small"
    stored = json.loads((results / "digits_heldout.json").read_text())
    assert {entry["method"] for entry in stored["runs"]} == set(SOME)
    for entry in stored["runs"]:
        for variant in entry["result"]["variants"].values():
            assert set(variant["outside"]) == {
                "held-out classes",
                "rotated 90°",
                "inverted",
                "shuffled",
                "noise",
            }
            assert set(variant["shifted"]) == {"rotation", "noise", "blur", "contrast"}
            assert variant["seconds_per_1000"] > 0
    text = (results / "digits_heldout.md").read_text()
    assert "## Under shift" in text and "| **null-space** |" in text
    for picture in ("shift", "auroc"):
        assert (results / f"digits_heldout-{picture}.png").stat().st_size > 10_000
    assert "training accuracy equal" in (results / "claims.md").read_text()
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.json")}
    assert command.main(arguments) == 0  # all is there: nothing is measured again
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.json")}


# -- the page --------------------------------------------------------------------------------------


def test_markers_are_filled_from_the_results_and_shortened(tmp_path: Path) -> None:
    rows = [f"| method {k} | {k} |" for k in range(20)] + [
        "| **ours** | 1 |",
        "| null-space, by evidence | 2 |",
    ]
    table = ["| | x |", "|---|---|", *rows]
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thing.md").write_text(
        "\n".join(["# T", "", "## One", "", *table, "", "## Two", "", "text"])
    )
    text = "a\n<!-- begin thing: One -->\nold\n<!-- end -->\nb\n"
    filled = page.filled(text, tmp_path)
    assert "old" not in filled and "| **ours** | 1 |" in filled and "method 3" not in filled
    assert "| null-space, by evidence | 2 |" in filled and "small" in filled
    assert "**One**\n\n| | x |" in filled  # a reader of the page sees what the table is of
    assert page.filled(filled, tmp_path) == filled
    rows = [f"| row {k} | {k} |" for k in range(20)]  # none stands for a method: all are shown
    (tmp_path / "small" / "other.md").write_text(
        "\n".join(["# T", "", "## One", *table[:2], *rows])
    )
    assert all(row in page.filled(text.replace("thing", "other"), tmp_path) for row in rows)
    with pytest.raises(ValueError, match="no section 'Three'"):
        page.filled(text.replace("One", "Three"), tmp_path)


@pytest.mark.skipif(
    not (Path(__file__).parents[2] / ".github").exists(), reason="an sdist has no results"
)
@pytest.mark.parametrize("name", list(page.BRIEFS))
def test_the_brief_table_has_the_cells_of_the_tables_that_it_is_made_of(name: str) -> None:
    folders = [RESULTS / setting for setting in ("full", "small")]
    source = next(f / f"{name}.md" for f in folders if (f / f"{name}.md").is_file())
    wanted = page.BRIEFS[name]
    lines = source.read_text().splitlines()
    rows = [row.split(" | ") for row in page.brief(lines, source).splitlines()[2:]]
    assert len(rows) == len(wanted.measures) * len(wanted.methods)
    for measure, method, *cells in rows:
        _, table = page.section(lines, wanted.measures[measure.strip("| ")], source)
        (found,) = (r for r in table if r.split("|")[1].replace("**", "").strip() == method)
        assert found.endswith(" | ".join(cells))
    lost = wanted.methods[-1]
    with pytest.raises(ValueError, match="has no row"):
        page.brief([line for line in lines if lost not in line], source)


@pytest.mark.skipif(
    not (Path(__file__).parents[2] / ".github").exists(), reason="an sdist has no results"
)
def test_the_pages_have_every_marker_that_they_had_on_one() -> None:
    """Five pages of the evaluation: none of what is measured is lost between them."""
    found = [m["what"] for p in page.PAGES for m in page.MARKER.finditer(p.read_text())]
    assert len(found) == len(set(found))
    tables = {what.split(":")[0].rpartition("/")[2] for what in found}  # without their setting
    written = {p.stem for s in ("full", *page.OTHERS) for p in (RESULTS / s).glob("*.md")}
    assert tables == written


@pytest.mark.skipif(
    not (Path(__file__).parents[2] / ".github").exists(), reason="an sdist has no results"
)
@pytest.mark.parametrize("document", page.PAGES, ids=lambda p: p.name)
def test_a_page_says_what_the_committed_results_say(document: Path) -> None:
    text = document.read_text()
    assert page.MARKER.search(text)
    assert page.filled(text, RESULTS) == text, "run `python -m experiments --docs`"


def test_regression_tunes_the_noise_of_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "FOLDER", tmp_path)
    monkeypatch.setattr(tabular, "SETS", ("diabetes",))
    scale = replace(tabular.SMALL, recipe=replace(tabular.SMALL.recipe, epochs=40), samples=20)
    runs = []
    for name in ("point", "temperature", "laplace_full", "null_predictions"):
        found = regression.measure_job(("diabetes",), 0, scale, name)["sets"]["diabetes"]
        runs.append({"method": name, "seed": 0, "result": {"sets": {"diabetes": found}}})
        for key, variant in found["variants"].items():
            assert math.isfinite(variant["test"]["nll"]), key
        if name in ("laplace_full", "null_predictions"):
            own = found["variants"][f"{name}_evidence"]
            noisy = found["variants"][f"{name}_evidence_noise"]
            assert noisy["headline"] and not found["variants"][name]["headline"]
            assert noisy["path"]["nll"][0] > min(noisy["path"]["nll"])
            total = noisy["test"]["coverage_90"] - own["test"]["coverage_90"]
            assert total * math.log(noisy["value"]) >= 0  # more noise covers more
            assert noisy["test"]["rmse"] == own["test"]["rmse"]
    findings, _ = tabular.claims(runs)
    assert {f.variant for f in findings} == {"by evidence", "calibrated"}
    assert all(f.held for f in findings if "RMSE" in f.claim)


def test_the_last_weights_are_counted_from_the_end() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    assert last_weights(network) == ["3.weight", "3.bias"]
    assert last_weights(network, 0.3) == ["3.weight", "3.bias"]  # 27 of 83
    assert last_weights(network, 0.5) == ["2.weight", "2.bias", "3.weight", "3.bias"]  # 43 of 83
    assert last_weights(network, 1.0) == [n for n, _ in network.named_parameters()]


def test_methods_around_different_networks_are_not_put_side_by_side() -> None:
    """Training need not end at the same weights on two machines, and committed pieces can be adopted."""

    def run(seed: int, method: str, network: str | None) -> dict[str, Any]:
        return {"seed": seed, "method": method, "result": {"network": network} if network else {}}

    same = [run(0, "point", "a"), run(0, "swag", "a"), run(1, "point", "b"), run(1, "swag", "b")]
    reports.require_one_network("toy", "small", same)
    reports.require_one_network("toy", "small", [run(0, "point", None), run(0, "swag", None)])
    for other in ("c", None):
        with pytest.raises(reports.MixedNetworks, match=r"seed 1 of toy .* swag.*--no-resume"):
            reports.require_one_network("toy", "small", [*same[:3], run(1, "swag", other)])


def test_a_network_is_known_by_its_weights() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    assert networks.identity(first) != networks.identity(second)
    second.load_state_dict(first.state_dict())
    assert networks.identity(first) == networks.identity(second)
