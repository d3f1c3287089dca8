"""Weights that are stored as something else: eight-bit integers and their scales in one tensor subclass.

Packages for quantised weights (torchao) give a layer a weight that multiplies and differentiates like any other, and
knows little else. What is asked of the numbers themselves (are they finite, are they what they were) is asked of the
plain tensors inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_ROWS = ("crow_indices", "col_indices", "values")
_COLUMNS = ("ccol_indices", "row_indices", "values")
# By layout, the methods that give what a sparse tensor is made of.
_SPARSE = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _ROWS,
    torch.sparse_bsr: _ROWS,
    torch.sparse_csc: _COLUMNS,
    torch.sparse_bsc: _COLUMNS,
}


def is_packed(tensor: Tensor) -> bool:
    """Whether it is made of other tensors."""
    return type(tensor) is not nn.Parameter and bool(is_traceable_wrapper_subclass(tensor))


def opened(tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors inside by name, ``""`` for one that is plain itself; of a sparse one indices and values."""
    if tensor.layout in _SPARSE:
        return {name: getattr(tensor, name)().detach() for name in _SPARSE[tensor.layout]}
    if not is_packed(tensor):
        return {"": tensor}
    packed: Any = tensor
    names, _ = packed.__tensor_flatten__()
    return {
        f"{name}.{inner}".rstrip("."): part
        for name in names
        for inner, part in opened(getattr(tensor, name)).items()
    }


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, and what is inside of those that are packed."""
    every = (*model.parameters(), *model.buffers())
    return [part for tensor in every for part in opened(tensor).values()]
