"""Tabular regression on real data that comes with scikit-learn: RMSE, NLL and calibration of intervals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments import figures, regression
from experiments.claims import NOISE, Finding
from experiments.methods import METHODS, usual
from experiments.reports import TUNING, about
from experiments.runner import Job
from experiments.store import by_method
from experiments.tables import Column, Figures, Page, Row, at
from experiments.tasks import TASKS, Recipe, Scale, Task, mlp
from nullbayes import datasets
from nullbayes.datasets import Dataset, Split

NAME = "tabular"
TITLE = "Tabular regression"
# Besides diabetes, whose target is what it was collected for, each set of scikit-learn's gives one of its measured
# quantities to be predicted from the others: (loader, column to predict, columns that would give it away).
TARGETS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "wine": ("load_wine", "alcohol", ()),
    "breast-cancer": (
        "load_breast_cancer",
        "worst concavity",
        ("worst concave points", "worst compactness", "worst fractal dimension"),
    ),
    "iris": ("load_iris", "petal width (cm)", ()),
}
SETS = ("diabetes", *TARGETS)
RECIPE = Recipe(epochs=100, batch_size=32, learning_rate=3e-3)
FULL = Scale(
    seeds=10,
    train=None,
    validation=0,
    test=None,
    shifted=0,
    outside=0,
    measured=10_000,
    recipe=RECIPE,
    samples=100,
)
SMALL = Scale(
    seeds=1,
    train=None,
    validation=0,
    test=None,
    shifted=0,
    outside=0,
    measured=10_000,
    recipe=RECIPE,
    samples=50,
)
SCALES = {"small": SMALL, "full": FULL}
WORDS = (
    "diabetes (442 × 10), and from wine (178 × 12), breast-cancer (569 × 26) and iris (150 × 3) one measured quantity "
    "predicted from the others: alcohol, worst concavity (without the columns that nearly repeat it), petal width. "
    "60/20/20 splits, another for each seed, all columns standardised. Two hidden layers of 50 tanh units, float64. "
    "The noise is the mean squared residual on training data, for every method. Tuned, for every method, is a factor "
    "on that noise (the counterpart of a temperature), the prior by evidence; rows with a tuned prior stand beside."
)


def data(name: str, seed: int) -> Dataset:
    """One set, split and standardised by its training part; float64."""
    if name == "diabetes":
        return datasets.diabetes(seed=seed, dtype=torch.float64)
    import sklearn.datasets

    loader, target, left_out = TARGETS[name]
    bunch = getattr(sklearn.datasets, loader)()
    columns = [str(c) for c in bunch.feature_names]
    y = np.asarray(bunch.data[:, columns.index(target)], dtype=np.float64)
    keep = [i for i, c in enumerate(columns) if c != target and c not in left_out]
    x = np.asarray(bunch.data[:, keep], dtype=np.float64)
    whole = Split(torch.from_numpy(x.copy()), torch.from_numpy(y.copy())[:, None])
    sizes = (int(0.6 * len(whole)), int(0.2 * len(whole)), None)
    parts = datasets.partition(whole, sizes, seed=seed, names=("train", "validation", "test"))
    shift, scale = parts[0].inputs.mean(0), parts[0].inputs.std(0)
    centre, spread = parts[0].targets.mean(0), parts[0].targets.std(0)
    scaled = [
        Split((p.inputs - shift) / scale, (p.targets - centre) / spread, p.name) for p in parts
    ]
    return Dataset(name, scaled[0], scaled[1], scaled[2])


def task(name: str, seed: int, scale: Scale) -> Task:
    found = data(name, seed)
    width = found.train.inputs.shape[1]
    build: Callable[[float], Any] = functools.partial(mlp, width, 1, dtype=torch.float64)
    return Task(name, "regression", seed, scale, found, build, {"data": name, "split": seed})


TASKS.update({name: functools.partial(task, name) for name in SETS})


def jobs(
    setting: str, seeds: Sequence[int] | None = None, methods: Sequence[str] | None = None
) -> list[Job]:
    scale = SCALES[setting]
    return regression.jobs(
        NAME, setting, scale, seeds or range(scale.seeds), SETS, methods or usual(setting)
    )


# -- report ----------------------------------------------------------------------------------------


def set_rows(runs: Sequence[dict[str, Any]], name: str) -> dict[str, Row]:
    """Every variant on one data set."""
    found, out = by_method(runs), {}
    for method in METHODS:
        mine = [(run["seed"], run["result"]["sets"][name]) for run in found.get(method, [])]
        for key in mine[0][1]["variants"] if mine else ():
            flat = [
                {**{k: v for k, v in r.items() if k != "variants"}, **r["variants"][key]}
                | {"seed": seed, "key": key}
                for seed, r in mine
            ]
            first = flat[0]
            mark, bold = ("" if first["single_network"] else " †"), "**" * first["headline"]
            out[key] = Row(f"{bold}{first['title']}{bold}{mark}", flat)
    return out


def rmse_lost(run: Figures) -> float:
    """How much the training RMSE grows, in per cent of the point estimate's."""
    return 100 * (float(run["train"]["rmse"]) / float(run["point_train_rmse"]) - 1)


COLUMNS = (
    Column("training RMSE lost, %", rmse_lost, 0, 2),
    Column("RMSE", at("test", "rmse"), -1, 3),
    Column("NLL", at("test", "nll"), -1, 3),
    Column("interval error", at("test", "interval_error"), -1, 3),
    Column("50 % interval", at("test", "coverage_50"), 0, 3),
    Column("90 % interval", at("test", "coverage_90"), 0, 3),
    Column("95 % interval", at("test", "coverage_95"), 0, 3),
    Column("epistemic share", at("test", "epistemic_share"), 0, 2),
    Column("value tuned", at("value"), 0, 3),
    Column("fit s", at("seconds", "fit"), 0, 2),
)


def report(setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
    if not runs:
        return
    page = Page(NAME, f"{TITLE} ({setting})")
    first = {**runs[0], "result": next(iter(runs[0]["result"]["sets"].values()))}
    words = about(
        [first, *runs[1:]], SCALES[setting], f"python -m experiments {NAME} --setting {setting}"
    )
    page.say(
        WORDS,
        "Interval error: mean |coverage − level| of the central intervals of 10, 20, … 90 %. Epistemic share: of the "
        "predictive variance.",
        words.replace("training images, 0 for validation", "training examples on the first set"),
        TUNING,
    )
    values: dict[str, tuple[str, list[list[float | None]]]] = {}
    for name in SETS:
        rows = set_rows(runs, name)
        page.table(name, list(rows.values()), COLUMNS, first="method")
        for row in rows.values():
            if row.runs[0]["headline"]:
                _, groups = values.setdefault(
                    row.runs[0]["method"], (row.title.replace("**", ""), [])
                )
                groups.append([run["test"]["nll"] for run in row.runs])
    lowest = min(v for _, groups in values.values() for g in groups for v in g if v is not None)
    figures.bars(
        folder / f"{NAME}-nll.png", SETS, values, "NLL on test data", bottom=min(0.0, lowest - 0.1)
    )
    page.picture(f"{NAME}-nll.png", "NLL by data set")
    page.write(folder, runs)


# -- claims ----------------------------------------------------------------------------------------


def claims(runs: Sequence[dict[str, Any]]) -> tuple[list[Finding], list[str]]:
    """Training RMSE equal, test RMSE within 0.2 %, NLL and intervals no worse than the point estimate's."""
    found: list[Finding] = []
    judged = {
        "by evidence": "null_predictions_evidence",
        "calibrated": "null_predictions_evidence_noise",  # what `calibrate` does for regression
    }
    for name in SETS:
        rows = set_rows(runs, name)
        if not {"point", *judged.values()} <= set(rows):
            continue
        points = {run["seed"]: run for run in rows["point"].runs}
        for variant, key in judged.items():
            for run in rows[key].runs:
                if (point := points.get(run["seed"])) is not None:
                    found += judge(name, variant, run, point)
    return found, []


def judge(name: str, variant: str, ours: Figures, point: Figures) -> list[Finding]:
    def finding(claim: str, margin: float, held: bool, words: str) -> Finding:
        return Finding(name, int(ours["seed"]), variant, claim, margin, held, words)

    train = rmse_lost(ours)
    test = 100 * (ours["test"]["rmse"] / point["test"]["rmse"] - 1)
    out = [
        finding("training RMSE equal (within 0.1 %)", -train, abs(train) <= 0.1, f"{train:+.3f} %"),
        finding("test RMSE at most 0.2 % higher", -test, test <= 0.2, f"{test:+.3f} %"),
    ]
    for measure, label in (("nll", "NLL"), ("interval_error", "interval error")):
        a, b = point["test"][measure], ours["test"][measure]
        claim = f"{label} no worse than the point estimate"
        out.append(finding(claim, a - b, b <= a + NOISE, f"{a:.4f} → {b:.4f}"))
    return out
