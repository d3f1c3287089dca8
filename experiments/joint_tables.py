"""Tables of joint predictions: a measure each, tasks as columns; and by strength of corruption, a task each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.joint import NAME, TASKS, TITLE, TITLES, TUNING, WORDS
from experiments.tables import Column, Page, Row, at, provenances

MEASURES = (
    ("joint", "clean", "Joint NLL by a label"),
    ("joint", "shifted", "Joint NLL by a label, shifted"),
    ("nll", "clean", "NLL"),
    ("nll", "shifted", "NLL, shifted"),
    ("ece", "clean", "ECE"),
    ("ece", "shifted", "ECE, shifted"),
    ("accuracy", "clean", "Accuracy"),
)
GUESS = (
    "The first row is no method: functions that give each input one label at random have this joint NLL, for a group "
    "holds two inputs, so that being consistent is worth something whatever is said. A posterior above that row is "
    "worse than knowing nothing; one far wider than its network comes near it."
)
SECONDS = (
    "On one core. All weights, the last two layers and the last layer have the same rows: those of all 300 training "
    "examples, so that what the last layer saves in time could buy no further ones."
)
CHOICE = (
    "The tables on which ways to set the prior were compared; they are in none of the others. Tuned by joint NLL: the "
    "prior precision with the lowest joint NLL of groups of validation labels."
)


def write(setting: str, runs: Sequence[dict[str, Any]], folder: Path) -> None:
    page = Page(NAME, f"{TITLE} ({setting})")
    page.say(
        WORDS,
        f"{seeds(runs)} † trains more networks than one.",
        provenances(runs, f"python -m experiments {NAME} --setting {setting}"),
    )
    for measure, part, title in MEASURES:
        words = GUESS if measure == "joint" else ""
        page.table(title, *table(runs, TASKS, (part, measure)), words, "method")
    page.table("Seconds of a fit", *table(runs, TASKS, ("seconds",)), SECONDS, "method")
    for measure, title in (("joint", "Joint NLL"), ("nll", "NLL")):
        for task in TASKS:
            if any(run["result"]["task"] == task for run in runs):
                page.table(
                    f"{title} at five strengths: {task}",
                    *strengths(runs, task, measure),
                    "",
                    "method",
                )
    for measure, part, title in MEASURES[:4]:
        if any(run["result"]["task"] in TUNING for run in runs):
            page.table(
                f"Tuning tasks: {title}", *table(runs, TUNING, (part, measure)), CHOICE, "method"
            )
    page.write(folder, list(runs))


def seeds(runs: Sequence[dict[str, Any]]) -> str:
    every = (*TASKS, *TUNING)
    counts = {task: sum(run["result"]["task"] == task for run in runs) for task in every}
    return "Seeds: " + ", ".join(f"{task} {n}" for task, n in counts.items() if n) + "."


def table(
    runs: Sequence[dict[str, Any]], tasks: Sequence[str], path: tuple[str, ...]
) -> tuple[list[Row], list[Column]]:
    """A row a method, a column a task."""
    there = [task for task in tasks if any(run["result"]["task"] == task for run in runs)]
    better = {"accuracy": 1, "seconds": 0}.get(path[-1], -1)
    rows = []
    for key, words in TITLES.items():
        if key == "guess" and path[-1] not in ("joint", "nll"):
            continue
        found = [
            {"seed": run["seed"], run["result"]["task"]: run["result"]["methods"][key]}
            for run in runs
            if key in run["result"]["methods"]
        ]
        if found:
            rows.append(Row(words, found))
    counts = {task: sum(run["result"]["task"] == task for run in runs) for task in there}
    titles = {task: task + " (1 seed)" * (counts[task] == 1) for task in there}
    return rows, [Column(titles[task], at(task, *path), better, 3) for task in there]


def strengths(
    runs: Sequence[dict[str, Any]], task: str, measure: str
) -> tuple[list[Row], list[Column]]:
    """A row a method, a column a strength."""
    mine = [run["result"]["methods"] for run in runs if run["result"]["task"] == task]
    rows = [
        Row(words, [methods[key] for methods in mine if key in methods])
        for key, words in TITLES.items()
        if any(key in methods for methods in mine)
    ]
    return rows, [Column(level, at("strengths", level, measure), -1, 3) for level in "12345"]
