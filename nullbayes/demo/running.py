"""Run the demonstration from data to report."""

from __future__ import annotations

import datetime
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nullbayes import report
from nullbayes.common.writing import make_folder, plain, write_signed_json, write_text
from nullbayes.demo import console as say
from nullbayes.demo import training
from nullbayes.demo.evaluation import (
    Method,
    differences,
    evaluate,
    nearest_input,
    number_of_inputs,
    point_method,
    posterior_method,
)
from nullbayes.demo.regression import certificate_fields, run_regression
from nullbayes.demo.tasks import Settings, Task, make_task
from nullbayes.errors import NullBayesWarning
from nullbayes.posterior import LaplacePosterior, NullSpacePosterior
from nullbayes.posterior.measuring.estimates import Estimate

SCHEMA = 2
POSTERIORS = (
    ("null_space", "Null-space posterior", NullSpacePosterior),
    ("laplace", "Full Laplace", LaplacePosterior),
)


def run_demo(
    settings: Settings | None = None,
    out: str | Path = "out/demo",
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, fit, measure; write ``results.json`` and ``report.html`` into ``out``; return the results.

    Both files are written at the end, each whole or not at all.

    Args:
        settings: what is run; None: the digits.
        out: the folder, made if need be.
        console: where to print; standard output if not given.
    """
    settings = settings or Settings()
    report.require_packages()  # found missing before the work, not after it
    console, out = console or Console(), Path(out)
    make_folder(out)
    clock = Clock()
    task = make_task(settings)
    _train(task, settings, console)
    clock.lap("training")
    results, printed = _measure(task, settings, console, clock)
    areas = _nearest(task, console)
    results["nearest_input"] = {"auroc": areas, "seconds": clock.lap("measuring")}
    with say.ticking(console, "the in-between picture", settings.regression_epochs) as tick:
        results["regression"] = run_regression(
            seed=settings.seed,
            epochs=settings.regression_epochs,
            samples=max(settings.samples, 30),
            tick=tick,
        )
    clock.lap("regression")
    results = plain(
        {
            "schema": SCHEMA,
            "dataset": task.describe(),
            **results,
            "settings": _effective(task, settings),
            "seconds": {**clock.seconds, "total": sum(clock.seconds.values())},
            "environment": environment(),
        }
    )
    html = report.render_report(results)  # before either file is written
    write_signed_json(out / "results.json", results)
    write_text(out / "report.html", html)
    say.summary(console, results, printed, (out / "report.html", out / "results.json"))
    return results


def _train(task: Task, settings: Settings, console: Console) -> None:
    with say.ticking(console, f"training on {len(task.data.train):,} images", task.epochs) as tick:
        training.train(
            task.model,
            task.data.train,
            training.Recipe(task.epochs, task.batch_size, task.learning_rate),
            seed=settings.seed,
            tick=tick,
        )


def _measure(
    task: Task, settings: Settings, console: Console, clock: Clock
) -> tuple[dict[str, Any], str]:
    """All methods on the same images: figures, curves, paths, certificates; and the certificate as printed."""
    data = task.measured
    figures: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    estimates: dict[str, dict[str, Estimate]] = {}
    paths: dict[str, Any] = {}
    certificates: dict[str, Any] = {}
    printed: dict[str, str] = {}
    notes: list[str] = []

    def measure(key: str, method: Method, seconds: float, prior_precision: float | None) -> None:
        words = f"measuring: {method.title.lower()}"
        with say.bar(console, words, number_of_inputs(data, task.shifts)) as advance:
            figures[key], curves[key], estimates[key] = evaluate(
                method, data, task.shifts, advance=advance
            )
        figures[key].update(fit_seconds=seconds, prior_precision=prior_precision)
        clock.lap("measuring")

    measure("point", point_method(task.model), clock.seconds["training"], None)
    for key, title, kind in POSTERIORS:
        say.line(console, f"fitting: {title.lower()}")
        posterior = kind(task.model, likelihood="classification")
        posterior.fit(data.train.loader(), num_samples=settings.samples, seed=settings.seed)
        seconds = clock.lap(f"fitting {key}")
        evidence = float(posterior.prior_precision)
        short = f"{title.removesuffix(' posterior')}, by evidence"
        measure(f"{key}_evidence", posterior_method(short, posterior), seconds, evidence)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NullBayesWarning)
            path = posterior.calibrate(data.validation.loader())
        notes += [f"{title}: {warning.message}" for warning in caught]
        clock.lap(f"calibrating {key}")
        chosen = float(posterior.prior_precision)
        measure(key, posterior_method(title, posterior), seconds, chosen)
        paths[key] = {**path.as_dict(), "evidence": evidence}
        certificates[key] = certificate_fields(posterior.certificate)
        printed[key] = str(posterior.certificate)
    order = sorted(figures, key=lambda key: key.endswith("_evidence"))  # the main rows first
    return {
        "methods": {key: figures[key] for key in order},
        "differences": differences(estimates),
        "certificate": certificates["null_space"],
        "certificates": certificates,
        "prior_path": paths,
        "notes": notes,
        "curves": {key: curves[key] for key in order},
    }, printed["null_space"]


def _nearest(task: Task, console: Console) -> dict[str, float]:
    """What the distance to the nearest training image tells apart, beside the methods that take a network."""
    data = task.data
    count = len(data.test) + sum(len(shift.inputs) for shift in task.shifts.values())
    with say.bar(console, "measuring: nearest training image", count) as advance:
        return nearest_input(data.train.inputs, data.test.inputs, task.shifts, advance=advance)


def _effective(task: Task, settings: Settings) -> dict[str, Any]:
    """The settings with every default filled in."""
    return {
        "dataset": settings.dataset,
        "seed": settings.seed,
        "examples": task.examples,
        "samples": settings.samples,
        "epochs": task.epochs,
        "batch_size": task.batch_size,
        "learning_rate": task.learning_rate,
        "regression_epochs": settings.regression_epochs,
        "predictive": "linearised",
    }


def environment() -> dict[str, Any]:
    """What the figures were made with."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("nullbayes")
    except PackageNotFoundError:  # run from a checkout that is not installed
        ours = "unknown"
    return {
        "nullbayes": ours,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


class Clock:
    """Seconds by stage; stages of one name add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> float:
        """End a stage here and return its seconds."""
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        return spent
