"""How data are split over processes, and what is refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from host_reads import followed
from processes.answers import CG, inside, layers
from processes.asked import of_layers
from processes.differing import Late, differing, threads
from processes.stage import BATCH, data, fitted, loader, network, posterior, told
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
)

import nullbayes as nb
from nullbayes.distributed import Shard


class Numbered(Dataset[Any]):
    """Remembers which examples were read."""

    def __init__(self, count: int) -> None:
        self.x, self.y = data(count)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, number: int) -> Any:
        self.read.append(number)
        return self.x[number], self.y[number]


class Streamed(IterableDataset[Any]):
    def __init__(self, start: int, stop: int) -> None:
        self.part = slice(start, stop)

    def __iter__(self) -> Any:
        x, y = data(20)
        yield from zip(x[self.part], y[self.part], strict=True)


def split_and_refused() -> dict[str, Any]:
    """How data are split, and what is refused."""
    rank, size = dist.get_rank(), dist.get_world_size()
    out: dict[str, Any] = {"number": rank}
    numbered = Numbered(20)
    shuffled = DataLoader(numbered, batch_size=BATCH, shuffle=True)
    posterior().fit(shuffled, 2, progress=False)
    out["read"] = [n for n in numbered.read if numbered.read.count(n) == 1]
    padded = DataLoader(
        TensorDataset(*data(20)), batch_size=BATCH, sampler=DistributedSampler(numbered)
    )
    out["padded"] = fitted(posterior(), padded)["unit"]
    whole = DataLoader(Streamed(0, 20), batch_size=BATCH)
    edges = [20 * r // size for r in range(size + 1)]
    part = DataLoader(Streamed(edges[rank], edges[rank + 1]), batch_size=BATCH)
    out["shards"] = fitted(posterior(), Shard(part))["unit"]
    by_layer = nb.LayerNullSpacePosterior(network(), prior_precision=1.0)
    by_layer.fit(Shard(part), 2, progress=False)
    out["layer shards"] = of_layers(by_layer, torch.float64)
    by_layer.fit(loader(20), 2, progress=False)
    out["layer whole"] = of_layers(by_layer, torch.float64)
    plain = posterior()
    out["whole"] = fitted(plain, loader(20))["unit"]
    rows = plain._fitted().rows
    assert rows is not None
    out["rows"] = rows.operator.nbytes
    plain.process_group = False
    out["update alone"] = told(lambda: plain.update(loader(4, seed=9), progress=False))
    alone = nb.NullSpacePosterior(network(), solver="dual Cholesky", process_group=False)
    out["alone"] = fitted(alone, loader(20))["unit"]
    rows = alone._fitted().rows
    assert rows is not None
    out["rows whole"] = rows.operator.nbytes
    out["streamed"] = told(lambda: posterior().fit(whole, 2, progress=False))
    out["other data"] = told(lambda: posterior().fit(data(20, seed=rank), 2, progress=False))
    out["other seed"] = told(lambda: posterior().fit(loader(20), 2, rank // 2, progress=False))
    own_part = layers(20 + 10 * rank)
    out["other layers"] = told(lambda: inside(own_part).fit(loader(7), 2, progress=False))
    moved = network()
    with torch.no_grad():
        next(moved.parameters()).add_(float(rank == size - 1))
    other = nb.NullSpacePosterior(moved, solver="dual Cholesky")
    out["other weights"] = told(lambda: other.fit(loader(20), 2, progress=False))
    out["failed"] = told(lambda: posterior().fit(Late(rank), 2, progress=False))
    out["differences"] = differing(rank == size - 1)
    out["data"] = _kinds_of_data(rank, size)
    out["threads"] = threads(rank)
    out["after"] = fitted(posterior(), loader(20))["unit"]
    if size == 2:  # counting them takes long
        out["host reads"] = reads()
    plan = posterior().plan(loader(20), num_samples=4)
    out["plan"] = (plan.processes, plan.rows, plan.sent > 0, sorted(plan.seconds))
    return out


class _Moved(DataLoader[Any]):
    """Reads something else than its data set holds."""

    def __iter__(self) -> Any:
        return ((2 * x, y) for x, y in super().__iter__())


def _kinds_of_data(rank: int, size: int) -> dict[str, Any]:
    """Which examples a fit is of, by how they are given; what is refused."""
    (x, y), some = data(20), [3, 1, 2, 7, 8, 11, 19]
    everything = TensorDataset(x, y)
    of_batches = BatchSampler(SubsetSampler(some), 2, drop_last=False)
    nowhere = x[:0], y[:0]
    all_here = (x[some], y[some]) if rank == size - 1 else nowhere
    ways = {
        "plain": loader_of(x[some], y[some]),
        "batch sampler": DataLoader(everything, batch_sampler=of_batches),
        "subset": DataLoader(Subset(everything, some), batch_size=BATCH),
        "one shard has all": Shard(all_here),
    }
    out: dict[str, Any] = {}
    for name, train in ways.items():
        p = posterior().fit(train, 2, progress=False)
        out[name] = (p._fitted().unit, p.certificate.examples, p.plan(train).examples)
    numbered = Numbered(20)
    part = DataLoader(Subset(numbered, range(20 * rank // size, 20 * (rank + 1) // size)))
    planned = posterior().plan(Shard(part))
    out["plan of a shard"] = planned.examples, [numbered.read.count(n) for n in range(20)]
    out["of a shard"] = p.predict(Shard(all_here)).mean - p.predict(ways["plain"]).mean
    refused = {
        "moved": _Moved(everything),
        "shuffled in one": DataLoader(everything, shuffle=rank == size - 1),
        "another choice": Subset(everything, [0, *([4, 5] if rank == size - 1 else [5, 4]), 9]),
        "a label": TensorDataset(x, torch.where(torch.arange(20) == 7, rank % 3, y)),
        "nobody has any": Shard(nowhere),
    }
    for name, train in refused.items():
        out[name] = told(lambda train=train: posterior().fit(train, 2, progress=False))
    out["nothing to plan"] = told(lambda: posterior().plan(Shard(nowhere)))
    out["a limit"] = told(lambda: posterior().plan(Shard(all_here), max_examples=3))
    return out


class SubsetSampler(Sampler[int]):
    def __init__(self, some: list[int]) -> None:
        self.some = some

    def __iter__(self) -> Any:
        return iter(self.some)

    def __len__(self) -> int:
        return len(self.some)


def loader_of(x: Tensor, y: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


def reads() -> list[int]:
    """From the device: in products with all rows, and in each step of a search (see `host_reads.py`)."""
    counts = []
    for limit in (3, 9):
        solver = CG(1e-14, max_iterations=limit)
        p = nb.NullSpacePosterior(network(), solver=solver, delta=1e-3)
        p.fit(loader(23), 4, progress=False)
        state = p._fitted().state
        assert state is not None
        operator, v = state.operator, torch.randn(4, p.space.total, dtype=torch.float64)
        with followed(operator, v) as products:
            operator.rmatvec(operator.matvec(v))
            operator.normal(v)
        with followed(operator, v) as steps:
            done = state.project(v)
        counts.append((steps.total, done.iterations))
    (first, before), (second, after) = counts
    return [products.total, (second - first) // (after - before)]
