"""Joint log-likelihood of groups of inputs, clean and shifted; ways to calibrate; which weights."""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from benchmarks.networks import Residual
from experiments import shifts
from experiments.detection import tabular
from experiments.layers.sequences import VOCABULARY, Encoder, docstring_splits
from experiments.methods.fixed_mean import FixedMean, Seen
from experiments.networks import identity
from experiments.runner import Job
from experiments.store import Key
from experiments.tasks import digits_network, lenet, mlp, small_resnet
from nullbayes import datasets
from nullbayes.datasets import Split
from nullbayes.demo.models import seeded
from nullbayes.demo.training import Recipe, train
from nullbayes.metrics import classification_metrics

NAME = "joint"
TITLE = "Joint predictions"
VERSION = 2
IMAGES = ("digits", "clothes", "clothes, residual")
TASKS = ("breast cancer", "schools", "weather", *IMAGES, "texts")
#: Tables on which ways to set the prior are compared before the tasks above are looked at.
TUNING = ("cars", "travel", "wine")
# The small setting: which, and how many of their test inputs at most.
SMALL, SMALL_TEST = ("wine", "breast cancer", "schools", "digits"), 120
SEEDS = {"small": 1, "full": 10}
TRAIN = 300  # images; of tables at most
SAMPLES, MEMBERS = 50, 5
GROUPS, LABELS = 1000, 10
WEAKER = 300  # test inputs that are corrupted, five times each
WORDS_CHANGED = (0.1, 0.2, 0.3, 0.4, 0.5)
SPREADS = (0.25, 0.5, 1.0, 1.5, 2.0)  # of noise in tables, in standard deviations of a column
#: Factors on the samples' spread that are tried where the prior is tuned by joint NLL.
WIDTHS = tuple(10 ** (k / 8) for k in range(-16, 17))
RECIPE = Recipe(epochs=60, batch_size=32, learning_rate=3e-3)
TITLES = {
    "guess": "functions that guess (no network)",
    "network": "network",
    "temperature": "network, temperature",
    "last-layer laplace": "last-layer Laplace",
    "laplace": "Laplace, all weights",
    "laplace, joint": "Laplace, all weights, prior tuned by joint NLL",
    "null": "null space, by evidence",
    "null, prior": "null space, prior tuned (`calibrate` as it is)",
    "null, joint": "null space, prior tuned by joint NLL",
    "null, temperature": "null space, temperature tuned",
    "null, two layers": "null space, last two layers or last block, by evidence",
    "null, last layer": "null space, last layer, by evidence",
    "layers": "layer null space, by the guarantee",
    "layers, prior": "layer null space, prior tuned",
    "layers, temperature": "layer null space, temperature tuned",
    "process": "Gaussian process around the network (FMGP)",
    "ensemble": "five networks †",
    "ensemble, temperature": "five networks, temperature †",
}
WORDS = (
    "Joint: dyadic sampling (Osband et al. 2022): two test inputs, ten labels drawn from them in turn, minus the mean "
    "log of the joint probability of the ten by a label, 1,000 groups; one network multiplies its marginals. "
    "Shifted: images rotated by 45 degrees, columns of tables with Gaussian noise of one standard deviation. 300 "
    "images or rows for training, others for tuning (temperature, prior precision), others again are measured. "
    "50 samples. Digits: two convolutions; clothes: LeNet, and a residual network with BatchNorm; tables: two hidden "
    "layers of 50 tanh units; texts: one transformer layer over 40 words, shifted by other words in place of 30 % of "
    "them. Five strengths: of Gaussian noise, blur and contrast (images), of noise (tables), of words replaced (texts)."
)


Draws = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Data:
    """What a network is trained on, tuned on and judged on; ``shifted`` has the labels of ``test``.

    ``corrupted``: by kind, at five strengths, the first of the test inputs.
    """

    train: Split
    validation: Split
    test: Split
    shifted: Tensor
    build: Callable[[float], nn.Module]
    corrupted: dict[str, list[Tensor]]

    def first(self, most: int | None) -> Data:
        """With the first ``most`` test inputs alone; None: all."""
        return replace(
            self,
            test=self.test[:most],
            shifted=self.shifted[:most],
            corrupted={kind: [x[:most] for x in every] for kind, every in self.corrupted.items()},
        )


def make(name: str, seed: int) -> Data:
    if name in IMAGES:
        return _images(name, seed)
    return _texts(seed) if name == "texts" else _table(name, seed)


def _images(name: str, seed: int) -> Data:
    found: Any
    if name == "digits":
        found = datasets.digits(train=TRAIN, validation=300, seed=seed)
    else:
        found = datasets.fashion_mnist(train=TRAIN, validation=300, test=1000, seed=seed)
    residual = functools.partial(small_resnet, 10, widths=(8, 16, 32))
    builds: dict[str, Callable[[float], nn.Module]] = {
        "digits": functools.partial(digits_network, 10),
        "clothes": functools.partial(lenet, 10),
        "clothes, residual": residual,
    }
    some = found.test.inputs[:WEAKER]
    strengths = {"noise": shifts.NOISE, "blur": shifts.BLUR, "contrast": shifts.CONTRAST}
    corrupted = {
        kind: [shifts.SHIFTS[kind][0](some, strength, seed) for strength in every]
        for kind, every in strengths.items()
    }
    shifted = datasets.rotated(found.test.inputs, 45.0)
    return Data(found.train, found.validation, found.test, shifted, builds[name], corrupted)


def _table(name: str, seed: int) -> Data:
    parts = tabular.shifted(name, seed)
    width, classes = parts.train.inputs.shape[1], int(parts.train.targets.max()) + 1
    noise = torch.randn(parts.test.inputs.shape, generator=torch.Generator().manual_seed(seed))
    whole = parts.train
    some = replace(whole, inputs=whole.inputs[:TRAIN], targets=whole.targets[:TRAIN])
    x = parts.test.inputs
    return Data(
        some,
        parts.validation,
        parts.test,
        x + noise,
        lambda rate: mlp(width, classes, rate, dtype=torch.float32),
        {"noise": [(x + spread * noise)[:WEAKER] for spread in SPREADS]},
    )


def _texts(seed: int) -> Data:
    """Docstrings by what they are about, with no subject held out."""
    found = docstring_splits(seed, None)
    splits, classes = found.splits, found.classes
    train, validation, test = splits[0][:TRAIN], splits[1][:300], splits[2][:1000]

    def replaced(x: Tensor, share: float) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        other = torch.randint(2, VOCABULARY, x.shape, generator=generator).to(x)
        which = (torch.rand(x.shape, generator=generator) < share) & (x > 0)
        return torch.where(which, other, x)

    x = test.inputs
    corrupted = {"words": [replaced(x[:WEAKER], share) for share in WORDS_CHANGED]}
    return Data(train, validation, test, replaced(x, 0.3), lambda rate: Encoder(classes), corrupted)


def jobs(
    setting: str, seeds: Sequence[int] | None = None, methods: Sequence[str] | None = None
) -> list[Job]:
    """One piece for each seed and task."""
    config = {"version": VERSION, "train": TRAIN, "samples": SAMPLES}
    most = SMALL_TEST if setting == "small" else None
    if most is not None:
        config["test"] = most
    return [
        Job(Key(NAME, setting, seed, name), config, measure_job, (name, seed, most))
        for seed in range(SEEDS[setting])
        for name in (SMALL if setting == "small" else (*TUNING, *TASKS))
    ]


def trained(data: Data, seed: int) -> nn.Module:
    network = seeded(data.build, 0.0, seed=seed)
    train(network, data.train, RECIPE, loss=nn.functional.cross_entropy, seed=seed)
    return network.eval()


def measure_job(name: str, seed: int, most: int | None = None) -> dict[str, Any]:
    """Figures of every method on one task, on ``most`` of its test inputs; None: all."""
    data = make(name, seed).first(most)
    network = trained(data, seed)
    out: dict[str, Any] = {"task": name, "network": identity(network), "methods": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nb.errors.NullBayesWarning)
        for key, (draws, temperature, seconds) in methods(network, data, seed).items():
            out["methods"][key] = measured(draws, temperature, seconds, data, seed)
    classes = int(max(split.targets.max() for split in (data.train, data.test))) + 1
    out["methods"]["guess"] = guessed(data.test.targets, classes, seed)
    return out


def measured(
    draws: Draws, temperature: float, seconds: float, data: Data, seed: int
) -> dict[str, Any]:
    """Of one method: figures on test inputs, on those shifted, and at five strengths."""
    found: dict[str, Any] = {"seconds": seconds, "temperature": temperature}
    for part, x in (("clean", data.test.inputs), ("shifted", data.shifted)):
        p = (draws(x) / temperature).double().softmax(2)
        found[part] = figures(p, data.test.targets, seed)
    found["strengths"] = by_strength(draws, temperature, data, seed)
    return found


def guessed(targets: Tensor, classes: int, seed: int) -> dict[str, Any]:
    """Of functions that give each input one label, any of them alike: what a joint NLL is without any knowledge.

    A group with two different inputs has the probability ``classes⁻²``, so that wide posteriors gain in this measure
    by being consistent alone.
    """

    def on(some: Tensor) -> dict[str, float]:
        anchors, which = groups(len(some), seed)
        used = anchors.gather(1, which)
        distinct = 1 + (used.amin(1) != used.amax(1)).double()
        logs = torch.tensor(float(classes)).log()
        return {
            "nll": float(logs), "accuracy": 1 / classes,
            "joint": float(distinct.mean() * logs) / LABELS,
        }  # fmt: skip

    weaker = on(targets[:WEAKER])
    return {
        "seconds": 0.0, "temperature": 1.0, "clean": on(targets), "shifted": on(targets),
        "strengths": dict.fromkeys("12345", weaker),
    }  # fmt: skip


def groups(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two inputs of each group ``(GROUPS, 2)``, and which of them each label is of ``(GROUPS, LABELS)``."""
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randint(0, count, (GROUPS, 2), generator=generator)
    return anchors, torch.randint(0, 2, (GROUPS, LABELS), generator=generator)


def by_strength(draws: Draws, temperature: float, data: Data, seed: int) -> dict[str, Any]:
    """Figures at strengths 1 to 5, means over the kinds of corruption."""
    out: dict[str, Any] = {}
    for level in range(5):
        each = []
        for inputs in data.corrupted.values():
            p = (draws(inputs[level]) / temperature).double().softmax(2)
            each.append(figures(p, data.test.targets[:WEAKER], seed))
        out[str(level + 1)] = {k: statistics.fmean(f[k] for f in each) for k in each[0]}
    return out


def figures(p: Tensor, targets: Tensor, seed: int) -> dict[str, float]:
    """NLL, ECE and accuracy of the mean of ``p (S, N, O)``, and the joint NLL by a label."""
    found = classification_metrics(p.mean(0), targets)
    own = p[:, torch.arange(len(targets)), targets].clamp(min=1e-300).log()  # (S, N)
    anchors, which = groups(len(targets), seed)
    joint = own[:, anchors.gather(1, which)].sum(2).logsumexp(0) - torch.tensor(len(p)).log()
    return {
        **{k: float(found[k]) for k in ("nll", "ece", "accuracy")},
        "joint": -float(joint.mean()) / LABELS,
    }


def methods(network: nn.Module, data: Data, seed: int) -> dict[str, tuple[Draws, float, float]]:
    """By key: output draws ``(S, N, O)``, the temperature, seconds to fit."""
    pairs = (data.train.inputs, data.train.targets)
    check = (data.validation.inputs, data.validation.targets)
    makers: dict[str, Callable[[], Any]] = {
        "null": lambda: nb.NullSpacePosterior(network),
        "null, two layers": lambda: nb.NullSpacePosterior(network, parameters=last_block(network)),
        "null, last layer": lambda: nb.NullSpacePosterior(network, parameters="last-layer"),
        "laplace": lambda: nb.LaplacePosterior(network),
        "last-layer laplace": lambda: nb.LaplacePosterior(network, parameters="last-layer"),
        "layers": lambda: nb.LayerNullSpacePosterior(network),
    }
    out: dict[str, tuple[Draws, float, float]] = {}
    point = of_networks([network])
    out["network"] = (point, 1.0, 0.0)
    out["temperature"] = (point, tuned(point, check), 0.0)
    for key, build in makers.items():
        started = time.perf_counter()
        own = pairs[0] if key == "layers" else pairs
        posterior = build().fit(own, SAMPLES, progress=False)
        seconds = time.perf_counter() - started
        alpha = posterior.prior_precision
        own_draws = of_posterior(posterior)
        out[key] = (own_draws, 1.0, seconds)
        if key in ("null", "laplace"):
            width = widened(own_draws, check, seed)
            out[f"{key}, joint"] = (spread(own_draws, width), 1.0, seconds)
        if key in ("null", "layers"):
            heat = posterior.calibrate(check, tune="temperature", progress=False).chosen_temperature
            out[f"{key}, temperature"] = (own_draws, heat, seconds)
            posterior.calibrate(check, tune="prior", progress=False)
            width = (alpha / posterior.prior_precision) ** 0.5
            posterior.prior_precision = alpha
            out[f"{key}, prior"] = (spread(own_draws, width), 1.0, seconds)
    started = time.perf_counter()
    out["process"] = (of_process(network, data, seed), 1.0, time.perf_counter() - started)
    started = time.perf_counter()
    members = [network, *(trained(data, 1000 * (i + 1) + seed) for i in range(MEMBERS - 1))]
    several = of_networks(members)
    seconds = time.perf_counter() - started
    out["ensemble"] = (several, 1.0, seconds)
    out["ensemble, temperature"] = (several, tuned(several, check), seconds)
    return out


def last_block(network: nn.Module) -> list[str]:
    """Names of the weights of the last two layers; of networks made of blocks, of the last block and the head."""
    names = [name for name, _ in network.named_parameters()]
    if isinstance(network, Encoder):
        return [n for n in names if n.startswith(("mix.linear", "mix.norm2", "head"))]
    blocks = [name for name, module in network.named_modules() if isinstance(module, Residual)]
    if blocks:
        return names[names.index(next(n for n in names if n.startswith(f"{blocks[-1]}."))) :]
    return names[-4:]


def of_networks(networks: Sequence[nn.Module]) -> Draws:
    def draws(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([network(x) for network in networks])

    return draws


def of_posterior(posterior: Any) -> Draws:
    """At the prior precision that it has now, with mirror images, as predictions are; computed once for each input."""
    alpha, known = posterior.prior_precision, dict[int, tuple[Tensor, Tensor]]()

    def draws(x: Tensor) -> Tensor:
        if id(x) not in known:
            before, posterior.prior_precision = posterior.prior_precision, alpha
            parts = [posterior.predict(part, method="linearised") for part in x.split(250)]
            posterior.prior_precision = before
            outputs = torch.cat([part.outputs for part in parts], 1)
            point = torch.cat([part.point for part in parts])
            known[id(x)] = x, torch.cat([outputs, 2 * point - outputs])  # x: its id stays its own
        return known[id(x)][1]

    return draws


def of_process(network: nn.Module, data: Data, seed: int) -> Draws:
    """Of a Gaussian process over the network's features whose mean is the network."""
    head = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    process = FixedMean(
        Seen(*_features(network, head, data.train.inputs), data.train.targets), seed
    )

    def draws(x: Tensor) -> Tensor:
        inputs, outputs = _features(network, head, x)
        return (outputs + process.samples(inputs, SAMPLES, seed)).float()

    return draws


@torch.no_grad()
def _features(network: nn.Module, head: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs of the last linear layer ``(N, D)`` and outputs ``(N, O)``."""
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        outputs = torch.cat([network(part) for part in x.split(250)])
    finally:
        handle.remove()
    return torch.cat(seen).flatten(1), outputs


def spread(draws: Draws, width: float) -> Draws:
    """The same samples about their mean, which is the network's output, ``width`` times as far from it."""

    def wider(x: Tensor) -> Tensor:
        outputs = draws(x)
        point = outputs.mean(0)
        return point + width * (outputs - point)

    return wider


def widened(draws: Draws, check: tuple[Tensor, Tensor], seed: int) -> float:
    """The factor on the samples' spread with the lowest joint NLL on validation data; the prior precision by its
    square."""
    outputs = draws(check[0]).double()
    point = outputs.mean(0)

    def joint(width: float) -> float:
        p = (point + width * (outputs - point)).softmax(2)
        return figures(p, check[1], seed)["joint"]

    return min(WIDTHS, key=joint)


def tuned(draws: Draws, check: tuple[Tensor, Tensor]) -> float:
    """The temperature with the lowest NLL on validation data, of forty between 0.3 and 10."""
    outputs = draws(check[0]).double()
    tried = torch.logspace(-0.5, 1, 40).tolist()

    def nll(t: float) -> float:
        p = (outputs / t).softmax(2).mean(0)
        return -float(p[torch.arange(len(p)), check[1]].clamp(min=1e-300).log().mean())

    return min(tried, key=nll)


def report(setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
    """``joint.md`` and ``.json``; nothing where there are no runs."""
    from experiments.joint_tables import write

    if runs:
        write(setting, runs, folder)
