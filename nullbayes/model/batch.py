"""Batches of inputs: nested tensors, and which of them have the examples on their first axis.

Which tensors those are is a fact about the model (``axes.py``), and travels with the inputs as a :class:`Batch`.
Inputs that nobody has looked at are cut wherever a tensor is as long as the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_map, tree_unflatten

from nullbayes.errors import InputError, NonFiniteError
from nullbayes.model.ragged import regular

Inputs = Any
Flags = tuple[bool, ...]


@dataclass(frozen=True)
class Batch:
    """Inputs and, for each of their leaves in the order of ``tree_flatten``, whether it has the batch."""

    inputs: Any
    flags: Flags


register_pytree_node(
    Batch,
    lambda batch: ([batch.inputs], batch.flags),
    lambda children, flags: Batch(next(iter(children)), flags),
    serialized_type_name="nullbayes.Batch",
)


@dataclass(frozen=True)
class Keyed:
    """Inputs with one key (int64) per example, from which its random numbers follow."""

    inputs: Any
    keys: Tensor  # (B,)
    seed: int


def _keyed_again(children: Iterable[Any], seed: int) -> Keyed:
    inputs, keys = children
    return Keyed(inputs, keys, seed)


register_pytree_node(
    Keyed,
    lambda keyed: ([keyed.inputs, keyed.keys], keyed.seed),
    _keyed_again,
    serialized_type_name="nullbayes.Keyed",
)


def plain(inputs: Inputs) -> Any:
    """What the model is called with: inputs without keys and flags."""
    while isinstance(inputs, (Keyed, Batch)):
        inputs = inputs.inputs
    return inputs


def flags_of(inputs: Inputs, size: int | None = None) -> Flags:
    """Which leaves of ``plain(inputs)`` have the batch axis; without evidence, those as long as the batch."""
    if isinstance(inputs, Keyed):
        return flags_of(inputs.inputs, len(inputs.keys))
    if isinstance(inputs, Batch):
        return inputs.flags
    leaves = tree_flatten(inputs)[0]
    if size is None:
        size = next((len(t) for t in leaves if isinstance(t, Tensor) and t.ndim), -1)
    return tuple(isinstance(t, Tensor) and t.ndim > 0 and len(t) == size for t in leaves)


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """All tensors of a nested input on ``device``; mappings become plain dicts, and structures have a batch axis."""
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    inputs = regular(inputs)
    return tree_map(lambda t: _placed(t, device) if isinstance(t, Tensor) else t, inputs)


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    """On ``device``, and fit for derivatives where it was made under ``torch.inference_mode``."""
    tensor = tensor.to(device)
    return tensor.clone() if tensor.is_inference() else tensor


def check_inputs(inputs: Inputs, where: str) -> None:
    """Raise :class:`NonFiniteError` if a floating-point input holds NaN or infinity.

    Minus infinity alone is an attention mask's way of saying no. Sparse tensors are an :class:`InputError`: examples
    cannot be taken out of them as out of others.
    """
    for leaf in tensor_leaves(inputs):
        if leaf.layout not in (torch.strided, torch.jagged):
            raise InputError(
                f"{where}: an input of shape {tuple(leaf.shape)} is sparse ({leaf.layout}), from which single examples "
                "cannot be taken. Pass `x.to_dense()`, or indices and values as dense tensors and put them together "
                "in the forward pass (or `forward=`)."
            )
        if not leaf.is_floating_point() or (_plain(leaf) and math.isfinite(leaf.detach().sum())):
            continue  # a finite sum has finite terms, and costs a quarter of looking at each
        if not bool(leaf.isfinite().all()):
            if not bool((leaf.isnan() | (leaf == float("inf"))).any()) and _is_mask(leaf):
                continue
            finite = leaf.isfinite().reshape(leaf.shape[0], -1).all(1) if leaf.ndim else None
            row = "" if finite is None else f" (first in example {int((~finite).nonzero()[0])})"
            raise NonFiniteError(
                f"{where}: the inputs hold NaN or infinity{row}. Clean or impute the data first."
            )


def _plain(leaf: Tensor) -> bool:
    """Whether the numbers of a tensor are where the processor reads them."""
    strided = leaf.layout == torch.strided and not leaf.is_nested
    return type(leaf) is Tensor and leaf.device.type == "cpu" and strided


def _is_mask(leaf: Tensor) -> bool:
    """Nothing but zeros and minus infinity."""
    return bool(((leaf == 0) | (leaf == -float("inf"))).all())


def tensor_leaves(inputs: Inputs) -> list[Tensor]:
    """All tensors of a nested input."""
    if type(inputs) is Tensor:
        return [inputs]
    return [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]


def batch_size(inputs: Inputs, where: str = "the batch") -> int:
    """Length of the leading axis of the first tensor that has the batch."""
    if isinstance(inputs, Keyed):
        return len(inputs.keys)
    leaves = tree_flatten(plain(inputs))[0]
    if isinstance(inputs, Batch):
        for leaf, has in zip(leaves, inputs.flags, strict=True):
            if has:
                return int(leaf.shape[0])
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    raise InputError(
        f"{where} holds no tensor with a batch axis; found {type(plain(inputs)).__name__}. Convert it first "
        "(`torch.as_tensor(...)`, or a collate function that makes tensors)."
    )


def take(inputs: Inputs, start: int, stop: int, size: int | None = None) -> Inputs:
    """Examples ``start:stop`` of ``size``: every tensor that has the batch axis is cut, the rest stays."""
    return changed(inputs, lambda t: t[start:stop], size)


def select(inputs: Inputs, index: Tensor) -> Inputs:
    """The examples at ``index (k,)``: every tensor that has the batch axis is indexed, the rest stays."""
    return changed(inputs, lambda t: t[index.to(t.device)])


def repeated(value: Any, size: int, times: int) -> Any:
    """Each example ``times`` times in a row, in every tensor that has the batch axis."""
    if times == 1:
        return value
    return changed(value, lambda t: t.repeat_interleave(times, 0), size)


def changed(inputs: Inputs, change: Callable[[Tensor], Tensor], size: int | None = None) -> Inputs:
    """``inputs`` with ``change`` made to every tensor that has the batch axis."""
    if isinstance(inputs, Keyed):
        return Keyed(changed(inputs.inputs, change), change(inputs.keys), inputs.seed)
    if isinstance(inputs, Batch):
        leaves, spec = tree_flatten(inputs.inputs)
        pairs = zip(leaves, inputs.flags, strict=True)
        cut = [change(t) if has else t for t, has in pairs]
        return Batch(tree_unflatten(cut, spec), inputs.flags)
    size = batch_size(inputs) if size is None else size
    return tree_map(
        lambda t: change(t) if isinstance(t, Tensor) and t.ndim and len(t) == size else t, inputs
    )
