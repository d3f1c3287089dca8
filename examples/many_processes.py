"""One fit on several processes: handwritten digits, two processes on this machine, and the same in one.

    python -m examples.many_processes [--small] [--processes 2]
    torchrun --nproc-per-node 2 -m examples.many_processes

There is nothing to call: once a process group is initialised, ``fit`` splits the data by index, ``predict`` and
``novelty`` of a loader split it as well, and every process ends with the same samples. The first form starts the
processes itself; under torchrun (or SLURM, Lightning, Accelerate, Ray) they are there already.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import nullbayes as nb
from nullbayes import datasets


@dataclass(frozen=True)
class Sizes:
    """Training images, hidden units, training steps, samples."""

    images: int = 1200
    width: int = 64
    steps: int = 150
    samples: int = 30


SMALL = Sizes(120, 12, 40, 4)


def trained(data: datasets.Split, sizes: Sizes) -> nn.Module:
    """The same weights in every process, as each would load them from a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = sizes.width
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(sizes.steps):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(data.inputs), data.targets).backward()
            optimiser.step()
    return model.eval()


def fit(sizes: Sizes) -> dict[str, Any]:
    """What each process does; it is what one would do without the others."""
    data = datasets.digits(train=sizes.images, validation=200)
    solver = nb.solvers.ConjugateGradient(tolerance=1e-2, equilibrate=0.5)
    posterior = nb.NullSpacePosterior(trained(data.train, sizes), solver=solver)
    posterior.fit(data.train.loader(100), num_samples=sizes.samples, progress=False)
    novelty = posterior.novelty(data.validation.loader(100))
    certificate = posterior.certificate
    rows = posterior._fitted().rows
    assert rows is not None
    return {
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "held": certificate.held,
        "residual": certificate.residual,
        "prior precision": certificate.prior_precision,
        "novelty": float(novelty.mean()),
        "rows MB": rows.operator.nbytes / 2**20,
        "seconds": certificate.seconds,
        "communication": certificate.stages.get("communication", 0.0) / certificate.seconds,
        "samples": posterior._fitted().unit,
    }


def _process(rank: int, size: int, port: int, sizes: Sizes, path: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    torch.save(fit(sizes), f"{path}-{rank}")
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def run(sizes: Sizes, processes: int = 2) -> list[dict[str, Any]]:
    """The fit in this process alone, and then what each of several found."""
    alone = fit(sizes)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "found")
        mp.spawn(_process, (processes, _free_port(), sizes, path), nprocs=processes)
        found = [torch.load(f"{path}-{rank}", weights_only=False) for rank in range(processes)]
    return [alone, *found]


def summary(found: list[dict[str, Any]]) -> str:
    """One line a process."""
    first = found[0]["samples"]
    lines = []
    for one in found:
        apart = float((one["samples"] - first).norm() / first.norm())
        lines.append(
            f"{one['processes']} processes: {one['seconds']:.1f} s, {100 * one['communication']:.0f} % of it "
            f"communication, {one['rows MB']:.1f} MB of rows here, held: {one['held']}, samples apart: {apart:.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    """Starts the processes, unless a launcher has."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    sizes = SMALL if asked.small else Sizes()
    if "LOCAL_RANK" in os.environ:  # under torchrun, which says where the others are
        dist.init_process_group("gloo")
        found = fit(sizes)
        if dist.get_rank() == 0:
            print(summary([found]))
        dist.destroy_process_group()
        return
    print(summary(run(sizes, asked.processes)))


if __name__ == "__main__":
    main()
