"""The two tasks of the demonstration: data, network, and the shifts that should look new to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nullbayes import datasets
from nullbayes.datasets import Dataset
from nullbayes.demo import models
from nullbayes.demo.evaluation import Shift
from nullbayes.errors import InputError

HELD_OUT = (0, 4)  # digits that training never sees; on other pairs see docs/concepts/null-space.md
ANGLES = (30, 60, 90, 120, 150)
ROTATED = 2000  # rotated images at most, over all angles


@dataclass(frozen=True)
class Settings:
    """What a run of the demonstration was asked for; None: the task's own default.

    Attributes:
        dataset: "digits" or "fashion-mnist"; data_dir: where Fashion-MNIST's files are, if not in a usual place.
        seed: of the splits, the training and the samples.
        examples: training images whose predictions are preserved; digits: also those trained on.
        samples: weight samples of each posterior.
        epochs: passes over the training images.
        held_out: digits that training never sees; 0 and 4 if not given.
        regression_epochs: steps of the network in the in-between picture.
        test_images: a limit on the test images and on the images of each shift.
    """

    dataset: str = "digits"
    data_dir: str | Path | None = None
    seed: int = 0
    examples: int | None = None
    samples: int = 30
    epochs: int | None = None
    held_out: Sequence[int] | None = None
    regression_epochs: int = 1500
    test_images: int | None = None

    def __post_init__(self) -> None:
        least = {"samples": 2, "examples": 1, "epochs": 1, "regression_epochs": 1, "test_images": 1}
        for name, minimum in least.items():
            count = getattr(self, name)
            if count is not None and count < minimum:
                raise InputError(f"`{name}` must be at least {minimum}, got {count}.")
        if self.dataset not in TASKS:
            raise InputError(
                f"Unknown data set {self.dataset!r}: choose one of {', '.join(TASKS)}."
            )


@dataclass(frozen=True)
class Task:
    """One data set with its network and its shifts."""

    title: str
    data: Dataset
    model: nn.Module
    shifts: dict[str, Shift]
    examples: int  # training images whose predictions are preserved
    epochs: int
    batch_size: int
    learning_rate: float

    @property
    def measured(self) -> Dataset:
        """The data on which every method is measured: the kept images stand for the training split."""
        data = self.data
        kept = data.train[: self.examples]
        return Dataset(data.name, kept, data.validation, data.test, data.classes)

    def describe(self) -> dict[str, Any]:
        """What the report says of the task."""
        data = self.data
        return {
            "name": data.name,
            "title": self.title,
            "classes": list(data.classes),
            "held_out": list(data.held_out_classes),
            "trained_on": len(data.train),
            "kept": self.examples,
            "validation": len(data.validation),
            "test": len(data.test),
            "image": list(data.test.inputs.shape[1:]),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "shifts": {
                key: {
                    "title": shift.title,
                    "words": shift.words,
                    "count": len(shift.inputs),
                    "groups": [name for name, _ in shift.groups],
                }
                for key, shift in self.shifts.items()
            },
        }


def make_task(settings: Settings) -> Task:
    """Read the data and build the network, untrained."""
    return TASKS[settings.dataset](settings)


def _digits(settings: Settings) -> Task:
    if settings.data_dir is not None:
        raise InputError("`data_dir` goes with fashion-mnist; the digits come with scikit-learn.")
    data = datasets.digits(
        train=settings.examples or 500,
        validation=300,
        held_out=settings.held_out or HELD_OUT,
        seed=settings.seed,
    )
    assert data.held_out is not None
    names = " and ".join(data.held_out_classes)
    held = Shift(
        "held-out classes",
        f"the digits {names}, which training never saw",
        data.held_out.inputs[: settings.test_images],
    )
    data = _limited(data, settings)
    return Task(
        "Handwritten digits",
        data,
        models.seeded(models.digits_net, len(data.classes), seed=settings.seed),
        {"held_out": held, **_common_shifts(data, settings)},
        examples=len(data.train),
        epochs=settings.epochs or 150,
        batch_size=64,
        learning_rate=3e-3,
    )


def _fashion_mnist(settings: Settings) -> Task:
    if settings.held_out is not None:
        raise InputError(
            "`held_out` goes with the digits; here the network learns all ten classes."
        )
    data = datasets.fashion_mnist(settings.data_dir, validation=1000, test=2000, seed=settings.seed)
    data = _limited(data, settings)
    examples = settings.examples or 1000
    if examples > len(data.train):
        raise InputError(
            f"{examples} examples were asked for; there are {len(data.train)} training images."
        )
    digits = datasets.digits(train=1, validation=0, seed=settings.seed).test.inputs
    far = Shift(
        "digits",
        "handwritten digits, enlarged to 28 × 28",
        datasets.rescaled(digits[: settings.test_images], 28),
    )
    return Task(
        "Fashion-MNIST",
        data,
        models.seeded(models.lenet, 10, seed=settings.seed),
        {"digits": far, **_common_shifts(data, settings)},
        examples=examples,
        epochs=settings.epochs or 4,
        batch_size=128,
        learning_rate=2e-3,
    )


TASKS: dict[str, Callable[[Settings], Task]] = {"digits": _digits, "fashion-mnist": _fashion_mnist}


def _limited(data: Dataset, settings: Settings) -> Dataset:
    test = data.test[: settings.test_images]
    return Dataset(
        data.name,
        data.train,
        data.validation,
        test,
        data.classes,
        data.held_out,
        data.held_out_classes,
    )


def _common_shifts(data: Dataset, settings: Settings) -> dict[str, Shift]:
    images = data.test.inputs[: ROTATED // len(ANGLES)]
    return {
        "rotated": Shift(
            "rotated",
            f"test images turned by {ANGLES[0]}° to {ANGLES[-1]}°",
            datasets.rotated(images, ANGLES),
            tuple((f"{angle}°", len(images)) for angle in ANGLES),
        ),
        "noise": Shift(
            "noise",
            "images of uniform noise",
            datasets.noise_like(data.test.inputs, seed=settings.seed + 2),
        ),
    }
