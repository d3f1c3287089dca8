"""Progress of long work on the terminal, and nothing where there is none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
Tick = Callable[[float], None]

# Stages of a fit, in order: what `Plan.seconds` predicts and `Certificate.stages` says.
ROWS, GRAM, FACTORISATION = "Jacobian rows", "Gram matrix, QR", "factorisation"
PROJECTION, CERTIFICATE, AUDIT = "projection", "certificate", "audit"
COMMUNICATION = "communication"  # of several processes
PRIOR = "prior precision"  # a bar of its own within the factorisation


class Laps:
    """Seconds of consecutive stages of a fit."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """What passed since the last call was ``stage``."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now

    def move(self, seconds: float, source: str, to: str) -> None:
        """So many seconds of one stage were really another's."""
        self.seconds[source] -= seconds
        self.seconds[to] = self.seconds.get(to, 0.0) + seconds

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Stages:
    """Named stages with a bar each. Bars go to standard error and vanish when the work is done."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def track(self, items: Iterable[T], label: str) -> Iterator[T]:
        """Yield ``items`` under a bar; the total is their ``len`` where they have one."""
        if self._progress is None:
            yield from items
            return
        try:
            total: int | None = len(items)  # type: ignore[arg-type]
        except TypeError:
            total = None
        task = self._progress.add_task(label, total=total)
        for item in items:
            yield item
            self._progress.advance(task)
        self._progress.update(task, total=self._progress.tasks[task].completed)

    def fraction(self, label: str) -> Tick | None:
        """A callback that takes the share done, from 0 to 1."""
        if self._progress is None:
            return None
        bar, task = self._progress, self._progress.add_task(label, total=100)
        return lambda share: bar.update(task, completed=round(100 * share))

    def towards(self, label: str) -> Callable[[int, float], None] | None:
        """A callback that takes iterations done and how far above the goal (at 1) the residual is."""
        if self._progress is None:
            return None
        bar, task = self._progress, self._progress.add_task(label, total=100)
        first: list[float] = []

        def report(done: int, ratio: float) -> None:
            ratio = min(max(ratio, 1.0), 1e300)
            if not first or ratio > first[0]:
                first[:] = [ratio]
            # Residuals fall geometrically: the share done is one of logarithms.
            share = 1 - math.log(ratio) / math.log(first[0]) if first[0] > 1 else 1.0
            text = f"{label} {done}: {ratio:.3g} × goal"
            bar.update(task, completed=round(100 * share), description=f"{text:<28}")

        return report


@contextmanager
def stages(*, show: bool) -> Iterator[Stages]:
    """Bars for the length of a ``with`` block; an interrupt or an error removes them."""
    if not show:
        yield Stages(None)
        return
    columns: list[Any] = [
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Stages(progress)
