"""Tables and figures of a classification task, from the runs alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import figures
from experiments.methods import METHODS
from experiments.store import by_method
from experiments.tables import Column, Figures, Page, Row, at, provenance
from experiments.tasks import Scale

OURS_DECLARED = (
    "AUROC of each set against the test images. Ours is scored by its novelty, in nats, as the library does by "
    "default. Every other method is scored by whichever of its own scores (entropy; mutual information, variance and "
    "information where it has samples; energy where it has none) has the best mean over sets and seeds."
)


#: Methods with a setting that was settled on the very images that a table shows.
HINDSIGHT = ("null_part", "null_part_outputs")


def variant_rows(runs: Sequence[dict[str, Any]]) -> dict[str, Row]:
    """Every variant of every method, in the order of the tables; figures carry what belongs to the method."""
    found = by_method(runs)
    out: dict[str, Row] = {}
    for method in METHODS:
        mine = found.get(method, [])
        keys = list(mine[0]["result"]["variants"]) if mine else []
        for key in keys:
            flat = [flattened(run, key) for run in mine if key in run["result"]["variants"]]
            mark = "" if flat[0]["single_network"] else " †"
            mark += " ‡" if method in HINDSIGHT else ""
            bold = "**" if flat[0]["headline"] else ""
            out[key] = Row(f"{bold}{flat[0]['title']}{bold}{mark}", flat)
    return out


def flattened(run: dict[str, Any], key: str) -> dict[str, Any]:
    result = run["result"]
    shared = {k: v for k, v in result.items() if k != "variants"}
    return {**shared, **result["variants"][key], "seed": run["seed"], "key": key}


def headline_rows(rows: dict[str, Row]) -> dict[str, Row]:
    """The variant that stands for each method, by method."""
    return {row.runs[0]["method"]: row for row in rows.values() if row.runs[0]["headline"]}


# -- novelty scores --------------------------------------------------------------------------------


def mean_auroc(run: Figures, score: str, measure: str = "auroc") -> float | None:
    values = [sets[score][measure] for sets in run["outside"].values() if score in sets]
    return statistics.fmean(values) if values else None


def score_of(row: Row) -> str:
    """The score that stands for a row: the one declared, or the best in hindsight."""
    if declared := row.runs[0]["declared"]:
        return str(declared)
    scores = list(next(iter(row.runs[0]["outside"].values())))
    means = {s: statistics.fmean(mean_auroc(r, s) or 0.0 for r in row.runs) for s in scores}
    return max(means, key=lambda s: means[s])


def detection_columns(rows: Sequence[Row], measure: str, better: int) -> list[Column]:
    chosen = {row.runs[0]["key"]: score_of(row) for row in rows}
    sets = list(rows[0].runs[0]["outside"])

    def get(name: str | None) -> Any:
        def value(run: Figures) -> float | None:
            score = chosen[run["key"]]
            if name is None:
                return mean_auroc(run, score, measure)
            return float(run["outside"][name][score][measure])

        return value

    return [
        Column("score", lambda run: chosen[run["key"]].replace("_", " ")),
        *(Column(name, get(name), better) for name in sets),
        Column("mean", get(None), better),
    ]


# -- the tables ------------------------------------------------------------------------------------

CLEAN = (
    Column("training accuracy lost, points", lambda run: lost(run), 0, 2),
    Column("accuracy", at("test", "accuracy"), 1, 4),
    Column("confidence", at("test", "confidence"), 0, 3),
    Column("NLL", at("test", "nll"), -1, 4),
    Column("Brier", at("test", "brier"), -1, 4),
    Column("ECE", at("test", "ece"), -1, 4),
    Column("ECE above chance", at("test", "ece_excess"), -1, 4),
    Column("MCE", at("test", "mce"), -1, 3),
    Column("AURC", at("test", "aurc"), -1, 4),
)


def lost(run: Figures) -> float:
    """Percentage points of training accuracy that the method loses against the point estimate."""
    return 100.0 * float(run["point_train_accuracy"] - run["train"]["accuracy"])


def shift_mean(run: Figures, measure: str, kind: str | None = None) -> float:
    """Mean over strengths of one shift, or over all shifts, each counting alike."""
    kinds = [kind] if kind else list(run["shifted"])
    means = [
        statistics.fmean(found[measure] for found in run["shifted"][k].values()) for k in kinds
    ]
    return statistics.fmean(means)


def shift_columns(run: Figures) -> list[Column]:
    def get(measure: str, kind: str | None) -> Any:
        return lambda figures: shift_mean(figures, measure, kind)

    columns = [
        Column(f"{kind} {label}", get(measure, kind), -1)
        for kind in run["shifted"]
        for measure, label in (("nll", "NLL"), ("ece", "ECE"))
    ]
    return [
        *columns,
        Column("all: accuracy", get("accuracy", None), 1),
        Column("all: NLL", get("nll", None), -1),
        Column("all: ECE", get("ece", None), -1),
    ]


SCORES = ("entropy", "mutual_information", "variance", "information", "energy")
BY_SCORE = [
    Column(score.replace("_", " "), lambda run, s=score: mean_auroc(run, s), 1)  # type: ignore[misc]
    for score in SCORES
]


def residual(run: Figures) -> float | None:
    """What a projection left along the rows; a Laplace posterior is meant to leave something there."""
    if not run["method"].startswith("null_"):
        return None
    return float(run["details"]["certificate"]["residual"])


COST = (
    Column("chosen on validation data", lambda run: run["tuned"]),
    Column("value", at("value"), 0, 3),
    Column("fit s", at("seconds", "fit"), -1, 1),
    Column("tuning s", at("seconds", "tune"), 0, 1),
    Column("1000 predictions s", at("seconds_per_1000"), -1, 2),
    Column("peak of the fit, MB", lambda run: run["peaks"]["fit"] / 2**20, -1, 0),
    Column("peak of predicting, MB", lambda run: run["peaks"]["predictions"] / 2**20, -1, 0),
    Column("relative residual", lambda run: residual(run), 0, -1),
)


class MixedNetworks(ValueError):
    """Methods of one seed were measured around different networks; no table may put them side by side."""


def require_one_network(name: str, setting: str, runs: Sequence[dict[str, Any]]) -> None:
    """Raise :class:`MixedNetworks` where pieces of one seed come from networks of which one was trained anew."""
    for seed in sorted({run["seed"] for run in runs}):
        found: dict[str, list[str]] = {}
        for run in runs:
            if run["seed"] == seed:
                found.setdefault(run["result"].get("network", "unknown"), []).append(run["method"])
        if len(found) > 1:
            listed = "; ".join(f"{network}: {', '.join(names)}" for network, names in found.items())
            raise MixedNetworks(
                f"seed {seed} of {name} was measured around {len(found)} different networks ({listed}). Measure all of "
                f"it again: `python -m experiments {name} --setting {setting} --no-resume`."
            )


def classification(
    name: str,
    title: str,
    words: str,
    setting: str,
    scale: Scale,
    runs: list[dict[str, Any]],
    folder: Path,
) -> None:
    """``<name>.md``, ``.json`` and figures in ``folder``; nothing where there are no runs."""
    if not runs:
        return
    require_one_network(name, setting, runs)
    page = Page(name, f"{title} ({setting})")
    rows = variant_rows(runs)
    every = list(rows.values())
    page.say(words, about(runs, scale, f"python -m experiments {name} --setting {setting}"))
    page.table("Clean test data", every, CLEAN, first="method")
    page.table(
        "Out of distribution: AUROC",
        every,
        detection_columns(every, "auroc", 1),
        OURS_DECLARED,
        "method",
    )
    page.table(
        "Out of distribution: FPR95",
        every,
        detection_columns(every, "fpr95", -1),
        "The share of test images flagged at the threshold that flags 95 % of the others; same scores.",
        "method",
    )
    page.table(
        "Out of distribution: mean AUROC by score",
        every,
        BY_SCORE,
        "Every score that a method has, mean over the sets.",
        "method",
    )
    page.table(
        "Under shift",
        every,
        shift_columns(every[0].runs[0]),
        "Mean over strengths; `all`: over the four shifts, each counting alike.",
        "method",
    )
    page.table("Cost, and what was tuned", every, COST, TUNING, "method")
    draw(name, rows, page, folder)
    page.write(folder, runs)


TUNING = (
    "One rule for all: the value of least validation NLL on a path of whole decades, then thirds of a decade around "
    "the best (temperatures: eighths, then twenty-fourths; full Laplace, where each value is a fit: decades, then "
    "halves). Fit seconds hold the training of further networks, not that of the one that all share. Each method ran "
    "in a process of its own; its peaks hold the packages and the data, about what the point estimate's are. "
    "Predicting: everything that these tables need, 100 inputs at a time."
)


def about(runs: Sequence[dict[str, Any]], scale: Scale, command: str) -> str:
    """Seeds, sizes and the machine, from the runs."""
    seeds = sorted({run["seed"] for run in runs})
    first = runs[0]
    where = first["environment"]
    commits = sorted({run["environment"]["commit"] for run in runs})
    recipe = scale.recipe
    spread = f"{len(seeds)} seeds (mean ± standard error)" if len(seeds) > 1 else "One seed"
    return (
        f"{spread}, {first['result']['parameters']:,} weights, "
        f"{first['result']['train']:,} training images, {scale.validation:,} for validation, {scale.samples} samples. "
        f"AdamW, {recipe.epochs} epochs, batches of {recipe.batch_size}, learning rate {recipe.learning_rate:g}, "
        f"cosine schedule, weight decay {recipe.weight_decay:g}. ECE and MCE: 15 equal bins of the top class; "
        "above chance: less the mean ECE of labels drawn from the same probabilities. In bold: "
        "the best of a column, and the variant that stands for each method; †: more than one network; ‡: a setting "
        "chosen in hindsight, on these images. " + provenance(where, ", ".join(commits), command)
    )


def draw(name: str, rows: dict[str, Row], page: Page, folder: Path) -> None:
    heads = headline_rows(rows)
    order = [m for m in heads if m != "null_predictions"]
    order += [m for m in heads if m == "null_predictions"]
    plain_titles = {m: heads[m].title.replace("**", "") for m in order}
    figures.shift_curves(
        folder / f"{name}-shift.png",
        {m: (plain_titles[m], list(heads[m].runs)) for m in order},
    )
    page.picture(f"{name}-shift.png", "Accuracy, NLL and ECE under shift")
    sets = list(next(iter(heads.values())).runs[0]["outside"])
    scores = {m: score_of(heads[m]) for m in order}
    values: dict[str, tuple[str, list[list[float | None]]]] = {
        m: (
            plain_titles[m],
            [[run["outside"][s][scores[m]]["auroc"] for run in heads[m].runs] for s in sets],
        )
        for m in order
    }
    lowest = min(v for _, groups in values.values() for g in groups for v in g if v is not None)
    figures.bars(
        folder / f"{name}-auroc.png",
        sets,
        values,
        "AUROC",
        bottom=min(0.5, lowest - 0.02),
        line=0.5,
    )
    page.picture(f"{name}-auroc.png", "AUROC out of distribution")
