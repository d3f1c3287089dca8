"""What one of several processes does in these tests: ``python scenes.py scenes rank size folder``.

Each scene returns what is compared with one process that does the same, or with the other processes.
"""

from __future__ import annotations

import os
import sys
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


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
