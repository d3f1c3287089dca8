"""Figures of the evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.tables import summarise

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}
# By method: the same colour in every figure. Ours is drawn last and thickest.
COLOURS = {
    "point": "#8a8a8a",
    "temperature": "#bdbdbd",
    "dropout": "#c2a300",
    "ensemble": "#222222",
    "swag": "#2a9d5c",
    "laplace_diag": "#e3a08a",
    "laplace_kron": "#d1641a",
    "laplace_last": "#b07aa1",
    "laplace_full": "#a11d33",
    "null_predictions": "#1f6feb",
    "null_outputs": "#79b0f5",
    "null_loss": "#17becf",
    "null_last": "#5e60ce",
    "null_last_outputs": "#b39ddb",
    "null_part": "#0b3d91",
    "null_part_outputs": "#4f7bd1",
}


@contextmanager
def drawing(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Yields axes ``(rows, columns)``; the file appears whole when the block ends well."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained"
        )
        try:
            yield axes
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part.png")
            figure.savefig(part, dpi=120)
            part.replace(path)
        finally:
            plt.close(figure)


def line_style(method: str) -> dict[str, Any]:
    ours = method == "null_predictions"
    return {
        "color": COLOURS.get(method, "#555555"),
        "linewidth": 2.4 if ours else 1.3,
        "zorder": 5 if ours else 3,
        "linestyle": "--" if method in ("ensemble", "dropout") else "-",
    }


def shift_curves(path: Path, methods: dict[str, tuple[str, list[Any]]]) -> None:
    """Accuracy, NLL and ECE against the strength of each shift; ``methods``: name -> (title, figures of every seed)."""
    first = next(iter(methods.values()))[1][0]
    kinds = list(first["shifted"])
    measures = (("accuracy", "accuracy"), ("nll", "NLL"), ("ece", "ECE"))
    with drawing(path, len(measures), len(kinds), (3.1 * len(kinds), 7.2)) as axes:
        for column, kind in enumerate(kinds):
            strengths = list(first["shifted"][kind])
            for row, (measure, label) in enumerate(measures):
                axis = axes[row, column]
                for method, (title, runs) in methods.items():
                    cells = [
                        summarise([run["shifted"][kind][s][measure] for run in runs])
                        for s in strengths
                    ]
                    values = [c.mean for c in cells]
                    errors = [c.error or 0.0 for c in cells]
                    x = range(len(strengths))
                    axis.plot(x, values, label=title, **line_style(method))
                    low = [v - e for v, e in zip(values, errors, strict=True)]  # type: ignore[operator]
                    high = [v + e for v, e in zip(values, errors, strict=True)]  # type: ignore[operator]
                    axis.fill_between(x, low, high, color=COLOURS.get(method), alpha=0.12, lw=0)
                axis.set_xticks(range(len(strengths)), strengths, fontsize=7, rotation=45)
                if not column:
                    axis.set_ylabel(label)
                if not row:
                    axis.set_title(kind, loc="left", weight="bold")
        axes[0, -1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))


def bars(
    path: Path,
    groups: Sequence[str],
    methods: dict[str, tuple[str, list[list[float | None]]]],
    label: str,
    bottom: float = 0.0,
    line: float | None = None,
) -> None:
    """One group of bars for each of ``groups``; ``methods``: name -> (title, values of every seed for each group)."""
    width = 0.84 / len(methods)
    with drawing(path, 1, 1, (1.6 + 1.7 * len(groups), 3.8)) as axes:
        axis = axes[0, 0]
        for k, (method, (title, values)) in enumerate(methods.items()):
            cells = [summarise(v) for v in values]
            x = [i + (k - (len(methods) - 1) / 2) * width for i in range(len(groups))]
            heights = [(c.mean if c.mean is not None else bottom) - bottom for c in cells]
            axis.bar(
                x,
                heights,
                width * 0.92,
                bottom=bottom,
                yerr=[c.error or 0.0 for c in cells],
                error_kw={"lw": 0.8},
                color=COLOURS.get(method, "#555555"),
                label=title,
            )
        if line is not None:
            axis.axhline(line, color="#555555", linestyle=":", linewidth=1)
        axis.set_xticks(range(len(groups)), groups)
        axis.grid(axis="x", visible=False)
        axis.set_ylabel(label)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1))
