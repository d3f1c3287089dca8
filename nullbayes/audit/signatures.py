"""What a batch looked like when its rows were proved; at use, a batch unlike those is proved again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from nullbayes.model.batch import Inputs, batch_size, select


@dataclass(frozen=True)
class Signature:
    """What can send a network, or the capture of its rows, down another path.

    Attributes:
        several: more than one example.
        structure: how inputs are nested.
        leaves: of each tensor its shape without the batch (whole where it has none), dtype and memory format; of
            anything else its value, where that can be compared.
    """

    several: bool
    structure: str
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, inputs: Inputs, size: int | None = None) -> Signature:
        """Of a batch of ``size`` examples."""
        size = batch_size(inputs) if size is None else size
        # Which tensors have the batch is decided where batches are cut, not here: two examples are taken, and what
        # comes out with another length, or as a copy, has it.
        leaves, spec = tree_flatten(inputs)
        chosen = torch.zeros(size + 1, dtype=torch.long, device=_device(leaves))
        cut = tree_flatten(select(inputs, chosen))[0]
        described = tuple(_leaf(a, b) for a, b in zip(leaves, cut, strict=True))
        return cls(size > 1, str(spec), described)


@dataclass
class SignatureSet:
    """All the signatures that were proved."""

    known: set[Signature] = field(default_factory=set)

    def add(self, signature: Signature) -> None:
        self.known.add(signature)

    def covers(self, signature: Signature) -> bool:
        """Whether a batch like this one was proved."""
        return signature in self.known

    @classmethod
    def of(cls, signatures: Iterable[Signature]) -> SignatureSet:
        return cls(set(signatures))


def _leaf(leaf: Any, cut: Any) -> tuple[Any, ...]:
    if not isinstance(leaf, Tensor):
        return (type(leaf).__name__, repr(leaf) if _plain(leaf) else None)
    batched = cut.ndim == leaf.ndim and cut.shape != leaf.shape
    shape = tuple(leaf.shape)
    # Which axes the examples lie on, by where the shapes differ.
    trailing = tuple(
        "B" if batched and cut.shape[axis] != length else length
        for axis, length in enumerate(shape)
    )
    return (str(leaf.dtype), trailing, _memory_format(leaf, batched))


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, bytes, type(None)))


def _memory_format(leaf: Tensor, batched: bool) -> str:
    if leaf.layout != torch.strided:
        return str(leaf.layout)
    if leaf.ndim == 4 and leaf.is_contiguous(memory_format=torch.channels_last):
        # Where one channel, or one pixel, makes both formats the same it is called the ordinary one.
        return "contiguous" if leaf.is_contiguous() else "channels last"
    if leaf.ndim == 5 and leaf.is_contiguous(memory_format=torch.channels_last_3d):
        return "contiguous" if leaf.is_contiguous() else "channels last"
    return "contiguous" if leaf.is_contiguous() else "strided"


def _device(leaves: list[Any]) -> torch.device:
    return next((t.device for t in leaves if isinstance(t, Tensor)), torch.device("cpu"))
