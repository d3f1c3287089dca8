"""Calls that are other ones in one of the processes, and errors in one of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from processes.stage import data, loader, network, posterior, told
from torch.utils.data import Dataset

import nullbayes as nb
from nullbayes.common.processes import resolve
from nullbayes.fit import pipeline


def differing(odd: bool) -> dict[str, tuple[str, str]]:
    """Errors of calls that are other ones in one process: ``odd`` there."""
    train, names = loader(8), ["0.weight"] if odd else ["4.weight", "4.bias"]  # 15 weights each
    alone = nb.NullSpacePosterior(network(), solver="dual Cholesky", process_group=False)
    alone.fit(train, 2, int(odd), progress=False).process_group = None
    same = posterior().fit(train, 2, progress=False)
    makes: dict[str, Callable[[], Any]] = {
        "prior": lambda: posterior(prior_precision=1.0 + odd).fit(train, 2, progress=False),
        "prior_mean": lambda: posterior(prior_mean=1.0 + odd).fit(train, 2, progress=False),
        "parameters": lambda: posterior(parameters=names).fit(train, 2, progress=False),
        "sample_dtype": lambda: posterior().fit(
            train, 2, progress=False, sample_dtype=torch.bfloat16 if odd else None
        ),
        "call": lambda: same.predict(train) if odd else same.novelty(train),
        "samples": lambda: alone.predict(train),
        "how": lambda: same.predict(train, method="sampled" if odd else "linearised"),
        "metric": lambda: same.calibrate(train, metric="ece" if odd else "nll", progress=False),
        "shifted": lambda: same.evaluate(train, shifted={"ab"[odd]: train}, progress=False),
        "count": lambda: same.draw(1 + odd),
        "exchange": lambda: _other_exchange(odd),
        "memory": lambda: _out_of_memory(odd),
    }
    return {name: told(make) for name, make in makes.items()}


def _other_exchange(odd: bool) -> None:
    """One process adds where the others give."""
    processes = resolve(None)
    assert processes is not None
    with processes.call("fit", {}):
        if odd:
            processes.total(1.0)
        else:
            processes.gather(1.0)


def _out_of_memory(odd: bool) -> None:
    """In one process, in the middle of a fit."""
    project = pipeline.Fitting.project

    def failing(self: pipeline.Fitting) -> None:
        if odd:
            raise MemoryError
        project(self)

    pipeline.Fitting.project = failing  # type: ignore[method-assign]
    try:
        posterior().fit(loader(8), 2, progress=False)
    finally:
        pipeline.Fitting.project = project  # type: ignore[method-assign]


def threads(rank: int) -> dict[str, list[Any]]:
    """Samples, or the error, of two threads that fit at once: in the group of all, and in one of their own each."""
    groups: dict[str, list[Any]] = {
        "one group": [None, None],
        "own groups": [dist.new_group(), dist.new_group()],
    }
    out: dict[str, list[Any]] = {}
    for name, of in groups.items():
        found = out[name] = [None, None]
        made = [posterior(process_group=group) for group in of]
        for (
            group
        ) in of:  # as the page on many processes says: each is used once before there are threads
            resolve(group)

        def fit(i: int, made: list[Any] = made, found: list[Any] = found) -> None:
            time.sleep(0.05 * ((i + rank) % 2))  # in another order in each process
            error = told(lambda: made[i].fit(loader(20), 4, progress=False))
            found[i] = error if any(error) else made[i]._fitted().unit

        both = [threading.Thread(target=fit, args=(i,)) for i in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    return out


class Late(Dataset[Any]):
    """Breaks in process 1 alone, at an example that nobody looks at before."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.x, self.y = data(60)

    def __len__(self) -> int:
        return 60

    def __getitem__(self, number: int) -> Any:
        if self.rank == 1 and number % 30 > 20:
            raise OSError("the disk is gone")
        return self.x[number], self.y[number]
