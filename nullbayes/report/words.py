"""Figures in words: what came out, also when it did not come out well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nullbayes.posterior.measuring.estimates import SAME, verdict

METHODS = ("point", "null_space", "laplace")
SAME_ACCURACY = 5e-5  # shown to four digits
#: AUROC of the distance to the nearest training input above which it takes no network to tell a shift apart
SOLVED = 0.97
NEAREST = "nearest"  # the row of that distance

# Field of the certificate -> (name, what it means), in the order shown; the first part always, the second on request.
CERTIFICATE_FIELDS = {
    "residual": ("Residual", "what is left of the samples along the constraints, as a share"),
    "network_score": (
        "Training accuracy, point estimate",
        "on the images whose predictions are preserved",
    ),
    "posterior_score": ("Training accuracy, posterior", "on the same images"),
    "drift": ("Drift, linearised", "RMS change of the preserved quantity over the training data"),
    "sampled_drift": (
        "Drift, sampled network",
        "the same for the network run with sampled weights: second order",
    ),
    "constraints": ("Constraints", "directions of the training outputs that must not move"),
    "parameters": ("Weights", "all of them are uncertain, and correlated"),
    "audit": (
        "Audit",
        "the same measured without these constraints, on single examples of all the data",
    ),
    "null_dim": ("Null space", "directions of weight space that stay free"),
    "prior_share": ("Prior variance left", "what the constraints leave of it"),
    "divergence": ("Divergence", "nats that samples move training predictions by, mean"),
    # of a posterior in the layer null space
    "change": ("Change of the outputs", "of sampled networks on training data, relative, RMS"),
    "left_out_divergence": ("Divergence, left out", "the same for examples left out of the fit"),
    "weight_change": ("Change of the weights", "of a sample, relative to the trained weights"),
    "free_share": ("Directions left", "share of the prior's variance, over all layers"),
}
CERTIFICATE_DETAILS = {
    "tolerance": ("Tolerance", "what the residual was asked to stay below"),
    "output_drift": ("Drift of the raw outputs", "RMS, linearised"),
    "examples": ("Examples preserved", "training examples whose predictions are preserved"),
    "checked_examples": ("Examples checked", "how many of them the drift was measured on"),
    "rank": ("Rank", "independent constraints that the solver found"),
    "discarded_trace": ("Discarded", "share of the output Hessian's trace that is not constrained"),
    "prior_precision": ("Prior precision", "at which drift and accuracy were measured"),
    "num_samples": ("Samples", "drawn together"),
    "solver": ("Solver", ""),
    "status": ("Status", "of the solver at its end"),
    "iterations": ("Iterations", "refinement steps or solver iterations"),
    "seconds": ("Seconds", "to fit"),
    "peak_memory": ("Peak memory", "of the process while fitting"),
}


def headline(results: Mapping[str, Any]) -> str:
    """One sentence with the result: accuracy kept or not, NLL and ECE, out-of-distribution AUROC."""
    point, ours = (results["methods"][key] for key in ("point", "null_space"))
    before, after = point["train_accuracy"], ours["train_accuracy"]
    if abs(after - before) <= SAME_ACCURACY:
        accuracy = "Same training accuracy"
    else:
        way = "rose" if after > before else "fell"
        accuracy = f"Training accuracy {way} from {before:.4f} to {after:.4f}"
    differences = results.get("differences", {}).get("null_space", {})

    def told(key: str, before: float, after: float, digits: int) -> str:
        word = judged(differences.get(key), higher_is_better=key == "auroc", digits=digits)
        if word == SAME and f"{before:.{digits}f}" != f"{after:.{digits}f}":
            return f"the same within its error ({before:.{digits}f}, {after:.{digits}f})"
        return moved(before, after, digits)

    area = told("auroc", mean_auroc(point), mean_auroc(ours), 2)
    if (nearest := results.get("nearest_input")) is not None:
        area += f" (nearest training image, no network: {mean_auroc(nearest):.2f})"
    return "; ".join(
        [
            accuracy,
            f"NLL {told('nll', point['nll'], ours['nll'], 3)}",
            f"ECE {told('ece', point['ece'], ours['ece'], 3)}",
            f"out-of-distribution AUROC {area}.",
        ]
    )


def nearest_words(results: Mapping[str, Any]) -> str:
    """What no network is needed for: AUROC of the nearest training image, shift by shift; empty where unknown."""
    if (nearest := results.get("nearest_input")) is None:
        return ""
    shifts = results["dataset"]["shifts"]
    each = [f"{shifts[key]['title']} {area:.3f}" for key, area in nearest["auroc"].items()]
    said = f"AUROC of the distance to the nearest training image: {', '.join(each)}."
    if any(area > SOLVED for area in nearest["auroc"].values()):
        said += f" Above {SOLVED:.2f} it takes no network to tell a shift apart."
    return said


def moved(before: float, after: float, digits: int) -> str:
    """``"down from 0.62 to 0.58"``; a change that rounding hides is called none."""
    old, new = f"{before:.{digits}f}", f"{after:.{digits}f}"
    if old == new:
        return f"unchanged at {new}"
    return f"{'up' if after > before else 'down'} from {old} to {new}"


def mean_auroc(figures: Mapping[str, Any]) -> float:
    """The mean over the shifts."""
    values = list(figures["auroc"].values())
    return sum(values) / len(values)


def tiles(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The four figures at the top: name, before, after, and whether their paired difference says better or worse."""
    point, ours = (results["methods"][key] for key in ("point", "null_space"))
    differences = results["differences"]["null_space"]
    mean = f"AUROC, mean of {len(point['auroc'])} shifts"
    rows = [
        ("Training accuracy", "train_accuracy", point, ours, 4, True),
        ("NLL on test", "nll", point, ours, 3, False),
        ("ECE on test", "ece", point, ours, 3, False),
        (mean, "auroc", {"auroc": mean_auroc(point)}, {"auroc": mean_auroc(ours)}, 3, True),
    ]
    shown = []
    for name, key, before, after, digits, higher in rows:
        old, new = f"{before[key]:.{digits}f}", f"{after[key]:.{digits}f}"
        word = judged(differences.get(key), higher_is_better=higher, digits=digits)
        shown.append({"name": name, "before": old, "after": new, "verdict": word})
    if (nearest := results.get("nearest_input")) is not None:
        shown[-1]["beside"] = f"nearest image {mean_auroc(nearest):.3f}"
    return shown


def judged(difference: Mapping[str, Any] | None, *, higher_is_better: bool, digits: int) -> str:
    """`verdict` of a difference as results files have it: ``{"value", "error"}``, None where not a number."""
    if difference is None or difference["value"] is None or difference["error"] is None:
        return SAME
    found, error = difference["value"], difference["error"]
    return verdict(found, error, higher_is_better=higher_is_better, digits=digits)


def table(results: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison: columns, and rows of cells that say whether they are the best of their column."""
    shifts = results["dataset"]["shifts"]
    columns: list[tuple[str, str, tuple[str, ...], int, int]] = [
        ("Train acc.", "", ("train_accuracy",), 4, 1),
        ("Test acc.", "", ("test_accuracy",), 4, 1),
        ("NLL", "", ("nll",), 4, -1),
        ("Brier", "", ("brier",), 4, -1),
        ("ECE", "", ("ece",), 4, -1),
        *(("AUROC", shift["title"], ("auroc", key), 3, 1) for key, shift in shifts.items()),
    ]
    methods = dict(results["methods"])
    if (nearest := results.get("nearest_input")) is not None:
        title = "Nearest training image"
        methods[NEAREST] = {**nearest, "title": title, "fit_seconds": nearest["seconds"]}
    best = {
        path: max(
            way * round(f, digits) for m in methods.values() if (f := _told(m, path)) is not None
        )
        for _, _, path, digits, way in columns
    }
    rows = []
    for key, figures in methods.items():
        cells = []
        for _, _, path, digits, way in columns:
            if (value := _told(figures, path)) is None:
                cells.append({"text": "–", "best": False})
                continue
            value = round(value, digits)
            cells.append({"text": f"{value:.{digits}f}", "best": way * value == best[path]})
        prior = figures.get("prior_precision")
        rows.append(
            {
                "key": key.removesuffix("_evidence"),
                "minor": key.endswith("_evidence"),
                "title": figures["title"],
                "note": _note(key),
                "cells": cells,
                "prior": "–" if prior is None else f"{prior:.3g}",
                "seconds": f"{figures['fit_seconds']:.1f}",
            }
        )
    return {"columns": [(name, detail, way) for name, detail, _, _, way in columns], "rows": rows}


def _told(figures: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    """A figure of the table; None where a method has none of its kind."""
    return dig(figures, path) if path[0] in figures else None


def certificate_rows(
    certificate: Mapping[str, Any], fields: Mapping[str, tuple[str, str]] = CERTIFICATE_FIELDS
) -> list[tuple[str, str, str]]:
    """(name, value, meaning) of each of the ``fields`` that the certificate has, in order."""
    rows = []
    for key, (name, meaning) in fields.items():
        if certificate.get(key) is not None:
            if key == "solver":
                meaning = certificate.get("reason") or "chosen by counted cost and memory"
            rows.append((name, certificate_value(key, certificate[key]), meaning))
    return rows


def certificate_value(key: str, value: Any) -> str:
    """One value as people write it."""
    if key == "audit":
        state = "agrees" if value["passed"] else "contradicts them"
        batches = f"{value['batches']:,} batch{'' if value['batches'] == 1 else 'es'}"
        return f"{state}: {value['examples']:,} of {value['total']:,} examples, {batches}"
    if key == "peak_memory":
        return f"{value / 2**20:,.0f} MiB"
    if key == "seconds":
        return f"{value:.2f}"
    if key in ("network_score", "posterior_score"):
        return f"{value:.4f}"
    if key in ("prior_share", "free_share"):
        return f"{100 * value:.1f} %"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return scientific(value)
    return str(value)


def scientific(value: float) -> str:
    """``2.3 × 10⁻⁷`` below a thousandth, plain above."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa} × 10{raised}"


def dig(value: Any, path: tuple[str, ...]) -> float:
    """Follow ``path`` into nested mappings."""
    for key in path:
        value = value[key]
    return float(value)


def _note(key: str) -> str:
    if key == NEAREST:
        return "no network: its distance is the score"
    if key == "point":
        return "scores by 1 − confidence"
    if key.endswith("_evidence"):
        return "needs no validation data"
    if key == "laplace":
        return "rescaled on validation data"
    return "calibrated on validation data"
