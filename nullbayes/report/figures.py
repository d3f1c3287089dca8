"""The report's figures, as inline SVG that takes its colours from the page, so that light and dark both work."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from nullbayes.report.words import METHODS

# Colours that stand for the page's own: replaced by CSS variables in the finished SVG.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
COLOURS = {"point": "#050505", "null_space": "#060606", "laplace": "#070707"}
INSIDE = "#080808"
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--card", INSIDE: "--inside",
    COLOURS["point"]: "--point", COLOURS["null_space"]: "--null-space", COLOURS["laplace"]: "--laplace",
}  # fmt: skip
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "font.family": "DejaVu Sans",  # comes with matplotlib and is wide: what fits in it fits in the page's font
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "legend.frameon": False,
}
_PLAIN: dict[str, Any] = {"fontsize": 8, "fontweight": "normal", "color": MUTED}
_SIZE = (3.5, 2.9)  # inches; drawn at about this size on a phone and a third larger on a laptop
_NAMES = {"point": "Point estimate", "null_space": "Null-space", "laplace": "Full Laplace"}

Draw = Callable[[Figure], str]  # draws, and returns the text alternative


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
    with matplotlib.rc_context(_STYLE):
        return {
            name: [
                _svg(draw, f"{name}{i}", (3.5, 3.5) if name == "novelty" else _SIZE)
                for i, draw in enumerate(draws)
            ]
            for name, draws in sections.items()
        }


def _svg(draw: Draw, name: str, size: tuple[float, float]) -> str:
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03))
    FigureCanvasSVG(figure)
    words = draw(figure)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same results give the same bytes
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _inline(file.getvalue(), name, words)


def _inline(svg: str, name: str, words: str) -> str:
    """Fit a stand-alone SVG for the inside of a page: no header, no metadata, ids of its own, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font: (bold|700) ([\d.]+)px [^;\"]*", r"font-weight: 600; font-size: \2px", svg)
    label = words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    size = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg {size.group(0) if size else ""} role="img" aria-label="{label}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)


def _reliability(results: Mapping[str, Any], key: str) -> Draw:
    def draw(figure: Figure) -> str:
        axes = figure.subplots()
        figures, curve = results["methods"][key], results["curves"][key]["reliability"]
        count = np.array(curve["count"])
        filled = count > 0
        confidence, accuracy = (
            np.array(curve["confidence"])[filled],
            np.array(curve["accuracy"])[filled],
        )
        share = count[filled] / count.sum()
        # One standard error of a share, with the pseudo-count that keeps it from vanishing at 0 and 1.
        near = (accuracy * count[filled] + 1) / (count[filled] + 2)
        error = np.sqrt(near * (1 - near) / count[filled])
        colour = COLOURS[key]
        axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 3)))
        axes.vlines(
            confidence,
            np.clip(accuracy - error, 0, 1),
            np.clip(accuracy + error, 0, 1),
            color=colour,
            lw=1,
            alpha=0.55,
        )
        axes.scatter(
            confidence,
            accuracy,
            s=24 + 150 * share,
            color=colour,
            edgecolor=PAPER,
            linewidth=0.8,
            zorder=3,
        )
        axes.set(
            xlim=(0, 1.04),
            ylim=(0, 1.06),
            xlabel="confidence",
            ylabel="accuracy",
            title=_NAMES[key],
        )
        axes.set_title(
            f"ECE {figures['ece']:.4f}   NLL {figures['nll']:.4f}", loc="right", **_PLAIN
        )
        return (
            f"Reliability diagram of the {_NAMES[key].lower()}: accuracy against confidence, expected calibration "
            f"error {figures['ece']:.4f}, maximum {figures['mce']:.3f}."
        )

    return draw


def _novelty(results: Mapping[str, Any], shift: str) -> Draw:
    def draw(figure: Figure) -> str:
        title = results["dataset"]["shifts"][shift]["title"]
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
            inside, outside = inside / inside.sum(), outside / outside.sum()
            axes.stairs(inside, edges, fill=True, color=INSIDE, alpha=0.45, lw=0)
            axes.stairs(inside, edges, color=INSIDE, lw=1)
            axes.stairs(outside, edges, fill=True, color=COLOURS[key], alpha=0.4, lw=0)
            axes.stairs(outside, edges, color=COLOURS[key], lw=1.2)
            axes.set(xlabel=name, yticks=[], xlim=(edges[0], edges[-1]))
            axes.set_ylim(0, 1.35 * max(inside.max(), outside.max()))
            axes.spines["left"].set_visible(False)
            axes.grid(False)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.xaxis.set_major_formatter(lambda x, _: f"$10^{{{x:.0f}}}$" if x else "1")
            auroc = results["methods"][key]["auroc"][shift]
            values.append(auroc)
            _note(axes, f"AUROC {auroc:.3f}", 0.02, 0.97, "left", "top", COLOURS[key])
        rows[0].set_title(title[:1].upper() + title[1:])
        return (
            f"Histograms of the scores of test images and of {title}. The point estimate's confidence separates them "
            f"with AUROC {values[0]:.3f}, the null-space posterior's novelty with {values[1]:.3f}."
        )

    return draw


def _roc(results: Mapping[str, Any], shift: str) -> Draw:
    def draw(figure: Figure) -> str:
        title = results["dataset"]["shifts"][shift]["title"]
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
            _note(
                axes,
                f"{auroc:.3f}  {_NAMES[key]}",
                0.42,
                0.25 - 0.09 * row,
                "left",
                "bottom",
                COLOURS[key],
            )
            said.append(f"{_NAMES[key].lower()} {auroc:.3f}")
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
            precision = np.array(
                path["prior_precision"], dtype=float
            )  # null, an infinite precision, becomes NaN
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
                    f"{_NAMES[key].lower()} chosen at {precision[chosen]:.3g} with {values[chosen]:.4f}"
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
        axes.set(xlabel="input", ylabel="output", title=_NAMES[key])
        return (
            f"Regression with the {_NAMES[key].lower()}: training points in two groups, the network's curve and a band "
            f"of two standard deviations: {method['train_sd']:.3g} at the data, {method['gap_sd']:.3g} in the gap "
            "on average, as one standard deviation."
        )

    return draw


def _note(
    axes: Axes, text: str, x: float, y: float, side: str, up: str = "bottom", colour: str = INK
) -> None:
    axes.text(
        x,
        y,
        text,
        transform=axes.transAxes,
        ha=side,
        va=up,
        color=colour,
        fontsize=8,
        linespacing=1.5,
    )
