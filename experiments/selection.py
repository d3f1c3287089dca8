"""Which inputs to label next: `posterior.select` against margin, novelty and chance, from few labels.

``python -m experiments.selection OUT.json`` prints a table; six minutes on one core. Each round trains the network
anew on all labels so far, fits the posterior on them, and adds a batch from the pool, whose labels nobody has seen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import nullbayes as nb

START, BATCH, ROUNDS, SEEDS = 20, 15, 5, 10
SHORT = 3 * BATCH  # inputs with the smallest margin, among which `select` chooses
SAMPLES, STEPS, WIDTH = 100, 150, 64
POOL = 600  # inputs at most; the rest is for the test


@dataclass(frozen=True)
class Data:
    """Inputs ``(N, d)``, standardised, and labels ``(N,)`` of so many classes."""

    x: Tensor
    y: Tensor
    classes: int

    def at(self, index: Tensor) -> Data:
        """Some of them."""
        return Data(self.x[index], self.y[index], self.classes)


def digits() -> Data:
    x, y = load_digits(return_X_y=True)
    return Data(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y), 10)


def cancer() -> Data:
    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32)
    return Data((x - x.mean(0)) / x.std(0), torch.tensor(y), 2)


def board() -> Data:
    """Four classes on a chess board of 4 × 4 fields, of which the left half holds nine tenths of the inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1500, 2, generator=generator)
    x[:, 0] = torch.where(torch.rand(1500, generator=generator) < 0.9, x[:, 0] / 2, x[:, 0])
    field = (x * 4).long()
    y = (field[:, 0] + 2 * field[:, 1]) % 4
    return Data(4 * x - 2, y, 4)


DATA: dict[str, Callable[[], Data]] = {"digits": digits, "breast cancer": cancer, "board": board}


def trained(data: Data, seed: int) -> nn.Module:
    """A network with one hidden layer, by full-batch AdamW."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = data.x.shape[1]
        model = nn.Sequential(
            nn.Linear(width, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, data.classes),
        )
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(STEPS):
        optimiser.zero_grad()
        F.cross_entropy(model(data.x), data.y).backward()
        optimiser.step()
    return model.eval()


def fitted(model: nn.Module, data: Data) -> nb.NullSpacePosterior:
    posterior = nb.NullSpacePosterior(model)
    return posterior.fit((data.x, data.y), SAMPLES, progress=False, audit=1)


def _random(model: nn.Module, data: Data, pool: Tensor, seed: int) -> Tensor:
    return torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:BATCH]


def _margin(model: nn.Module, data: Data, pool: Tensor, seed: int) -> Tensor:
    top = model(pool).detach().softmax(1).topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]).argsort()[:BATCH]


def _novelty(model: nn.Module, data: Data, pool: Tensor, seed: int) -> Tensor:
    return fitted(model, data).novelty(pool).argsort(descending=True)[:BATCH]


def _selected(criterion: str) -> Callable[[nn.Module, Data, Tensor, int], Tensor]:
    def choose(model: nn.Module, data: Data, pool: Tensor, seed: int) -> Tensor:
        return fitted(model, data).select(pool, BATCH, criterion=criterion)

    return choose


def _shortlisted(criterion: str) -> Callable[[nn.Module, Data, Tensor, int], Tensor]:
    def choose(model: nn.Module, data: Data, pool: Tensor, seed: int) -> Tensor:
        top = model(pool).detach().softmax(1).topk(2, dim=1).values
        short = (top[:, 0] - top[:, 1]).argsort()[:SHORT]
        return short[fitted(model, data).select(pool[short], BATCH, criterion=criterion)]

    return choose


METHODS: dict[str, Callable[[nn.Module, Data, Tensor, int], Tensor]] = {
    "random": _random,
    "margin": _margin,
    "novelty": _novelty,
    "select, pool": _selected("pool"),
    "select, weights": _selected("weights"),
    "margin, then select, pool": _shortlisted("pool"),
    "margin, then select, weights": _shortlisted("weights"),
}


def course(data: Data, method: str, seed: int) -> list[float]:
    """Test accuracy after each round, the start first."""
    pool, test = divided(data, seed)
    labelled, pool = pool[:START], pool[START:]
    scores = []
    for step in range(ROUNDS + 1):
        known = data.at(labelled)
        model = trained(known, seed)
        hits = model(data.x[test]).argmax(1) == data.y[test]
        scores.append(float(hits.double().mean()))
        if step < ROUNDS:
            index = METHODS[method](model, known, data.x[pool], 1000 * seed + step)
            keep = torch.ones(len(pool), dtype=torch.bool)
            keep[index] = False
            labelled, pool = torch.cat([labelled, pool[index]]), pool[keep]
    return scores


def divided(data: Data, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the pool, of which the first ``START`` are labelled, and of the test inputs."""
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))
    pool, test = order[:POOL], order[POOL:]
    if len(test) < 200:
        pool, test = order[: len(order) // 2], order[len(order) // 2 :]
    return pool, test


def ceiling(data: Data, seeds: int) -> tuple[float, float]:
    """Mean test accuracy of the network trained on the labels of the whole pool, and its standard error."""
    found = []
    for seed in range(seeds):
        pool, test = divided(data, seed)
        hits = trained(data.at(pool), seed)(data.x[test]).argmax(1) == data.y[test]
        found.append(float(hits.double().mean()))
    values = torch.tensor(found).double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def measured(
    names: list[str], methods: list[str], seeds: int
) -> dict[str, dict[str, list[list[float]]]]:
    """Courses by data set and method, one for each seed."""
    return {
        name: {m: [course(DATA[name](), m, seed) for seed in range(seeds)] for m in methods}
        for name in names
    }


def table(found: dict[str, dict[str, list[list[float]]]]) -> str:
    """Mean accuracy over the rounds, and at the end; difference to margin with its standard error over seeds."""
    lines = [
        "| data | method | mean over rounds | at the end | mean − margin |",
        "|---|---|---|---|---|",
    ]
    for name, methods in found.items():
        base = torch.tensor(methods["margin"]).double()[:, 1:].mean(1)
        for method, courses in methods.items():
            values = torch.tensor(courses).double()
            mean = values[:, 1:].mean(1)
            gap = mean - base
            error = float(gap.std() / len(gap) ** 0.5)
            lines.append(
                f"| {name} | {method} | {float(mean.mean()):.3f} | {float(values[:, -1].mean()):.3f} | "
                f"{float(gap.mean()):+.3f} ± {error:.3f} |"
            )
    return "\n".join(lines)


def main(path: str) -> None:
    found = measured(list(DATA), list(METHODS), SEEDS)
    Path(path).write_text(json.dumps(found))
    print(table(found))
    for name in DATA:
        print(
            "{}: all labels of the pool {:.3f} ± {:.3f}".format(name, *ceiling(DATA[name](), SEEDS))
        )


if __name__ == "__main__":
    main(sys.argv[1])
