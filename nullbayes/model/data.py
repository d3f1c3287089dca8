"""Data as people have them: arrays, tensors, data sets, loaders, Lightning data modules; one way to read them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nullbayes.common.arguments import check_count
from nullbayes.errors import InputError
from nullbayes.model.graphs import is_graph
from nullbayes.model.loader import TARGET_KEYS, check_reusable
from nullbayes.model.ragged import Structured

BATCH = 256
_STRUCTURES = (Structured, PackedSequence)

Split = Callable[[Any], tuple[Any, Any]]


class Batches:
    """Data of any kind as batches ``(inputs, targets)`` that can be read again: accepted wherever a loader is.

    Args:
        data: a loader, a list of batches, a `torch.utils.data.Dataset`, a tuple ``(X, y)`` of arrays or tensors, or a
            Lightning data module (its training data).
        targets: the key of a mapping, or the attribute of an object, under which a batch holds its targets. None: the
            last entry of a tuple, or a key that is called like targets.
        batch_size: of data that do not come in batches.
        collate: ``collate(list of examples) -> batch``, for a data set or a list of examples.
        split: ``split(batch) -> (inputs, targets)``, for batches of any other structure.

    Raises:
        InputError: arguments that do not fit together; while it is read, a batch that they do not fit.
    """

    def __init__(
        self,
        data: Any,
        *,
        targets: str | None = None,
        batch_size: int = BATCH,
        collate: Callable[[list[Any]], Any] | None = None,
        split: Split | None = None,
    ) -> None:
        if split is not None and targets is not None:
            raise InputError("`split` and `targets` both say where targets are; pass one of them.")
        if isinstance(targets, bool) or not isinstance(targets, (str, type(None))):
            raise InputError(f"`targets` is {targets!r}; expected the name of a key, or None.")
        for name, value in (("collate", collate), ("split", split)):
            if value is not None and not callable(value):
                raise InputError(f"`{name}` is {value!r}; expected a function, or None.")
        self.batch_size = check_count(batch_size, "batch_size")
        self.targets, self.split = targets, split
        if collate is None:
            self.loader = as_loader(data, "data", None, labelled=False, batch_size=self.batch_size)
        elif isinstance(data, Dataset) or (
            isinstance(data, Sized) and hasattr(data, "__getitem__")
        ):
            self.loader = DataLoader(data, batch_size=self.batch_size, collate_fn=collate)  # type: ignore[arg-type]
        else:
            raise InputError(
                f"`collate` needs a data set or a list of examples, `data` is {type(data).__name__}; give the "
                "function to the loader itself (`DataLoader(..., collate_fn=...)`)."
            )

    @property
    def sampler(self) -> Any:
        """That of the loader, if it has one."""
        return getattr(self.loader, "sampler", None)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.loader):
            yield self._parted(batch, index)

    def _parted(self, batch: Any, index: int) -> Any:
        if self.split is not None:
            parts = self.split(batch)
            if not isinstance(parts, (tuple, list)) or len(parts) != 2:
                raise InputError(
                    f"batch {index}: `split` returned {type(parts).__name__}, expected (inputs, targets)."
                )
            return tuple(parts)
        if self.targets is None:
            return batch
        if isinstance(batch, Mapping):
            if self.targets not in batch:
                raise InputError(
                    f"batch {index} has the keys {sorted(map(str, batch))}, but not {self.targets!r} "
                    "(`targets=`)."
                )
            return {k: v for k, v in batch.items() if k != self.targets}, batch[self.targets]
        found = getattr(batch, self.targets, None)
        if found is None:
            raise InputError(
                f"batch {index} is {type(batch).__name__}, which has no {self.targets!r} (`targets=`); use "
                "`split=lambda batch: (inputs, targets)`."
            )
        return batch, found


class Shard:
    """What this process has of the data, where they cannot be split by index: no other process has any of it.

    Args:
        data: anything that ``fit`` takes, of this process alone; nothing, where it has none.
        batch_size: of data that do not come in batches.
    """

    def __init__(self, data: Any, batch_size: int = BATCH) -> None:
        if _is_empty(data):
            data = []
        self.loader = as_loader(data, "data", None, labelled=False, batch_size=batch_size)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def _is_empty(data: Any) -> bool:
    parts = data if isinstance(data, tuple) and data else (data,)
    return all(is_array(part) and part.shape and not len(part) for part in parts)


def as_loader(
    data: Any,
    name: str,
    dtype: torch.dtype | None,
    *,
    labelled: bool = True,
    batch_size: int = BATCH,
    pieces: bool = False,
) -> Iterable[Any]:
    """Batches of ``data``, which can be read again.

    Args:
        data: a loader or list of batches, a `torch.utils.data.Dataset`, a tuple ``(X, y)`` (or ``(X1, X2, y)``) of
            tensors or arrays, a Lightning data module, or, where targets are not needed, ``X`` alone.
        name: of the argument, for messages; it also says which loader of a data module is meant.
        pieces: a tuple of tensors that differ in nothing but their length is batches without targets, as
            ``x.split(32)`` makes them, and not ``(X, y)``.
        dtype: of the network; floating-point arrays of NumPy and pandas are converted to it.

    Raises:
        InputError: anything else; arrays of different lengths; what can be read only once.
    """
    if is_array(data):
        if labelled:
            raise InputError(
                f"`{name}` is one {type(data).__name__}, but targets are needed: pass `(X, y)`, or a loader."
            )
        return _sliced((as_tensor(data, dtype),), name, batch_size)
    several = isinstance(data, tuple) and len(data) >= 2 and all(is_array(t) for t in data)
    if several and any(isinstance(t, Tensor) and t.is_nested for t in data):
        return [data]
    if several and not (pieces and _alike(data)):
        return _sliced(tuple(as_tensor(t, dtype) for t in data), name, batch_size)
    if hasattr(data, "train_dataloader"):
        return _of_module(data, name)
    if isinstance(data, Dataset):
        return _loader(data, batch_size)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], _STRUCTURES):
        return [data]  # inputs that cannot be cut before they have been looked at
    check_reusable(data, name)
    return data


def _loader(data: Dataset[Any], batch_size: int) -> DataLoader[Any]:
    """Batches of a data set; graphs of PyTorch Geometric are put together as that library does."""
    if isinstance(data, Sized) and len(data) and is_graph(data[0]):
        from torch_geometric.loader import DataLoader as GraphLoader

        return GraphLoader(data, batch_size=batch_size)
    return DataLoader(data, batch_size=batch_size)


def _alike(values: tuple[Any, ...]) -> bool:
    return len({(tuple(v.shape[1:]), v.dtype) for v in values if isinstance(v, Tensor)}) == 1


def is_array(value: Any) -> bool:
    """A tensor, a NumPy array, or a table of pandas."""
    return isinstance(value, (Tensor, np.ndarray)) or (
        hasattr(value, "__array__") and hasattr(value, "iloc")
    )


def as_tensor(values: Any, dtype: torch.dtype | None) -> Tensor:
    """Tensors as they are; other arrays as tensors, floating-point ones in ``dtype``.

    Raises:
        InputError: an array of objects or strings.
    """
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    try:
        # A copy where torch could not hold the array: negative strides, or memory that must not be written to.
        made = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    except TypeError as error:
        raise InputError(
            f"an array has dtype {array.dtype}, which no tensor can hold; expected numbers. Encode "
            "text and categories first."
        ) from error
    return made.to(dtype) if made.is_floating_point() and dtype is not None else made


def as_inputs(x: Any, dtype: torch.dtype) -> Any:
    """``x`` with tensors where it has NumPy's arrays or pandas' tables."""
    return tree_map(lambda leaf: as_tensor(leaf, dtype) if is_array(leaf) else leaf, x)


def is_stream(x: Any) -> bool:
    """Whether ``x`` is many batches, to be read one by one, and not the inputs of one."""
    streams = (DataLoader, Dataset, Batches, Iterator, Shard)
    return isinstance(x, streams) or hasattr(x, "train_dataloader")


def streamed(x: Any, dtype: torch.dtype, *, labelled: bool = False) -> Iterator[Any]:
    """The inputs of each batch of a stream; what it holds for targets is left out.

    Args:
        labelled: mappings stay as they are: the network's library makes inputs of targets, too.

    Raises:
        InputError: it holds no batches.
    """
    loader = x if isinstance(x, Iterator) else as_loader(x, "x", dtype, labelled=False)
    empty = True
    for batch in loader:
        empty = False
        yield batch if labelled and isinstance(batch, Mapping) else without_targets(batch)
    if empty:
        raise InputError("`x` yields no batches; a generator can be read only once.")


def without_targets(batch: Any) -> Any:
    """The inputs of a batch."""
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k not in TARGET_KEYS}
    if isinstance(batch, (list, tuple)) and batch and not isinstance(batch, PackedSequence):
        inputs = batch[:-1] if len(batch) > 1 else batch
        return inputs[0] if len(inputs) == 1 else tuple(inputs)
    return batch


def _sliced(tensors: tuple[Tensor, ...], name: str, batch_size: int) -> Iterable[Any]:
    if not tensors[0].ndim or not len(tensors[0]):
        raise InputError(f"`{name}` holds no examples: shape {tuple(tensors[0].shape)}.")
    lengths = [len(t) if t.ndim else 0 for t in tensors]
    if len(set(lengths)) > 1:
        raise InputError(
            f"`{name}` holds {lengths[0]} inputs but {lengths[-1]} targets."
            if len(lengths) == 2
            else f"`{name}` holds arrays of the lengths {lengths}; expected one for each example."
        )
    return Slices(tensors, batch_size)


class Slices:
    """Consecutive parts of tensors, as views; ``sampler`` says how many examples there are."""

    def __init__(self, tensors: tuple[Tensor, ...], batch_size: int) -> None:
        self.tensors, self.batch_size = tensors, batch_size
        self.sampler = TensorDataset(*tensors)

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.tensors[0]), self.batch_size):
            parts = tuple(t[start : start + self.batch_size] for t in self.tensors)
            yield parts[0] if len(parts) == 1 else parts


def _of_module(module: Any, name: str) -> Iterable[Any]:
    """A loader of a Lightning data module, by what it is for.

    It is set up only where its loaders cannot be had otherwise: a second set-up may split the data another way.
    """
    part = "train" if name in ("train", "train_loader", "data", "more") else "test"
    part = "val" if name in ("val_loader", "validation") else part
    make = getattr(module, f"{part}_dataloader", None)
    if make is None:
        raise InputError(f"`{name}` is {type(module).__name__}, which has no `{part}_dataloader`.")
    try:
        loader = make()
    except Exception:  # before it is set up, whatever its loaders say to that
        module.prepare_data()
        module.setup("test" if part == "test" else "fit")
        loader = make()
    if isinstance(loader, Mapping) or not isinstance(loader, Iterable):
        raise InputError(
            f"`{name}`: `{type(module).__name__}.{part}_dataloader` gives {type(loader).__name__}, expected one "
            "loader. Pass the one that is meant."
        )
    return loader
