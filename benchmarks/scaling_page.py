"""The page and the figure of :mod:`benchmarks.scaling`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks import common

QUANTITIES = {"seconds": "seconds", "cpu_seconds": "CPU seconds", "memory": "memory"}


def slope_text(law: dict[str, Any]) -> str:
    half = law["half_width"]
    return f"{law['slope']:.2f}" + ("" if half is None else f" ± {half:.2f}")


def report(results: list[dict[str, Any]], seconds: float, entropy: float) -> str:
    """The page; ``entropy``: that of a trained classifier's predictions, nats."""
    lines = [
        "# Scaling laws of a whole fit",
        "",
        "`y ∝ x^k`: k by least squares of log y on log x over the medians of the repeats, ± 95 %. The small end of",
        "each range is fixed cost, so k is given for the whole range and for its upper half (in log x, from the x",
        "named), and the target is held against both; `last` is the slope between the last two points, which shows",
        "where a law still bends. Each run is a fresh process after a tiny fit; CPU seconds are those of all threads,",
        "which other work on the machine disturbs less; memory is the growth of the process's peak beyond model and",
        f"data. Exact projection (`delta=0`), certificate included; {seconds / 60:.0f} minutes in all.",
        "`python -m benchmarks.scaling`",
        "",
        "In the O law the body is the same and the head small, so that P hardly grows. `predictions` is the network",
        "as initialised, all classes about equally likely and so every direction of weight. For `confident`,",
        f"`auto` and `loss` the last layer is scaled until the mean softmax entropy is {entropy} nats at every O, as a",
        "trained classifier has it: predictions then concentrate on a few classes, whatever their number.",
        "",
        "| x | preserves | quantity | k, whole range | k, upper half | from x = | last | target | whole | upper |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for law in results:
        for series in law["series"]:
            for quantity, fits in series["laws"].items():
                target = series["target"]
                met = ["–", "–"]
                if target is not None:
                    slopes = (fits["whole"]["slope"], fits["upper"]["slope"])
                    met = ["met" if slope <= target else "missed" for slope in slopes]
                lines.append(
                    f"| {law['letter']} | {series['name']} | {QUANTITIES[quantity]} | {slope_text(fits['whole'])} "
                    f"| {slope_text(fits['upper'])} | {fits['from']:,} | {fits['last']:.2f} "
                    f"| {'–' if target is None else f'≤ {target:g}'} | {met[0]} | {met[1]} |"
                )
    for law in results:
        lines += ["", f"## {law['letter']}, {law['words']}", "", law["fixed"], ""]
        for series in law["series"]:
            lines += [*point_table(law["letter"], series), ""]
    return "\n".join(lines).rstrip() + "\n"


def point_table(letter: str, series: dict[str, Any]) -> list[str]:
    named = ("rows", "Gram", "factorisation", "projection", "certificate")
    used = [s for s in named if any(s in p["stages"] for p in series["points"])]
    lines = [
        f"{series['name']}:",
        "",
        f"| {letter} | runs | seconds | CPU | {' | '.join(used)} | other | memory MB | M | P | iterations | residual |",
        "|---" * (len(used) + 10) + "|",
    ]
    for p in series["points"]:
        parts = [p["stages"].get(stage, 0.0) for stage in used]
        cells = " | ".join(f"{v:.2f}" for v in [*parts, p["seconds"] - sum(parts)])
        x, memory = f"{p['x']:,}", p["memory"] / 2**20
        lines.append(
            f"| {x} | {p['repeats']} | {p['seconds']:.2f} | {p['cpu_seconds']:.2f} | {cells} | {memory:.0f} "
            f"| {p['constraints']:,} | {p['parameters']:,} | {p['iterations']} | {p['residual']:.1e} |"
        )
    return lines


COLOURS = ("#1f6feb", "#d1641a", "#2a9d5c", "#8250b8")


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """A panel for each law: seconds above, memory below; the line is the law of the upper half."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e3e3e3",
        "grid.linewidth": 0.6,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        columns = len(results)
        figure, axes = plt.subplots(
            2,
            columns,
            figsize=(4.2 * columns, 7),
            squeeze=False,
            layout="constrained",
            sharex="col",
        )
        rows = (("seconds", "seconds", 1.0), ("memory", "memory, MB", 2.0**20))
        for column, law in enumerate(results):
            for row, (quantity, label, unit) in enumerate(rows):
                axis = axes[row, column]
                for series, colour in zip(law["series"], COLOURS, strict=False):
                    draw_series(axis, series, quantity, unit, colour)
                axis.set_xscale("log")
                axis.set_yscale("log")
                low, high = axis.get_ylim()
                axis.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend
                for scale in (axis.xaxis, axis.yaxis):
                    subs = (1.0,) if scale is axis.xaxis else (1.0, 3.0)
                    scale.set_major_locator(ticker.LogLocator(subs=subs, numticks=12))
                    scale.set_major_formatter(ticker.FuncFormatter(plain_tick))
                    scale.set_minor_formatter(ticker.NullFormatter())
                axis.legend(fontsize=8, loc="upper left")
                if column == 0:
                    axis.set_ylabel(label)
            axes[0, column].set_title(f"{law['letter']}, {law['words']}", loc="left", weight="bold")
            axes[1, column].set_xlabel(law["letter"])
        figure.suptitle(
            "A whole fit: exponents over the upper half of each range, 95 % intervals",
            x=0.01,
            ha="left",
        )
        common.save_figure(figure, path, 130)


def plain_tick(value: float, _: Any = None) -> str:
    """10,000 and 0.3 as people write them; powers of ten from a million on."""
    if value >= 1e6:
        power = math.floor(math.log10(value) + 1e-9)
        return rf"${value / 10**power:.0f}\!\times\!10^{{{power}}}$"
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def draw_series(axis: Any, series: dict[str, Any], quantity: str, unit: float, colour: str) -> None:
    points = series["points"]
    x, y = [p["x"] for p in points], [p[quantity] / unit for p in points]
    law = series["laws"][quantity]
    text = f"{series['name']}: {slope_text(law['upper'])}"
    axis.plot(x, y, "o", color=colour, markersize=4.5, label=text)
    upper = [v for v in x if v >= law["from"]]
    fit = law["upper"]
    line = [math.exp(fit["intercept"]) * v ** fit["slope"] / unit for v in upper]
    axis.plot(upper, line, color=colour, linewidth=1.4)
