"""What one of several processes does in these tests: ``python scenes.py scenes rank size folder``.

With ``all`` for the rank it forks them all, and ends as the first of them does or, without the scene ``lost``, as the
last of them: what they import is then imported once.

Each scene returns what is compared with one process that does the same, or with the other processes.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import answers, asked, endings, meshes, splits

from nullbayes.fit import pipeline


def sharded() -> dict[str, Any]:
    """A network of which each process has a part."""
    from processes import sharded as room  # FSDP takes long to import

    return room.sharded()


def main(scenes: str, rank: int, size: int, folder: Path) -> None:
    """Plays the scenes one after the other; what they return goes to files."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Which examples there was time to audit is no property of a fit.
    pipeline.LEAST_AUDIT = 1e9
    store = os.environ.get("NULLBAYES_TEST_STORE", f"file://{folder}/store-{size}-{scenes[:4]}")
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    every: dict[str, Callable[[], dict[str, Any]]] = {
        "solver": answers.same_by_solver,
        "rows": answers.same_by_rows,
        "updates": answers.same_after_updates,
        "flat": meshes.same_on_flat_meshes,
        "within": answers.same_within_layers,
        "posterior": asked.same_of_a_posterior,
        "layer": asked.same_by_layer,
        "split": splits.split_and_refused,
        "sharded": sharded,
        "interrupted": lambda: endings.interrupted(folder),
        "lost": endings.lost,
        "hosts": endings.on_two_hosts,
        "mesh": meshes.same_on_a_mesh,
        "cut": lambda: endings.cut(folder),
    }
    for scene in scenes.split(","):
        torch.save(every[scene](), folder / f"{scene}-{size}-{rank}.pt")
    if "cut" in scenes:
        os._exit(0)  # nothing is left to be taken down together
    dist.destroy_process_group()


def forked(scenes: str, size: int, folder: Path) -> int:
    """The exit status of all processes that are waited for."""
    importlib.import_module(
        "experiments.preload"
    )  # what they import on their way, and takes seconds
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            _child(scenes, rank, size, folder)
        children.append(child)
    waited = children[:1] if "lost" in scenes else children
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in waited)


def _child(scenes: str, rank: int, size: int, folder: Path) -> None:
    with (folder / f"said-{size}-{rank}.txt").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    try:
        main(scenes, rank, size, folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    scenes, rank, size, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    if rank == "all":
        sys.exit(forked(scenes, size, folder))
    main(scenes, int(rank), size, folder)
