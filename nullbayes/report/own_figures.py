"""The figures of the report on one's own model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from nullbayes.report.drawing import (
    COLOURS,
    INSIDE,
    MUTED,
    PAPER,
    PLAIN,
    SCALED,
    SIZE,
    Draw,
    label,
    note,
    reliability_points,
    styled,
    svg,
    two_histograms,
)
from nullbayes.report.own_words import style

Results = Mapping[str, Any]
_PAINT = {**COLOURS, "scaled": SCALED, "inside": INSIDE}
_DASHED: Any = (0, (4, 2))
MOST_SETS = 12


def own_figures(results: Results) -> dict[str, list[str]]:
    """Every figure of the report: section name -> panels as SVG."""
    curves = results["curves"]
    sets = list(curves["novelty"]["outside"])[:MOST_SETS]
    sections: dict[str, list[Draw]] = {
        "novelty": [_novelty(results, name) for name in sets],
        "roc": [_roc(results, name) for name in sets if curves["roc"][name]],
        "reliability": [_reliability(results, key) for key in curves["reliability"]],
        "risk": [_risk(results)] if curves["risk_coverage"] else [],
        "coverage": [_coverage(results)] if curves["coverage"] else [],
        "path": [_path(results)] if results["calibration"] else [],
    }
    with styled():
        return {
            name: [svg(draw, f"{name}{i}", SIZE) for i, draw in enumerate(draws)]
            for name, draws in sections.items()
        }


def _colour(results: Results, key: str) -> str:
    return _PAINT[style(results, key)]


def _lines(results: Results, key: str) -> dict[str, Any]:
    """The main method and the network are solid, what else has their colour is dashed."""
    solid = key in (results["main"], "network", "temperature")
    return {"color": _colour(results, key), "ls": "-" if solid else _DASHED}


def _title(results: Results, key: str) -> str:
    return label(results["methods"][key]["title"])


def _novelty(results: Results, name: str) -> Draw:
    def draw(figure: Figure) -> str:
        axes = figure.subplots()
        data = results["curves"]["novelty"]
        edges, inside = np.array(data["log10_edges"]), np.array(data["inside"])
        colour = COLOURS["null_space"]
        two_histograms(axes, edges, inside, np.array(data["outside"][name]), colour)
        top = axes.get_ylim()[1]
        for entry in results["thresholds"]["rates"]:
            if entry["value"] and entry["rate"] == 0.05:
                axes.axvline(np.log10(max(entry["value"], 1e-9)), color=MUTED, lw=1, ls=(0, (4, 3)))
        layers = results["settings"]["posterior"] == "LayerNullSpacePosterior"  # a score of no unit
        axes.set(xlabel="novelty" if layers else "novelty, nats", title=label(name))
        axes.spines["left"].set_visible(False)
        axes.grid(False)
        axes.set_ylim(0, 1.05 * top)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda x, _: f"{10**x:.2g}")
        row = next(
            d
            for d in results["detection"]
            if (d["method"], d["score"]) == (results["main"], "novelty")
        )
        area = row["sets"][name]["auroc"]["value"]
        note(axes, f"AUROC {area:.3f}", 0.02, 0.97, "left", "top", colour)
        return f"Histograms of the novelty of test inputs and of {name}: AUROC {area:.3f}."

    return draw


def _roc(results: Results, name: str) -> Draw:
    def draw(figure: Figure) -> str:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 3)))
        lines: dict[str, tuple[str, dict[str, Any]]] = {
            "novelty": ("novelty", {"color": COLOURS["null_space"], "zorder": 3}),
            "max_softmax": ("1 − confidence", {"color": COLOURS["point"]}),
            "energy": ("energy", {"color": COLOURS["point"], "ls": _DASHED}),
        }
        drawn = results["curves"]["roc"][name]
        for row, key in enumerate(k for k in lines if k in drawn):
            words, look = lines[key]
            axes.plot(drawn[key]["fpr"], drawn[key]["tpr"], **look)
            text = words + (" (dashed)" if "ls" in look else "")
            note(axes, text, 0.45, 0.25 - 0.09 * row, "left", "bottom", look["color"])
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), title=label(name))
        axes.set(xlabel="test inputs flagged", ylabel="shifted inputs flagged")
        return f"ROC curves of {', '.join(lines[k][0] for k in drawn)} for {name}."

    return draw


def _reliability(results: Results, key: str) -> Draw:
    def draw(figure: Figure) -> str:
        axes = figure.subplots()
        reliability_points(axes, results["curves"]["reliability"][key], _colour(results, key))
        ece = results["figures"][key]["ece"]["value"]
        axes.set(xlim=(0, 1.04), ylim=(0, 1.06), xlabel="confidence", ylabel="accuracy")
        axes.set_title(_title(results, key), fontsize=8)
        note(axes, f"ECE {ece:.4f}", 0.03, 0.97, "left", "top", MUTED)
        title = results["methods"][key]["title"]
        return f"Reliability diagram, {title}: accuracy against confidence, expected calibration error {ece:.4f}."

    return draw


def _risk(results: Results) -> Draw:
    def draw(figure: Figure) -> str:
        axes = figure.subplots()
        said = []
        for key, curve in results["curves"]["risk_coverage"].items():
            axes.plot(curve["coverage"], curve["risk"], **_lines(results, key))
            area = results["figures"][key]["aurc"]["value"]
            said.append(f"{results['methods'][key]['title']} {area:.4f}")
        axes.axhline(0.05, color=MUTED, lw=1, ls=(0, (1, 2)))
        axes.set(xlim=(0, 1.01), xlabel="share of inputs answered", ylabel="error rate among them")
        axes.set_ylim(bottom=0)
        axes.set_title("Declining the least confident")
        return f"Error rate against the share of inputs answered; area under the curve: {'; '.join(said)}."

    return draw


def _coverage(results: Results) -> Draw:
    def draw(figure: Figure) -> str:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 3)))
        said = []
        for key, curve in results["curves"]["coverage"].items():
            axes.plot(curve["level"], curve["found"], marker="o", ms=3.5, **_lines(results, key))
            at = results["figures"][key]["coverage_90"]["value"]
            said.append(f"{results['methods'][key]['title']} {100 * at:.1f} %")
        axes.set(xlim=(0, 1.01), ylim=(0, 1.03), title="Predictive intervals")
        axes.set(xlabel="level of the interval", ylabel="share of targets inside")
        return f"Share of targets inside predictive intervals of each level; at 90 %: {'; '.join(said)}."

    return draw


def _path(results: Results) -> Draw:
    def draw(figure: Figure) -> str:
        path, axes = results["calibration"], figure.subplots()
        what, tried = "prior precision", path["prior_precision"]
        if path["noise_scale"] is not None:
            what, tried = "noise variance, times the estimate", path["noise_scale"]
        elif path.get("temperature") is not None:
            what, tried = "temperature", path["temperature"]
        at = np.array(tried, dtype=float)
        values = np.array(path["nll"], dtype=float)
        known = np.isfinite(at) & np.isfinite(values) & (at > 0)
        colour, chosen = COLOURS["null_space"], path["chosen"]
        axes.plot(at[known], values[known], color=colour)
        axes.plot(at[chosen], values[chosen], "o", ms=6, mfc=colour, mec=PAPER, zorder=5)
        point = path["point"]["nll"]
        if point is not None:
            axes.axhline(point, color=COLOURS["point"], lw=1.2, ls=(0, (4, 3)))
        low = min(np.nanmin(values[known]), point or np.inf)
        high = max(values[chosen], point or -np.inf)
        axes.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 2 * (high - low) + 1e-2)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=what, title="NLL on validation data")
        axes.set_title(f"chosen {at[chosen]:.3g}", loc="right", **PLAIN)
        return (
            f"NLL on validation data against the {what}: chosen {at[chosen]:.3g} with {values[chosen]:.4f}; "
            f"trained network {'unknown' if point is None else f'{point:.4f}'}."
        )

    return draw
