"""The central claim: what each posterior costs in accuracy along the prior precision, and what it gives for it.

No tuning here: every posterior at every prior precision of one grid, with the training accuracy, the test accuracy and
the novelty that it has there. Full, Kronecker and diagonal Laplace are refitted at each; the null-space posterior's
samples scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nullbayes as nb
from experiments import digits_heldout, fashion_lenet, measures, networks, tasks
from experiments.claims import Finding
from experiments.classification import case_of
from experiments.figures import COLOURS, drawing
from experiments.methods import METHODS, Case, Draws
from experiments.methods.peer_laplace import PeerLaplace
from experiments.methods.posteriors import fitted, slim, unit_draws
from experiments.networks import FIRST, train_job
from experiments.runner import Job
from experiments.store import Key
from experiments.tables import Column, Page, Row, at, summarise
from experiments.tasks import Scale

NAME = "underfitting"
TITLE = "Underfitting along the prior precision"
GRID = {
    "small": tuple(10.0**e for e in (-1, 0, 1, 2, 3, 4)),
    "full": tuple(10 ** (e / 2) for e in range(-2, 9)),
}
BASE = {"digits_heldout": digits_heldout, "fashion_lenet": fashion_lenet}
# A full Laplace posterior is a fit for each value: on large data, half an hour a seed, it has these and one seed.
LARGE_GRID = (1.0, 10.0, 100.0)
LARGE_SEEDS = 1
BATCH = 250
STRUCTURES = {
    "diagonal Laplace": "laplace_diag",
    "Kronecker Laplace": "laplace_kron",
    "full Laplace": "laplace_full",
    "null-space": "null_predictions",
}


def scale_of(task: str, setting: str) -> Scale:
    """The task's own networks and data, with less to measure."""
    base: Scale = BASE[task].SCALES[setting]
    few = {"small": (400, 200, 80), "full": (3000, 2000, 500)}[setting]
    measured, test, outside = few
    seeds = {"small": 1, "full": 3 - (task == "fashion_lenet")}[setting]
    if task == "fashion_lenet" and setting == "small":
        base = replace(base, train=600)
    return replace(
        base,
        seeds=seeds,
        measured=min(measured, base.measured),
        test=min(test, base.test or test),
        outside=min(outside, base.outside),
        shifted=1,
    )


def jobs(
    setting: str, seeds: Sequence[int] | None = None, methods: Sequence[str] | None = None
) -> list[Job]:
    out: list[Job] = []
    wanted = [name for name, m in STRUCTURES.items() if methods is None or m in methods]
    for task in BASE:
        scale = scale_of(task, setting)
        for seed in seeds or range(scale.seeds):
            key = Key(NAME, setting, seed, f"{task}, network")
            recipe = {"recipe": scale.config()["recipe"], "train": scale.train}
            out.append(Job(key, recipe, train_job, (task, seed, scale, FIRST), keep=False))
            for name in wanted:
                if name == "full Laplace" and too_long(task, setting, seed, scale):
                    continue
                key = Key(NAME, setting, seed, f"{task}, {name}")
                config = {**scale.config(), "grid": list(GRID[setting])}
                if name == "full Laplace":
                    config["version"] = METHODS[STRUCTURES[name]].version
                out.append(Job(key, config, path_job, (task, seed, scale, name, GRID[setting])))
    return out


def too_long(task: str, setting: str, seed: int, scale: Scale) -> bool:
    """Whether a full Laplace posterior is left out."""
    few = setting == "small" and task == "fashion_lenet"
    return few or (large(scale.train) and seed >= LARGE_SEEDS)


def large(examples: int | None) -> bool:
    """None: all there are."""
    return examples is None or examples > 10_000


def path_job(
    task: str, seed: int, scale: Scale, structure: str, grid: Sequence[float]
) -> dict[str, Any]:
    """For the runner: one posterior along the grid, and at its own evidence."""
    case = case_of(tasks.make(task, seed, scale))
    point = measured(case, lambda x: Draws(networks.outputs(case.network, x)[None]))
    evidence, path = PATHS[structure](case, grid)
    return {
        "task": task,
        "structure": structure,
        "point": point,
        "evidence": evidence,
        "path": path,
        "parameters": sum(p.numel() for p in case.network.parameters()),
        "train": len(case.train),
    }


def measured(case: Case, draws: Any) -> dict[str, float]:
    """Training and test figures, and AUROC of each set by variance (by entropy for a single network)."""
    task = case.task
    out: dict[str, float] = {}

    def of(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [draws(x) for x in inputs.split(BATCH)]
        score = [p.novelty().get("variance", p.novelty()["entropy"]) for p in parts]
        plain = [p.plain().argmax(-1) for p in parts]
        return torch.cat([p.probabilities() for p in parts]), torch.cat(score), torch.cat(plain)

    probs, _, plain = of(task.measured.inputs)
    train = measures.classification(probs, task.measured.targets)
    out["train_accuracy_plain"] = float((plain == task.measured.targets).double().mean())
    probs, known, plain = of(task.data.test.inputs)
    test = measures.classification(probs, task.data.test.targets)
    out["test_accuracy_plain"] = float((plain == task.data.test.targets).double().mean())
    out |= {f"train_{k}": train[k] for k in ("accuracy", "nll")}
    out |= {f"test_{k}": test[k] for k in ("accuracy", "nll", "ece")}
    aurocs = [measures.detection(known, of(x)[1])["auroc"] for x in task.outside.values()]
    out["auroc"] = sum(aurocs) / len(aurocs)
    return out


Path_ = list[dict[str, float]]


def null_space_path(case: Case, grid: Sequence[float]) -> tuple[float, Path_]:
    posterior = slim(fitted(nb.NullSpacePosterior, case))
    evidence = float(posterior.prior_precision)

    def at_alpha(alpha: float) -> Any:
        def draws(x: Tensor) -> Draws:
            point, unit = unit_draws(posterior, x)
            return Draws(point + unit * alpha**-0.5, point)

        return draws

    return evidence, along(case, [evidence, *grid], at_alpha)


def full_laplace_path(case: Case, grid: Sequence[float]) -> tuple[float, Path_]:
    first = slim(fitted(nb.LaplacePosterior, case))
    evidence = float(first.prior_precision)
    if large(len(case.task.constrained)):
        grid = LARGE_GRID

    def at_alpha(alpha: float) -> Any:
        posterior = (
            first
            if alpha == evidence
            else slim(fitted(nb.LaplacePosterior, case, prior_precision=alpha))
        )

        def draws(x: Tensor) -> Draws:
            prediction = posterior.predict(x)
            return Draws(prediction.outputs, prediction.point)

        return draws

    return evidence, along(case, [evidence, *grid], at_alpha)


def peer_path(name: str) -> Any:
    def path(case: Case, grid: Sequence[float]) -> tuple[float, Path_]:
        method = METHODS[name]()
        assert isinstance(method, PeerLaplace)
        method.build(case)

        def at_alpha(alpha: float) -> Any:
            changes = method.changes(alpha)

            def draws(x: Tensor) -> Draws:
                point, change = method.linearised(changes, x)
                return Draws(point + change, point)

            return draws

        return method.evidence, along(case, [method.evidence, *grid], at_alpha)

    return path


def along(case: Case, alphas: Iterable[float], at_alpha: Any) -> Path_:
    return [{"prior_precision": a, **measured(case, at_alpha(a))} for a in alphas]


PATHS: dict[str, Any] = {
    "diagonal Laplace": peer_path("laplace_diag"),
    "Kronecker Laplace": peer_path("laplace_kron"),
    "full Laplace": full_laplace_path,
    "null-space": null_space_path,
}


# -- report ----------------------------------------------------------------------------------------


def lost(run: dict[str, Any], entry: dict[str, float], part: str, how: str = "") -> float:
    """Percentage points of accuracy below the point estimate; ``how="_plain"``: without mirror images of samples."""
    return 100 * (run["point"][f"{part}_accuracy"] - entry[f"{part}_accuracy{how}"])


def flat(run: dict[str, Any], index: int) -> dict[str, Any]:
    entry = run["path"][index]
    gone = {f"{part}_lost": lost(run, entry, part) for part in ("train", "test")}
    gone |= {f"{part}_lost_plain": lost(run, entry, part, "_plain") for part in ("train", "test")}
    return {**entry, **gone, "task": run["task"], "structure": run["structure"]}


LOST = ("train_lost", "test_lost", "train_lost_plain", "test_lost_plain")
COLUMNS = (
    Column("prior precision", at("prior_precision"), 0, 2),
    Column("training accuracy lost, plain samples", at("train_lost_plain"), 0, 2),
    Column("training, mirrored", at("train_lost"), 0, 2),
    Column("test accuracy lost, plain samples", at("test_lost_plain"), 0, 2),
    Column("test, mirrored", at("test_lost"), 0, 2),
    Column("training NLL", at("train_nll"), 0, 3),
    Column("test NLL", at("test_nll"), 0, 3),
    Column("test ECE", at("test_ece"), 0, 3),
    Column("mean AUROC by variance", at("auroc"), 0, 3),
)


def grouped(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Results by task and structure."""
    out: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in sorted(runs, key=lambda r: r["seed"]):
        result = {**run["result"], "seed": run["seed"]}
        out.setdefault(result["task"], {}).setdefault(result["structure"], []).append(result)
    return out


def report(setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
    if not runs:
        return
    page = Page(NAME, f"{TITLE} ({setting})")
    page.say(
        "Linearised predictions. At the evidence, at the smallest prior precision of the grid that costs at most 0.1 "
        "points of training accuracy, and along the grid. Plain samples: the average that these methods are used with; "
        "mirrored: over each sample and its mirror image around the trained network's output, as this library "
        "predicts, under which two classes never change places. The other columns are mirrored. "
        "AUROC: by the variance of the outputs, mean over the sets "
        "from elsewhere; of the point estimate by entropy. Mean ± standard error over seeds.",
        f"`python -m experiments {NAME} --setting {setting}`",
    )
    found = grouped(runs)
    for task, structures in found.items():
        point = [
            {**r["point"], **dict.fromkeys(LOST, 0.0)} for r in next(iter(structures.values()))
        ]
        rows = [Row("point estimate", point)]
        for name in [n for n in STRUCTURES if n in structures]:
            some = structures[name]
            rows.append(Row(f"{name}, evidence", [flat(r, 0) for r in some]))
            rows.append(Row(f"{name}, widest that preserves training", widest(some)))
        page.table(task, rows, COLUMNS, first="posterior")
        steps = []
        for name in [n for n in STRUCTURES if n in structures]:
            count = min(len(r["path"]) for r in structures[name])
            steps += [
                Row(f"{name}", [flat(r, index) for r in structures[name]])
                for index in range(1, count)
            ]
        page.table(f"{task}, along the grid", steps, COLUMNS, first="posterior")
    draw(found, folder / f"{NAME}.png")
    page.picture(f"{NAME}.png", "Accuracy lost and novelty along the prior precision")
    page.write(folder, runs)


def widest(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each seed the smallest prior precision on the grid that costs at most 0.1 points of training accuracy."""
    out = []
    for run in runs:
        kept = [
            i
            for i in range(1, len(run["path"]))
            if lost(run, run["path"][i], "train", "_plain") <= 0.1
        ]
        if kept:
            best = min(kept, key=lambda i, r=run: r["path"][i]["prior_precision"])  # type: ignore[misc]
            out.append(flat(run, best))
    return out


def draw(found: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    panels = (
        (
            "training accuracy lost, plain samples",
            lambda r, e: lost(r, e, "train", "_plain"),
            "symlog",
        ),
        ("test accuracy lost, plain samples", lambda r, e: lost(r, e, "test", "_plain"), "symlog"),
        ("test NLL", lambda r, e: e["test_nll"], "linear"),
        ("mean AUROC by variance", lambda r, e: e["auroc"], "linear"),
    )
    with drawing(path, len(found), 4, (15, 3.6 * len(found))) as axes:
        for row, (task, structures) in enumerate(found.items()):
            for column, (label, value, kind) in enumerate(panels):
                axis = axes[row, column]
                for name in [n for n in STRUCTURES if n in structures]:
                    some, colour = structures[name], COLOURS[STRUCTURES[name]]
                    count = min(len(r["path"]) for r in some)
                    alphas = [some[0]["path"][i]["prior_precision"] for i in range(1, count)]
                    cells = [
                        summarise([value(r, r["path"][i]) for r in some]) for i in range(1, count)
                    ]
                    means = [c.mean for c in cells]
                    axis.plot(alphas, means, "o-", ms=3, color=colour, label=name)
                    # The evidence of each seed: where the method itself would stand.
                    ours = [(r["path"][0]["prior_precision"], value(r, r["path"][0])) for r in some]
                    axis.plot(*zip(*ours, strict=True), "*", ms=11, color=colour, mec="white")
                axis.set_xscale("log")
                if kind == "symlog":
                    axis.set_yscale("symlog", linthresh=0.1)
                    axis.axhline(0.0, color="#555555", lw=0.8, ls=":")
                if column == 3:
                    points = [r["point"]["auroc"] for r in next(iter(structures.values()))]
                    axis.axhline(sum(points) / len(points), color="#8a8a8a", ls="--", lw=1)
                if column == 2:
                    points = [r["point"]["test_nll"] for r in next(iter(structures.values()))]
                    axis.axhline(sum(points) / len(points), color="#8a8a8a", ls="--", lw=1)
                axis.set_xlabel("prior precision")
                axis.set_title(f"{task}: {label}", loc="left", fontsize=9)
        axes[0, 0].legend(
            title="★ by evidence; dashed: point estimate", fontsize=7, title_fontsize=7
        )


# -- claims ----------------------------------------------------------------------------------------


def claims(runs: Sequence[dict[str, Any]]) -> tuple[list[Finding], list[str]]:
    """At its own evidence each Laplace posterior loses training accuracy; the null-space posterior does not."""
    found: list[Finding] = []
    lines = [
        "## Underfitting, each posterior at its own evidence",
        "",
        "| task | posterior | training accuracy lost, plain samples | mirrored | test accuracy lost, plain samples "
        "| mirrored | training NLL | mean AUROC by variance |",
        "|---" * 8 + "|",
    ]
    for task, structures in grouped(runs).items():
        for name, some in structures.items():
            entries = [flat(r, 0) for r in some]
            cells = [
                summarise([e[k] for e in entries]).shown(d)
                for k, d in (
                    ("train_lost_plain", 2),
                    ("train_lost", 2),
                    ("test_lost_plain", 2),
                    ("test_lost", 2),
                    ("train_nll", 3),
                    ("auroc", 3),
                )
            ]
            lines.append(f"| {task} | {name} | " + " | ".join(cells) + " |")
            for run, entry in zip(some, entries, strict=True):
                ours = name == "null-space"
                both = (entry["train_lost_plain"], entry["train_lost"])
                gone = max(both, key=abs) if ours else both[0]
                held = abs(gone) <= 0.1 if ours else gone > 0.1
                claim = (
                    "preserves training accuracy at the evidence (within 0.1 points)"
                    if ours
                    else f"{name} loses training accuracy at the evidence (plain samples)"
                )
                margin = -gone if ours else gone
                found.append(
                    Finding(
                        f"{task} (path)",
                        run["seed"],
                        "by evidence",
                        claim,
                        margin,
                        held,
                        f"{gone:+.2f} points",
                    )
                )
    return found, [*lines, ""]
