"""What every benchmark shares: the trained LeNet, fresh processes, and a record of the environment."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nullbayes import datasets
from nullbayes.common.files import atomic_file
from nullbayes.common.memory import peak_bytes
from nullbayes.demo.models import lenet

RESULTS = Path(__file__).parent / "results"


def trained_lenet(
    examples: int,
    epochs: int = 2,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, Tensor, Tensor]:
    """LeNet (61,706 weights) trained on all of Fashion-MNIST, on ``device``, and its first ``examples`` images."""
    data = datasets.fashion_mnist().train
    x, y = data.inputs.to(device), data.targets.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = lenet(10).to(device)
        optimiser = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).to(device).split(128):
                optimiser.zero_grad()
                loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
                loss.backward()
                optimiser.step()
    return model.eval(), data.inputs[:examples], data.targets[:examples]


def _child(queue: Any, function: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    try:
        queue.put(function(*args) | {"peak_bytes": peak_bytes(torch.device("cpu"))})
    except BaseException as error:  # handed to the parent, which raises it
        queue.put({"error": repr(error)})


def fresh_process(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Run ``function`` in a new process: its peak memory is its own, and so are its caches."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue, function, args))
    process.start()
    result: dict[str, Any] = queue.get()
    process.join()
    if "error" in result:
        raise RuntimeError(f"{function.__name__} failed in its own process: {result['error']}")
    return result


def environment() -> dict[str, Any]:
    """Where the figures were measured."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


def notes_of(path: Path) -> str:
    """What a page says below its table; an empty text where there is no page yet."""
    if not path.exists():
        return ""
    lines = path.read_text().splitlines()
    last = max((n for n, line in enumerate(lines) if line.startswith("|")), default=len(lines))
    return "\n".join(lines[last + 1 :]).strip()


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """As PNG, written whole or not at all; the figure is closed."""
    from matplotlib import pyplot

    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=dpi)
    pyplot.close(figure)


def write_results(name: str, results: dict[str, Any], table: str) -> Path:
    """``results/<name>.json`` and ``.md``, each written whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    for suffix, text in ((".json", json.dumps(results, indent=1) + "\n"), (".md", table)):
        target = RESULTS / f"{name}{suffix}"
        with atomic_file(target) as part:
            part.write_text(text)
    return RESULTS / f"{name}.md"
