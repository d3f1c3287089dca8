"""Digits two at a time: training inside the layer null space, beside plain fine-tuning and EWC.

    python -m examples.continual [--small]

A perceptron learns five tasks of two classes each, one after the other, never seeing data of an earlier one again.
Inside the null space every step is projected so that no layer moves on what it received from earlier tasks
(``LayerNullSpacePosterior(delta=0).projector()``); after each task ``update`` adds its layer inputs, a matrix a layer,
whatever the number of examples. Elastic weight consolidation (Kirkpatrick et al., PNAS 2017) holds weights back by the
diagonal of the Fisher matrix instead. Every task trains the logits of its own two classes; accuracy is measured over
all classes seen so far, and on each task with its two classes known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from examples import _common as common
from nullbayes import datasets

# The first layer's weights beside their usual size. 64 pixels are soon spanned, so that layer stays as the first task
# leaves it; wide and steep, it gives different inputs different features, and the later layers room to tell them apart.
GAIN = 8.0
TASKS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))


@dataclass(frozen=True)
class Sizes:
    """Width of the hidden layers (more than there are examples), epochs a task, strengths of EWC to try."""

    width: int = 512
    epochs: int = 30
    strengths: tuple[float, ...] = (1e4, 1e7, 1e10)


SMALL = Sizes(128, 4, (1e2,))
Task = tuple[Tensor, Tensor, tuple[int, int]]
Penalty = Callable[[nn.Module], Tensor]


def network(width: int, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = nn.Linear(64, width), nn.Linear(width, width)
        first.weight.data.mul_(GAIN)
        return nn.Sequential(
            nn.Flatten(), first, nn.Tanh(), second, nn.Tanh(), nn.Linear(width, 10)
        ).eval()


def tasks(data: datasets.Dataset, examples: int | None) -> list[tuple[Task, Task]]:
    """Training and test data of each task."""
    out = []
    for pair in TASKS:
        parts = []
        for split in (data.train, data.test):
            some = torch.isin(split.targets, torch.tensor(pair))
            parts.append((split.inputs[some][:examples], split.targets[some][:examples], pair))
        out.append((parts[0], parts[1]))
    return out


def learn(
    model: nn.Module, task: Task, epochs: int, penalty: Penalty | None = None, attach: Any = None
) -> None:
    """Adam on the two logits of the task. ``attach``: projects its steps."""
    inputs, targets, pair = task
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    stop = attach(optimiser) if attach is not None else None
    order = torch.Generator().manual_seed(0)
    labels = (targets == pair[1]).long()
    for _ in range(epochs):
        for index in torch.randperm(len(inputs), generator=order).split(32):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs[index])[:, list(pair)], labels[index])
            if penalty is not None:
                loss = loss + penalty(model)
            loss.backward()
            optimiser.step()
    if stop is not None:
        stop()


def fisher(model: nn.Module, task: Task) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher matrix, mean over examples."""
    inputs, targets, pair = task
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in zip(inputs, targets, strict=True):
        label = torch.tensor([int(y == pair[1])])
        loss = nn.functional.cross_entropy(model(x[None])[:, list(pair)], label)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for name, g in zip(total, gradients, strict=True):
            total[name] += g.square() / len(inputs)
    return total


def accuracy(model: nn.Module, seen: list[Task], known: bool) -> float:
    """Over the classes of all tasks in ``seen``, or (``known``) with each example's task given."""
    classes = [c for _, _, pair in seen for c in pair]
    right, count = 0, 0
    with torch.no_grad():
        for inputs, targets, pair in seen:
            among = torch.tensor(pair if known else classes)
            right += int((among[model(inputs)[:, among].argmax(1)] == targets).sum())
            count += len(targets)
    return right / count


def consecutive(
    method: str, parts: list[tuple[Task, Task]], sizes: Sizes, strength: float = 0.0
) -> dict[str, Any]:
    """Learn all tasks in turn; accuracies after each, and how far outputs on earlier training data moved."""
    model = network(sizes.width)
    posterior: nb.LayerNullSpacePosterior | None = None
    anchors: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    curve: dict[str, list[float]] = {"all classes": [], "task known": [], "outputs moved": []}

    def pull(net: nn.Module) -> Tensor:
        terms = [
            (weight[n] * (p - at[n]).square()).sum()
            for weight, at in anchors
            for n, p in net.named_parameters()
        ]
        return 0.5 * strength * torch.stack(terms).sum()

    for number, (train, _) in enumerate(parts):
        earlier = [t[0] for t, _ in parts[:number]]
        before = [model(x).detach() for x in earlier]
        if method == "null space":
            if posterior is None:
                learn(model, train, sizes.epochs)
                posterior = nb.LayerNullSpacePosterior(model, delta=0, prior_precision=1.0)
                posterior.fit(train[0], num_samples=2, progress=False)
            else:
                learn(model, train, sizes.epochs, attach=posterior.projector().attach)
                posterior.follow().update(train[0], progress=False)
        else:
            learn(model, train, sizes.epochs, pull if anchors else None)
            if method == "EWC":
                at = {n: p.detach().clone() for n, p in model.named_parameters()}
                anchors.append((fisher(model, train), at))
        moved = [
            float((model(x).detach() - f).norm() / f.norm())
            for x, f in zip(earlier, before, strict=True)
        ]
        tested = [test for _, test in parts[: number + 1]]
        curve["all classes"].append(accuracy(model, tested, known=False))
        curve["task known"].append(accuracy(model, tested, known=True))
        curve["outputs moved"].append(max(moved, default=0.0))
    return curve


def run(sizes: Sizes, examples: int | None = None) -> dict[str, Any]:
    """Curves of all methods. EWC at each strength: choosing one on the test data would favour it."""
    parts = tasks(datasets.digits(), examples)
    out = {name: consecutive(name, parts, sizes) for name in ("plain", "null space")}
    for strength in sizes.strengths:
        out[f"EWC, {strength:g}"] = consecutive("EWC", parts, sizes, strength)
    return out


def summary(found: dict[str, Any]) -> str:
    """A table: after each task, and how far outputs on earlier training data moved during the last."""
    lines = [
        "test accuracy over all classes seen (with the task known), after each task; outputs moved at most"
    ]
    for name, curve in found.items():
        pairs = zip(curve["all classes"], curve["task known"], strict=True)
        cells = "  ".join(f"{a:.3f} ({k:.3f})" for a, k in pairs)
        lines.append(f"{name:<12} {cells}  {max(curve['outputs moved']):.1e}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    chosen = common.options(__doc__)
    found = run(SMALL, 20) if chosen.small else run(Sizes(), 80)
    common.write_figures("continual", found, chosen.out)
    print(summary(found))


if __name__ == "__main__":
    main()
