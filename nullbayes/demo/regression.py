"""The in-between picture: a curve through two groups of points, and what each posterior says of the gap."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn import functional as F

from nullbayes import metrics
from nullbayes.datasets import in_between, in_between_truth
from nullbayes.demo import models, training
from nullbayes.posterior import LaplacePosterior, NullSpacePosterior
from nullbayes.solvers import PrimalQR

POINTS, NOISE = 16, 0.05
REACH = 2.8  # the picture runs from -REACH to REACH; the data end at 2
GAP = 0.7
DRAWS = 8  # function draws kept for the picture


def run_regression(
    *, seed: int, epochs: int, samples: int, tick: training.Tick = lambda words: None
) -> dict[str, Any]:
    """Train the small network, fit both posteriors, and return everything that the picture needs."""
    # Few points, in float64: nearby rows of so smooth a function nearly depend on each other, and a function that
    # passes exactly through many points is soon known everywhere, the gap included.
    data = in_between(POINTS, noise=NOISE, seed=seed, dtype=torch.float64)
    model = models.seeded(models.curve_net, seed=seed).double()
    training.train(
        model,
        data,
        training.Recipe(epochs, len(data), 1e-2, 0.1),
        loss=F.mse_loss,
        seed=seed,
        tick=tick,
    )
    grid = torch.linspace(-REACH, REACH, 201, dtype=torch.float64)[:, None]
    fresh = in_between(400, noise=NOISE, seed=seed + 1, dtype=torch.float64)
    gap = torch.linspace(-GAP, GAP, 101, dtype=torch.float64)[:, None]
    with torch.no_grad():
        point = model(grid).squeeze(1)
        rmse = metrics.regression_metrics(
            model(data.inputs), torch.ones_like(data.targets), data.targets
        )["rmse"]
    result: dict[str, Any] = {
        "train": {"x": data.inputs.flatten().tolist(), "y": data.targets.flatten().tolist()},
        "x": grid.flatten().tolist(),
        "truth": in_between_truth(grid).flatten().tolist(),
        "point": {"mean": point.tolist(), "train_rmse": rmse},
        "methods": {},
    }
    for key, title, kind in (
        ("null_space", "Null-space posterior", NullSpacePosterior),
        ("laplace", "Full Laplace", LaplacePosterior),
    ):
        started = time.perf_counter()
        # QR of the rows, because the Gram matrix would square their condition number.
        posterior = kind(model, likelihood="regression", solver=PrimalQR())
        posterior.fit(data.loader(len(data)), num_samples=samples, seed=seed, progress=False)
        seconds = time.perf_counter() - started
        prediction = posterior.predict(grid)
        old, new, between = (posterior.predict(x) for x in (data.inputs, fresh.inputs, gap))
        result["methods"][key] = {
            "title": title,
            "mean": prediction.mean.flatten().tolist(),
            "sd": prediction.variance.flatten().sqrt().tolist(),
            "noise_sd": float(prediction.aleatoric.mean()) ** 0.5,
            "draws": prediction.outputs[:DRAWS, :, 0].tolist(),
            "prior_precision": posterior.prior_precision,
            "train_rmse": metrics.regression_metrics(old.mean, old.total, data.targets)["rmse"],
            "train_sd": float(old.variance.mean()) ** 0.5,
            "test": metrics.regression_metrics(new.mean, new.total, fresh.targets),
            "gap": metrics.regression_metrics(between.mean, between.total, in_between_truth(gap)),
            "gap_sd": float(between.variance.mean()) ** 0.5,
            "seconds": seconds,
            "certificate": certificate_fields(posterior.certificate),
        }
    return result


def certificate_fields(certificate: Any) -> dict[str, Any]:
    """All fields of a certificate, with its judgement in words."""
    return {**certificate.as_dict(), "held": certificate.held, "verdict": certificate.verdict}
