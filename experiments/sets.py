"""Sets of classes at one level: conformal ones, and those from probabilities of a network and of posteriors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from experiments import conformal, joint
from experiments.networks import identity
from experiments.runner import Job
from experiments.store import Key
from experiments.tables import Column, Page, Row, at, provenances

NAME = "sets"
TITLE = "Sets of classes"
VERSION = 1
LEVEL = 0.9
TASKS = ("breast cancer", "schools", "weather", "digits", "clothes")
SMALL = ("breast cancer", "digits")  # those of the small setting
SEEDS = {"small": 1, "processor": 3, "full": 10}
#: Where probabilities come from; the temperature and the second prior precision are tuned on the validation part.
SOURCES = {
    "network": "network",
    "temperature": "network, temperature",
    "null": "null space, by evidence",
    "null, prior": "null space, prior tuned",
    "laplace": "Laplace, all weights",
    "process": "fixed-mean process (FMGP)",
}
WAYS = {
    "mass": "classes up to 90 % of the probability",
    "likely": "conformal, one probability (LAC)",
    "adaptive": "conformal, adaptive (APS)",
    "regularised": "conformal, regularised (RAPS)",
}
WORDS = (
    "Data, networks and shifts of the joint predictions: 300 training examples, images rotated by 45 degrees, columns "
    "of tables with noise of one standard deviation. The level is .90. Conformal sets are set on the validation part, "
    "at most 300 examples, on which the temperature and the prior precision are tuned, too; the sets in the first rows "
    "use it for that alone. A set that covers more than its level is larger than it has to be; one that covers less "
    "breaks its word. Ties and the last class of adaptive sets are decided by random numbers of a fixed seed."
)


def jobs(
    setting: str, seeds: Sequence[int] | None = None, methods: Sequence[str] | None = None
) -> list[Job]:
    """One piece for each task and seed."""
    config = {"version": VERSION, "level": LEVEL, "train": joint.TRAIN, "samples": joint.SAMPLES}
    return [
        Job(Key(NAME, setting, seed, name), config, measure_job, (name, seed))
        for name in (SMALL if setting == "small" else TASKS)
        for seed in range(SEEDS[setting])
    ]


def measure_job(name: str, seed: int) -> dict[str, Any]:
    """Coverage and size of every kind of set from every source."""
    data = joint.make(name, seed)
    network = joint.trained(data, seed)
    classes = int(max(s.targets.max() for s in (data.train, data.validation, data.test))) + 1
    out: dict[str, Any] = {"task": name, "network": identity(network), "classes": classes}
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nb.errors.NullBayesWarning)
        for key, probabilities in sources(network, data, seed).items():
            p = [probabilities(x) for x in (data.validation.inputs, data.test.inputs, data.shifted)]
            found[key] = of_source(p, data.validation.targets, data.test.targets, seed)
    return {**out, "sources": found}


def sources(
    network: nn.Module, data: joint.Data, seed: int
) -> dict[str, Callable[[Tensor], Tensor]]:
    """By key: inputs ``(N, …)`` to class probabilities ``(N, C)``, float64."""
    pairs = (data.train.inputs, data.train.targets)
    check = (data.validation.inputs, data.validation.targets)
    point = joint.of_networks([network])
    heat = joint.tuned(point, check)
    out = {
        "network": _mean(point, 1.0),
        "temperature": _mean(point, heat),
    }
    null = nb.NullSpacePosterior(network).fit(pairs, joint.SAMPLES, progress=False)
    draws, alpha = joint.of_posterior(null), null.prior_precision
    out["null"] = _mean(draws, 1.0)
    null.calibrate(check, tune="prior", progress=False)
    out["null, prior"] = _mean(joint.spread(draws, (alpha / null.prior_precision) ** 0.5), 1.0)
    null.prior_precision = alpha
    laplace = nb.LaplacePosterior(network).fit(pairs, joint.SAMPLES, progress=False)
    out["laplace"] = _mean(joint.of_posterior(laplace), 1.0)
    out["process"] = _mean(joint.of_process(network, data, seed), 1.0)
    return out


def _mean(draws: joint.Draws, temperature: float) -> Callable[[Tensor], Tensor]:
    return lambda x: (draws(x) / temperature).double().softmax(2).mean(0)


def of_source(p: Sequence[Tensor], validation: Tensor, test: Tensor, seed: int) -> dict[str, Any]:
    """``p``: probabilities of the validation part, of test inputs and of those shifted."""
    generator = torch.Generator().manual_seed(seed)
    u = [torch.rand(len(part), generator=generator, dtype=torch.float64) for part in p]
    makers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "likely": lambda some, _: conformal.likely(some),
        "adaptive": conformal.adaptive,
        "regularised": conformal.regularised,
    }
    parts = ("clean", "shifted")
    out: dict[str, Any] = {
        "mass": {
            part: conformal.figures(conformal.by_mass(some, LEVEL), test)
            for part, some in zip(parts, p[1:], strict=True)
        }
    }
    for way, make in makers.items():
        own = make(p[0], u[0]).gather(1, validation[:, None])[:, 0]
        limit = conformal.threshold(own, LEVEL)
        out[way] = {
            part: conformal.figures(conformal.sets(make(some, v), limit), test)
            for part, some, v in zip(parts, p[1:], u[1:], strict=True)
        }
    return out


def report(setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
    """``sets.md`` and ``.json``; nothing where there are no runs."""
    if not runs:
        return
    page = Page(NAME, f"{TITLE} ({setting})")
    counts = {t: sum(r["result"]["task"] == t for r in runs) for t in TASKS}
    page.say(
        WORDS,
        "Seeds: " + ", ".join(f"{t} {n}" for t, n in counts.items() if n) + ".",
        provenances(runs, f"python -m experiments {NAME} --setting {setting}"),
    )
    for part, suffix in (("clean", ""), ("shifted", ", shifted")):
        for measure, title in (("coverage", "Coverage at .90"), ("size", "Mean number of classes")):
            page.table(f"{title}{suffix}", *table(runs, part, measure), "", "set")
    page.write(folder, runs)


def table(
    runs: Sequence[dict[str, Any]], part: str, measure: str
) -> tuple[list[Row], list[Column]]:
    """A row a kind of set and source, a column a task; sizes of sets of different coverage are not compared."""
    there = [t for t in TASKS if any(run["result"]["task"] == t for run in runs)]
    rows = []
    for way, words in WAYS.items():
        for key, title in SOURCES.items():
            found = [
                {r["result"]["task"]: r["result"]["sources"][key][way]}
                for r in runs
                if key in r["result"]["sources"]
            ]
            if found:
                rows.append(Row(f"{words}: {title}", found))
    return rows, [Column(t, at(t, part, measure), 0, 3) for t in there]
