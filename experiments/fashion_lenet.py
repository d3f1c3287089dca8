"""Fashion-MNIST and LeNet: 61,706 weights, all 60,000 images (full) or 800 of them (small)."""

from __future__ import annotations

from experiments.image_task import ImageTask
from experiments.tasks import Recipe, Scale

NAME = "fashion_lenet"
TITLE = "Fashion-MNIST, LeNet"
FULL = Scale(
    seeds=3,
    train=None,
    validation=2000,
    test=None,
    shifted=1000,
    outside=1000,
    measured=10_000,
    recipe=Recipe(epochs=15, batch_size=128, learning_rate=2e-3),
    memory="10GB",
    solver_tolerance=0.05,
    collected=25,
)
SMALL = Scale(
    seeds=1,
    train=800,
    validation=200,
    test=400,
    shifted=60,
    outside=100,
    measured=400,
    recipe=Recipe(epochs=15, batch_size=64, learning_rate=2e-3),
    memory="4GB",
    solver_tolerance=0.05,
    collected=12,
    members=3,
    samples=20,
    strengths={
        "rotation": (30, 90, 180),
        "noise": (0.1, 0.3, 0.5),
        "blur": (1.0, 3.0),
        "contrast": (0.5, 0.2),
    },
)
SCALES = {"small": SMALL, "full": FULL}
WORDS = (
    "LeNet with tanh (61,706 weights). Every posterior is fitted on every training image: with 10 classes nine "
    "constraints an image, so full-size fits are iterative, to the relative residual that the table of costs states."
)
TASK = ImageTask(NAME, TITLE, WORDS, SCALES)
jobs, report = TASK.jobs, TASK.report
