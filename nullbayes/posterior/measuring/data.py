"""Data as an evaluation takes them: loaders, data sets, and tensors or arrays as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nullbayes.errors import InputError
from nullbayes.model.loader import check_reusable

BATCH = 256
Arrays = (Tensor, np.ndarray)


def as_loader(data: Any, name: str, dtype: torch.dtype, *, labelled: bool) -> Iterable[Any]:
    """Batches of ``data``, which can be read again.

    Args:
        data: a loader or list of batches, a `torch.utils.data.Dataset`, a tuple ``(X, y)`` of tensors or arrays, or,
            where targets are not needed, ``X`` alone.
        dtype: of the network; NumPy's floating-point arrays are converted to it.

    Raises:
        InputError: anything else; arrays of different lengths; what can be read only once.
    """
    if isinstance(data, Arrays):
        if labelled:
            raise InputError(
                f"`{name}` is one {type(data).__name__}, but targets are needed: pass `(X, y)`, or a loader."
            )
        x = _tensor(data, dtype)
        return [x[start : start + BATCH] for start in _starts(x, name)]
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(t, Arrays) for t in data):
        x, y = (_tensor(t, dtype) for t in data)
        if len(x) != len(y):
            raise InputError(f"`{name}` holds {len(x)} inputs but {len(y)} targets.")
        return [(x[s : s + BATCH], y[s : s + BATCH]) for s in _starts(x, name)]
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=BATCH)
    check_reusable(data, name)
    return data


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(values, Tensor):
        return values
    made = torch.from_numpy(np.ascontiguousarray(values))
    return made.to(dtype) if made.is_floating_point() else made


def _starts(values: Any, name: str) -> range:
    if not values.ndim or not len(values):
        raise InputError(f"`{name}` holds no examples: shape {tuple(values.shape)}.")
    return range(0, len(values), BATCH)
