"""How figures are drawn: inline SVG that takes its colours from the page, so that light and dark both work."""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

# Colours that stand for the page's own: replaced by CSS variables in the finished SVG.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
COLOURS = {"point": "#050505", "null_space": "#060606", "laplace": "#070707"}
INSIDE, SCALED = "#080808", "#090909"
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--card", INSIDE: "--inside",
    SCALED: "--scaled",
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
PLAIN: dict[str, Any] = {"fontsize": 8, "fontweight": "normal", "color": MUTED}
SIZE = (3.5, 2.9)  # inches; drawn at about this size on a phone and a third larger on a laptop
Draw = Callable[[Figure], str]  # draws, and returns the text alternative


def styled() -> AbstractContextManager[Any]:
    """Within it, figures have the style of the report."""
    context: AbstractContextManager[Any] = matplotlib.rc_context(_STYLE)
    return context


def label(text: str, most: int = 28) -> str:
    """A stranger's text for a figure: no control characters, no mathematics, not too long."""
    plain = "".join(c for c in text if unicodedata.category(c)[0] != "C")
    short = plain if len(plain) <= most else plain[: most - 1] + "…"
    return short.replace("$", r"\$")


def svg(draw: Draw, name: str, size: tuple[float, float]) -> str:
    """What ``draw`` draws, ``size`` inches, for the inside of a page; ``name`` makes its ids its own."""
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03))
    FigureCanvasSVG(figure)
    words = draw(figure)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # The page's font has what matplotlib's may lack.
        warnings.filterwarnings("ignore", "Glyph")
        # Without a date: the same results give the same bytes.
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _inline(file.getvalue(), name, words)


def _inline(svg: str, name: str, words: str) -> str:
    """Fit a stand-alone SVG for the inside of a page: no header, no metadata, ids of its own, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    # Inside tags alone: text between them is a stranger's, and stays as it is.
    svg = re.sub(r"<[^>]*>", lambda tag: _fitted(tag.group(0), name), svg)
    said = words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    size = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg {size.group(0) if size else ""} role="img" aria-label="{said}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)


def _fitted(tag: str, name: str) -> str:
    """One tag with ids of this figure, the page's colours and its font."""
    tag = re.sub(r' xmlns(:\w+)?="[^"]*"', "", tag)
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', tag)
    tag = re.sub(r"url\(#", f"url(#{name}-", tag)
    tag = re.sub(r'href="#', f'href="#{name}-', tag)
    for colour, variable in _VARIABLES.items():
        tag = tag.replace(colour, f"var({variable})")
    tag = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", tag)
    return re.sub(r"font: (bold|700) ([\d.]+)px [^;\"]*", r"font-weight: 600; font-size: \2px", tag)


def note(
    axes: Axes, text: str, x: float, y: float, side: str, up: str = "bottom", colour: str = INK
) -> None:
    """Small text at ``(x, y)`` of the panel, from 0 to 1."""
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


# -- panels that the demonstration and the report on one's own model share ---------------------------


def reliability_points(axes: Axes, curve: Mapping[str, Sequence[float]], colour: str) -> None:
    """Accuracy against confidence, a dot a bin, with one standard error."""
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


def two_histograms(axes: Axes, edges: Any, inside: Any, outside: Any, colour: str) -> None:
    """Ordinary inputs in grey and shifted ones in ``colour``, over log10 of a score."""
    inside, outside = (v / max(v.sum(), 1) for v in (inside, outside))
    axes.stairs(inside, edges, fill=True, color=INSIDE, alpha=0.45, lw=0)
    axes.stairs(inside, edges, color=INSIDE, lw=1)
    axes.stairs(outside, edges, fill=True, color=colour, alpha=0.4, lw=0)
    axes.stairs(outside, edges, color=colour, lw=1.2)
    axes.set(yticks=[], xlim=(edges[0], edges[-1]))
    axes.set_ylim(0, 1.35 * max(inside.max(), outside.max()))
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: f"$10^{{{x:.0f}}}$" if x else "1")
