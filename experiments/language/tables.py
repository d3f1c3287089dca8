"""``language.md``: predictions, scores, the regime of samples, the causal model, and what it costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.detection.base import SCORES
from experiments.language.encoder import WAYS
from experiments.language.texts import FAR, JUDGING, NEAR, TUNING
from experiments.tables import Column, Page, Row, at

WORDS = (
    "A sentence encoder with 22.6 million weights (MiniLM, six layers, width 384), fine-tuned on docstrings by topic "
    "(six classes). Near sets: docstrings of other topics, and messages of programs in English. Far sets: such "
    "messages in other languages. Settings of rivals (k of KNN, directions of ViM) and nothing else are chosen on the "
    "sets for tuning: {tuning}. Temperatures and prior precisions marked as tuned are chosen on validation texts of "
    "the six classes. † trains more networks than one."
)
FOLDS = {"LoRA": "LoRA, r = 8", "full": "All weights fine-tuned"}
QUALITY = (
    ("accuracy", "accuracy", 1), ("nll", "NLL", -1), ("ece", "ECE", -1), ("joint_nll", "joint NLL", -1),
)  # fmt: skip
ORDER = (
    "point", "point_temperature", "dropout", "dropout_temperature", "ensemble", "ensemble_temperature",
    "laplace_last", "laplace_kron", "laplace", "laplace_tempered", "laplace_temperature",
    "null", "null_temperature", "null_tuned", "null_part", "null_part_temperature", "null_part_tuned", "layers",
    "layers_tuned",
)  # fmt: skip
#: Rows of the library's that stand in the table of scores, with what they are called there.
OWN = ("null", "null_part", "layers")
OTHERS = ("dropout", "ensemble", "laplace_last", "laplace_kron", "laplace")
NO_NETWORK = ("pretrained", "words")

Run = Mapping[str, Any]


def write(setting: str, runs: Sequence[dict[str, Any]], folder: Path) -> None:
    page = Page("language", f"Language models ({setting})")
    tuning = ", ".join(n for n, (role, _) in {**NEAR, **FAR}.items() if role == TUNING)
    page.say(WORDS.format(tuning=tuning), _provenance(runs))
    for way in reversed(WAYS):
        found = by_seed(runs, way)
        if not found:
            continue
        predictions(page, way, found)
        scores(page, way, found)
    regimes(page, runs)
    asked(page, runs)
    costs(page, runs)
    failures(page, runs)
    page.write(folder, runs)


def _provenance(runs: Sequence[Run]) -> str:
    devices = sorted({r["result"]["device"] for r in runs})
    seeds = len({r["seed"] for r in runs})
    return f"{seeds} seed{'s' * (seeds > 1)}, mean ± standard error. On: {', '.join(devices)}."


def by_seed(runs: Sequence[Run], way: str) -> dict[int, dict[str, Any]]:
    """All rows of one way of fine-tuning, by seed."""
    out: dict[int, dict[str, Any]] = {}
    for run in runs:
        if run["result"]["way"] == way:
            out.setdefault(run["seed"], {}).update(run["result"]["rows"])
    return {seed: rows for seed, rows in sorted(out.items()) if rows}


def rows_of(found: Mapping[int, Mapping[str, Any]], keys: Sequence[str]) -> Iterator[Row]:
    """One row for each method that any seed has."""
    for key in keys:
        here = [standing(key, rows[key]) for rows in found.values() if key in rows]
        if here:
            title = here[0]["title"]
            yield Row(f"**{title}**" if key.startswith(("null", "layers")) else title, here)


def standing(key: str, row: Run) -> Run:
    """With the score that stands for it: what is not the library's and predicts is judged by its entropy."""
    own = key.startswith(("null", "layers"))
    samples = row["declared"] in ("mutual_information", "variance")
    return {**row, "declared": "entropy"} if samples and not own else row


def mean(row: Run, distance: str, role: str = JUDGING, score: str | None = None) -> float | None:
    """Mean AUROC of a row's declared score over the sets at one distance."""
    found = row["auroc"].get(score or row["declared"], {}).get(role, {}).get(distance)
    return statistics.fmean(found.values()) if found else None


def _means() -> list[Column]:
    return [
        Column(f"AUROC {distance}", lambda row, d=distance: mean(row, d), 1)  # type: ignore[misc]
        for distance in ("near", "far")
    ]


def predictions(page: Page, way: str, found: Mapping[int, Any]) -> None:
    columns = [Column(title, at("quality", key), better) for key, title, better in QUALITY]
    page.table(
        f"{FOLDS[way]}: predictions",
        list(rows_of(found, ORDER)),
        [*columns, *_means()],
        "AUROC by the score that stands for each: the library's default novelty (of its tuned posteriors: variance), "
        "the entropy of the mean prediction for all others. Joint NLL: of ten labels, nats.",
        "method",
    )


def representatives(found: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Of each family of scores the setting with the best mean over the tuning sets, near and far alike."""
    best: dict[str, tuple[float, str]] = {}
    for name, score in SCORES.items():
        here = [rows[name] for rows in found.values() if name in rows]
        if here:
            means = [mean(row, d, TUNING) or 0.0 for row in here for d in ("near", "far")]
            best[score.family] = max(
                best.get(score.family, (0.0, "")), (statistics.fmean(means), name)
            )
    return [name for _, name in best.values()]


def scores(page: Page, way: str, found: Mapping[int, Any]) -> None:
    sets = [
        (distance, name)
        for distance, every in (("near", NEAR), ("far", FAR))
        for name, (role, _) in every.items()
        if role == JUDGING
    ]
    columns = [
        Column(name, lambda row, d=d, n=name: _one(row, d, n), 1)  # type: ignore[misc]
        for d, name in sets
    ]
    keys = [*OWN, *representatives(found), *OTHERS, *NO_NETWORK]
    page.table(
        f"{FOLDS[way]}: scores",
        list(rows_of(found, keys)),
        [*_means(), *columns],
        "AUROC against test texts. The last two rows need no fine-tuned network.",
        "score",
    )


def _one(row: Run, distance: str, name: str) -> float | None:
    value: float | None = at("auroc", row["declared"], JUDGING, distance, name)(row)  # type: ignore[assignment]
    return value


# -- the regime of samples -----------------------------------------------------------------------

PRIORS = {
    "evidence": "the evidence's",
    "bounded": "bounded, linearised (the library's)",
    "bounded, sampled networks": "bounded, sampled networks",
}


def regimes(page: Page, runs: Sequence[Run]) -> None:
    """At the evidence's prior precision and at those of the bound: linearised and sampled."""
    rows = []
    for way in reversed(WAYS):
        found = by_seed(runs, way)
        for key, what in (("null", ""), ("null_part", ", last twentieth")):
            here = [rows[key]["details"]["regime"] for rows in found.values() if key in rows]
            for prior, words in PRIORS.items():
                made = [{**each, "here": each[prior]} for each in here if prior in each]
                if made:
                    rows.append(Row(f"{way}{what}: {words}", made))
    if not rows:
        return
    columns = [
        Column("α", at("here", "prior_precision"), 0, -1),
        Column("‖Δ‖ / ‖θ‖", at("here", "length"), 0, 2),
        Column("√(null / rank)", at("expected"), 0, 2),
    ]
    for method in ("linearised", "sampled"):
        columns += [
            Column(f"{method}: training divergence", at("here", method, "divergence"), 0, 4),
            Column(f"{method}: accuracy", at("here", method, "accuracy"), 0),
            Column(f"{method}: NLL", at("here", method, "nll"), 0),
            Column(f"{method}: ECE", at("here", method, "ece"), 0),
        ]
    page.table(
        "The prior of the evidence and the bound",
        rows,
        columns,
        "‖Δ‖: mean length of a sample's change; beside it what the evidence predicts, the root of unconstrained over "
        "determined directions. Divergence: mean Kullback-Leibler divergence of one sample's prediction from the "
        "network's on training texts, nats. Accuracy, NLL and ECE: on test texts.",
        "prior precision",
    )


# -- the causal model ----------------------------------------------------------------------------


def asked(page: Page, runs: Sequence[Run]) -> None:
    """One of six answers, and free text."""
    for group, title, keys in (
        (
            "choices",
            "A causal model that names the topic",
            (*ORDER[:6], "null", "null_tuned"),
        ),
        ("free text", "A causal model of free text", ("point", "null_loss", "null_token")),
    ):
        own = [r for r in runs if r["result"]["group"].partition(",")[0] == group]
        found = by_seed(own, "GPT-2")
        if not found:
            continue
        if group == "choices":
            columns = [Column(name, at("quality", key), b) for key, name, b in QUALITY]
        else:
            columns = [
                Column("NLL by token", at("quality", "nll"), -1),
                Column(
                    "training: change of a text", at("quality", "training change of a text"), 0, -1
                ),
                Column("of a token", at("quality", "training change of a token"), 0, -1),
                Column("left out, nats", at("details", "left_out_divergence"), 0, 4),
            ]
        weights = own[0]["result"]["weights"]
        page.table(
            title,
            list(rows_of(found, keys)),
            [*columns, *_means()],
            f"{weights:,} weights.",
            "method",
        )


# -- costs and failures --------------------------------------------------------------------------


def costs(page: Page, runs: Sequence[Run]) -> None:
    rows: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda r: r["seed"]):
        result = run["result"]
        rows.setdefault(f"{result['way']}: {result['group']}", []).append(result)
    columns = [
        Column("fit and tuning s", at("fit_seconds"), 0, 1),
        Column("all s", at("seconds"), 0, 1),
        Column("peak on the device GB", _gigabytes, 0, 1),
    ]
    page.table(
        "Seconds",
        [Row(name, found) for name, found in rows.items()],
        columns,
        "Of a piece with all its methods; several pieces share the device.",
        "piece",
    )


def _gigabytes(result: Run) -> float | None:
    found = result.get("peak device memory")
    return None if found is None else found / 1e9


def failures(page: Page, runs: Sequence[Run]) -> None:
    """What could not be measured, and why."""
    lines = [
        f"- {r['result']['way']}, {r['result']['group']}, seed {r['seed']}: {r['result']['error']}"
        for r in runs
        if "error" in r["result"]
    ]
    if lines:
        page.say("Not measured:", "\n".join(lines))
