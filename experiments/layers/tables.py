"""The tables: judging problems alone, one column a family; scores and settings chosen on the tuning problems."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.detection.families import JUDGING
from experiments.layers.problems import families
from experiments.layers.running import NAME
from experiments.tables import Column, Page, Row, provenances, summarise
from nullbayes.report.words import SOLVED

LAYERS, LEVERAGE, NEAREST = "layers", "layers, leverage", "nearest input"
#: Rows in order: key, title, and the score where the row is one of several with the same predictions.
SHOWN: dict[str, str] = {
    LAYERS: "**layer null space**",
    LEVERAGE: "**layer null space, leverage**",
    "layers_tuned": "**layer null space, tuned**",
    "null_predictions_evidence": "null space, by evidence",
    "null_predictions": "null space",
    "laplace_diag": "diagonal Laplace",
    "laplace_kron": "Kronecker Laplace",
    "laplace_last": "last-layer Laplace",
    "laplace_full": "full Laplace",
    "point": "network alone",
    "temperature": "temperature scaling",
    "max-softmax": "max-softmax",
    "energy": "energy",
    "Mahalanobis": "Mahalanobis",
    "KNN": "KNN",
    "ViM": "ViM",
    "DDU": "DDU",
    NEAREST: "nearest input",
    "ensemble_tuned": "five networks †",
}
SETTINGS = {
    "KNN": ("KNN, k=1", "KNN, k=10", "KNN, k=50"),
    "ViM": ("ViM, half the directions", "ViM, a quarter"),
}
OURS = {LAYERS, LEVERAGE, "layers_tuned", "layers_free"}
#: Not methods around one network.
NO_RIVALS = {*OURS, "ensemble", "ensemble_tuned", NEAREST}
PARTS = ("sizes of all layers", "direction, last layer", "energy part")

Result = dict[str, Any]
Value = Callable[[Result], float | None]


@dataclass(frozen=True)
class Measure:
    """A table: where its value is, and which way is better in a family of either kind."""

    title: str
    words: str
    keys: Mapping[str, tuple[str, int]]  # by kind
    digits: int = 3


BOTH = ("classification", "regression")
MEASURES = (
    Measure(
        "Accuracy",
        "Of test inputs; of regressions the RMSE, in deviations of the targets.",
        {"classification": ("accuracy", 1), "regression": ("rmse", -1)},
    ),
    Measure("NLL", "Nats a test input.", dict.fromkeys(BOTH, ("nll", -1))),
    Measure(
        "ECE",
        "Fifteen bins; of regressions the mean |coverage − level| of the central intervals of 10, 20, … 90 %.",
        {"classification": ("ece", -1), "regression": ("interval_error", -1)},
    ),
    Measure(
        "Joint NLL",
        "Nats a group of ten test inputs that repeats two (dyadic sampling, Osband et al. 2022): whether samples are "
        "right or wrong together. Of one network ten times its NLL. From 20 samples: few for regressions with little "
        "noise, where one group decides the mean.",
        dict.fromkeys(BOTH, ("joint_nll", -1)),
        2,
    ),
    Measure("AUROC, near sets", "", dict.fromkeys(BOTH, ("near", 1))),
    Measure("AUROC, far sets", "", dict.fromkeys(BOTH, ("far", 1))),
)
COUNTED = [Measure(w, "", dict.fromkeys(BOTH, (w, 1))) for w in ("near counted", "far counted")]


class Found:
    """Rows of all problems: choices from the tuning ones, values of the judging ones."""

    def __init__(self, runs: Sequence[dict[str, Any]]) -> None:
        results = [run["result"] | {"seed": run["seed"]} for run in runs]
        self.problems: dict[tuple[str, str, int], Result] = {}
        for result in results:
            key = result["family"], result["member"], result["seed"]
            whole = self.problems.setdefault(key, {**result, "rows": {}})
            whole["rows"].update(result["rows"])
        self.names = list(dict.fromkeys(family for family, _, _ in self.problems))

    def of(self, family: str, role: str = JUDGING) -> list[Result]:
        return [
            p for (name, _, _), p in self.problems.items() if name == family and p["role"] == role
        ]

    def kind(self, family: str) -> str:
        return str(next(p["kind"] for (name, _, _), p in self.problems.items() if name == family))

    def chosen(self, key: str, kind: str) -> tuple[str, str] | None:
        """Row and score that stand for a row of the tables: declared, or the best on the tuning problems."""
        if key in OURS:
            return (LAYERS, "leverage") if key == LEVERAGE else (key, "combined")
        options = SETTINGS.get(key, (key,))
        best: tuple[float, tuple[str, str]] | None = None
        for row in options:
            some = self._tuning(row, kind)
            declared = {p["rows"][row]["declared"] for p in some}
            if len(options) == 1 and declared and declared != {""}:
                return row, declared.pop()
            for score in dict.fromkeys(s for p in some for s in p["rows"][row]["scores"]):
                value = self._mean(some, row, score)
                if best is None or value > best[0]:
                    best = value, (row, score)
        return None if best is None else best[1]

    def _tuning(self, row: str, kind: str) -> list[Result]:
        return [
            p
            for p in self.problems.values()
            if p["role"] != JUDGING and p["kind"] == kind and has(p, row)
        ]

    @staticmethod
    def _mean(some: Sequence[Result], row: str, score: str) -> float:
        """Over families alike, of near and far alike."""
        by_family: dict[str, list[float]] = {}
        for p in some:
            sides = [auroc(p, (row, score), distance) for distance in ("near", "far")]
            by_family.setdefault(p["family"], []).append(
                statistics.fmean(s for s in sides if s is not None)
            )
        return statistics.fmean(statistics.fmean(v) for v in by_family.values())

    def value(self, key: str, what: str, kind: str) -> Value:
        """Of one row of the tables on a problem; None where it has none."""
        chosen = self.chosen(key, kind)

        def get(problem: Result) -> float | None:
            distance, _, counted = what.partition(" ")
            if distance in ("near", "far"):
                without = self.solved(problem["family"]) if counted else ()
                return None if chosen is None else auroc(problem, chosen, distance, without)
            row = LAYERS if key == LEVERAGE else key
            if not has(problem, row) or "quality" not in problem["rows"][row]:
                return None
            return float(problem["rows"][row]["quality"][what])

        return get

    def solved(self, family: str) -> list[str]:
        """Sets that the nearest training input tells apart without any network."""
        names: dict[str, list[float]] = {}
        for p in self.of(family):
            if has(p, NEAREST):
                for sets in p["rows"][NEAREST]["scores"][NEAREST].values():
                    for name, figures in sets.items():
                        names.setdefault(name, []).append(figures["auroc"])
        return [name for name, values in names.items() if statistics.fmean(values) > SOLVED]


def has(problem: Result, row: str) -> bool:
    return row in problem["rows"] and "error" not in problem["rows"][row]


def auroc(
    problem: Result, chosen: tuple[str, str], distance: str, without: Collection[str] = ()
) -> float | None:
    """Mean over the sets at one distance, but for those named."""
    row, score = chosen
    if not has(problem, row) or score not in problem["rows"][row]["scores"]:
        return None
    sets = problem["rows"][row]["scores"][score][distance]
    values = [s["auroc"] for name, s in sets.items() if name not in without]
    return statistics.fmean(values) if values else None


# -- tables ----------------------------------------------------------------------------------------


def write(setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
    found = Found(runs)
    page = Page(NAME, f"The layer null space beside its rivals ({setting})")
    page.say(
        "`nb.LayerNullSpacePosterior` on all training examples beside what else there is around one trained network, "
        "and five networks (†: five trainings). Mean ± standard error over the judging problems and seeds of a family. "
        "What is not marked *tuned* or *by evidence* or *layer* has its one setting (prior precision, temperature) "
        "from 150 validation examples; the layer null space has none unless it says so. Scores: the library's default "
        "of ours; of every other row the one score, and the setting, that was best on the *tuning* problems, which "
        "appear in no table. `NullSpacePosterior` is fitted on at most 500 examples.",
        provenances(runs, f"python -m experiments {NAME} --setting {setting}"),
    )
    page.table("Problems", *problems(found, setting), first="family")
    for measure in MEASURES:
        page.table(measure.title, *one(found, measure), measure.words, "method")
    page.table(
        "Seconds", *costs(found), "Of a fit (tuning not counted) and of 1,000 inputs.", "method"
    )
    page.table("Where it loses", *losses(found), LOSSES, "family")
    page.table("What the guarantee leaves", *left(found), LEFT, "family")
    page.table("What the score is made of", *made(found), MADE, "family")
    if failures := failed(found):
        page.say("Left out: " + "; ".join(failures) + ".")
    page.write(folder, [kept(run) for run in runs])


LOSSES = (
    "The layer null space less the best method around one network *on that measure* (whose name follows; tuned where "
    "it can be), in units of which more is better for us: NLL and ECE the other way round. Paired over problems and "
    "seeds; bold: better, or within one standard error. `tuned`: our prior precision from validation data as well. "
    f"*Counted*: without the sets that the nearest input solves (over {SOLVED}); – where these are all."
)
LEFT = (
    "Directions left: share of the prior's variance. α over its natural value: by how much a fit raised the prior "
    "precision above the one of weights as large as the trained ones. Divergence of sampled networks in nats on "
    "training data, on left-out examples, and on training data at the prior precision of least validation NLL without "
    "any bound (the guarantee allows .005). Joint NLL: of the network, as fitted, tuned within the guarantee, and "
    "without it. Means over judging problems."
)
MADE = (
    "AUROC of each part of the default score by itself: mean excess of log leverages over layers; that of the last "
    "layer over the squared size; energy. Near and far sets, judging problems."
)


def problems(found: Found, setting: str) -> tuple[list[Row], list[Column]]:
    known = families(setting)
    rows = []
    for name in found.names:
        judged = found.of(name)
        tuning = {p["member"] for p in found.of(name, "tuning")}
        members = {p["member"] for p in judged}
        seeds = {p["seed"] for p in judged}
        rows.append(
            Row(
                name,
                [
                    {
                        "words": known[name].words if name in known else "",
                        "judged": f"{len(members)} × {len(seeds)}",
                        "tuning": f"{len(tuning)} × {len({p['seed'] for p in found.of(name, 'tuning')})}",
                        "train": statistics.fmean(p["train"] for p in judged),
                        "weights": statistics.fmean(p["parameters"] for p in judged),
                        "solved": ", ".join(found.solved(name)) or "none",
                    }
                ],
            )
        )
    columns = [
        Column("what", lambda r: str(r["words"])),
        Column("judged × seeds", lambda r: str(r["judged"])),
        Column("tuning × seeds", lambda r: str(r["tuning"])),
        Column("training examples", lambda r: r["train"], 0, 0),
        Column("weights", lambda r: r["weights"], 0, 0),
        Column("sets that the nearest input solves (over .97)", lambda r: str(r["solved"])),
    ]
    return rows, columns


def one(found: Found, measure: Measure) -> tuple[list[Row], list[Column]]:
    """Rows are methods; each problem of a family gives one value."""
    rows = []
    for key, title in SHOWN.items():
        if key == LEVERAGE and not measure.title.startswith("AUROC"):
            continue
        values = []
        for name in found.names:
            kind = found.kind(name)
            get = found.value(key, measure.keys[kind][0], kind)
            values += [{"family": name, "value": get(p)} for p in found.of(name)]
        if any(v["value"] is not None for v in values):
            rows.append(Row(title, values))
    columns = [
        Column(name, _only(name), measure.keys[found.kind(name)][1], measure.digits)
        for name in found.names
    ]
    return rows, columns


def _only(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda run: run["value"] if run["family"] == name else None


def costs(found: Found) -> tuple[list[Row], list[Column]]:
    rows = []
    for key, title in SHOWN.items():
        row = {"KNN": "KNN, k=10", "ViM": "ViM, a quarter"}.get(key, key)
        values = [p["rows"][row] for name in found.names for p in found.of(name) if has(p, row)]
        if values and row != "ensemble_tuned":
            rows.append(Row(title, values))
    columns = [
        Column("fit s", lambda r: r["fit_seconds"], 0, 2),
        Column("1000 inputs s", lambda r: r["seconds_per_1000"], 0, 2),
    ]
    return rows, columns


def losses(found: Found) -> tuple[list[Row], list[Column]]:
    """Text, for each cell names who it is compared with."""
    by_title = {measure.title: measure for measure in (*MEASURES, *COUNTED)}
    asked = {
        "NLL": ("NLL", LAYERS),
        "NLL, tuned": ("NLL", "layers_tuned"),
        "ECE": ("ECE", LAYERS),
        "joint NLL": ("Joint NLL", LAYERS),
        "joint NLL, tuned": ("Joint NLL", "layers_tuned"),
        "AUROC near": ("AUROC, near sets", LAYERS),
        "AUROC far": ("AUROC, far sets", LAYERS),
        "near, counted": ("near counted", LAYERS),
        "far, counted": ("far counted", LAYERS),
    }
    rows = [
        Row(
            name,
            [{title: compared(found, name, by_title[m], own) for title, (m, own) in asked.items()}],
        )
        for name in found.names
    ]
    return rows, [Column(title, lambda r, title=title: r[title]) for title in asked]  # type: ignore[misc]


def compared(found: Found, name: str, measure: Measure, own: str) -> str:
    """Our value less that of the best other method, in units of which more is better."""
    kind, judged = found.kind(name), found.of(name)
    what, sign = measure.keys[kind]
    mine = [found.value(own, what, kind)(p) for p in judged]
    best: tuple[float, str, list[float | None]] | None = None
    for key in SHOWN:
        if key in NO_RIVALS:
            continue
        values = [found.value(key, what, kind)(p) for p in judged]
        known = [v for v in values if v is not None]
        if len(known) == len(judged) and known:
            mean = sign * statistics.fmean(known)
            if best is None or mean > best[0]:
                best = mean, SHOWN[key], values
    if best is None or any(v is None for v in mine):
        return "–"
    gaps = [
        sign * (a - b)
        for a, b in zip(mine, best[2], strict=True)
        if a is not None and b is not None
    ]
    shown = summarise(gaps)
    assert shown.mean is not None
    text = f"{shown.mean:+.{measure.digits}f}"
    if shown.error is not None:
        text += f" ± {shown.error:.{measure.digits}f}"
    good = shown.mean >= -(shown.error or 0.0)
    return f"**{text}** ({best[1]})" if good else f"{text} ({best[1]})"


def left(found: Found) -> tuple[list[Row], list[Column]]:
    rows = []
    for name in found.names:
        kind = found.kind(name)
        values = []
        for p in found.of(name):
            if not has(p, LAYERS):
                continue
            details = p["rows"][LAYERS]["details"]
            joint = {
                key: found.value(key, "joint_nll", kind)(p)
                for key in ("point", LAYERS, "layers_tuned", "layers_free")
            }
            ratio = details["prior_precision"] / details["natural_precision"]
            values.append(
                {**details, "ratio": ratio, **{f"joint {k}": v for k, v in joint.items()}}
            )
        rows.append(Row(name, values))
    columns = [
        Column("directions left", lambda r: r["free_share"], 0, 2),
        Column("α / natural", lambda r: r["ratio"], 0, 1),
        Column("divergence", lambda r: r["divergence"], 0, 4),
        Column("left out", lambda r: r["left_out_divergence"], 0, 4),
        Column("unbounded", lambda r: r["divergence_free"], 0, 4),
        Column("joint: network", lambda r: r["joint point"], 0, 2),
        Column("as fitted", lambda r: r[f"joint {LAYERS}"], 0, 2),
        Column("tuned", lambda r: r["joint layers_tuned"], 0, 2),
        Column("no bound", lambda r: r["joint layers_free"], 0, 2),
    ]
    return rows, columns


def made(found: Found) -> tuple[list[Row], list[Column]]:
    rows, names = [], ("combined", "leverage", *PARTS)
    for name in found.names:
        values = [
            {(score, d): auroc(p, (LAYERS, score), d) for score in names for d in ("near", "far")}
            for p in found.of(name)
        ]
        rows.append(Row(name, values))  # type: ignore[arg-type]
    columns = [
        Column(f"{distance}: {score.removesuffix(' part')}", _pair(score, distance), 0, 3)
        for distance in ("near", "far")
        for score in names
    ]
    return rows, columns


def _pair(score: str, distance: str) -> Callable[[Mapping[Any, Any]], float | None]:
    return lambda values: values[score, distance]


def failed(found: Found) -> list[str]:
    """Methods that could not be had on a family, once each, with the reason."""
    out: dict[str, list[str]] = {}
    for (name, _, _), p in found.problems.items():
        for key, row in p["rows"].items():
            if "error" in row:
                title = SHOWN.get(key, key)
                words = f"{title}: {row['error'].partition(':')[2].strip()}"
                if title == SHOWN["laplace_full"]:
                    words = f"{title}: more than 12,000 weights, of which each prior precision takes a fit"
                where = out.setdefault(words, [])
                if name not in where:
                    where.append(name)
    return [f"{words} ({', '.join(where)})" for words, where in out.items()]


def kept(run: dict[str, Any]) -> dict[str, Any]:
    """Without FPR95 of every set, of which no table speaks: the file is committed."""
    rows = {}
    for key, row in run["result"]["rows"].items():
        scores = {
            score: {
                d: {n: {"auroc": s["auroc"]} for n, s in sets.items()} for d, sets in both.items()
            }
            for score, both in row.get("scores", {}).items()
        }
        rows[key] = {**row, **({"scores": scores} if scores else {})}
        if key in ("layers_tuned", "layers_free"):
            rows[key].pop("details", None)  # those of `layers`
    return {**run, "result": {**run["result"], "rows": rows}}
