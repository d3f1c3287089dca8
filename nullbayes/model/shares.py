"""Data for several processes: each reads its own range of the examples, none twice, none padded.

Which range follows from the numbers of the examples alone, so that every process can tell what all the others read.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from nullbayes.common.processes import Processes, spread
from nullbayes.errors import InputError
from nullbayes.model.batch import Inputs, tensor_leaves
from nullbayes.model.bits import digest
from nullbayes.model.data import Batches, Slices, as_loader, streamed, without_targets
from nullbayes.model.data import Shard as Shard
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.loader import limited, split_batch

# Items of a data set that are compared between processes.
_PROBES = 3
_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True)
class Share:
    """The batches of one process.

    Attributes:
        loader: these; ``empty``: whether there are none.
        start: the number of its first example among all; None: told by nobody, the shards follow each other.
        limit: of its examples, how many are used; None: all.
        probe: a batch of the data, for a process that has none.
        whole: examples that all processes have, before any limit; None: told by nobody.
        batch: examples that one process would read at a time, where they were split by index.
    """

    processes: Processes
    loader: Iterable[Any]
    start: int | None
    limit: int | None
    probe: Iterable[Any]
    whole: int | None
    empty: bool
    batch: int | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter(() if self.empty else self.loader)

    def __len__(self) -> int:
        return 0 if self.empty else len(self.loader)  # type: ignore[arg-type]

    @property
    def sampler(self) -> range | None:
        """As long as there are examples."""
        return None if self.whole is None else range(self.whole)


def shared(
    loader: Any, processes: Processes, name: str, limit: int | None = None, *, split: bool = True
) -> Share:
    """What this process reads of ``loader``, which every process passes alike.

    Args:
        loader: as ``as_loader`` gives it.
        limit: examples at most, of all processes together.
        split: False: every process reads all of it, in the same order.

    Raises:
        InputError: data that cannot be split, or that are not the same on every process.
    """
    if isinstance(loader, Share):
        return loader
    processes.agree(
        {f"kind of data in `{name}`": type(loader).__name__, "limit": limit}, InputError
    )
    part = _Parting(processes, name, limit, split)
    if isinstance(loader, Batches):
        inner = part.of(loader.loader)
        mine, probe = copy.copy(loader), copy.copy(loader)
        mine.loader, probe.loader = inner.loader, inner.probe
        return replace(inner, loader=mine, probe=probe)
    return part.of(loader)


def share_of(
    functional: FunctionalModel,
    loader: Iterable[Any],
    name: str,
    limit: int | None = None,
    tracked: Iterable[Any] | None = None,
    *,
    probe: bool = False,
) -> Iterator[tuple[int, Inputs, Any]]:
    """Batches of this process as `limited` gives them; of all where ``loader`` is no `Share`.

    Args:
        limit: of examples, where the share does not know it.
        tracked: the batches of ``loader`` under a bar.
        probe: where this process has no example, one to look at.
    """
    batches = loader if tracked is None else tracked
    if not isinstance(loader, Share):
        return limited(functional, batches, name, limit)
    if loader.empty:
        return limited(functional, loader.probe, name, 1) if probe else iter(())
    return limited(functional, batches, name, loader.limit)


def inputs_of_share(
    x: Any, dtype: torch.dtype, processes: Processes | None, *, labelled: bool = False
) -> Iterator[Any]:
    """The inputs of each batch of a stream that this process reads; what it holds for targets is left out.

    Args:
        labelled: see :func:`streamed`.

    Raises:
        InputError: it holds no batches, or cannot be split.
    """
    if processes is None:
        yield from streamed(x, dtype, labelled=labelled)
        return
    share = shared(as_loader(x, "x", dtype, labelled=False), processes, "x")
    if share.whole == 0:
        raise InputError("`x` yields no batches; pass a filled loader.")
    for batch in share:
        yield batch if labelled and isinstance(batch, Mapping) else without_targets(batch)


def refuse_limit(limit: int | None) -> None:
    """Raise `InputError` where there is one, for a `Shard`."""
    if limit is not None:
        raise InputError(
            "`max_examples` with a `Shard`: how many examples each process has is known to it alone. Cut the data "
            "before."
        )


@dataclass(frozen=True)
class _Parting:
    processes: Processes
    name: str
    limit: int | None
    split: bool

    def of(self, loader: Any) -> Share:
        if isinstance(loader, Shard):
            return self._said(loader)
        if isinstance(loader, Slices):
            return self._slices(loader)
        plain = (
            type(loader).__iter__ is DataLoader.__iter__
            if isinstance(loader, DataLoader)
            else False
        )
        if plain and not isinstance(loader.dataset, IterableDataset):
            return self._loader(loader)
        if isinstance(loader, Sequence):
            return self._list(loader)
        found = type(loader).__name__
        if plain:
            found = type(loader.dataset).__name__
        elif isinstance(loader, DataLoader):
            found += ", a loader with an `__iter__` of its own"
        raise InputError(
            f"`{self.name}` is read by iterating ({found}), so it cannot be split between {self.processes.size} "
            "processes by index. Let each process read its own part and say so, "
            "`nullbayes.distributed.Shard(data)`; or pass a data set with `__len__` and `__getitem__`."
        )

    def _range(self, count: int) -> range:
        if not self.split:
            return range(count)
        return spread(count, self.processes.size)[self.processes.rank]

    def _same(self, facts: dict[str, Any]) -> None:
        facts = {f"{key} in `{self.name}`": value for key, value in facts.items()}
        try:
            self.processes.agree(facts, InputError)
        except InputError as error:
            raise InputError(
                f"{error} Every process passes all of the data; one that has a part only says so: "
                "`nullbayes.distributed.Shard(data)`."
            ) from None

    def _said(self, shard: Shard) -> Share:
        refuse_limit(self.limit)
        # A process that has none looks at the first batch of another.
        first = next(iter(shard), None)
        having = [i for i, some in enumerate(self.processes.gather(first is not None)) if some]
        probe: Iterable[Any] = shard
        if having and len(having) < self.processes.size:
            probe = [self.processes.shared(lambda: tree_map(_on_cpu, first), having[0])]
        return Share(self.processes, shard, None, None, probe, None, bool(having) and first is None)

    def _slices(self, slices: Slices) -> Share:
        tensors = slices.tensors
        self._same(
            {
                "shapes": [tuple(t.shape) for t in tensors],
                "dtypes": [str(t.dtype) for t in tensors],
                "values": [digest(t) for t in tensors],
            }
        )
        whole = len(tensors[0])
        mine = self._range(whole if self.limit is None else min(whole, self.limit))
        some = tuple(t[mine.start : mine.stop] for t in tensors)
        first = tuple(t[: slices.batch_size] for t in tensors)
        probe = Slices(first, slices.batch_size)
        size = slices.batch_size
        loader = Slices(some, size)
        return Share(self.processes, loader, mine.start, None, probe, whole, not mine, size)

    # -- loaders -----------------------------------------------------------------------------------

    def _loader(self, loader: DataLoader[Any]) -> Share:
        self._same(_order(loader) | _facts(loader.dataset))
        sampler = loader.batch_sampler
        if type(sampler) is not BatchSampler:
            return self._batches(loader, sampler if sampler is not None else loader.sampler)
        # (Not the loader's: where it was given batches, that is a sampler of everything which nobody uses.)
        numbers = self._numbers(sampler.sampler)
        size = sampler.batch_size
        if sampler.drop_last:
            numbers = numbers[: len(numbers) // size * size]
        whole = len(numbers)
        numbers = numbers[: self.limit]
        mine = self._range(len(numbers))
        some = [
            list(numbers[i : min(i + size, mine.stop)]) for i in range(mine.start, mine.stop, size)
        ]
        own, probe = _again(loader, some), _again(loader, [list(numbers[:size])])
        return Share(self.processes, own, mine.start, None, probe, whole, not mine, size)

    def _numbers(self, sampler: Any) -> Sequence[int]:
        """The numbers of all examples, in the order in which one process would read them."""
        if _distributed(sampler):  # which pads: all of its data set, each once
            return range(len(sampler.dataset))
        if type(sampler) is SequentialSampler:
            return range(len(sampler))
        if type(sampler) in _RANDOM:
            return self.processes.shared(lambda: list(sampler))
        return self._custom(list(sampler), "sampler")

    def _custom(self, found: list[Any], what: str) -> list[Any]:
        """What a sampler of somebody's own gives, if it gives the same everywhere."""
        told = hashlib.sha256(repr(found).encode()).hexdigest()
        if len(set(self.processes.gather(told))) == 1:
            return found
        raise InputError(
            f"the {what} of `{self.name}` gives other examples in each process. Where it splits the data already, say "
            f"so, `nullbayes.distributed.Shard({self.name})`, and see that no example comes twice; otherwise pass the "
            "data set itself."
        )

    def _batches(self, loader: DataLoader[Any], sampler: Any) -> Share:
        """A sampler of batches of its own: whole batches go to the processes."""
        if self.limit is not None:
            raise InputError(
                f"`max_examples` with the batch sampler {type(sampler).__name__} on several processes: cut the data "
                "set instead."
            )
        known = sampler is loader.sampler and (
            isinstance(sampler, SequentialSampler) or _distributed(sampler)
        )
        numbers: list[Any] = list(self._numbers(sampler)) if known else list(sampler)
        parts = numbers if known else self._custom(numbers, "sampler")
        mine = self._range(len(parts))
        alone = loader.batch_sampler is None  # each number is a batch
        own = _again(loader, parts[mine.start : mine.stop], alone=alone)
        sizes: list[int] = [] if alone else [len(batch) for batch in parts]
        start = None if alone else sum(sizes[: mine.start])
        whole = None if alone else sum(sizes)
        probe = _again(loader, parts[:1], alone=alone)
        return Share(self.processes, own, start, None, probe, whole, not mine)

    def _list(self, batches: Sequence[Any]) -> Share:
        sizes = [_size(batch, f"{self.name}, batch {i}") for i, batch in enumerate(batches)]
        self._same({"sizes of batches": sizes, "values": [_digest(batch) for batch in batches]})
        total, ours = sum(sizes), self.processes.rank
        edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        # Each batch to the process in whose share its middle lies.
        owners = [
            int((edges[i] + sizes[i] / 2) * self.processes.size / max(1, total))
            for i in range(len(sizes))
        ]
        mine = [i for i, owner in enumerate(owners) if owner == ours or not self.split]
        start = edges[mine[0]] if mine else edges[sum(owner < ours for owner in owners)]
        count = sum(sizes[i] for i in mine)
        limit = None if self.limit is None else max(0, min(count, self.limit - start))
        own = [batches[i] for i in mine]
        empty = not count or limit == 0
        return Share(self.processes, own, start, limit, batches[:1], total, empty)


def _again(
    loader: DataLoader[Any], parts: Sequence[Any], *, alone: bool = False
) -> DataLoader[Any]:
    """The same loader over batches of these numbers; ``alone``: each number is a batch of its own."""
    order: dict[str, Any] = {"sampler": parts, "batch_size": None} if alone else {}
    return DataLoader(
        loader.dataset,
        **(order or {"batch_sampler": parts}),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
    )


def _distributed(sampler: Any) -> bool:
    """Whether it goes through all of its data set; one with an order of its own may go through something else."""
    return (
        isinstance(sampler, DistributedSampler)
        and type(sampler).__iter__ is DistributedSampler.__iter__
    )


def _order(loader: DataLoader[Any]) -> dict[str, Any]:
    """In which order a loader reads its data set, and in what batches."""
    inner = loader.batch_sampler
    used = getattr(inner, "sampler", loader.sampler)
    return {
        "sampler": (type(used).__name__, type(inner).__name__),
        "batch size": (getattr(inner, "batch_size", None), getattr(inner, "drop_last", None)),
    }


def _facts(dataset: Any) -> dict[str, Any]:
    """What two copies of a data set have in common: its length, and a few of its items."""
    count = len(dataset)
    places = sorted({0, count // 2, count - 1}) if count else []
    first = [_digest(dataset[i]) for i in places[:_PROBES]]
    again = [_digest(dataset[i]) for i in places[:_PROBES]]
    kinds = [leaf[:2] if isinstance(leaf, tuple) else leaf for item in first for leaf in item]
    # Augmented at random: another item each time, in one process as between two.
    values = first if first == again else "random"
    return {
        "number of examples": count,
        "shapes and dtypes of items": kinds,
        f"values of items {', '.join(map(str, places))}": values,
        "choice, order or labels of examples": _contents(dataset),
    }


def _contents(dataset: Any) -> list[Any]:
    """What is known of all items without reading one: tensors, which of a larger set these are, labels."""
    if isinstance(dataset, TensorDataset):
        return [digest(t) for t in dataset.tensors]
    if isinstance(dataset, Subset):
        chosen = hashlib.sha256(repr(list(dataset.indices)).encode()).hexdigest()[:16]
        return [chosen, *_contents(dataset.dataset)]
    if isinstance(dataset, ConcatDataset):
        return [_contents(part) for part in dataset.datasets]
    labels = getattr(dataset, "targets", None)  # those of torchvision
    if isinstance(labels, (list, np.ndarray)) and len(labels) == len(dataset):
        labels = np.asarray(labels)
        labels = torch.from_numpy(labels) if labels.dtype.kind in "biu" else None
    return [digest(labels)] if isinstance(labels, Tensor) else []


def _digest(value: Any) -> list[Any]:
    out: list[Any] = []
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
            leaf = torch.from_numpy(np.ascontiguousarray(leaf))
        if isinstance(leaf, Tensor):
            out.append((tuple(leaf.shape), str(leaf.dtype), digest(leaf)))
        else:
            plain = isinstance(leaf, (bool, int, float, str, type(None)))
            out.append(leaf if plain else type(leaf).__name__)
    return out


def _on_cpu(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf


def _size(batch: Any, where: str) -> int:
    """Examples of a batch: the length of its first tensor."""
    inputs, _ = split_batch(batch, where, unlabelled=True)
    sizes = [len(t) for t in tensor_leaves(inputs) if t.ndim]
    return sizes[0] if sizes else 1
