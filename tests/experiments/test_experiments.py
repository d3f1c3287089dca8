"""Runs that are stopped, methods, tables, claims and a whole experiment."""

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
from support import generator
from torch import nn
from torch.testing import assert_close

from experiments import __main__ as command
from experiments import (
    claims,
    digits_heldout,
    networks,
    overview,
    regression,
    reports,
    tables,
    tabular,
    underfitting,
)
from experiments.methods.swag import Moments, refresh_batchnorm
from experiments.methods.weights import Linearised, last_weights, sampled
from experiments.runner import Job, Unavailable, isolated, run
from experiments.store import Key, Store, collected, rounded
from experiments.tables import Column, Row, at, markdown, summarise
from experiments.tasks import Recipe

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
    assert not worse["mean AUROC best of these methods around one network"]
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


@pytest.mark.parametrize(
    ("setting", "found"), [("small", (5, 0)), ("full", (5, 1))], ids=["small", "full"]
)
def test_where_a_full_laplace_posterior_takes_too_long(
    setting: str, found: tuple[int, int]
) -> None:
    methods = [job.key.method for job in underfitting.jobs(setting, range(5))]
    tasks = ("digits_heldout", "fashion_lenet")
    assert tuple(methods.count(f"{task}, full Laplace") for task in tasks) == found
    assert all(methods.count(f"{task}, null-space") == 5 for task in tasks)


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
