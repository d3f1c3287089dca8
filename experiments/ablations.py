"""What each choice of the null-space posterior is worth: one table for each, everything else at its default.

Samples, the share of the data whose predictions are kept, exactness of the solver, the edge of the null space, the
prior precision, directions, novelty scores, which weights of networks with normalisation layers take part, and which
weights of a large network, of which fewer can be kept of more examples.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import digits_heldout, fashion_lenet, fashion_resnet, swin, tasks
from experiments.ablation_items import ITEMS, point_entry
from experiments.classification import case_of
from experiments.methods.posteriors import DECLARED
from experiments.networks import FIRST, train_job
from experiments.runner import Job
from experiments.store import Key
from experiments.tables import Column, Figures, Page, Row, at
from experiments.tasks import Scale

NAME = "ablations"
TITLE = "Ablations"
# Which items are asked of which task; None: all.
FULL_TASKS: dict[str, set[str] | None] = {
    "digits_heldout": None,
    "fashion_lenet": set(ITEMS) - {"norms", "weights"},
    "fashion_resnet": {"subset", "scores"},
    "swin": {"weights"},
}
SMALL_TASKS: dict[str, set[str] | None] = {"digits_heldout": set(ITEMS) - {"norms", "residual"}}


def scale_of(task: str, setting: str) -> Scale:
    """The task's own network; on Fashion-MNIST 3,000 training images are preserved, unless the item says otherwise."""
    if task == "fashion_lenet":
        few = {"constrained": 3000, "measured": 2000, "test": 2000, "outside": 500}
        return replace(fashion_lenet.FULL, seeds=1, shifted=1, **few)
    if task == "fashion_resnet":
        return replace(fashion_resnet.FULL, seeds=2, shifted=1, test=2000, outside=500)
    if task == "swin":
        return replace(swin.FULL, shifted=1)
    base = digits_heldout.SCALES[setting]
    if setting == "small":
        return replace(base, shifted=1, seeds=1, train=300, measured=300)
    return replace(base, shifted=1, seeds=5)


def jobs(
    setting: str, seeds: Sequence[int] | None = None, methods: Sequence[str] | None = None
) -> list[Job]:
    """``methods`` does not apply: there is one."""
    out: list[Job] = []
    for task, wanted in (SMALL_TASKS if setting == "small" else FULL_TASKS).items():
        scale = scale_of(task, setting)
        for seed in seeds or range(scale.seeds):
            key = Key(NAME, setting, seed, f"{task}, network")
            recipe = {"recipe": scale.config()["recipe"], "train": scale.train}
            out.append(Job(key, recipe, train_job, (task, seed, scale, FIRST), keep=False))
            for item in ITEMS:
                if wanted is None or item in wanted:
                    key = Key(NAME, setting, seed, f"{task}, {item}")
                    config = {**scale.config(), "novelty": DECLARED}
                    out.append(Job(key, config, item_job, (task, seed, scale, item)))
    return out


def item_job(task: str, seed: int, scale: Scale, item: str) -> dict[str, Any]:
    """For the runner: one table's figures from one seed."""
    started = time.perf_counter()
    case = case_of(tasks.make(task, seed, scale))
    rows = [{"label": label, **figures} for label, figures in ITEMS[item][1](case)]
    if item not in ("norms", "scores"):
        rows.insert(0, {"label": "point estimate", **point_entry(case)})
    return {"task": task, "item": item, "rows": rows, "seconds": time.perf_counter() - started}


# -- report ----------------------------------------------------------------------------------------

BASIC = (
    Column("training accuracy lost, points", at("train_lost"), 0, 2),
    Column("accuracy", at("test_accuracy"), 1, 4),
    Column("NLL", at("test_nll"), -1, 4),
    Column("ECE", at("test_ece"), -1, 4),
)
ABOUT: dict[str, tuple[Column, ...]] = {
    "subset": (Column("rows", at("constraints"), 0, 0), Column("fit s", at("seconds"), 0, 1)),
    "residual": (
        Column("residual", at("residual"), 0, -1),
        Column("passes", at("iterations"), 0, 0),
        Column("fit s", at("seconds"), 0, 1),
    ),
    "delta": (
        Column("residual", at("residual"), 0, -1),
        Column("prior preserved, %", at("kept"), 0, 1),
    ),
    "prior": (Column("prior precision", at("prior_precision"), 0, 2),),
    "directions": (
        Column("rows", at("constraints"), 0, 0),
        Column("trace left out, %", at("discarded"), 0, 2),
        Column("fit s", at("seconds"), 0, 1),
    ),
    "preserve": (
        Column("rows", at("constraints"), 0, 0),
        Column("prior preserved, %", at("kept"), 0, 1),
        Column("fit s", at("seconds"), 0, 1),
    ),
    "norms": (Column("prior precision", at("prior_precision"), 0, 2),),
    "weights": (
        Column("how many", at("weights"), 0, 0),
        Column("rows", at("constraints"), 0, 0),
        Column("prior precision", at("prior_precision"), 0, 2),
        Column("fit s", at("seconds"), 0, 1),
    ),
}


def columns(item: str, first: Figures) -> list[Column]:
    outside = [Column(name, at("outside", name), 1) for name in first["outside"]]
    mean = Column("mean AUROC", at("auroc"), 1)
    if item == "scores":
        return [*outside, mean]
    return [*ABOUT.get(item, ()), *BASIC, *outside, mean]


def report(setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
    if not runs:
        return
    page = Page(NAME, f"{TITLE} ({setting})")
    page.say(
        "The null-space posterior with one thing changed at a time; prior precision by the evidence, linearised "
        "predictions, novelty by the information of the samples (the point estimate's by entropy). On Fashion-MNIST "
        "LeNet is trained on all images and 3,000 are preserved, except where the share of the data is the question. "
        f"Mean ± standard error over seeds. `python -m experiments {NAME} --setting {setting}`"
    )
    for item, (title, _) in ITEMS.items():
        for task in FULL_TASKS:
            some = [
                r["result"]
                for r in sorted(runs, key=lambda r: r["seed"])
                if (r["result"]["item"], r["result"]["task"]) == (item, task)
            ]
            if some:
                rows = rows_of(some)
                words = (ITEMS[item][1].__doc__ or "").splitlines()[0]
                page.table(
                    f"{title} ({task}, {len(some)} seed{'s' if len(some) > 1 else ''})",
                    rows,
                    columns(item, rows[-1].runs[0]),
                    words,
                    item,
                )
    page.write(folder, runs)


def rows_of(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row a label, in the order of the first result that has it."""
    labels = dict.fromkeys(
        itertools.chain.from_iterable((e["label"] for e in r["rows"]) for r in results)
    )
    return [
        Row(label, [e for r in results for e in r["rows"] if e["label"] == label])
        for label in labels
    ]
