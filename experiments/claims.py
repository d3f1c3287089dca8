"""Each claim against the stored figures, task by task and seed by seed: held or failed, computed.

    python -m experiments --report --setting small      # writes claims.md and claims.json too

What is judged is the null-space posterior with ``preserve="predictions"``: by the evidence (what a user gets who does
nothing) and calibrated on validation data (what the rival methods get too).
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.reports import lost, mean_auroc, score_of, shift_mean, variant_rows
from experiments.store import collected
from experiments.tables import Row
from nullbayes.common.writing import write_json, write_text

CLASSIFICATION = ("digits_heldout", "fashion_lenet", "fashion_resnet", "swin")
JUDGED = {"by evidence": "null_predictions_evidence", "calibrated": "null_predictions"}
# Of a network whose weights leave room for few of its data also what a certificate then advises: fewer weights.
ADVISED = {
    "swin": {
        "swin, last twentieth": {"by evidence": "null_part_evidence", "calibrated": "null_part"}
    }
}
POINT, ENSEMBLES, OURS = "point", ("ensemble", "ensemble_tuned"), "null_"
# What counts as equal. Accuracies in points, NLL in nats.
EQUAL_TRAINING, WITHIN_TEST, NOISE = 0.1, 0.2, 1e-3


@dataclass(frozen=True)
class Finding:
    """One claim on one task from one seed: ``margin`` is how much better than asked for, negative if worse."""

    task: str
    seed: int
    variant: str
    claim: str
    margin: float
    held: bool
    words: str


@dataclass(frozen=True)
class Bench:
    """The figures of one seed: by variant key, and the score that stands for each row."""

    task: str
    seed: int
    runs: Mapping[str, Mapping[str, Any]]
    scores: Mapping[str, str]

    def point(self) -> Mapping[str, Any]:
        return self.runs[POINT]

    def auroc(self, key: str) -> float:
        value = mean_auroc(self.runs[key], self.scores[key])
        assert value is not None
        return value

    def rivals(self) -> list[str]:
        return [k for k, r in self.runs.items() if r["single_network"] and not k.startswith(OURS)]


Claim = Callable[[Bench, str], tuple[float, bool, str]]


def training_equal(bench: Bench, key: str) -> tuple[float, bool, str]:
    gone = lost(bench.runs[key])
    return -gone, abs(gone) <= EQUAL_TRAINING, f"{gone:+.3f} points lost"


def test_accuracy(bench: Bench, key: str) -> tuple[float, bool, str]:
    ours, point = (r["test"]["accuracy"] for r in (bench.runs[key], bench.point()))
    change = 100 * (ours - point)
    return change, change >= -WITHIN_TEST - 1e-9, f"{100 * point:.2f} → {100 * ours:.2f} %"


def no_worse(measure: str) -> Claim:
    def claim(bench: Bench, key: str) -> tuple[float, bool, str]:
        ours, point = (r["test"][measure] for r in (bench.runs[key], bench.point()))
        return point - ours, ours <= point + NOISE, f"{point:.4f} → {ours:.4f}"

    return claim


def better_shifted(measure: str) -> Claim:
    def claim(bench: Bench, key: str) -> tuple[float, bool, str]:
        ours, point = (shift_mean(r, measure) for r in (bench.runs[key], bench.point()))
        return point - ours, ours < point, f"{point:.4f} → {ours:.4f}"

    return claim


def best_detection(bench: Bench, key: str) -> tuple[float, bool, str]:
    ours = bench.auroc(key)
    best = max(bench.rivals(), key=bench.auroc)
    theirs = bench.auroc(best)
    return (
        ours - theirs,
        ours >= theirs,
        f"{ours:.3f}; next {bench.runs[best]['title']} {theirs:.3f}",
    )


def best_everywhere(bench: Bench, key: str) -> tuple[float, bool, str]:
    """Set by set, against whichever single-network row is best on that very set."""
    behind, worst = [], float("inf")
    for name, found in bench.runs[key]["outside"].items():
        ours = found[bench.scores[key]]["auroc"]
        rival = max(
            bench.rivals(), key=lambda k: bench.runs[k]["outside"][name][bench.scores[k]]["auroc"]
        )
        theirs = bench.runs[rival]["outside"][name][bench.scores[rival]]["auroc"]
        worst = min(worst, ours - theirs)
        if ours < theirs:
            behind.append(f"{name} {ours:.3f} < {bench.runs[rival]['title']} {theirs:.3f}")
    return worst, not behind, "; ".join(behind) or "every set"


def ensemble_detection(bench: Bench, key: str) -> tuple[float, bool, str]:
    ours, theirs = bench.auroc(key), max(bench.auroc(k) for k in ENSEMBLES if k in bench.runs)
    return ours - theirs, ours >= theirs, f"{ours:.3f} against {theirs:.3f}"


def ensemble_nll(bench: Bench, key: str) -> tuple[float, bool, str]:
    ours = bench.runs[key]["test"]["nll"]
    theirs = min(bench.runs[k]["test"]["nll"] for k in ENSEMBLES if k in bench.runs)
    return theirs - ours, ours <= theirs + NOISE, f"{ours:.4f} against {theirs:.4f}"


CLAIMS: dict[str, Claim] = {
    f"training accuracy equal (within {EQUAL_TRAINING} points)": training_equal,
    f"test accuracy at most {WITHIN_TEST} points lower": test_accuracy,
    "NLL no worse than the point estimate": no_worse("nll"),
    "ECE no worse than the point estimate": no_worse("ece"),
    "ECE above chance no worse": no_worse("ece_excess"),
    "NLL under shift better": better_shifted("nll"),
    "ECE under shift better": better_shifted("ece"),
    "mean AUROC best of these methods around one network": best_detection,
    "AUROC best of them on every set": best_everywhere,
    "mean AUROC no worse than the ensemble's": ensemble_detection,
    "NLL no worse than the ensemble's": ensemble_nll,
}
NEEDS_ENSEMBLE = {"mean AUROC no worse than the ensemble's", "NLL no worse than the ensemble's"}


def benches(task: str, runs: Sequence[dict[str, Any]]) -> list[Bench]:
    """One for each seed that has the point estimate and the posterior."""
    rows: dict[str, Row] = variant_rows(runs)
    scores = {key: score_of(row) for key, row in rows.items()}
    seeds: dict[int, dict[str, Mapping[str, Any]]] = {}
    for key, row in rows.items():
        for figures in row.runs:
            seeds.setdefault(figures["seed"], {})[key] = figures
    wanted = {POINT, *JUDGED.values()}
    return [
        Bench(task, s, found, scores) for s, found in sorted(seeds.items()) if wanted <= set(found)
    ]


def check(task: str, runs: Sequence[dict[str, Any]]) -> list[Finding]:
    """All claims on one classification task."""
    found = benches(task, runs)
    return [
        finding
        for label, keys in {task: JUDGED, **ADVISED.get(task, {})}.items()
        for bench in found
        for variant, key in keys.items()
        if key in bench.runs
        for finding in judged(bench, label, variant, key)
    ]


def judged(bench: Bench, label: str, variant: str, key: str) -> list[Finding]:
    """All claims on one variant of one seed; those against an ensemble only where there is one."""
    out = []
    for name, claim in CLAIMS.items():
        if name in NEEDS_ENSEMBLE and not set(ENSEMBLES) & set(bench.runs):
            continue
        margin, held, words = claim(bench, key)
        out.append(Finding(label, bench.seed, variant, name, margin, held, words))
    return out


# -- the page --------------------------------------------------------------------------------------


def write(setting: str, folder: Path) -> None:
    """``claims.md`` and ``claims.json`` from the runs committed beside the tables; nothing where there are none."""
    findings: list[Finding] = []
    for task in CLASSIFICATION:
        findings += check(task, collected(setting, task, folder.parent))
    sections = []
    for name in ("tabular", "underfitting"):  # these judge themselves
        runs = collected(setting, name, folder.parent)
        if runs:
            module = importlib.import_module(f"experiments.{name}")
            more, lines = module.claims(runs)
            findings += more
            sections.append(lines)
    if not findings:
        return
    lines = [
        f"# Claims ({setting})",
        "",
        "Computed from the figures beside this file; `python -m experiments --report` writes it again. Judged is the",
        "null-space posterior that preserves predictions, by the evidence (no validation data) and calibrated; of",
        'Swin-T also the one of fewer weights, as a certificate advises there. "No worse"',
        f"allows {NOISE:g} (nats, or ECE). In AUROC every rival has its best score in hindsight, and every variant of",
        "it counts; ours is the novelty score; scores of features and inputs are not among them (`detection.md`).",
        "Training accuracy of Swin-T is that of the 256 images that its posterior preserves. Cells: seeds on which the",
        "claim held, and the mean margin ± its standard error (positive: better than asked for).",
        "",
        *summary(findings),
        "",
        *[line for section in sections for line in section],
        *failures(findings),
    ]
    write_text(folder / "claims.md", "\n".join(lines).rstrip() + "\n")
    write_json(folder / "claims.json", {"findings": [vars(f) for f in findings]})


def summary(findings: Sequence[Finding]) -> list[str]:
    tasks = list(dict.fromkeys(f.task for f in findings))
    names = list(dict.fromkeys(f.claim for f in findings))
    lines = []
    for variant in dict.fromkeys(f.variant for f in findings):
        lines += [
            f"## {variant[0].upper()}{variant[1:]}",
            "",
            "| claim | " + " | ".join(tasks) + " |",
            "|---" * (len(tasks) + 1) + "|",
        ]
        for name in names:
            cells = []
            for task in tasks:
                some = [
                    f for f in findings if (f.task, f.variant, f.claim) == (task, variant, name)
                ]
                cells.append(verdict(some))
            if any(cell != "–" for cell in cells):
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def verdict(found: Sequence[Finding]) -> str:
    if not found:
        return "–"
    held = sum(f.held for f in found)
    word = "held" if held == len(found) else "**failed**" if not held else "**mixed**"
    margins = [f.margin for f in found]
    margin = f"{statistics.fmean(margins):+.3f}"
    if len(found) > 1:
        margin += f" ± {statistics.stdev(margins) / len(found) ** 0.5:.3f}"
    return f"{word} {held}/{len(found)} ({margin})"


def failures(findings: Sequence[Finding]) -> list[str]:
    lines = ["## Where it failed", ""]
    failed = [f for f in findings if not f.held]
    if not failed:
        return [*lines, "Nowhere."]
    lines += ["| task | seed | posterior | claim | found |", "|---|---|---|---|---|"]
    lines += [f"| {f.task} | {f.seed} | {f.variant} | {f.claim} | {f.words} |" for f in failed]
    return lines
