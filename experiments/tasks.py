"""Data, network and recipe of each task; all that depends on the seed comes from the seed alone."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks import Residual
from experiments import shifts
from experiments.runner import Unavailable
from nullbayes import datasets
from nullbayes.datasets import Dataset, Split
from nullbayes.demo import models
from nullbayes.errors import InputError

HELD_OUT = ((0, 4), (1, 7), (2, 5), (3, 6), (8, 9))  # one pair a seed, in turn
DROPOUT = 0.2
HARNESS = 4  # raised when figures of all methods change: pieces finished before are not reused


@dataclass(frozen=True)
class Recipe:
    """How point estimates are trained: AdamW with a cosine schedule. Weight decay is torch's default."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 1e-2


@dataclass(frozen=True)
class Scale:
    """How much of everything. One of these for each experiment and setting."""

    seeds: int
    train: int | None  # training images; None: all there are
    validation: int
    test: int | None  # test images; None: all that are left
    shifted: int  # test images at each strength of a shift
    outside: int  # images of each set from elsewhere, at most
    measured: int  # training images on which accuracy is measured
    recipe: Recipe
    samples: int = 30
    members: int = 5  # of the ensemble
    memory: str = "8GB"  # of each of our fits
    constrained: int | None = None  # training images whose predictions are kept; None: all
    solver_tolerance: float | None = None  # None: the library's default
    fit_batch: int = 250  # training images that our fits take at a time
    collected: int = 30  # SWAG: epochs of SGD
    strengths: dict[str, Sequence[float]] | None = None  # None: all
    options: dict[str, Any] = field(default_factory=dict)  # for the task's own builder

    def config(self) -> dict[str, Any]:
        """What a piece depends on; not how many seeds there are."""
        return {k: v for k, v in asdict(self).items() if k != "seeds"} | {"harness": HARNESS}


@dataclass(frozen=True)
class Task:
    """What is learned, by what, and where it is measured."""

    name: str
    kind: str  # "classification" or "regression"
    seed: int
    scale: Scale
    data: Dataset
    build: Callable[[float], nn.Module]  # an untrained network with this rate of dropout
    identity: dict[str, Any]  # what the trained network depends on, beside recipe and seed
    outside: dict[str, Tensor] = field(default_factory=dict)
    shifted: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shifted_targets: Tensor | None = None
    # Makes the first network where the common recipe does not: a trained network and the seconds that it took.
    pretrained: Callable[[], tuple[nn.Module, float]] | None = None

    @property
    def recipe(self) -> Recipe:
        return self.scale.recipe

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return F.cross_entropy if self.kind == "classification" else F.mse_loss

    @property
    def constrained(self) -> Split:
        """The training examples that posteriors are fitted on."""
        return self.data.train[: self.scale.constrained]

    @property
    def measured(self) -> Split:
        """The training examples on which accuracy is measured."""
        return self.data.train[: self.scale.measured]


# -- networks ------------------------------------------------------------------------------------


def with_dropout(network: nn.Sequential, rate: float) -> nn.Sequential:
    """The same layers with dropout in front of every linear one."""
    if not rate:
        return network
    layers: list[nn.Module] = []
    for layer in network:
        if isinstance(layer, nn.Linear):
            layers.append(nn.Dropout(rate))
        layers.append(layer)
    return nn.Sequential(*layers)


def digits_network(classes: int, rate: float = 0.0) -> nn.Module:
    return with_dropout(_sequential(models.digits_net(classes)), rate)


def lenet(classes: int, rate: float = 0.0) -> nn.Module:
    return with_dropout(_sequential(models.lenet(classes)), rate)


def _sequential(network: nn.Module) -> nn.Sequential:
    assert isinstance(network, nn.Sequential)
    return network


def small_resnet(
    classes: int,
    rate: float = 0.0,
    widths: Sequence[int] = (16, 32, 64),
    stem_stride: int = 2,
) -> nn.Module:
    """A stem and one residual block of two convolutions a stage, all with BatchNorm; dropout after each stage."""
    first = widths[0]
    layers: list[nn.Module] = [
        nn.Conv2d(1, first, 3, stem_stride, padding=1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
    ]
    before = first
    for stage, width in enumerate(widths):
        layers.append(Residual(before, width, 1 if stage == 0 else 2))
        if rate:
            layers.append(nn.Dropout(rate))
        before = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)]
    return nn.Sequential(*layers)


def mlp(
    inputs: int, outputs: int, rate: float = 0.0, width: int = 50, dtype: Any = torch.float32
) -> nn.Module:
    """Two hidden layers of ``width`` tanh units."""
    layers = nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(),
        nn.Linear(width, width), nn.Tanh(),
        nn.Linear(width, outputs),
    )  # fmt: skip
    out: nn.Module = with_dropout(layers, rate).to(dtype)
    return out


# -- tasks ---------------------------------------------------------------------------------------


def digits_heldout(seed: int, scale: Scale) -> Task:
    """scikit-learn's digits without two of the classes; which two goes with the seed."""
    pair = HELD_OUT[seed % len(HELD_OUT)]
    data = datasets.digits(
        train=scale.train or 500, validation=scale.validation, held_out=pair, seed=seed
    )
    held_out = data.held_out
    data = replace(data, test=data.test[: scale.test])
    few = data.test[: scale.outside].inputs
    assert held_out is not None
    outside = {
        "held-out classes": held_out.inputs[: scale.outside],
        **shifts.altogether(few, seed),
    }
    classes = len(data.classes)
    return Task(
        "digits_heldout",
        "classification",
        seed,
        scale,
        data,
        functools.partial(digits_network, classes),
        {"data": "digits", "train": scale.train, "held_out": pair, "split": seed},
        outside,
        **_graded(data, scale, seed),
    )


def fashion(name: str, seed: int, scale: Scale, build: Callable[[float], nn.Module]) -> Task:
    """Fashion-MNIST with any network.

    Raises:
        Unavailable: its files are not on this machine.
    """
    try:
        datasets.find_fashion_mnist()
    except InputError as error:
        raise Unavailable(str(error)) from error
    data = datasets.fashion_mnist(
        train=scale.train, validation=scale.validation, test=scale.test, seed=seed
    )
    few = data.test[: scale.outside].inputs
    digits = datasets.digits(train=1, validation=0, seed=seed).test.inputs[: scale.outside]
    outside = {"digits": datasets.rescaled(digits, 28), **shifts.altogether(few, seed)}
    return Task(
        name,
        "classification",
        seed,
        scale,
        data,
        build,
        {"data": "fashion-mnist", "train": scale.train, "split": seed},
        outside,
        **_graded(data, scale, seed),
    )


def fashion_lenet(seed: int, scale: Scale) -> Task:
    """Fashion-MNIST and LeNet, 61,706 weights."""
    return fashion("fashion_lenet", seed, scale, functools.partial(lenet, 10))


def fashion_resnet(seed: int, scale: Scale) -> Task:
    """Fashion-MNIST and a small residual network with BatchNorm."""
    build = functools.partial(small_resnet, 10, **scale.options)
    return fashion("fashion_resnet", seed, scale, build)


def _graded(data: Dataset, scale: Scale, seed: int) -> dict[str, Any]:
    some = data.test[: scale.shifted]
    return {
        "shifted": shifts.graded(some.inputs, seed, scale.strengths),
        "shifted_targets": some.targets,
    }


TASKS: dict[str, Callable[[int, Scale], Task]] = {
    "digits_heldout": digits_heldout,
    "fashion_lenet": fashion_lenet,
    "fashion_resnet": fashion_resnet,
}


OTHERS = ("experiments.tabular", "experiments.swin", "experiments.ablation_items")


def make(name: str, seed: int, scale: Scale) -> Task:
    """Read the data, build the shifts. Other experiments add their tasks to ``TASKS`` when they are imported."""
    for module in OTHERS if name not in TASKS else ():
        importlib.import_module(module)
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}.")
    return TASKS[name](seed, scale)
