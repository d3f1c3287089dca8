"""What the demonstration says in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from nullbayes.demo.evaluation import Advance
from nullbayes.demo.training import Tick
from nullbayes.report import headline
from nullbayes.report.words import nearest_words

HEADINGS = {
    "point": "point\nestimate",
    "null_space": "null-space\ncalibrated",
    "laplace": "Laplace\ncalibrated",
    "null_space_evidence": "null-space\nevidence",
    "laplace_evidence": "Laplace\nevidence",
}


@contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Advance]:
    """A progress bar that is advanced by calling what this yields with a number."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{escape(title):<36}", total=total)
        yield lambda n: progress.advance(task, n)


@contextmanager
def ticking(console: Console, title: str, total: int) -> Iterator[Tick]:
    """A progress bar for :func:`nullbayes.demo.training.train`."""
    with bar(console, title, total) as advance:
        yield lambda words: advance(1)


def line(console: Console, text: str) -> None:
    """Print ``text`` as it is: no markup, no colours by guess."""
    console.print(text, markup=False, highlight=False)


def summary(
    console: Console, results: dict[str, Any], certificate: str, files: tuple[Path, ...]
) -> None:
    """The end of a run: table, certificate, notes, the result in a sentence, and where to look."""
    console.print()
    console.print(comparison(results))
    line(console, nearest_words(results))
    line(console, certificate)
    for note in results["notes"]:
        line(console, f"\nNote. {note}")
    line(console, f"\n{headline(results)}")
    names = " and ".join(str(file) for file in files)
    line(console, f"\n{results['seconds']['total']:.0f} s. Written: {names}")


def comparison(results: dict[str, Any]) -> Table:
    """The table: one column per method, one row per figure, the best of each row in bold. Fits in 80 columns."""
    shifts = results["dataset"]["shifts"]
    rows: list[tuple[str, tuple[str, ...], int, int]] = [
        # name, path into the figures, digits, which way is better
        ("train accuracy", ("train_accuracy",), 4, 1),
        ("test accuracy", ("test_accuracy",), 4, 1),
        ("NLL", ("nll",), 4, -1),
        ("Brier", ("brier",), 4, -1),
        ("ECE", ("ece",), 4, -1),
        *((f"AUROC {shift['title']}", ("auroc", key), 3, 1) for key, shift in shifts.items()),
    ]
    methods = results["methods"]
    table = Table(
        title=f"{results['dataset']['title']}, {results['dataset']['test']:,} test images",
        caption="AUROC: point estimate by 1 − confidence, posteriors by novelty",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        padding=(0, 1),
    )
    table.add_column("")
    for key in methods:
        table.add_column(HEADINGS.get(key, escape(key)), justify="right", no_wrap=True)
    for name, path, digits, way in rows:
        values = [round(_at(figures, path), digits) for figures in methods.values()]
        best = max(way * value for value in values)
        texts = [f"{value:.{digits}f}" for value in values]
        bold = (
            f"[bold]{text}[/bold]" if way * value == best else text
            for text, value in zip(texts, values, strict=True)
        )
        table.add_row(escape(name), *bold)
    priors = [figures["prior_precision"] for figures in methods.values()]
    table.add_row(
        "prior precision", *("–" if prior is None else f"{prior:.3g}" for prior in priors)
    )
    table.add_row("fit seconds", *(f"{figures['fit_seconds']:.1f}" for figures in methods.values()))
    return table


def _at(figures: dict[str, Any], path: tuple[str, ...]) -> float:
    value: Any = figures
    for key in path:
        value = value[key]
    return float(value)
