"""How good a posterior is on data that it has not seen: figures with standard errors, beside the trained network's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from nullbayes.common.writing import plain, write_signed_json
from nullbayes.posterior.measuring.estimates import Estimate
from nullbayes.posterior.measuring.records import METRICS
from nullbayes.posterior.measuring.running import Question as Question
from nullbayes.posterior.measuring.running import measured

SCHEMA = 1
KIND = "nullbayes-evaluation"


class Figure(NamedTuple):
    """A figure and its standard error (NaN where it cannot be told)."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What `nullbayes.Posterior.evaluate` measured; ``print`` it.

    Attributes:
        figures: ``{method: {figure: Figure}}`` on the test data. Methods: ``"network"``; with validation data
            ``"temperature"`` and ``"calibrated"``; ``"evidence"`` (``"given"`` where the prior precision was set
            by hand); and the posteriors of ``against``. Figures: `nullbayes.posterior.measuring.records.METRICS`.
        differences: the same minus the trained network's, paired example by example.
        verdicts: ``{method: {figure: "better" | "worse" | "same"}}``: other than same only where the paired difference
            exceeds two of its standard errors.
        detection: one entry for each score and method: ``{"method", "score", "sets": {shift: {"auroc": Figure,
            "fpr95": Figure, "difference": Figure, "verdict": str}}}``; the difference is that of the AUROC to that of
            the trained network's max-softmax score, where there is one.
        train: ``{method: {figure: Figure}}`` of score and NLL on ``train``.
        classes, slices: ``{name: {"examples": n, "methods": {method: {figure: Figure}}}}``.
        thresholds: novelty that a share ``rate`` of ordinary inputs exceeds, with its 95 % interval, and what share of
            the test data and of each shifted set exceeds it.
        details: what the report draws and says besides: curves, examples, certificate, settings. JSON-able.
    """

    figures: dict[str, dict[str, Figure]]
    differences: dict[str, dict[str, Figure]]
    verdicts: dict[str, dict[str, str]]
    detection: list[dict[str, Any]]
    train: dict[str, dict[str, Figure]]
    classes: dict[str, dict[str, Any]]
    slices: dict[str, dict[str, Any]]
    thresholds: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> dict[str, str]:
        """Key and title of each method."""
        return {key: about["title"] for key, about in self.details["methods"].items()}

    def as_dict(self) -> dict[str, Any]:
        """Everything, JSON-able; a figure is ``{"value", "error"}``, NaN is None."""
        parts = {name: _written(getattr(self, name)) for name in _PARTS}
        out = {"kind": KIND, "schema": SCHEMA, **parts, **self.details}
        return dict(plain(out))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write :meth:`as_dict` as JSON with a checksum, whole or not at all; ``nullbayes report`` draws it.

        Raises:
            InputError: the folder cannot be made. OSError: the file cannot be written.
        """
        target = Path(path)
        write_signed_json(target, self.as_dict())
        return target

    def table(self) -> str:
        """Figures by method, and AUROC by score, as plain text; ``*``: better than the network, ``!``: worse."""
        keys = list(self.figures)
        names = [name for name in METRICS if any(name in f for f in self.figures.values())]
        titles = [self.methods[key] for key in keys]
        rows = [[METRICS[name].label, *(self._cell(k, name) for k in keys)] for name in names]
        for key in ("network", *keys[1:]):
            for name, figure in self.train.get(key, {}).items():
                label = f"training {METRICS[name].label}"
                row = next((r for r in rows if r[0] == label), None)
                if row is None:
                    row = [label, *("" for _ in keys)]
                    rows.append(row)
                row[1 + keys.index(key)] = f"{figure.value:.4f}"
        text = [_aligned(["", *titles], rows)]
        if self.detection:
            sets = list(self.detection[0]["sets"])
            found = [
                [self.methods[d["method"]], d["score"], *(_auroc(d["sets"][s]) for s in sets)]
                for d in self.detection
            ]
            text.append(_aligned(["AUROC", "score", *sets], found))
        return "\n\n".join(text)

    def _cell(self, key: str, name: str) -> str:
        figure = self.figures[key].get(name)
        if figure is None:
            return ""
        mark = {"better": " *", "worse": " !"}.get(self.verdicts.get(key, {}).get(name, ""), "  ")
        digits = METRICS[name].digits
        return f"{figure.value:.{digits}f} ± {figure.error:.{digits}f}{mark}"

    def __str__(self) -> str:
        test = self.details["data"]["test"]["examples"]
        legend = "± one standard error; * better, ! worse than the trained network by more than two"
        return f"Evaluation on {test:,} test examples ({legend})\n\n{self.table()}"

    def __repr__(self) -> str:
        test = self.details["data"]["test"]["examples"]
        return f"Evaluation({test} test examples, methods {', '.join(self.figures)})"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


_PARTS = (
    "figures",
    "differences",
    "verdicts",
    "detection",
    "train",
    "classes",
    "slices",
    "thresholds",
)


def evaluate(question: Question) -> Evaluation:
    """See `nullbayes.Posterior.evaluate`."""
    found = measured(question)
    verdicts = {
        key: {
            name: METRICS[name].judged(e.value, e.error)
            for name, e in differences.items()
            if METRICS[name].better
        }
        for key, differences in found.differences.items()
    }
    return Evaluation(
        _figures(found.figures),
        _figures(found.differences),
        verdicts,
        _figures(found.detection),
        _figures(found.train),
        _figures(found.classes),
        _figures(found.slices),
        _figures(found.thresholds),
        plain(found.details),
    )


def _figures(value: Any) -> Any:
    """Estimates within nested mappings and lists as `Figure`."""
    if isinstance(value, Estimate):
        return Figure(value.value, value.error)
    if isinstance(value, Mapping):
        return {key: _figures(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_figures(item) for item in value]
    return value


def _written(value: Any) -> Any:
    if isinstance(value, Figure):
        return value._asdict()
    if isinstance(value, Mapping):
        return {key: _written(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_written(item) for item in value]
    return value


def _auroc(entry: Mapping[str, Any]) -> str:
    mark = {"better": " *", "worse": " !"}.get(entry.get("verdict", ""), "  ")
    return f"{entry['auroc'].value:.3f} ± {entry['auroc'].error:.3f}{mark}"


def _aligned(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
