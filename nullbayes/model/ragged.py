"""Inputs without a batch axis as tensors that have one: ragged lists, bags, packed sequences, nested tensors, graphs.

Everything else in this package cuts, orders and repeats examples by the first axis of tensors. So such inputs are
padded when they come in (:func:`regular`), travel as a :class:`Structured`, and are made again, without the padding,
when the network is called (:func:`restored`). The network never sees a padded value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pad_packed_sequence,
    pad_sequence,
)
from torch.utils._pytree import MappingKey, register_pytree_node, tree_map

from nullbayes.errors import InputError
from nullbayes.model import graphs

Parts = dict[str, Tensor]


class Kind(Protocol):
    """How a structure is made again; equal for structures of the same kind."""

    def restore(self, parts: Parts) -> Any:
        """The structure of the examples in ``parts``, tensors ``(B, ...)``."""


@dataclass(frozen=True)
class Structured:
    """Examples as tensors ``(B, ...)`` by name, and the kind of structure that the network gets instead of them."""

    parts: Parts
    kind: Kind

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))


def _again(children: Any, context: tuple[tuple[str, ...], Kind]) -> Structured:
    names, kind = context
    return Structured(dict(zip(names, children, strict=True)), kind)


register_pytree_node(
    Structured,
    lambda s: (list(s.parts.values()), (tuple(s.parts), s.kind)),
    _again,
    flatten_with_keys_fn=lambda s: (
        [(MappingKey(name), t) for name, t in s.parts.items()],
        (tuple(s.parts), s.kind),
    ),
    serialized_type_name="nullbayes.Structured",
)


def _flat(padded: Tensor, lengths: Tensor) -> Tensor:
    """``(B, L, *) -> (sum of lengths, *)``."""
    return padded[torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]]


# -- kinds -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _List:
    def restore(self, parts: Parts) -> Any:
        padded = parts["values"]
        return [row[:n] for row, n in zip(padded, parts["lengths"].tolist(), strict=True)]


@dataclass(frozen=True)
class _Bags:
    def restore(self, parts: Parts) -> Any:
        lengths = parts["lengths"]
        flat = [_flat(parts[name], lengths) for name in ("ids", "weights") if name in parts]
        return flat[0], lengths.cumsum(0) - lengths, *flat[1:]


@dataclass(frozen=True)
class _Packed:
    def restore(self, parts: Parts) -> Any:
        lengths = parts["lengths"].cpu()
        # Sequences in their order need no sorting, as they may have come.
        ordered = bool((lengths.diff() <= 0).all())
        return pack_padded_sequence(
            parts["values"], lengths, batch_first=True, enforce_sorted=ordered
        )


@dataclass(frozen=True)
class _Nested:
    layout: torch.layout

    def restore(self, parts: Parts) -> Any:
        values, lengths = parts["values"], parts["lengths"]
        if self.layout == torch.jagged:
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            return torch.nested.nested_tensor_from_jagged(_flat(values, lengths), offsets)
        rows = [row[:n] for row, n in zip(values, lengths.tolist(), strict=True)]
        return torch.nested.as_nested_tensor(rows)


@dataclass(frozen=True)
class _Graphs:
    spec: graphs.Spec

    def restore(self, parts: Parts) -> Any:
        return graphs.restored(self.spec, parts)


# -- what people have --------------------------------------------------------------------------------


def ragged(examples: Sequence[Any]) -> Structured:
    """Examples of different lengths as inputs: the network is called with the list of their tensors.

    Args:
        examples: tensors or arrays that differ in nothing but the length of their first axis.

    Raises:
        InputError: none, or other differences.
    """
    if not isinstance(examples, Sequence) or isinstance(examples, (str, bytes)) or not examples:
        raise InputError(
            f"`examples` is {type(examples).__name__}{' without any' if not examples else ''}; expected a list of "
            "tensors, one for each example."
        )
    rows = [t if isinstance(t, Tensor) else torch.as_tensor(t) for t in examples]
    shapes = sorted({(tuple(t.shape[1:]) if t.ndim else None, str(t.dtype)) for t in rows}, key=str)
    if len(shapes) > 1 or shapes[0][0] is None:
        raise InputError(
            f"`examples` have the shapes behind their first axis, and dtypes, {shapes[:5]}; expected the same for all."
        )
    return Structured(_padded(rows), _List())


def bags(ids: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Structured:
    """Bags of tokens as `torch.nn.EmbeddingBag` takes them: the network is called with the same arguments.

    Args:
        ids: ``(T,)`` tokens of all bags; ``offsets (B,)``: where each begins; ``weights (T,)``: of tokens.

    Raises:
        InputError: offsets that do not cut ``ids`` into bags.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 1:
        raise InputError(
            f"`ids` is {_shape(ids)}; expected the tokens of all bags in one tensor, (T,). Tokens (B, L) need no bags."
        )
    wrong = not isinstance(offsets, Tensor) or offsets.ndim != 1 or offsets.is_floating_point()
    if not wrong:
        ends = torch.cat([offsets, offsets.new_full((1,), len(ids))])
        wrong = not len(offsets) or int(offsets[0]) != 0 or bool((ends.diff() < 0).any())
    if wrong:
        raise InputError(
            f"`offsets` is {_shape(offsets)}; expected (B,): where each bag begins, from 0 to at most {len(ids)}."
        )
    if weights is not None and (not isinstance(weights, Tensor) or weights.shape != ids.shape):
        raise InputError(
            f"`weights` is {_shape(weights)}; expected one for each of the {len(ids)} tokens."
        )
    lengths = ends.diff()
    made = _padded(list(ids.split(lengths.tolist())))
    parts = {"ids": made["values"], "lengths": made["lengths"]}
    if weights is not None:
        parts["weights"] = _padded(list(weights.split(lengths.tolist())))["values"]
    return Structured(parts, _Bags())


def _padded(rows: list[Tensor]) -> Parts:
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    return {"values": pad_sequence(rows, batch_first=True), "lengths": lengths}


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def regular(inputs: Any) -> Any:
    """``inputs`` with a :class:`Structured` in place of each packed sequence, nested tensor, graph or batch of graphs.

    Raises:
        InputError: one of these that cannot be cut into examples.
    """

    def special(value: Any) -> bool:
        nested = isinstance(value, Tensor) and value.is_nested
        return nested or isinstance(value, PackedSequence) or graphs.is_graph(value)

    return tree_map(lambda v: _regular(v) if special(v) else v, inputs, is_leaf=special)


def _regular(value: Any) -> Structured:
    if isinstance(value, PackedSequence):
        padded, lengths = pad_packed_sequence(value, batch_first=True)
        return Structured({"values": padded, "lengths": lengths.to(padded.device)}, _Packed())
    if isinstance(value, Tensor):
        rows = list(value.unbind())
        if not rows or any(row.ndim < 1 or row.shape[1:] != rows[0].shape[1:] for row in rows):
            raise InputError(
                f"a nested tensor has components of the shapes {[tuple(r.shape) for r in rows[:4]]}; they may "
                "differ in the length of their first axis only."
            )
        return Structured(_padded(rows), _Nested(value.layout))
    spec, parts = graphs.taken_apart(value)
    return Structured(parts, _Graphs(spec))


def restored(inputs: Any) -> Any:
    """What the network is called with: the structures themselves in place of each :class:`Structured`."""

    def is_structured(value: Any) -> bool:
        return isinstance(value, Structured)

    return tree_map(
        lambda v: v.kind.restore(v.parts) if is_structured(v) else v, inputs, is_leaf=is_structured
    )


def collated(given: Any) -> str:
    """A sentence on a list of batches, or on lists of tensors among named inputs: what becomes of lists of numbers."""
    if isinstance(given, list) and all(isinstance(part, Mapping) for part in given):
        return " Of a list of batches pass `iter(batches)`, or one batch at a time."
    named = given.items() if isinstance(given, Mapping) else ()
    lists = [k for k, v in named if type(v) is list and v and isinstance(v[0], Tensor)]
    if not lists:
        return ""
    return (
        f" {lists} are lists of tensors, as PyTorch's default collation makes them of lists of numbers: give tensors "
        "in each item (`dataset.set_format('torch')`), or pass the loader of the Trainer."
    )


def unbatched(inputs: Any, count: int) -> str:
    """The mend where ``count`` outputs are not one for each example, because the inputs have no batch axis; or nothing.

    Args:
        inputs: what the network was called with, or what stands for it.
    """
    if isinstance(inputs, Structured):
        if isinstance(inputs.kind, _Graphs):
            return (
                " Where the network answers for each node, make the nodes the examples: `forward=lambda model, nodes: "
                "model(graph)[nodes]`, `fit((nodes, graph.y[nodes]))`."
            )
        return ""
    tensors = isinstance(inputs, (list, tuple)) and all(isinstance(t, Tensor) for t in inputs)
    if isinstance(inputs, list) and tensors and len(inputs) == count:
        return " A list with one tensor for each example is passed as `nb.ragged(list)`."
    if isinstance(inputs, tuple) and tensors and len(inputs) > 1:
        ids, offsets = inputs[:2]
        if ids.ndim == offsets.ndim == 1 and len(offsets) == count != len(ids):
            return " Tokens and offsets of bags are passed as `nb.bags(ids, offsets)`."
    return ""
