"""Fashion-MNIST and a small residual network with BatchNorm: three stages of 16, 32 and 64 channels."""

from __future__ import annotations

from experiments.image_task import ImageTask
from experiments.tasks import Recipe, Scale

NAME = "fashion_resnet"
TITLE = "Fashion-MNIST, residual network with BatchNorm"
FULL = Scale(
    seeds=3,
    train=2000,
    validation=1000,
    test=4000,
    shifted=500,
    outside=500,
    measured=2000,
    recipe=Recipe(epochs=30, batch_size=64, learning_rate=3e-3),
    memory="4GB",
    solver_tolerance=0.05,
    collected=21,
    options={"widths": (16, 32, 64), "stem_stride": 2},
)
SMALL = Scale(
    seeds=1,
    train=800,
    validation=200,
    test=300,
    shifted=40,
    outside=80,
    measured=200,
    recipe=Recipe(epochs=12, batch_size=64, learning_rate=3e-3),
    samples=20,
    members=3,
    memory="3GB",
    constrained=200,
    solver_tolerance=0.05,
    collected=12,
    strengths={
        "rotation": (30, 90),
        "noise": (0.1, 0.4),
        "blur": (1.0, 3.0),
        "contrast": (0.5, 0.2),
    },
    options={"widths": (8, 16, 32), "stem_stride": 2},
)
SCALES = {"small": SMALL, "full": FULL}
WORDS = (
    "Stem of stride 2, one residual block of two 3 × 3 convolutions a stage, BatchNorm after every convolution, global "
    "average pooling. BatchNorm is in evaluation mode for every posterior; its weights take part in ours, and in the "
    "diagonal approximation, but not in the Kronecker one, whose backend has no rule for them. SWAG computes the "
    "statistics of BatchNorm anew for each sample."
)
TASK = ImageTask(NAME, TITLE, WORDS, SCALES)
jobs, report = TASK.jobs, TASK.report
