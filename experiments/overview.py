"""All classification tasks side by side: one table for each question, a row for each method.

Written from the figures committed beside it, like the claims: ``overview.md`` and ``overview.json``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.claims import OURS
from experiments.page import ALSO_SHOWN
from experiments.reports import lost, mean_auroc, score_of, shift_mean, variant_rows
from experiments.store import collected
from experiments.tables import Column, Figures, Page, Row

NAME = "overview"
ONE_SEED = " (1 seed)"
Measure = Callable[[Figures], float | None]
# Title, what it is, which way is better, digits.
QUESTIONS: dict[str, tuple[str, Measure, int, int]] = {
    "Training accuracy lost": ("Percentage points, against the network itself.", lost, 0, 2),
    "NLL": ("On clean test data, in nats.", lambda run: float(run["test"]["nll"]), -1, 3),
    "NLL under shift": (
        "Mean over rotations, noise, blur and loss of contrast.",
        lambda run: shift_mean(run, "nll"),
        -1,
        2,
    ),
    "ECE under shift": ("The same.", lambda run: shift_mean(run, "ece"), -1, 3),
    "AUROC": (
        "Mean over the sets from elsewhere. Ours by novelty; others by whichever of their variants (tuned, by the "
        "evidence, sampled) and scores turns out best on the task.",
        lambda run: float(run["auroc"]),
        1,
        3,
    ),
}


def merged(found: Mapping[str, Sequence[dict[str, Any]]]) -> list[Row]:
    """The variants that stand for a method, and ours by the evidence, with the runs of every task."""
    titles: dict[str, str] = {}
    runs: dict[str, list[Figures]] = {}
    for task, records in found.items():
        rows = variant_rows(records)
        for key, row in rows.items():
            if row.runs[0]["headline"] or row.title == ALSO_SHOWN:
                titles.setdefault(key, row.title)
                told = detection(row, rows.values())
                runs.setdefault(key, []).extend(
                    {**run, "on": task, "auroc": value}
                    for run, value in zip(row.runs, told, strict=True)
                )
    return [Row(title, runs[key]) for key, title in titles.items()]


def detection(row: Row, others: Iterable[Row]) -> list[float]:
    """Mean AUROC of each seed; of a rival's best variant on the task, which may be another than the one shown."""
    first = row.runs[0]
    mine = [row]
    if not first["method"].startswith(OURS):
        mine = [other for other in others if other.runs[0]["method"] == first["method"]]
    found = []
    for variant in mine:
        values = [mean_auroc(run, score_of(variant)) for run in variant.runs]
        found.append([value for value in values if value is not None])
    return max(found, key=statistics.fmean)


def write(setting: str, tasks: Sequence[str], folder: Path) -> None:
    """The page, from the runs beside it; nothing where there are none."""
    found = {task: runs for task in tasks if (runs := collected(setting, task, folder.parent))}
    if not found:
        return
    page = Page(NAME, f"All classification tasks ({setting})")
    counts = {task: len({r["seed"] for r in runs}) for task, runs in found.items()}
    seeds = ", ".join(f"{task} {count}" for task, count in counts.items())
    page.say(
        f"Mean ± standard error over seeds ({seeds}). In bold: the best of a column, and the variant that stands for "
        "each method; †: more than one network; ‡: a setting chosen in hindsight, on these images."
    )
    rows = merged(found)
    for title, (words, measure, better, digits) in QUESTIONS.items():
        columns = [
            Column(task + ONE_SEED * (counts[task] == 1), only(task, measure), better, digits)
            for task in found
        ]
        page.table(title, rows, columns, words, "method")
    page.write(folder, [])


def only(task: str, measure: Measure) -> Measure:
    return lambda run: measure(run) if run["on"] == task else None
