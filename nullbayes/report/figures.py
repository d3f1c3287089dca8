"""The figures of the demonstration's report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from nullbayes.report.drawing import (
    COLOURS,
    INK,
    MUTED,
    PAPER,
    PLAIN,
    SIZE,
    Draw,
    label,
    note,
    reliability_points,
    styled,
    svg,
    two_histograms,
)
from nullbayes.report.words import METHODS

NAMES = {"point": "Point estimate", "null_space": "Null-space", "laplace": "Full Laplace"}


def all_figures(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Every figure of the report: section name -> panels as SVG."""
    shifts = results["dataset"]["shifts"]
    sections: dict[str, list[Draw]] = {
        "reliability": [_reliability(results, key) for key in METHODS],
        "novelty": [_novelty(results, shift) for shift in shifts],
        "roc": [_roc(results, shift) for shift in shifts],
        "path": [_path(results, "nll", "NLL"), _path(results, "ece", "ECE")],
        "angles": [_groups(results, shift) for shift in shifts if shifts[shift]["groups"]],
        "regression": [_regression(results, key) for key in results["regression"]["methods"]],
    }
    with styled():
        return {
            name: [
                svg(draw, f"{name}{i}", (3.5, 3.5) if name == "novelty" else SIZE)
                for i, draw in enumerate(draws)
            ]
            for name, draws in sections.items()
        }


def _reliability(results: Mapping[str, Any], key: str) -> Draw:
    def draw(figure: Figure) -> str:
        axes = figure.subplots()
        figures, curve = results["methods"][key], results["curves"][key]["reliability"]
        reliability_points(axes, curve, COLOURS[key])
        axes.set(
            xlim=(0, 1.04),
            ylim=(0, 1.06),
            xlabel="confidence",
            ylabel="accuracy",
            title=NAMES[key],
        )
        axes.set_title(f"ECE {figures['ece']:.4f}   NLL {figures['nll']:.4f}", loc="right", **PLAIN)
        return (
            f"Reliability diagram of the {NAMES[key].lower()}: accuracy against confidence, expected calibration "
            f"error {figures['ece']:.4f}, maximum {figures['mce']:.3f}."
        )

    return draw


def _novelty(results: Mapping[str, Any], shift: str) -> Draw:
    def draw(figure: Figure) -> str:
        title = label(results["dataset"]["shifts"][shift]["title"])
        rows = figure.subplots(2, 1)
        values = []
        for axes, key, name in zip(
            rows,
            ("point", "null_space"),
            ("1 − confidence of the point estimate", "novelty, null-space posterior"),
            strict=True,
        ):
            data = results["curves"][key]["histogram"]
            edges = np.array(data["log10_edges"])
            inside, outside = np.array(data["inside"]), np.array(data["outside"][shift])
            two_histograms(axes, edges, inside, outside, COLOURS[key])
            axes.set_xlabel(name)
            auroc = results["methods"][key]["auroc"][shift]
            values.append(auroc)
            note(axes, f"AUROC {auroc:.3f}", 0.02, 0.97, "left", "top", COLOURS[key])
        rows[0].set_title(title[:1].upper() + title[1:])
        return (
            f"Histograms of the scores of test images and of {title}. The point estimate's confidence separates them "
            f"with AUROC {values[0]:.3f}, the null-space posterior's novelty with {values[1]:.3f}."
        )

    return draw


def _roc(results: Mapping[str, Any], shift: str) -> Draw:
    def draw(figure: Figure) -> str:
        title = label(results["dataset"]["shifts"][shift]["title"])
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 3)))
        said = []
        for row, key in enumerate(METHODS):
            curve, auroc = (
                results["curves"][key]["roc"][shift],
                results["methods"][key]["auroc"][shift],
            )
            axes.plot(
                curve["fpr"],
                curve["tpr"],
                color=COLOURS[key],
                zorder=3 if key == "null_space" else 2,
            )
            note(
                axes,
                f"{auroc:.3f}  {NAMES[key]}",
                0.42,
                0.25 - 0.09 * row,
                "left",
                "bottom",
                COLOURS[key],
            )
            said.append(f"{NAMES[key].lower()} {auroc:.3f}")
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
        axes.set(
            xlabel="test images flagged",
            ylabel="shifted images flagged",
            title=title[:1].upper() + title[1:],
        )
        return f"ROC curves for {title}; area under the curve: {', '.join(said)}."

    return draw


def _path(results: Mapping[str, Any], metric: str, name: str) -> Draw:
    def draw(figure: Figure) -> str:
        axes = figure.subplots()
        said, ends = [], []
        for key, path in results["prior_path"].items():
            if path.get(metric) is None:
                continue
            # Null, an infinite precision, becomes NaN.
            precision = np.array(path["prior_precision"], dtype=float)
            values = np.array(path[metric], dtype=float)
            known = np.isfinite(precision) & np.isfinite(values) & (precision > 0) & (values > 0)
            at, height = precision[known], values[known]
            order = np.argsort(at)
            at, height = at[order], height[order]
            colour, evidence, chosen = COLOURS[key], path["evidence"], path["chosen"]
            axes.plot(at, height, color=colour)
            level = np.interp(np.log(evidence), np.log(at), height)
            axes.plot(evidence, level, "D", ms=5, mfc=PAPER, mec=colour, mew=1.4, zorder=4)
            ends.append(evidence)
            if known[chosen]:
                ends.append(precision[chosen])
                axes.plot(
                    precision[chosen], values[chosen], "o", ms=6, mfc=colour, mec=PAPER, zorder=5
                )
                said.append(
                    f"{NAMES[key].lower()} chosen at {precision[chosen]:.3g} with {values[chosen]:.4f}"
                )
            point = path["point"][metric]
            axes.axhline(point, color=COLOURS["point"], lw=1.2, ls=(0, (4, 3)))
            said.append(f"point estimate {point:.4f}")
        axes.set(xscale="log", yscale="log")
        if ends:  # the path is longer than what is worth looking at
            axes.set_xlim(min(ends) / 300, max(ends) * 3000)
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.2g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="prior precision (log scale)", title=f"{name} on the validation split")
        return f"{name} on the validation split against the prior precision: {'; '.join(dict.fromkeys(said))}."

    return draw


def _groups(results: Mapping[str, Any], shift: str) -> Draw:
    def draw(figure: Figure) -> str:
        title, groups = (results["dataset"]["shifts"][shift][key] for key in ("title", "groups"))
        axes = figure.subplots()
        lowest = 0.5
        for key in METHODS:
            values = [results["methods"][key]["auroc_by_group"][shift][group] for group in groups]
            lowest = min(lowest, *values)
            axes.plot(
                range(len(groups)), values, "o-", ms=4.5, color=COLOURS[key], mec=PAPER, mew=0.8
            )
        axes.set_xticks(range(len(groups)), groups)
        axes.set(ylim=(max(0, lowest - 0.05), 1.03), xlim=(-0.2, len(groups) - 0.8))
        axes.set(xlabel="turned by", ylabel="AUROC", title="AUROC by angle")
        return f"AUROC of the three methods for {title} images, by angle."

    return draw


def _regression(results: Mapping[str, Any], key: str) -> Draw:
    def draw(figure: Figure) -> str:
        data = results["regression"]
        method = data["methods"][key]
        axes = figure.subplots()
        x, mean, sd = (np.array(v) for v in (data["x"], method["mean"], method["sd"]))
        colour = COLOURS[key]
        train_y = np.array(data["train"]["y"])
        gap = train_y.max() - train_y.min()
        axes.fill_between(x, mean - 2 * sd, mean + 2 * sd, color=colour, alpha=0.2, lw=0)
        for draw_ in method["draws"]:
            axes.plot(x, draw_, color=colour, lw=0.5, alpha=0.45)
        axes.plot(x, data["truth"], color=MUTED, lw=1, ls=(0, (4, 3)))
        axes.plot(x, data["point"]["mean"], color=colour, lw=1.6)
        axes.plot(data["train"]["x"], data["train"]["y"], "o", ms=3.2, color=INK, mew=0, zorder=5)
        axes.set(xlim=(x[0], x[-1]), ylim=(train_y.min() - 0.9 * gap, train_y.max() + 0.9 * gap))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set(xlabel="input", ylabel="output", title=NAMES[key])
        return (
            f"Regression with the {NAMES[key].lower()}: training points in two groups, the network's curve and a band "
            f"of two standard deviations: {method['train_sd']:.3g} at the data, {method['gap_sd']:.3g} in the gap "
            "on average, as one standard deviation."
        )

    return draw
