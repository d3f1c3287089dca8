"""Joint log-likelihood of groups of inputs, clean and shifted; ways to calibrate; which weights."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from experiments.detection import tabular
from experiments.networks import identity
from experiments.runner import Job
from experiments.store import Key
from experiments.tables import Column, Page, Row, at
from experiments.tasks import digits_network, lenet, mlp
from nullbayes import datasets
from nullbayes.datasets import Split
from nullbayes.demo.models import seeded
from nullbayes.demo.training import Recipe, train
from nullbayes.metrics import classification_metrics

NAME = "joint"
TITLE = "Joint predictions"
VERSION = 1
TASKS = ("breast cancer", "schools", "weather", "digits", "clothes")
IMAGES = ("digits", "clothes")
SEEDS = {"small": 2, "full": 10}
TRAIN = 300  # images; of tables at most
SAMPLES, MEMBERS = 50, 5
GROUPS, LABELS = 1000, 10
RECIPE = Recipe(epochs=60, batch_size=32, learning_rate=3e-3)
TITLES = {
    "network": "network",
    "temperature": "network, temperature",
    "last-layer laplace": "last-layer Laplace",
    "laplace": "Laplace, all weights",
    "null": "null space, by evidence",
    "null, prior": "null space, prior tuned (`calibrate` as it is)",
    "null, temperature": "null space, temperature tuned",
    "null, two layers": "null space, last two layers, by evidence",
    "null, last layer": "null space, last layer, by evidence",
    "layers": "layer null space, by the guarantee",
    "layers, prior": "layer null space, prior tuned",
    "layers, temperature": "layer null space, temperature tuned",
    "ensemble": "five networks †",
    "ensemble, temperature": "five networks, temperature †",
}
WORDS = (
    "Joint: dyadic sampling (Osband et al. 2022): two test inputs, ten labels drawn from them in turn, minus the mean "
    "log of the joint probability of the ten by a label, 1,000 groups; one network multiplies its marginals. "
    "Shifted: images rotated by 45 degrees, columns of tables with Gaussian noise of one standard deviation. 300 "
    "images or rows for training, others for tuning (temperature, prior precision), others again are measured. "
    "50 samples. Digits: two convolutions; clothes: LeNet; tables: two hidden layers of 50 tanh units."
)


@dataclass(frozen=True)
class Data:
    """What a network is trained on, tuned on and judged on; ``shifted`` has the labels of ``test``."""

    train: Split
    validation: Split
    test: Split
    shifted: Tensor
    build: Callable[[float], nn.Module]


def make(name: str, seed: int) -> Data:
    if name in IMAGES:
        if name == "digits":
            found: Any = datasets.digits(train=TRAIN, validation=300, seed=seed)
            build: Any = lambda rate: digits_network(10, rate)  # noqa: E731
        else:
            found = datasets.fashion_mnist(train=TRAIN, validation=300, test=1000, seed=seed)
            build = lambda rate: lenet(10, rate)  # noqa: E731
        shifted = datasets.rotated(found.test.inputs, 45.0)
        return Data(found.train, found.validation, found.test, shifted, build)
    parts = tabular.shifted(name, seed)
    width, classes = parts.train.inputs.shape[1], int(parts.train.targets.max()) + 1
    noise = torch.randn(parts.test.inputs.shape, generator=torch.Generator().manual_seed(seed))
    whole = parts.train
    some = replace(whole, inputs=whole.inputs[:TRAIN], targets=whole.targets[:TRAIN])
    return Data(
        some,
        parts.validation,
        parts.test,
        parts.test.inputs + noise,
        lambda rate: mlp(width, classes, rate, dtype=torch.float32),
    )


def jobs(
    setting: str, seeds: Sequence[int] | None = None, methods: Sequence[str] | None = None
) -> list[Job]:
    """One piece for each seed and task."""
    config = {"version": VERSION, "train": TRAIN, "samples": SAMPLES}
    return [
        Job(Key(NAME, setting, seed, name), config, measure_job, (name, seed))
        for tasks in (TASKS[:3], TASKS[3:])  # the quick ones first
        for seed in range(SEEDS[setting])
        for name in tasks
    ]


def trained(data: Data, seed: int) -> nn.Module:
    network = seeded(data.build, 0.0, seed=seed)
    train(network, data.train, RECIPE, loss=nn.functional.cross_entropy, seed=seed)
    return network.eval()


def measure_job(name: str, seed: int) -> dict[str, Any]:
    """Figures of every method on one task."""
    data = make(name, seed)
    network = trained(data, seed)
    out: dict[str, Any] = {"task": name, "network": identity(network), "methods": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nb.errors.NullBayesWarning)
        for key, (draws, temperature, seconds) in methods(network, data, seed).items():
            found = {"seconds": seconds, "temperature": temperature}
            for part, x in (("clean", data.test.inputs), ("shifted", data.shifted)):
                p = (draws(x) / temperature).double().softmax(2)
                found[part] = figures(p, data.test.targets, seed)
            out["methods"][key] = found
    return out


def figures(p: Tensor, targets: Tensor, seed: int) -> dict[str, float]:
    """NLL, ECE and accuracy of the mean of ``p (S, N, O)``, and the joint NLL by a label."""
    found = classification_metrics(p.mean(0), targets)
    own = p[:, torch.arange(len(targets)), targets].clamp(min=1e-300).log()  # (S, N)
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randint(0, len(targets), (GROUPS, 2), generator=generator)
    which = torch.randint(0, 2, (GROUPS, LABELS), generator=generator)
    joint = own[:, anchors.gather(1, which)].sum(2).logsumexp(0) - torch.tensor(len(p)).log()
    return {
        **{k: float(found[k]) for k in ("nll", "ece", "accuracy")},
        "joint": -float(joint.mean()) / LABELS,
    }


Draws = Callable[[Tensor], Tensor]


def methods(network: nn.Module, data: Data, seed: int) -> dict[str, tuple[Draws, float, float]]:
    """By key: output draws ``(S, N, O)``, the temperature, seconds to fit."""
    pairs = (data.train.inputs, data.train.targets)
    check = (data.validation.inputs, data.validation.targets)
    names = [name for name, _ in network.named_parameters()]
    makers: dict[str, Callable[[], Any]] = {
        "null": lambda: nb.NullSpacePosterior(network),
        "null, two layers": lambda: nb.NullSpacePosterior(network, parameters=names[-4:]),
        "null, last layer": lambda: nb.NullSpacePosterior(network, parameters="last-layer"),
        "laplace": lambda: nb.LaplacePosterior(network),
        "last-layer laplace": lambda: nb.LaplacePosterior(network, parameters="last-layer"),
        "layers": lambda: nb.LayerNullSpacePosterior(network),
    }
    out: dict[str, tuple[Draws, float, float]] = {}
    point = _of_networks([network])
    out["network"] = (point, 1.0, 0.0)
    out["temperature"] = (point, tuned(point, check), 0.0)
    for key, build in makers.items():
        started = time.perf_counter()
        own = pairs[0] if key == "layers" else pairs
        posterior = build().fit(own, SAMPLES, progress=False)
        seconds = time.perf_counter() - started
        out[key] = (_of_posterior(posterior, posterior.prior_precision), 1.0, seconds)
        if key in ("null", "layers"):
            alpha = posterior.prior_precision
            heat = posterior.calibrate(check, tune="temperature", progress=False).chosen_temperature
            out[f"{key}, temperature"] = (_of_posterior(posterior, alpha), heat, seconds)
            posterior.calibrate(check, tune="prior", progress=False)
            new = posterior.prior_precision
            out[f"{key}, prior"] = (_of_posterior(posterior, new), 1.0, seconds)
    started = time.perf_counter()
    members = [network, *(trained(data, 1000 * (i + 1) + seed) for i in range(MEMBERS - 1))]
    several = _of_networks(members)
    seconds = time.perf_counter() - started
    out["ensemble"] = (several, 1.0, seconds)
    out["ensemble, temperature"] = (several, tuned(several, check), seconds)
    return out


def _of_networks(networks: Sequence[nn.Module]) -> Draws:
    def draws(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([network(x) for network in networks])

    return draws


def _of_posterior(posterior: Any, alpha: float) -> Draws:
    def draws(x: Tensor) -> Tensor:
        posterior.prior_precision = alpha
        parts = [posterior.predict(part, method="linearised") for part in x.split(250)]
        outputs = torch.cat([part.outputs for part in parts], 1)
        point = torch.cat([part.point for part in parts])
        return torch.cat([outputs, 2 * point - outputs])  # with mirror images, as predictions are

    return draws


def tuned(draws: Draws, check: tuple[Tensor, Tensor]) -> float:
    """The temperature with the lowest NLL on validation data, of forty between 0.3 and 10."""
    outputs = draws(check[0]).double()
    tried = torch.logspace(-0.5, 1, 40).tolist()

    def nll(t: float) -> float:
        p = (outputs / t).softmax(2).mean(0)
        return -float(p[torch.arange(len(p)), check[1]].clamp(min=1e-300).log().mean())

    return min(tried, key=nll)


def _seeds(runs: Sequence[dict[str, Any]]) -> str:
    counts = {task: sum(r["result"]["task"] == task for r in runs) for task in TASKS}
    return "Seeds: " + ", ".join(f"{task} {n}" for task, n in counts.items() if n) + "."


def report(setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
    """A table a measure, tasks as columns; means over tasks last."""
    if not runs:
        return
    page = Page(NAME, f"{TITLE} ({setting})")
    page.say(WORDS, f"{_seeds(runs)} † trains more networks than one.")
    tables = (
        ("joint", "clean", "Joint NLL by a label"),
        ("joint", "shifted", "Joint NLL by a label, shifted"),
        ("nll", "clean", "NLL"),
        ("nll", "shifted", "NLL, shifted"),
        ("ece", "clean", "ECE"),
        ("ece", "shifted", "ECE, shifted"),
        ("accuracy", "clean", "Accuracy"),
    )
    seeds = sorted({run["seed"] for run in runs})
    for measure, part, title in tables:
        better = 1 if measure == "accuracy" else -1
        columns = [
            Column(task, at(task, part, measure), better, 3)
            for task in TASKS
            if any(r["result"]["task"] == task for r in runs)
        ]
        rows = []
        for key, words in TITLES.items():
            found = [
                {"seed": s}
                | {r["result"]["task"]: r["result"]["methods"][key] for r in runs if r["seed"] == s}
                for s in seeds
            ]
            rows.append(Row(words, found))
        page.table(title, rows, columns, first="method")
    page.write(folder, runs)
