"""The picture of the README: what a null-space posterior does, beside a Laplace posterior, on a curve with a gap.

    python docs/make_figures.py      # a few seconds on one core

One network, trained on sixteen points. Both posteriors are built around it, at the prior precision of their own
evidence; the observation noise is known. Nothing is tuned and one seed is shown: figures over ten seeds stand in
docs/evaluation/regression.md.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nullbayes as nb
from nullbayes import datasets

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FILE = Path(__file__).parent / "assets" / "overview.png"
NOISE = 0.2  # standard deviation of the targets around the truth
SAMPLES = 200
SHOWN = 15  # of the samples, as lines
SEED = 0
REACH = 2.2
STEPS = 1500  # of training
PANELS = {
    "Laplace posterior:\nsamples leave the training predictions": (nb.LaplacePosterior, "#a11d33"),
    "null-space posterior:\nsamples preserve the training predictions": (
        nb.NullSpacePosterior,
        "#1f6feb",
    ),
}


def trained(data: datasets.Split) -> nn.Module:
    """A small smooth network in float64, trained to pass close to every point."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        layers = [nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1)]
        network = nn.Sequential(*layers).double()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        optimiser.zero_grad()
        F.mse_loss(network(data.inputs), data.targets).backward()
        optimiser.step()
        schedule.step()
    return network.eval()


def draw(path: Path) -> dict[str, Tensor]:
    """Write the picture. Returns each panel's predictions at the training points ``(S, N, 1)``."""
    data = datasets.in_between(16, noise=NOISE, seed=SEED, dtype=torch.float64)
    network = trained(data)
    x = torch.linspace(-REACH, REACH, 301, dtype=torch.float64)[:, None]
    at_training: dict[str, Tensor] = {}
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.4), sharey=True, layout="constrained")
        for axis, (title, (kind, colour)) in zip(axes, PANELS.items(), strict=True):
            # QR of the rows: a Gram matrix would square the condition number of so smooth a problem.
            posterior = kind(network, nb.Regression(NOISE**2), solver=nb.solvers.PrimalQR())
            posterior.fit([(data.inputs, data.targets)], SAMPLES, SEED, progress=False)
            prediction = posterior.predict(x)
            at_training[title] = posterior.predict(data.inputs).outputs
            place, mean = x.flatten(), prediction.mean.flatten()
            band = 2 * prediction.variance.sqrt().flatten()
            axis.fill_between(place, mean - band, mean + band, color=colour, alpha=0.15, lw=0)
            axis.plot(place, prediction.outputs[:SHOWN, :, 0].T, color=colour, lw=0.7, alpha=0.7)
            axis.plot(place, mean, color="black", lw=1.6, label="trained network")
            axis.plot([], [], color=colour, lw=1, label="samples, and two standard deviations")
            axis.plot(
                *map(torch.flatten, (data.inputs, data.targets)), "ko", ms=4, label="training data"
            )
            axis.set_title(title, fontsize=10.5)
            axis.set_ylim(-4, 4)
            axis.set_xlabel("input")
        axes[0].set_ylabel("prediction")
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return at_training


if __name__ == "__main__":
    for name, outputs in draw(FILE).items():
        spread = outputs.std(0).max()
        print(f"{name.splitlines()[0]} largest standard deviation at a training point {spread:.2g}")
