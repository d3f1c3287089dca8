"""Trained networks, kept as safetensors, so that every method starts from exactly the same one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments import tasks
from experiments.store import OUT
from experiments.tasks import DROPOUT, Task
from nullbayes.common.files import atomic_file
from nullbayes.common.writing import plain
from nullbayes.demo import training
from nullbayes.demo.models import seeded
from nullbayes.model.fingerprint import fingerprint

FOLDER = OUT / "networks"
FIRST = "member-0"  # the network that all methods share; the rest of the ensemble follows
WITH_DROPOUT = "dropout"
BATCH = 500


def cache_path(task: Task, which: str = FIRST, folder: Path | None = None) -> Path:
    """One file for each choice of data, recipe, seed and member: another choice never finds it."""
    settings = {
        "task": task.name,
        "identity": task.identity,
        "recipe": asdict(task.recipe),
        "options": task.scale.options,
        "seed": task.seed,
        "which": which,
        "dropout": DROPOUT if which == WITH_DROPOUT else 0.0,
    }
    key = hashlib.sha256(json.dumps(plain(settings), sort_keys=True).encode()).hexdigest()[:12]
    return (folder or FOLDER) / f"{task.name}-seed{task.seed}-{which}-{key}.safetensors"


def member_seed(seed: int, which: str) -> int:
    """Seed of initial weights and of the order of batches: one stream for each member."""
    number = 0 if which == WITH_DROPOUT else int(which.removeprefix("member-"))
    return 1000 * seed + number


def trained(task: Task, which: str = FIRST, folder: Path | None = None) -> nn.Module:
    """The network in evaluation mode; trained and stored if it was not before."""
    path = cache_path(task, which, folder)
    seed = member_seed(task.seed, which)
    network = seeded(task.build, DROPOUT if which == WITH_DROPOUT else 0.0, seed=seed)  # type: ignore[arg-type]
    if which == FIRST and task.pretrained is not None and not path.is_file():
        network, spent = task.pretrained()
        write(path, network, spent)
        return network

    def train(fresh: nn.Module) -> None:
        with torch.random.fork_rng(devices=[]):  # dropout draws from the global state
            torch.manual_seed(seed)
            recipe = training.Recipe(**asdict(task.recipe))
            training.train(fresh, task.data.train, recipe, loss=task.loss, seed=seed)

    return kept(path, network, train)


def kept(path: Path, network: nn.Module, train: Callable[[nn.Module], object]) -> nn.Module:
    """``network`` in evaluation mode with the weights at ``path``; trained and written there if it was not before."""
    if path.is_file():
        network.load_state_dict(load_file(path))
        return network.eval()
    started = time.perf_counter()
    train(network)
    write(path, network, time.perf_counter() - started)
    return network.eval()


def write(path: Path, network: nn.Module, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().clone().contiguous() for name, t in network.state_dict().items()}
    with atomic_file(path) as part:  # two processes may train the same one
        save_file(tensors, part, metadata={"seconds": f"{seconds:.3f}"})


def seconds(task: Task, which: str = FIRST, folder: Path | None = None) -> float:
    """How long its training took."""
    with safe_open(cache_path(task, which, folder), framework="pt") as file:
        return float(file.metadata()["seconds"])


def outputs(network: nn.Module, inputs: Tensor) -> Tensor:
    """Raw outputs ``(N, O)``, a batch at a time."""
    with torch.no_grad():
        return torch.cat([network(part) for part in inputs.split(BATCH)])


def identity(network: nn.Module) -> str:
    """Twelve digits that tell its weights from all others: training need not end at the same ones on two machines."""
    digests = json.dumps(fingerprint(network), sort_keys=True)
    return hashlib.sha256(digests.encode()).hexdigest()[:12]


def train_job(name: str, seed: int, scale: Any, which: str) -> dict[str, Any]:
    """For the runner: train one network unless it is there; its seconds and scores."""
    task = tasks.make(name, seed, scale)
    network = trained(task, which)
    figures: dict[str, Any] = {"seconds": seconds(task, which)}
    figures["parameters"] = sum(p.numel() for p in network.parameters())
    for part, split in (("train", task.measured), ("test", task.data.test)):
        out = outputs(network, split.inputs)
        if task.kind == "classification":
            figures[part] = float((out.argmax(1) == split.targets).double().mean())
        else:
            figures[part] = float((out - split.targets).square().mean().sqrt())
    return figures
