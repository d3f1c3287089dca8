"""What a batch looked like when its rows were proved; at use, a batch unlike those is proved again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from nullbayes.model.batch import Inputs, batch_size, flags_of, plain


@dataclass(frozen=True)
class Signature:
    """What can send a network, or the capture of its rows, down another path.

    Attributes:
        alone: one example, and not several.
        structure: how inputs are nested.
        leaves: of each tensor whether it has the batch, its shape without that, its dtype, its order in memory, and
            whether another axis is as long as the batch; of anything else its value, where values can be compared.
    """

    alone: bool
    structure: str
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, inputs: Inputs, size: int | None = None) -> Signature:
        """Of a batch of ``size`` examples."""
        size = batch_size(inputs) if size is None else size
        leaves, spec = tree_flatten(plain(inputs))
        flags = flags_of(inputs, size)
        described = [
            _leaf(leaf, size, batched=has) for leaf, has in zip(leaves, flags, strict=True)
        ]
        return cls(size == 1, str(spec), tuple(described))


class SignatureSet:
    """The kinds of batches that were proved."""

    def __init__(self, signatures: Iterable[Signature] = ()) -> None:
        self._known = set(signatures)

    def add(self, signature: Signature) -> None:
        self._known.add(signature)

    def covers(self, signature: Signature) -> bool:
        """Whether a batch like this one was proved."""
        return signature in self._known

    def __len__(self) -> int:
        return len(self._known)


def _leaf(leaf: Any, size: int, *, batched: bool) -> tuple[Any, ...]:
    if not isinstance(leaf, Tensor):
        comparable = isinstance(leaf, (bool, int, float, str, bytes, type(None)))
        return type(leaf).__name__, leaf if comparable else None
    shape = tuple(leaf.shape[1:] if batched else leaf.shape)
    return batched, shape, leaf.dtype, _order(leaf, batched=batched), size in shape


def _order(leaf: Tensor, *, batched: bool) -> Any:
    """Axes by their distance in memory, but for that of the batch: contiguous, channels last, or any other."""
    if leaf.layout != torch.strided:
        return str(leaf.layout)
    strides = leaf.stride()[1:] if batched else leaf.stride()
    # Of an axis of length one, the distance means nothing.
    lengths = leaf.shape[1:] if batched else leaf.shape
    axes = [axis for axis, length in enumerate(lengths) if length > 1]
    return tuple(sorted(axes, key=lambda axis: -strides[axis]))
