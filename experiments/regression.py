"""Measure a method on a regression task.

What is tuned here is the noise, for every method: with the prior by the evidence (SWAG: its own scale). Rows whose
prior is tuned instead stand beside.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from experiments import measures, networks, tasks
from experiments.classification import case_of, describe, timed
from experiments.methods import METHODS, Case, Draws, Method
from experiments.methods.base import Variant
from experiments.methods.point import tuned_temperature
from experiments.runner import Job, forget_peak
from experiments.store import Key
from experiments.tasks import Scale
from nullbayes.common.memory import peak_bytes
from nullbayes.datasets import Split

TIMED = 200
RULE = 2  # raised when what is tuned changes


def jobs(
    experiment: str,
    setting: str,
    scale: Scale,
    seeds: Sequence[int],
    names: Sequence[str],
    methods: Sequence[str],
) -> list[Job]:
    """All methods on all data sets ``names`` from one seed, one process each; networks are made on the way."""
    return [
        Job(
            Key(experiment, setting, seed, method),
            {
                **scale.config(),
                "names": list(names),
                "version": METHODS[method].version,
                "rule": RULE,
            },
            measure_job,
            (names, seed, scale, method),
        )
        for seed in seeds
        for method in methods
    ]


def measure_job(names: Sequence[str], seed: int, scale: Scale, method: str) -> dict[str, Any]:
    """For the runner: one method on every data set."""
    return {
        "sets": {
            name: measure(METHODS[method](), case_of(tasks.make(name, seed, scale)))
            for name in names
        }
    }


def measure(method: Method, case: Case) -> dict[str, Any]:
    """All figures of one method on one data set."""
    method.fit(case)
    held = forget_peak()
    started = time.perf_counter()
    task = case.task
    described, noisy = noise_tuned(method, case)
    variants: dict[str, dict[str, Any]] = {key: {} for key in described}
    for part, split in (("train", task.measured), ("test", task.data.test)):
        found = method.draws(split.inputs)
        for key, (own, scale) in noisy.items():
            found[key] = replace(found[own], temperature=scale)
        for key, draws in found.items():
            variants[key][part] = figures(case, draws, split)
    measured = time.perf_counter() - started
    peak = peak_bytes(torch.device("cpu"))
    for key, seconds in timed(method, task.data.test.inputs[:TIMED]).items():
        variants[key]["seconds_per_1000"] = seconds
    for key, (own, _) in noisy.items():
        variants[key]["seconds_per_1000"] = variants[own]["seconds_per_1000"]
    point = networks.outputs(case.network, task.measured.inputs)
    rmse = float((point - task.measured.targets).double().square().mean().sqrt())
    return {
        "method": method.name,
        "single_network": method.single_network,
        "variants": {key: {**describe(described[key]), **variants[key]} for key in variants},
        "point_train_rmse": rmse,
        "noise": case.noise,
        "parameters": sum(p.numel() for p in case.network.parameters()),
        "train": len(case.train),
        "test": len(task.data.test),
        "seconds": {**method.seconds, "measuring": measured},
        "peaks": {**method.peaks, "before_predictions": held, "predictions": peak},
        "details": method.details,
    }


def noise_tuned(
    method: Method, case: Case
) -> tuple[dict[str, Variant], dict[str, tuple[str, float]]]:
    """All variants, with a tuned noise beside the one whose prior (or scale) is the method's own.

    The new variant stands for its method. Returns the variants, and by new key: the key whose draws it takes, and the
    factor on the noise.
    """
    name = method.name
    own = "swag" if name == "swag" else f"{name}_evidence"
    if own not in method.variants:
        return dict(method.variants), {}
    draws = method.draws(case.validation.inputs, [own])[own]
    scale, path = tuned_temperature(case, draws)
    key, variants = f"{own}_noise", dict(method.variants)
    for other, variant in method.variants.items():
        if variant.headline:
            title = variant.title
            what = "scale" if name == "swag" else "prior"
            variants[other] = replace(variant, title=f"{title}, tuned {what}", headline=False)
            before = "" if name != "swag" else "learning rate of its SGD, "
            new = Variant(
                f"{title}, tuned noise", f"{before}noise", scale, headline=True, path=path
            )
            variants[key] = new
    return variants, {key: (own, scale)}


def figures(case: Case, draws: Draws, split: Split) -> dict[str, float]:
    """RMSE, NLL, coverage; and the share of the predictive variance that is not noise."""
    total = case.total(draws)
    found = measures.regression(draws.mean, total, split.targets)
    found["epistemic_share"] = float((draws.variance.double() / total).mean())
    return found
