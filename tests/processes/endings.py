"""Searches that are interrupted and go on, processes that are lost, machines that are cut off."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes.answers import CG, SOLVERS
from processes.asked import of_layers
from processes.differing import Late
from processes.stage import fitted, loader, network, posterior, told

import nullbayes as nb
from nullbayes.common import pulse
from nullbayes.common.processes import Processes, resolve
from nullbayes.solvers.checkpoint import Watch


def _search(path: Path, stop_at: int | None, who: int) -> dict[str, Any]:
    """A search with a checkpoint; Ctrl-C comes at iteration ``stop_at`` in process ``who`` alone."""
    count, report = [0], Watch.report
    # Where the tests run in the background of a shell, Ctrl-C is ignored from the start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def counting(self: Watch, done: int, reached: float) -> None:
        count[0] += 1
        mine = not dist.is_initialized() or dist.get_rank() == who
        if stop_at is not None and count[0] == stop_at and mine:
            os.kill(os.getpid(), signal.SIGINT)
        report(self, done, reached)

    Watch.report = counting  # type: ignore[method-assign]
    try:
        p = nb.NullSpacePosterior(network(), solver=CG(1e-9), delta=1e-2)
        found = fitted(p, loader(23), checkpoint=path, checkpoint_every=1e-9)
    finally:
        Watch.report = report  # type: ignore[method-assign]
    return found | {"status": p.certificate.status, "iterations": p.certificate.iterations}


def interrupted(folder: Path) -> dict[str, Any]:
    """Goes on from what more processes have left, as far as Ctrl-C in one of them."""
    size = dist.get_world_size()
    return _search(folder / "search.safetensors", 18 if size == 3 else 6, size - 1)


def finished(folder: Path | None) -> dict[str, Any]:
    """To the end, from a checkpoint or without one."""
    if folder is None:
        p = nb.NullSpacePosterior(network(), solver=CG(1e-9), delta=1e-2)
        return fitted(p, loader(23)) | {"iterations": p.certificate.iterations}
    return _search(folder / "search.safetensors", None, 0)


class _Broken(Late):
    """Kills or stalls its process in the middle of the data."""

    def __init__(self, how: str) -> None:
        super().__init__(0)
        self.how = how

    def __getitem__(self, number: int) -> Any:
        if number % 20 > 10:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "stalled":
                time.sleep(300)
        return self.x[number], self.y[number]


def lost() -> dict[str, Any]:
    """Process 1 of three stalls; then, of the two others, the last is killed."""
    rank, out = dist.get_rank(), {}
    pair = dist.new_group([0, 2])
    pulse.BEAT, pulse.SILENT = 0.2, 3.0
    for how, who, group in (("stalled", 1, None), ("killed", 2, pair)):
        processes = resolve(group)
        assert isinstance(processes, Processes)
        processes.pulse.stalled = 3.0
        dual = nb.NullSpacePosterior(network(), solver="dual Cholesky", process_group=group)
        started = time.monotonic()
        broken = _Broken(how if rank == who else "")
        error = told(lambda dual=dual, broken=broken: dual.fit(broken, 2, progress=False))
        out[how] = (error, time.monotonic() - started)
    return out


def on_two_hosts() -> dict[str, Any]:
    """A direct solver, a search and a layer posterior."""
    out = {}
    for name in ("dual", "plain"):
        p = nb.NullSpacePosterior(network(), solver=SOLVERS[name](1e-9), delta=1e-2)
        out[name] = fitted(p, loader(23))
    layers = nb.LayerNullSpacePosterior(network()).fit(loader(23), 3, progress=False)
    return out | {"layer": of_layers(layers, torch.float64)}


class _Cut(Late):
    """Waits in process 1 until the link between the two is gone."""

    def __init__(self, folder: Path) -> None:
        super().__init__(0)
        self.folder = folder

    def __getitem__(self, number: int) -> Any:
        if dist.get_rank() == 1 and number % 30 > 10:
            (self.folder / "cut now").touch()
            while not (self.folder / "is cut").exists():
                time.sleep(0.05)
        return self.x[number], self.y[number]


def cut(folder: Path) -> dict[str, Any]:
    """The link is cut while both read data."""
    started = time.monotonic()
    error = told(lambda: posterior().fit(_Cut(folder), 2, progress=False))
    return {"error": error, "seconds": time.monotonic() - started}
