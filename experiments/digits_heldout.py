"""Digits with held-out classes: 500 training images, a convolutional network, two held-out classes for each seed."""

from __future__ import annotations

from experiments.image_task import ImageTask
from experiments.tasks import Recipe, Scale

NAME = "digits_heldout"
TITLE = "Digits with held-out classes"
FULL = Scale(
    seeds=10,
    train=500,
    validation=300,
    test=None,
    shifted=300,
    outside=400,
    measured=500,
    recipe=Recipe(epochs=100, batch_size=64, learning_rate=3e-3),
)
SMALL = Scale(
    seeds=1,
    train=500,
    validation=200,
    test=300,
    shifted=75,
    outside=120,
    measured=500,
    recipe=Recipe(epochs=60, batch_size=64, learning_rate=3e-3),
    strengths={
        "rotation": (30, 90, 180),
        "noise": (0.1, 0.3, 0.5),
        "blur": (1.0, 2.0, 3.0),
        "contrast": (0.5, 0.3, 0.1),
    },
)
SCALES = {"small": SMALL, "full": FULL}
WORDS = (
    "scikit-learn's digits (8 × 8), tanh network of two convolutions and two dense layers, trained without two of the "
    "ten classes, another pair for each seed. All posteriors preserve, or are fitted on, all training images."
)
TASK = ImageTask(NAME, TITLE, WORDS, SCALES)
jobs, report = TASK.jobs, TASK.report
