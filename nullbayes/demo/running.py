"""Run the demonstration from data to report."""

from __future__ import annotations

import datetime
import os
import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .. import datasets
from ..datasets import Dataset
from ..errors import InputError, NullBayesWarning
from ..posterior import LaplacePosterior, NullSpacePosterior
from ..report.writing import make_folder, plain, write_json, write_text
from . import console as say
from . import models, training
from .evaluation import Method, Shift, evaluate, number_of_inputs, point_method, posterior_method
from .regression import certificate_fields, run_regression

SCHEMA = 1
HELD_OUT = (0, 4)  # digits that training never sees
ANGLES = (30, 60, 90, 120, 150)


@dataclass(frozen=True)
class Task:
    """One data set with its network and its shifts."""

    title: str
    data: Dataset
    model: nn.Module
    shifts: dict[str, Shift]
    examples: int  # training images whose predictions are kept
    epochs: int
    batch_size: int
    learning_rate: float


def run_demo(
    dataset: str = "digits",
    out: str | Path = "out/demo",
    data_dir: str | Path | None = None,
    seed: int = 0,
    *,
    examples: int | None = None,
    samples: int = 30,
    epochs: int | None = None,
    held_out: Sequence[int] | None = None,
    regression_epochs: int = 1500,
    test_images: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, fit, measure; write ``results.json`` and ``report.html`` into ``out``; return the results.

    ``dataset`` is "digits" or "fashion-mnist"; ``held_out`` are the digits kept from training (0 and 4). ``examples``
    is how many training images the posteriors keep (digits: also how many the network is trained on), ``samples`` how
    many weight samples they draw, ``test_images`` a limit on the test images and on the images of each shift. Both files are written at the end, each whole or not at all.
    """
    from .. import report  # matplotlib and jinja2: found missing before the work, not after it

    report.require_packages()
    console = console or Console()
    out = Path(out)
    make_folder(out)
    _check(samples=samples, examples=examples, epochs=epochs, regression_epochs=regression_epochs)
    if dataset not in TASKS:
        raise InputError(f"Unknown data set {dataset!r}: choose one of {', '.join(TASKS)}.")
    started = time.perf_counter()
    clock = _Clock()

    task = TASKS[dataset](data_dir, seed, examples, epochs, held_out)
    data, model = task.data, task.model
    kept = data.train[: task.examples]
    with say.ticking(console, f"training on {len(data.train):,} images", task.epochs) as tick:
        training.train(
            model,
            data.train,
            epochs=task.epochs,
            batch_size=task.batch_size,
            learning_rate=task.learning_rate,
            seed=seed,
            tick=tick,
        )
    clock.lap("training")

    # Every method is measured on the images whose predictions are to be kept, and on the same test images and shifts.
    measured = Dataset(data.name, kept, data.validation, data.test, data.classes)
    figures: dict[str, Any] = {}
    curves: dict[str, Any] = {}

    def measure(key: str, method: Method, seconds: float, posterior: Any = None) -> None:
        with say.bar(
            console, f"measuring: {method.title.lower()}", number_of_inputs(measured, task.shifts)
        ) as bar:
            figures[key], curves[key] = evaluate(method, measured, task.shifts, advance=bar)
        figures[key]["fit_seconds"] = seconds
        figures[key]["prior_precision"] = (
            None if posterior is None else float(posterior.prior_precision)
        )

    measure("point", point_method(model), clock.seconds["training"])
    certificates, paths, printed = {}, {}, {}
    notes: list[str] = []
    for key, title, kind in (
        ("null_space", "Null-space posterior", NullSpacePosterior),
        ("laplace", "Full Laplace", LaplacePosterior),
    ):
        clock.lap("measuring")
        console.print(f"fitting: {title.lower()}", highlight=False)
        posterior = kind(model, likelihood="classification")
        posterior.fit(kept.loader(), num_samples=samples, seed=seed, progress=True)
        seconds = clock.lap(f"fitting {key}")
        measure(
            f"{key}_evidence",
            posterior_method(f"{title.removesuffix(' posterior')}, by evidence", posterior),
            seconds,
            posterior,
        )
        evidence = float(posterior.prior_precision)
        clock.lap("measuring")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NullBayesWarning)
            calibration = posterior.calibrate(data.validation.loader())
        notes += [f"{title}: {warning.message}" for warning in caught]
        clock.lap(f"calibrating {key}")
        measure(key, posterior_method(title, posterior), seconds, posterior)
        paths[key] = {**calibration.as_dict(), "evidence": evidence}
        certificates[key] = certificate_fields(posterior.certificate)
        printed[key] = str(posterior.certificate)
    clock.lap("measuring")

    with say.ticking(console, "the in-between picture", regression_epochs) as tick:
        regression = run_regression(
            seed=seed, epochs=regression_epochs, samples=max(samples, 30), tick=tick
        )
    clock.lap("regression")

    order = ("point", "null_space", "laplace", "null_space_evidence", "laplace_evidence")
    clock.seconds["total"] = time.perf_counter() - started
    results: dict[str, Any] = plain(
        {
            "schema": SCHEMA,
            "dataset": _describe(task, measured),
            "methods": {key: figures[key] for key in order},
            "certificate": certificates["null_space"],
            "certificates": certificates,
            "prior_path": paths,
            "curves": {key: curves[key] for key in order},
            "regression": regression,
            "settings": {
                "dataset": dataset,
                "seed": seed,
                "examples": len(kept),
                "samples": samples,
                "epochs": task.epochs,
                "batch_size": task.batch_size,
                "learning_rate": task.learning_rate,
                "regression_epochs": regression_epochs,
                "predictive": "linearised",
            },
            "notes": notes,
            "seconds": clock.seconds,
            "environment": environment(),
        }
    )
    html = report.render_report(results)
    write_json(out / "results.json", results)
    write_text(out / "report.html", html)

    console.print()
    console.print(say.comparison(results))
    console.print(printed["null_space"], markup=False, highlight=False)
    for note in notes:
        console.print(f"\nNote. {note}", markup=False, highlight=False)
    console.print(f"\n{report.headline(results)}", markup=False, highlight=False)
    console.print(
        f"\n{clock.seconds['total']:.0f} s. Written: {out / 'report.html'} and {out / 'results.json'}",
        markup=False,
        highlight=False,
    )
    return results


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


def _digits(
    data_dir: str | Path | None,
    seed: int,
    examples: int | None,
    epochs: int | None,
    held_out: Sequence[int] | None,
) -> Task:
    if data_dir is not None:
        raise InputError("`data_dir` goes with fashion-mnist; the digits come with scikit-learn.")
    data = datasets.digits(
        train=examples or 500, validation=300, held_out=held_out or HELD_OUT, seed=seed
    )
    shifts = _common_shifts(data, seed)
    if data.held_out is not None:
        names = " and ".join(data.held_out_classes)
        held = Shift(
            "held-out classes", f"digits {names}, which training never saw", data.held_out.inputs
        )
        shifts = {"held_out": held, **shifts}
    model = models.seeded(models.digits_net, len(data.classes), seed=seed)
    return Task("Handwritten digits", data, model, shifts, len(data.train), epochs or 150, 64, 3e-3)


def _fashion_mnist(
    data_dir: str | Path | None,
    seed: int,
    examples: int | None,
    epochs: int | None,
    held_out: Sequence[int] | None,
) -> Task:
    if held_out is not None:
        raise InputError(
            "`held_out` goes with the digits; Fashion-MNIST's network is trained on all ten classes."
        )
    data = datasets.fashion_mnist(data_dir, validation=1000, test=2000, seed=seed)
    examples = examples or 1000
    if examples > len(data.train):
        raise InputError(
            f"{examples} examples were asked for; there are {len(data.train)} training images."
        )
    digits = datasets.digits(train=1, validation=0, seed=seed).test.inputs
    shifts = {
        "digits": Shift(
            "digits", "handwritten digits, enlarged to 28 × 28", datasets.rescaled(digits, 28)
        ),
        **_common_shifts(data, seed),
    }
    model = models.seeded(models.lenet, 10, seed=seed)
    return Task("Fashion-MNIST", data, model, shifts, examples, epochs or 4, 128, 2e-3)


TASKS = {"digits": _digits, "fashion-mnist": _fashion_mnist}


def _common_shifts(data: Dataset, seed: int) -> dict[str, Shift]:
    images = data.test.inputs[: 2000 // len(ANGLES)]
    return {
        "rotated": Shift(
            "rotated",
            f"test images turned by {ANGLES[0]}° to {ANGLES[-1]}°",
            datasets.rotated(images, ANGLES),
            tuple((f"{angle}°", len(images)) for angle in ANGLES),
        ),
        "noise": Shift(
            "noise", "images of uniform noise", datasets.noise_like(data.test.inputs, seed=seed + 2)
        ),
    }


def _describe(task: Task, measured: Dataset) -> dict[str, Any]:
    return {
        "name": task.data.name,
        "title": task.title,
        "classes": list(task.data.classes),
        "held_out": list(task.data.held_out_classes),
        "trained_on": len(task.data.train),
        "kept": len(measured.train),
        "validation": len(measured.validation),
        "test": len(measured.test),
        "image": list(measured.test.inputs.shape[1:]),
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "shifts": {
            key: {
                "title": shift.title,
                "words": shift.words,
                "count": len(shift.inputs),
                "groups": [name for name, _ in shift.groups],
            }
            for key, shift in task.shifts.items()
        },
    }


def _check(**counts: int | None) -> None:
    for name, count in counts.items():
        least = 2 if name == "samples" else 1
        if count is not None and count < least:
            raise InputError(f"`{name}` must be at least {least}, got {count}.")


class _Clock:
    """Seconds by stage; stages of one name add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> float:
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        return spent


__all__: Sequence[str] = ("environment", "run_demo")
