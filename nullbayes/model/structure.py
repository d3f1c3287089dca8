"""Models that return several tensors: one flat tensor ``(B, D)`` for the mathematics, and the way back.

A tuple, list, named tuple, mapping, dataclass or Hugging Face ``ModelOutput``, nested or not, is laid out as
the floating-point tensors in it, end to end for each example. What has no derivative is not part of it: numbers,
strings and ``None`` stay where they were, integer tensors and other objects come back as ``None``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nullbayes.errors import ModelError

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A tensor among the outputs: where its elements lie in the flat tensor, and its shape without the batch."""

    path: str
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + torch.Size(self.shape).numel()


@dataclasses.dataclass(frozen=True)
class _Branch:
    """A container: how to make one again from its children."""

    rebuild: Callable[[list[Any]], Any]
    children: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The structure of one forward pass's outputs.

    Attributes:
        tree: branches, leaves and constants, nested as the model nests them.
        leaves: the tensors in it, in order; ``signature`` tells two structures apart.
        dropped: what has no derivative and is passed on as None, with its type, by path.
    """

    tree: Any
    leaves: tuple[_Leaf, ...]
    signature: tuple[Any, ...]
    dropped: dict[str, str]

    def describe(self) -> str:
        """The tensors by path and shape, for messages."""
        parts = [
            f"{leaf.path or 'output'} (B, {', '.join(map(str, leaf.shape))})"
            for leaf in self.leaves
        ]
        parts += [f"{path} {kind}, passed as None" for path, kind in self.dropped.items()]
        return "; ".join(parts)


class Layouts:
    """Structures by the number of elements of an example, which tells them apart (padding may vary)."""

    def __init__(self) -> None:
        self._by_size: dict[int, Layout] = {}
        self._reached: set[str] = set()  # paths of tensors seen with a graph behind them

    def __deepcopy__(self, memo: dict[int, Any]) -> Layouts:
        return self  # shared on purpose: the model writes what the likelihood reads

    def flatten(self, value: Any, size: int) -> Tensor:
        """``value`` of a forward pass of ``size`` examples as ``(B, D)``; a lone tensor stays as it is.

        Raises:
            ModelError: no floating-point tensor, one without the batch axis, or two structures of one size.
        """
        if isinstance(value, Tensor):
            return value
        found = _Walk(size)
        tree = found.visit(value, "")
        if not found.tensors:
            inside = (
                ", ".join(f"{p or 'itself'}: {k}" for p, k in found.dropped.items()) or "nothing"
            )
            raise ModelError(
                f"the model returned {type(value).__name__} without a floating-point tensor ({inside}): there "
                "is nothing to differentiate. Return logits or other raw outputs, before any argmax or "
                "rounding, or pass `forward=` that does."
            )
        layout = Layout(tree, tuple(found.leaves), tuple(found.signature), found.dropped)
        known = self._by_size.setdefault(found.total, layout)
        if known.signature != layout.signature:
            raise ModelError(
                f"the model returned two structures with {found.total} elements an example: "
                f"{known.describe()}; and {layout.describe()}. Return the same in each forward pass "
                "(`forward=` may pick what to return)."
            )
        pairs = zip(found.leaves, found.tensors, strict=True)
        self._reached.update(leaf.path for leaf, t in pairs if t.requires_grad)
        return torch.cat([t.reshape(size, -1) for t in found.tensors], dim=1)

    def unflatten(self, flat: Tensor) -> Any:
        """``(*lead, D)`` in the model's structure, each tensor ``(*lead, *shape)`` a view."""
        layout = self.layout(flat)
        return flat if layout is None else _rebuilt(layout.tree, flat)

    def unreached(self, flat: Tensor) -> list[_Leaf]:
        """The tensors in ``flat`` that never had a graph, once a forward pass with derivatives has run."""
        layout = self.layout(flat)
        return [] if layout is None else [t for t in layout.leaves if t.path not in self._reached]

    def layout(self, flat: Tensor) -> Layout | None:
        """The structure that ``flat (*lead, D)`` came from; None where the model returns a lone tensor."""
        if not self._by_size:
            return None
        return self._by_size[flat.shape[-1]]


class _Walk:
    """One pass over what a model returned."""

    def __init__(self, size: int) -> None:
        self.size, self.total = size, 0
        self.tensors: list[Tensor] = []
        self.leaves: list[_Leaf] = []
        self.signature: list[Any] = []
        self.dropped: dict[str, str] = {}

    def visit(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, _PLAIN):
            self.signature.append((path, repr(value)))
            return value
        branch = _children(value)
        if branch is None:
            self.dropped[path] = type(value).__name__
            return None
        rebuild, items = branch
        self.signature.append((path, type(value).__qualname__))
        return _Branch(rebuild, tuple(self.visit(v, _joined(path, key)) for key, v in items))

    def _tensor(self, value: Tensor, path: str) -> _Leaf | None:
        if not value.is_floating_point():
            self.dropped[path] = str(value.dtype)
            return None
        if value.ndim == 0 or len(value) != self.size:
            raise ModelError(
                f"the model's output {path!r} has shape {tuple(value.shape)} for {self.size} examples; expected "
                "one entry per example on the first axis. A loss already reduced over the batch has no "
                "per-example rows: leave it out with `forward=`, and compute it in the loss, one per example."
            )
        leaf = _Leaf(path, self.total, tuple(value.shape[1:]))
        self.total = leaf.stop
        self.tensors.append(value)
        self.leaves.append(leaf)
        self.signature.append((path, leaf.shape))
        return leaf


def _children(value: Any) -> tuple[Callable[[list[Any]], Any], list[tuple[Any, Any]]] | None:
    """How to rebuild a container, and its entries; None for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        names = [f.name for f in dataclasses.fields(value) if f.init]
        return (
            lambda parts: kind(**dict(zip(names, parts, strict=True))),
            [(f".{name}", getattr(value, name)) for name in names],
        )
    if isinstance(value, Mapping):
        keys = list(value)
        return lambda parts: dict(zip(keys, parts, strict=True)), [(k, value[k]) for k in keys]
    if isinstance(value, tuple) and hasattr(value, "_fields") and hasattr(value, "_make"):
        return value._make, [(f".{n}", v) for n, v in zip(value._fields, value, strict=True)]
    if isinstance(value, (list, tuple)):
        plain = list if isinstance(value, list) else tuple
        return plain, list(enumerate(value))
    return None


def _joined(path: str, key: Any) -> str:
    if isinstance(key, str) and key.startswith("."):
        return path + key if path else key[1:]
    return f"{path}[{key!r}]" if path or not isinstance(key, str) else key


def _rebuilt(node: Any, flat: Tensor) -> Any:
    if isinstance(node, _Leaf):
        return flat[..., node.start : node.stop].reshape(*flat.shape[:-1], *node.shape)
    if isinstance(node, _Branch):
        return node.rebuild([_rebuilt(child, flat) for child in node.children])
    return node


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a structured output, in order."""
    if isinstance(value, Tensor):
        yield value
        return
    branch = _children(value)
    for _, child in branch[1] if branch else ():
        yield from tensors_in(child)
