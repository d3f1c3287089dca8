"""Batches of inputs: nested tensors with the examples on the first axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from nullbayes.errors import InputError, NonFiniteError

Inputs = Any


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """All tensors of a nested input on ``device``; mappings become plain dicts."""
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    return tree_map(lambda t: _placed(t, device) if isinstance(t, Tensor) else t, inputs)


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    """On ``device``, and fit for derivatives where it was made under ``torch.inference_mode``."""
    tensor = tensor.to(device)
    return tensor.clone() if tensor.is_inference() else tensor


def check_inputs(inputs: Inputs, where: str) -> None:
    """Raise :class:`NonFiniteError` if a floating-point input holds NaN or infinity."""
    for leaf in tensor_leaves(inputs):
        if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
            finite = leaf.isfinite().reshape(leaf.shape[0], -1).all(1) if leaf.ndim else None
            row = "" if finite is None else f" (first in example {int((~finite).nonzero()[0])})"
            raise NonFiniteError(
                f"{where}: the inputs hold NaN or infinity{row}. Clean or impute the data first."
            )


def tensor_leaves(inputs: Inputs) -> list[Tensor]:
    """All tensors of a nested input."""
    return [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]


def batch_size(inputs: Inputs, where: str = "the batch") -> int:
    """Length of the leading axis of the first tensor."""
    for leaf in tensor_leaves(inputs):
        if leaf.ndim:
            return int(leaf.shape[0])
    raise InputError(
        f"{where} holds no tensor with a batch axis; found {type(inputs).__name__}. Convert it first "
        "(`torch.as_tensor(...)`, or a collate function that makes tensors)."
    )


def take(inputs: Inputs, start: int, stop: int, size: int | None = None) -> Inputs:
    """Examples ``start:stop`` of ``size``: every tensor that has the batch axis is cut, the rest is kept."""
    size = batch_size(inputs) if size is None else size
    return tree_map(
        lambda t: t[start:stop] if isinstance(t, Tensor) and t.ndim and len(t) == size else t,
        inputs,
    )


def select(inputs: Inputs, index: Tensor) -> Inputs:
    """The examples at ``index (k,)``: every tensor that has the batch axis is indexed, the rest is kept."""
    size = batch_size(inputs)
    return tree_map(
        lambda t: t[index] if isinstance(t, Tensor) and t.ndim and len(t) == size else t, inputs
    )
