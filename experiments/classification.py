"""Measure a method on a classification task: everything that the tables need, as plain numbers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from experiments import measures, networks, tasks
from experiments.methods import METHODS, Case, Method
from experiments.networks import FIRST, train_job, trained
from experiments.runner import Job, forget_peak
from experiments.store import Key
from experiments.tasks import Scale, Task
from nullbayes.common.memory import peak_bytes

TIMED = 200  # inputs on which each variant's prediction is timed


def jobs(
    experiment: str,
    setting: str,
    scale: Scale,
    seeds: Sequence[int],
    methods: Sequence[str],
    function: Any = None,
) -> list[Job]:
    """Networks first, then methods: of one seed after the other, so that something is complete early."""
    out: list[Job] = []
    config = scale.config()
    for seed in seeds:
        needed = [FIRST]
        for name in methods:
            needed += [w for w in METHODS[name].required(scale) if w not in needed]
        for which in needed:
            key = Key(experiment, setting, seed, f"network-{which}")
            network = {"recipe": config["recipe"], "train": scale.train, "options": scale.options}
            out.append(Job(key, network, train_job, (experiment, seed, scale, which), keep=False))
        for name in methods:
            key = Key(experiment, setting, seed, name)
            mine = {**config, "version": METHODS[name].version}
            out.append(Job(key, mine, function or measure_job, (experiment, seed, scale, name)))
    return out


def measure_job(experiment: str, seed: int, scale: Scale, method: str) -> dict[str, Any]:
    """For the runner: fit, tune and measure one method."""
    task = tasks.make(experiment, seed, scale)
    return measure(METHODS[method](), case_of(task))


def case_of(task: Task) -> Case:
    """The case with the network that all methods share, trained if need be."""
    network = trained(task, FIRST)
    noise = None
    if task.kind == "regression":
        residual = task.data.train.targets - networks.outputs(network, task.data.train.inputs)
        noise = float(residual.double().square().mean())
    return Case(task, network, task.data.train, task.data.validation, task.seed, noise)


def measure(method: Method, case: Case) -> dict[str, Any]:
    """All figures of one method: of each variant, and of the method as a whole."""
    method.fit(case)
    held = forget_peak()
    started = time.perf_counter()
    variants = figures(method, case.task)
    measured = time.perf_counter() - started
    peak = peak_bytes(torch.device("cpu"))
    for key, seconds in timed(method, case.task.data.test.inputs[:TIMED]).items():
        variants[key]["seconds_per_1000"] = seconds
    described = {key: describe(variant) for key, variant in method.variants.items()}
    point = networks.outputs(case.network, case.task.measured.inputs).argmax(1)
    return {
        "method": method.name,
        "single_network": method.single_network,
        "network": networks.identity(case.network),
        "variants": {key: {**described[key], **variants[key]} for key in variants},
        "point_train_accuracy": float((point == case.task.measured.targets).double().mean()),
        "parameters": sum(p.numel() for p in case.network.parameters()),
        "train": len(case.train),
        "seconds": {**method.seconds, "measuring": measured},
        "peaks": {**method.peaks, "before_predictions": held, "predictions": peak},
        "details": method.details,
    }


def describe(variant: Any) -> dict[str, Any]:
    return {
        "title": variant.title,
        "tuned": variant.tuned,
        "value": variant.value,
        "declared": variant.declared,
        "headline": variant.headline,
        "path": variant.path,
    }


def figures(method: Method, task: Task) -> dict[str, dict[str, Any]]:
    """By variant: training and test figures, figures under shift, detection of what comes from elsewhere."""
    measured, test = task.measured, task.data.test
    out: dict[str, dict[str, Any]] = {}
    for key, draws in method.draws(measured.inputs).items():
        train = measures.classification(draws.probabilities(), measured.targets)
        out[key] = {"train": {k: train[k] for k in ("accuracy", "nll")}}
    known: dict[str, dict[str, Tensor]] = {}
    for key, draws in method.draws(test.inputs).items():
        out[key]["test"] = measures.classification(draws.probabilities(), test.targets)
        known[key] = draws.novelty()
        out[key]["shifted"] = {name: {} for name in task.shifted}
        out[key]["outside"] = {}
    targets = task.shifted_targets
    for name, strengths in task.shifted.items():
        for strength, inputs in strengths.items():
            assert targets is not None
            for key, draws in method.draws(inputs).items():
                found = measures.classification(draws.probabilities(), targets)
                out[key]["shifted"][name][strength] = found
    for name, inputs in task.outside.items():
        for key, draws in method.draws(inputs).items():
            scores = draws.novelty()
            out[key]["outside"][name] = {
                score: measures.detection(known[key][score], value)
                for score, value in scores.items()
            }
    return out


def timed(method: Method, inputs: Tensor) -> dict[str, float]:
    """Seconds for a thousand predictions of each variant on its own; the second of two runs."""
    out = {}
    for key in method.variants:
        for _ in range(2):
            started = time.perf_counter()
            method.draws(inputs, [key])
            out[key] = (time.perf_counter() - started) * 1000 / len(inputs)
    return out
