"""The tables: judging problems alone, one row a score family, its setting chosen on the tuning problems."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.detection.base import SCORES
from experiments.detection.families import FAMILIES, JUDGING
from experiments.detection.rivals import InputNeighbour
from experiments.detection.running import NAME, both, by_family, representatives
from experiments.tables import Column, Figures, Page, Row, provenances
from nullbayes.report.words import SOLVED

OURS = ("null space", "layer null space", "layer null space, neighbours")


def write(setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
    results = [run["result"] for run in runs]
    chosen = representatives(results)
    judged = by_family([r for r in results if r["role"] == JUDGING])
    page = Page(NAME, f"Which score finds what ({setting})")
    page.say(
        "AUROC of each set against test inputs; mean ± standard error over judging problems (and seeds). All scores "
        "need one trained network and its training data. Each score family stands with the setting that was best on "
        "the *tuning* problems, which appear in no table but the last. * marks a set that a nearest neighbour in the "
        f"*inputs* solves (mean AUROC over {SOLVED}): it needs no network and counts for nothing; `counted` is the "
        "mean of the sets that remain.",
        seeds_line(judged),
        provenances(runs, f"python -m experiments {NAME} --setting {setting}"),
    )
    partly = {family: fewer(family, found, chosen) for family, found in judged.items()}
    words = " ".join((OVERVIEW, *(w for some in partly.values() for w in some)))
    page.table("Overview", *overview(judged, chosen), words, "score")
    for family, found in judged.items():
        page.table(
            family.capitalize(),
            rows_of(found, chosen),
            columns_of(found),
            " ".join((words_of(family, found, results), *partly[family])),
            "score",
        )
    tuning = [r for r in results if r["role"] != JUDGING]
    if tuning:
        # Problems of their own, with seeds of their own.
        words = f"{TUNING}\n\n{seeds_line(by_family(tuning))}"
        page.table("Every setting, on the tuning problems", *every_setting(tuning), words, "score")
    page.write(folder, runs)


REGRESSIONS = ("gaps",)
RANK, RANKED_CLASSES = "rank", "rank, classes"
OVERVIEW = (
    "Mean over the counted sets of a family; `rank`: mean rank over families, of the scores that all of them have "
    "figures for; `rank, classes`: over the families of classifications, which more scores have figures "
    "for. A dash: every set is solved by the inputs; or the score needs class probabilities, for a regression."
)
TUNING = "Near and far sets count alike. Settings were chosen by the mean over families."


def counts(found: Sequence[dict[str, Any]]) -> list[int]:
    """Seeds of each problem, fewest first."""
    members = [r["member"] for r in found]
    return sorted(members.count(member) for member in set(members))


def seeds_of(found: Sequence[dict[str, Any]]) -> str:
    few, many = counts(found)[0], counts(found)[-1]
    seeds = f"{few} to {many} seeds" if few < many else f"{many} seed{'s' * (many > 1)}"
    problems = len(counts(found))
    return f"{seeds} of " + (f"each of {problems} problems" if problems > 1 else "one problem")


def seeds_line(found: dict[str, list[dict[str, Any]]]) -> str:
    """The documentation copies it to below the tables."""
    return f"Seeds: {'; '.join(f'{family}, {seeds_of(some)}' for family, some in found.items())}."


def fewer(family: str, found: Sequence[dict[str, Any]], chosen: dict[str, str]) -> list[str]:
    """A sentence on the scores that have figures on some of these networks only, where there are any."""
    by_count: dict[str, list[str]] = {}
    for title, name in chosen.items():
        runs = [r for r in found if name in r["scores"]]
        if 0 < len(runs) < len(found):
            by_count.setdefault(seeds_of(runs), []).append(title)
    parts = [f"{', '.join(names)}, {seeds}" for seeds, names in by_count.items()]
    return [f"On fewer networks of {family}: {'; '.join(parts)}."] if parts else []


def words_of(family: str, found: Sequence[dict[str, Any]], results: Sequence[Any]) -> str:
    tuning = {r["member"] for r in results if r["family"] == family and r["role"] != JUDGING}
    quality = [r["accuracy"] for r in found]
    what = "R²" if family == "gaps" else "accuracy"
    return (
        f"{FAMILIES[family].words}. Judged: {seeds_of(found)}; tuning problems: {len(tuning)}; "
        f"{statistics.fmean(r['train'] for r in found):,.0f} training examples, "
        f"{statistics.fmean(r['parameters'] for r in found):,.0f} weights; mean test {what} "
        f"{statistics.fmean(quality):.3f}, lowest {min(quality):.3f}."
    )


def auroc(distance: str, name: str) -> Callable[[Figures], float | None]:
    def value(run: Figures) -> float | None:
        sets = run.get(distance, {})
        return float(sets[name]["auroc"]) if name in sets else None

    return value


def set_names(found: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """By distance, what any problem has."""
    out: dict[str, list[str]] = {"near": [], "far": []}
    for result in found:
        sets = result["scores"][InputNeighbour.name]
        for distance, names in out.items():
            names += [n for n in sets[distance] if n not in names]
    return out


def solved(found: Sequence[dict[str, Any]]) -> set[tuple[str, str]]:
    """Sets that the nearest input solves."""
    out = set()
    for distance, names in set_names(found).items():
        for name in names:
            values = [auroc(distance, name)(r["scores"][InputNeighbour.name]) for r in found]
            if statistics.fmean(v for v in values if v is not None) > SOLVED:
                out.add((distance, name))
    return out


def counted(found: Sequence[dict[str, Any]]) -> Callable[[Figures], float | None]:
    """Mean AUROC of one score on one problem over the sets that count."""
    left_out = solved(found)

    def value(run: Figures) -> float | None:
        values = [
            sets["auroc"]
            for distance in ("near", "far")
            for name, sets in run.get(distance, {}).items()
            if (distance, name) not in left_out
        ]
        return statistics.fmean(values) if values else None

    return value


def rows_of(found: Sequence[dict[str, Any]], chosen: dict[str, str]) -> list[Row]:
    rows = []
    for family, name in chosen.items():
        runs = [r["scores"][name] for r in found if name in r["scores"]]
        if runs and any("error" not in run for run in runs):
            bold = "**" if family in OURS else ""
            rows.append(Row(f"{bold}{family}{bold}", runs))
    return rows


def columns_of(found: Sequence[dict[str, Any]]) -> list[Column]:
    left_out = solved(found)
    columns = [
        Column(f"{name}{' *' * ((distance, name) in left_out)}", auroc(distance, name), 1)
        for distance, names in set_names(found).items()
        for name in names
    ]
    return [
        *columns,
        Column("counted", counted(found), 1),
        Column("fit s", lambda run: run.get("fit_seconds"), 0, 1),
        Column("1000 inputs s", lambda run: run.get("seconds_per_1000"), 0, 2),
    ]


def overview(
    judged: dict[str, list[dict[str, Any]]], chosen: dict[str, str]
) -> tuple[list[Row], list[Column]]:
    """One row a score family, one column a family of problems."""
    getters = {problems: counted(found) for problems, found in judged.items()}
    values = {
        family: [
            {"problems": problems, "value": getters[problems](r["scores"][name])}
            for problems, found in judged.items()
            for r in found
            if name in r["scores"]
        ]
        for family, name in chosen.items()
    }
    means = {
        family: {
            problems: statistics.fmean(known)
            for problems in judged
            if (
                known := [
                    v["value"]
                    for v in found
                    if v["problems"] == problems and v["value"] is not None
                ]
            )
        }
        for family, found in values.items()
    }
    # A family of which every set is solved by the inputs ranks nobody.
    there = [p for p in judged if any(p in found for found in means.values())]
    ranks = {
        RANK: ranked(means, there),
        RANKED_CLASSES: ranked(means, [p for p in there if p not in REGRESSIONS]),
    }
    rows = []
    for family, found in values.items():
        bold = "**" if family in OURS else ""
        places = [{"problems": title, "value": r.get(family)} for title, r in ranks.items()]
        rows.append(Row(f"{bold}{family}{bold}", [*found, *places]))
    one = [p for p, found in judged.items() if counts(found)[-1] == 1]
    columns = [
        Column(
            problems + " (1 seed)" * (problems in one),
            _only(problems),
            -1 if problems in ranks else 1,
            1 if problems in ranks else 3,
        )
        for problems in (*judged, *ranks)
    ]
    return rows, columns


def _only(problems: str) -> Callable[[Figures], float | None]:
    return lambda run: run["value"] if run["problems"] == problems else None


def ranked(means: dict[str, dict[str, float]], problems: Sequence[str]) -> dict[str, float]:
    """Mean rank over families of problems; a score is ranked where it has figures, by share of the scores there."""
    out: dict[str, list[float]] = {}
    for problem in problems:
        present = {family: m[problem] for family, m in means.items() if problem in m}
        order = sorted(present, key=lambda f: -present[f])
        for position, family in enumerate(order):
            out.setdefault(family, []).append(1 + position)
    return {family: statistics.fmean(v) for family, v in out.items() if len(v) == len(problems)}


def every_setting(tuning: Sequence[dict[str, Any]]) -> tuple[list[Row], list[Column]]:
    families = list(dict.fromkeys(r["family"] for r in tuning))
    rows = [
        Row(
            name,
            [
                {"problems": r["family"], "value": both(r, name)}
                for r in tuning
                if name in r["scores"]
            ],
        )
        for name in SCORES
    ]
    rows = [row for row in rows if row.runs]
    return rows, [Column(family, _only(family), 1) for family in families]
