"""Tables in Markdown and JSON: mean ± standard error over seeds, the best of a column in bold."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.store import rounded
from nullbayes.common.writing import plain, write_text

Figures = Mapping[str, Any]
Getter = Callable[[Figures], float | str | None]


@dataclass(frozen=True)
class Column:
    """One column: where its value is found in the figures of one run, and which way is better."""

    title: str
    value: Getter
    better: int = 0  # 1: larger, -1: smaller, 0: neither
    digits: int = 3  # negative: powers of ten


@dataclass(frozen=True)
class Row:
    """One row: the figures of every seed."""

    title: str
    runs: Sequence[Figures]


@dataclass(frozen=True)
class Summary:
    """Mean and standard error of one cell; text where the value is text."""

    mean: float | None
    error: float | None = None
    count: int = 0
    text: str = ""

    def shown(self, digits: int) -> str:
        if self.text:
            return self.text
        if self.mean is None:
            return "–"
        out = number(self.mean, digits)
        return out if self.error is None else f"{out} ± {number(self.error, digits)}"


def number(value: float, digits: int) -> str:
    """Fixed digits; powers of ten where ``digits`` is negative or the number is very large."""
    return f"{value:.1e}" if digits < 0 or abs(value) >= 1e6 else f"{value:.{digits}f}"


def summarise(values: Sequence[float | str | None]) -> Summary:
    """Mean and standard error ``sd / √n`` over seeds; one seed has no error, a missing value counts for nothing."""
    texts = sorted({v for v in values if isinstance(v, str)})
    if texts:
        return Summary(None, None, len(values), "; ".join(texts))
    found = [float(v) for v in values if v is not None and math.isfinite(float(v))]
    if not found:
        return Summary(None)
    error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else None
    return Summary(statistics.fmean(found), error, len(found))


def summaries(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[Summary]]:
    return [[summarise([c.value(run) for run in row.runs]) for c in columns] for row in rows]


def markdown(rows: Sequence[Row], columns: Sequence[Column], first: str = "") -> list[str]:
    """Lines of a table; in bold what no other row beats at the digits shown."""
    cells = summaries(rows, columns)
    lines = [
        "| " + " | ".join([first, *(c.title for c in columns)]) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    best = []
    for index, column in enumerate(columns):
        means = [row[index].mean for row in cells]
        known = [round(m, column.digits) * column.better for m in means if m is not None]
        best.append(max(known) if column.better and len(set(known)) > 1 else None)
    for row, values in zip(rows, cells, strict=True):
        shown = []
        for column, top, cell in zip(columns, best, values, strict=True):
            text = cell.shown(column.digits)
            win = (
                top is not None
                and cell.mean is not None
                and round(cell.mean, column.digits) * column.better == top
            )
            shown.append(f"**{text}**" if win else text)
        lines.append("| " + " | ".join([row.title, *shown]) + " |")
    return lines


def as_dict(rows: Sequence[Row], columns: Sequence[Column]) -> dict[str, Any]:
    """The same table for JSON: mean, error and count by row and column."""
    cells = summaries(rows, columns)
    return {
        row.title: {
            c.title: cell.text or {"mean": cell.mean, "error": cell.error, "count": cell.count}
            for c, cell in zip(columns, values, strict=True)
        }
        for row, values in zip(rows, cells, strict=True)
    }


def provenance(environment: Mapping[str, Any], commit: str, command: str) -> str:
    """What figures were made with, and the command that makes them."""
    return (
        f"torch {environment['torch']}, {environment['cores']} cores, commit {commit}. `{command}`"
    )


def provenances(runs: Sequence[Mapping[str, Any]], command: str) -> str:
    """Of pieces of one table: on which machines how many were measured, of which commits, and the command."""
    counts: dict[str, int] = {}
    commits: dict[str, None] = {}
    for run in runs:
        where = run["environment"]
        words = f"torch {where['torch']}, {where['cores']} cores"
        counts[words] = counts.get(words, 0) + 1
        commits[where["commit"]] = None
    every = "; ".join(f"{words} ({count} pieces)" for words, count in counts.items())
    machines = every if len(counts) > 1 else next(iter(counts))
    return f"{machines}, one core each; commits {', '.join(commits)}. `{command}`"


@dataclass
class Page:
    """A page of tables as it grows, for ``<name>.md`` and ``<name>.json``."""

    name: str
    title: str

    def __post_init__(self) -> None:
        self.lines = [f"# {self.title}", ""]
        self.tables: dict[str, Any] = {}

    def say(self, *paragraphs: str) -> None:
        for text in paragraphs:
            self.lines += [text, ""]

    def table(
        self,
        title: str,
        rows: Sequence[Row],
        columns: Sequence[Column],
        words: str = "",
        first: str = "",
    ) -> None:
        self.lines += [f"## {title}", ""]
        if words:
            self.say(words)
        self.lines += [*markdown(rows, columns, first), ""]
        self.tables[title] = as_dict(rows, columns)

    def picture(self, file: str, words: str) -> None:
        self.lines += [f"![{words}]({file})", ""]

    def write(self, folder: Path, runs: Sequence[Mapping[str, Any]]) -> None:
        """Both files, each whole or not at all."""
        write_text(folder / f"{self.name}.md", "\n".join(self.lines).rstrip() + "\n")
        value = {"experiment": self.name, "tables": self.tables, "runs": list(runs)}
        text = json.dumps(rounded(plain(value)), allow_nan=False, ensure_ascii=False)
        write_text(folder / f"{self.name}.json", text + "\n")


def at(*path: str) -> Getter:
    """The value at a path of keys; None where there is none."""

    def get(figures: Figures) -> Any:
        value: Any = figures
        for key in path:
            if not isinstance(value, Mapping) or key not in value:
                return None
            value = value[key]
        return value

    return get
