"""Swin-T on Fashion-MNIST, 27.5 million weights, as far as the machine allows; small: the same architecture, tiny.

The trained network is that of ``benchmarks.swin``. Ensembles, SWAG and Laplace approximations of all layers are left
out: five such networks, twenty copies of its weights or explicit Jacobians do not fit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from benchmarks import swin as benchmark
from experiments import classification, reports
from experiments.methods import brief
from experiments.runner import Job, Unavailable
from experiments.tasks import TASKS, Recipe, Scale, Task, fashion

NAME = "swin"
TITLE = "Fashion-MNIST, Swin transformer"
METHODS = (
    "point", "temperature", "laplace_last", "null_predictions", "null_loss", "null_last", "null_last_outputs",
    "null_part", "null_part_outputs",
)  # fmt: skip
IMAGES, EPOCHS = 10_000, 5  # those of the benchmark, whose network is shared
SHIFTS: dict[str, Sequence[float]] = {
    "rotation": (30, 90),
    "noise": (0.2, 0.4),
    "blur": (1.0, 3.0),
    "contrast": (0.5, 0.2),
}
FULL = Scale(
    seeds=1,
    train=IMAGES,
    validation=250,
    test=400,
    shifted=50,
    outside=100,
    measured=256,
    recipe=Recipe(EPOCHS, 32, 5e-4, 0.05),
    samples=10,
    memory="10GB",
    constrained=256,
    fit_batch=32,
    solver_tolerance=1e-3,
    strengths=SHIFTS,
)
SMALL = Scale(
    seeds=1,
    train=1000,
    validation=60,
    test=100,
    shifted=20,
    outside=30,
    measured=60,
    recipe=Recipe(15, 32, 2e-3, 0.05),
    samples=10,
    memory="3GB",
    constrained=60,
    fit_batch=32,
    strengths={"rotation": (30,), "noise": (0.2,), "blur": (2.0,), "contrast": (0.3,)},
    options={"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)},
)
SCALES = {"small": SMALL, "full": FULL}
WORDS = (
    "A Swin transformer for 32 × 32 images, windows of 2 × 2 patches of 2 × 2 pixels. Full: Swin-T, 27.5 million "
    "weights, one network, trained on 10,000 images; posteriors of all weights preserve 256 of them, and training "
    "accuracy is measured on those; those of the last twentieth of the weights (whole layers from the end until a "
    "twentieth is reached: 2.4 million) preserve 1,024, of the last layer all. "
    "Small: one block in each of two stages, trained on 1,000 images, 60 preserved."
)


class SwinNetwork(nn.Module):
    """Images ``(B, 1, 28, 28)`` in [0, 1] to logits ``(B, 10)``."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        try:
            from transformers import SwinConfig, SwinForImageClassification
        except ImportError as error:
            raise Unavailable(
                "transformers is not installed: pip install 'nullbayes[experiments]'"
            ) from error
        config = SwinConfig(**{**benchmark.CONFIG, **options})
        self.model: nn.Module = SwinForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return benchmark.logits(self.model, benchmark.prepare(x))


def build(options: dict[str, Any], rate: float = 0.0) -> nn.Module:
    if rate:
        raise ValueError("there is no variant with dropout of this network.")
    return SwinNetwork(options)


def shared(seed: int) -> tuple[nn.Module, float]:
    """The network of the benchmark, trained if it is not there."""
    path = benchmark.trained_swin(IMAGES, EPOCHS, seed)
    network = SwinNetwork({})
    network.model.load_state_dict(benchmark.load_swin(path).state_dict())
    with safe_open(path, framework="pt") as file:
        spent = float(file.metadata()["seconds"])
    return network.eval(), spent


def task(seed: int, scale: Scale) -> Task:
    made = fashion(NAME, seed, scale, functools.partial(build, scale.options))
    return made if scale.options else replace(made, pretrained=functools.partial(shared, seed))


TASKS[NAME] = task


def jobs(
    setting: str, seeds: Sequence[int] | None = None, methods: Sequence[str] | None = None
) -> list[Job]:
    scale = SCALES[setting]
    wanted = [m for m in brief(METHODS, setting) if methods is None or m in methods]
    return classification.jobs(NAME, setting, scale, seeds or range(scale.seeds), wanted)


def report(setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
    reports.classification(NAME, TITLE, WORDS, setting, SCALES[setting], runs, folder)
