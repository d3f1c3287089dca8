"""What the demonstration says in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .evaluation import Advance
from .training import Tick


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
        task = progress.add_task(f"{escape(title):<34}", total=total)
        yield lambda n: progress.advance(task, n)


@contextmanager
def ticking(console: Console, title: str, total: int) -> Iterator[Tick]:
    """A progress bar for :func:`nullbayes.demo.training.train`."""
    with bar(console, title, total) as advance:
        yield lambda words: advance(1)


def comparison(results: dict[str, Any]) -> Table:
    """The table: one row per method, one column per figure, the best of each column in bold."""
    shifts = results["dataset"]["shifts"]
    columns: list[tuple[str, tuple[str, ...], int, int]] = [
        # heading, path into the figures, digits, which way is better
        ("train acc", ("train_accuracy",), 4, 1),
        ("test acc", ("test_accuracy",), 4, 1),
        ("NLL", ("nll",), 4, -1),
        ("Brier", ("brier",), 4, -1),
        ("ECE", ("ece",), 4, -1),
        *((f"AUROC\n{shift['title']}", ("auroc", key), 3, 1) for key, shift in shifts.items()),
    ]
    methods = results["methods"]
    table = Table(title=f"{results['dataset']['title']}: test figures", title_justify="left", pad_edge=False)
    table.add_column("method")
    best = {}
    for heading, path, digits, way in columns:
        table.add_column(heading, justify="right", no_wrap=True)
        best[path] = max(way * round(_at(figures, path), digits) for figures in methods.values())
    table.add_column("prior\nprecision", justify="right")
    table.add_column("fit\nseconds", justify="right")
    for figures in methods.values():
        cells = []
        for _, path, digits, way in columns:
            value = round(_at(figures, path), digits)
            text = f"{value:.{digits}f}"
            cells.append(f"[bold]{text}[/bold]" if way * value == best[path] else text)
        prior = figures["prior_precision"]
        table.add_row(
            escape(figures["title"]), *cells, "" if prior is None else f"{prior:.3g}", f"{figures['fit_seconds']:.1f}"
        )
    return table


def _at(figures: dict[str, Any], path: tuple[str, ...]) -> float:
    value: Any = figures
    for key in path:
        value = value[key]
    return float(value)
