"""An evaluation in words and rows: what the page about one's own model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nullbayes.posterior.measuring.estimates import BETTER, SAME, WORSE
from nullbayes.posterior.measuring.records import METRICS
from nullbayes.report.words import CERTIFICATE_FIELDS, judged

Results = Mapping[str, Any]

SCORES = {
    "max_softmax": "1 − confidence",
    "energy": "energy",
    "novelty": "novelty",
    "entropy": "entropy",
    "mutual_information": "mutual information",
    "total_variance": "total variance",
    "epistemic_variance": "epistemic variance",
}
REFERENCE = "network"
#: figures of classes and slices, in the order shown
PART = ("accuracy", "rmse", "loss", "nll", "ece", "gap", "coverage_90", "z_squared")


def certificate_fields(results: Results) -> dict[str, tuple[str, str]]:
    """Names of the certificate's fields for this task."""
    label = METRICS[results["score_name"]].label
    return {
        **CERTIFICATE_FIELDS,
        "network_score": (
            f"Training {label}, trained network",
            "on the examples that were checked",
        ),
        "posterior_score": (f"Training {label}, posterior", "on the same examples"),
    }


def text_of(figure: Mapping[str, Any] | None, digits: int) -> tuple[str, str]:
    """Value and standard error as text; empty where unknown."""
    if figure is None or figure["value"] is None:
        return "–", ""
    error = "" if figure["error"] is None else f"± {figure['error']:.{digits}f}"
    return signed(f"{figure['value']:.{digits}f}"), error


def signed(text: str) -> str:
    """A number with the minus sign that people write, and none before a zero."""
    text = text if text.strip("-0.") else text.lstrip("-")
    return text.replace("-", "\N{MINUS SIGN}", 1) if text.startswith("-") else text


def headline(results: Results) -> str:
    """One sentence: the guarantee, then what became better and worse on test data."""
    certificate, main = results["certificate"], results["main"]
    if certificate["method"] not in ("null-space", "layer null-space"):
        opening = "No guarantee promised"
    else:
        opening = "The guarantee held" if certificate["held"] else "The guarantee is weak"
    verdicts = results["verdicts"].get(main, {})
    shown = [n for n in METRICS if n in verdicts]
    parts = []
    for word in (BETTER, WORSE):
        names = [METRICS[n].label for n in shown if verdicts[n] == word]
        if names:
            parts.append(f"{word} {listed(names[:4])}")
    if not parts:
        parts = ["no figure differs from the trained network's by more than two standard errors"]
    return f"{opening}; on test data {' and '.join(parts)}."


def listed(names: Sequence[str]) -> str:
    """``"a, b and c"``."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def tiles(results: Results) -> list[dict[str, str]]:
    """The figures at the top: score, NLL, calibration, and novelty's AUROC where there are shifted sets."""
    main = results["main"]
    before, after = results["figures"][REFERENCE], results["figures"][main]
    wanted = [results["score_name"], "nll", "ece" if "ece" in after else "crps", "joint_nll"]
    out = []
    for name in dict.fromkeys(wanted):
        if name in after and name in before:
            metric = METRICS[name]
            word = results["verdicts"].get(main, {}).get(name, SAME)
            old, new = (text_of(f[name], metric.digits)[0] for f in (before, after))
            title = metric.label[:1].upper() + metric.label[1:]
            out.append({"name": f"{title} on test", "before": old, "after": new, "verdict": word})
    out = out[:3] if results["detection"] else out
    return out + _novelty_tile(results)


def _novelty_tile(results: Results) -> list[dict[str, str]]:
    rows = {(d["method"], d["score"]): d["sets"] for d in results["detection"]}
    ours = rows.get((results["main"], "novelty"))
    theirs = rows.get((REFERENCE, "max_softmax"))
    if not ours:
        return []
    names = list(ours)
    worst = min(names, key=lambda n: ours[n]["auroc"]["value"])
    new = text_of(ours[worst]["auroc"], 3)[0]
    old = text_of(theirs[worst]["auroc"], 3)[0] if theirs else ""
    word = ours[worst].get("verdict", SAME) if theirs else ""
    title = "AUROC of novelty" + (", its hardest set" if len(names) > 1 else "")
    return [{"name": title, "before": old, "after": new, "verdict": word}]


def comparison(results: Results) -> dict[str, Any]:
    """Rows of figures, columns of methods; cells say value, error, and better or worse than the trained network."""
    methods = results["methods"]
    names = [n for n in METRICS if any(n in f for f in results["figures"].values())]
    rows = []
    for name in names:
        metric = METRICS[name]
        cells = [_cell(results, key, name) for key in methods]
        rows.append(_row(metric.label, metric.better, metric.meaning, cells))
    first: Mapping[str, Any] = next(iter(results["train"].values()), {})
    for name in first:
        metric = METRICS[name]
        texts = [text_of(results["train"].get(k, {}).get(name), metric.digits) for k in methods]
        cells = [{"text": t, "error": e, "verdict": ""} for t, e in texts]
        meaning = f"on {results['data']['train']['examples']:,} training examples"
        rows.append(_row(f"training {metric.label}", metric.better, meaning, cells))
    columns = [
        {"title": m["title"], "setting": m["setting"], "style": style(results, k)}
        for k, m in methods.items()
    ]
    return {"columns": columns, "rows": rows}


def _row(label: str, better: int, meaning: str, cells: list[dict[str, str]]) -> dict[str, Any]:
    arrow = {1: " ↑", -1: " ↓", 0: ""}[better]
    return {
        "label": label[:1].upper() + label[1:] + arrow,
        "meaning": meaning,
        "cells": cells,
    }


def _cell(results: Results, key: str, name: str) -> dict[str, str]:
    value, error = text_of(results["figures"][key].get(name), METRICS[name].digits)
    word = results["verdicts"].get(key, {}).get(name, "")
    return {"text": value, "error": error, "verdict": "" if word == SAME else word}


def style(results: Results, key: str) -> str:
    """The colour of a method: one of the page's classes."""
    fixed = {REFERENCE: "point", "temperature": "scaled"}
    own = ("evidence", "guarantee", "calibrated", "given")
    return fixed.get(key, "null_space" if key in own else "laplace")


def detection(results: Results) -> dict[str, Any]:
    """Rows of scores, columns of shifted sets."""
    rows = []
    for entry in results["detection"]:
        cells = []
        for found in entry["sets"].values():
            value, error = text_of(found["auroc"], 3)
            fpr, _ = text_of(found["fpr95"], 3)
            word = found.get("verdict", "")
            verdict = "" if word == SAME else word
            cells.append({"text": value, "error": error, "fpr": fpr, "verdict": verdict})
        title = f"{SCORES.get(entry['score'], entry['score'])}"
        rows.append(
            {
                "title": title[:1].upper() + title[1:],
                "method": results["methods"][entry["method"]]["title"],
                "style": style(results, entry["method"]),
                "cells": cells,
            }
        )
    return {"sets": list(results["data"]["shifted"].items()), "rows": rows}


def thresholds(results: Results) -> list[dict[str, Any]]:
    """One row a rate: the threshold with its interval, and what it flags."""
    out = []
    for entry in results["thresholds"]["rates"]:
        if entry["value"] is None:
            value, shares = "too few inputs", []
        else:
            low = "–∞" if entry["low"] is None else f"{entry['low']:.3g}"
            high = "∞" if entry["high"] is None else f"{entry['high']:.3g}"
            value = f"{entry['value']:.4g} ({low} to {high})"
            shares = [entry["test"], *entry["shifted"].values()]
        texts = [_percent(s) for s in shares]
        out.append({"rate": f"{100 * entry['rate']:g} %", "value": value, "shares": texts})
    return out


def _percent(figure: Mapping[str, Any]) -> str:
    error = "" if figure["error"] is None else f" ± {100 * figure['error']:.1f}"
    return f"{100 * figure['value']:.1f}{error} %"


def parts(results: Results, which: str) -> dict[str, Any] | None:
    """Figures of classes or slices under the main method, the worst of them named."""
    found = results[which]
    if not found:
        return None
    main = results["main"]
    have = {n for part in found.values() for n in part["methods"][main]}
    columns = [n for n in PART if n in have]
    rows = []
    for name, part in found.items():
        figures = part["methods"][main]
        cells = []
        for column in columns:
            text, error = text_of(figures.get(column), METRICS[column].digits)
            difference = part.get("differences", {}).get(main, {}).get(column)
            better = METRICS[column].better
            digits = METRICS[column].digits
            judgement = judged(difference, higher_is_better=better > 0, digits=digits)
            word = judgement if better else SAME
            cells.append({"text": text, "error": error, "verdict": "" if word == SAME else word})
        rows.append({"name": name, "examples": f"{part['examples']:,}", "cells": cells})
    heads = [METRICS[n].label[:1].upper() + METRICS[n].label[1:] for n in columns]
    tested = results["data"]["test"]["examples"]
    several = which == "classes" and sum(p["examples"] for p in found.values()) > tested
    counted = "Positions" if several and results["task"] == "classification" else "Examples"
    first = "Slice" if which == "slices" else str(next(iter(found))).partition(" ")[0].capitalize()
    return {
        "head": first,
        "counted": counted,
        "columns": heads,
        "rows": rows,
        "worst": worst(results, which),
    }


def worst(results: Results, which: str) -> str:
    """A sentence that names the part whose probabilities are furthest off, by more than two standard errors."""
    one = (
        "slice" if which == "slices" else str(next(iter(results[which]), "class")).partition(" ")[0]
    )
    main = results["main"]
    if results["task"] == "regression":
        return _worst_interval(results, which)
    gaps = _gaps(results[which], main, "gap", 0.0)
    if not gaps:
        return ""
    excess, name, figure = max(gaps)
    if excess <= 0:
        return f"In no {one} do confidence and accuracy differ by more than two standard errors."
    way = "overconfident" if figure["value"] > 0 else "underconfident"
    return (
        f"Worst calibrated: {name}, {way} by {abs(figure['value']):.3f} ± {figure['error']:.3f} "
        "(mean confidence minus accuracy)."
    )


def _worst_interval(results: Results, which: str) -> str:
    gaps = _gaps(results[which], results["main"], "coverage_90", 0.9)
    if not gaps:
        return ""
    excess, name, figure = max(gaps)
    if excess <= 0:
        one = {"classes": "output", "slices": "slice"}[which]
        return f"In no {one} does the 90 % interval cover more or less than 90 % by more than two standard errors."
    value, error = 100 * figure["value"], 100 * figure["error"]
    return f"Furthest off: {name}, whose 90 % interval covers {value:.1f} ± {error:.1f} %."


def _gaps(
    found: Mapping[str, Any], main: str, column: str, wanted: float
) -> list[tuple[float, str, Mapping[str, Any]]]:
    """How far each part is off beyond two standard errors: small, noisy parts do not win by their noise."""
    out = []
    for name, part in found.items():
        figure = part["methods"][main].get(column)
        if figure and figure["value"] is not None and figure["error"] is not None:
            excess = abs(figure["value"] - wanted) - 2 * figure["error"]
            out.append((excess, name, figure))
    return out
