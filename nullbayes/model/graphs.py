"""Graphs of PyTorch Geometric, one by one: ``Data`` and ``Batch`` as padded tensors, and back.

Torch Geometric is imported only where somebody passes one of its objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nullbayes.errors import InputError

# Between the name of an attribute and what a part says about it.
COUNT = "\0count"


@dataclass(frozen=True)
class Attribute:
    """An attribute of each graph: which axis differs in length between graphs (None: it has one shape); a number."""

    name: str
    axis: int | None
    number: bool = False


@dataclass(frozen=True)
class Spec:
    """What graphs are made of."""

    kind: Any
    attributes: tuple[Attribute, ...]


def is_graph(value: Any) -> bool:
    """Whether ``value`` is a graph, or a batch of graphs, of PyTorch Geometric."""
    return any(
        kind.__module__ == "torch_geometric.data.data" and kind.__name__ == "BaseData"
        for kind in type(value).__mro__
    )


def taken_apart(value: Any) -> tuple[Spec, dict[str, Tensor]]:
    """What makes the graphs again, and tensors ``(B, ...)``. Texts and other objects are left out.

    Raises:
        InputError: graphs of several node types, sparse adjacency, or graphs that differ in their attributes.
    """
    if not hasattr(value, "edge_index") and hasattr(value, "node_types"):
        raise InputError(
            f"{type(value).__name__} has nodes of several types, which cannot be taken apart here. Make the nodes the "
            "examples: `forward=lambda model, nodes: model(x_dict, edge_index_dict)[nodes]`, `fit((nodes, labels))`."
        )
    several = (
        hasattr(value, "to_data_list") and hasattr(value, "num_graphs") and hasattr(value, "ptr")
    )
    found = value.to_data_list() if several else [value]
    stored = [graph.to_dict() for graph in found]
    names = [n for n, v in stored[0].items() if isinstance(v, (Tensor, bool, int, float))]
    attributes, parts = [], {}
    for name in names:
        values = [s.get(name) for s in stored]
        first = values[0]
        if not isinstance(first, Tensor):
            parts[name] = torch.as_tensor(values)
            attributes.append(Attribute(name, None, True))
            continue
        if any(not isinstance(v, Tensor) for v in values):
            raise InputError(f"some graphs of the batch have {name!r} and others do not.")
        if first.layout != torch.strided:
            raise InputError(
                f"{name!r} of a graph is a sparse tensor, which cannot be cut; pass `edge_index` in its place."
            )
        axis = found[0].__cat_dim__(name, first) if first.ndim else None
        if axis is None:
            parts[name] = torch.stack(values)
        else:
            axis = axis % first.ndim
            rows = [v.movedim(axis, 0) for v in values]
            parts[name] = pad_sequence(rows, batch_first=True)
            parts[name + COUNT] = torch.tensor([len(r) for r in rows], device=first.device)
        attributes.append(Attribute(name, axis))
    if not parts:
        raise InputError(f"{type(value).__name__} holds no tensors.")
    return Spec(type(found[0]), tuple(attributes)), parts


def restored(spec: Spec, parts: dict[str, Tensor]) -> Any:
    """A batch of the graphs in ``parts``."""
    from torch_geometric.data import Batch

    size = len(next(iter(parts.values())))
    graphs: list[dict[str, Any]] = [{} for _ in range(size)]
    for attribute in spec.attributes:
        values = parts[attribute.name]
        counts = [None] * size
        if attribute.axis is not None:
            counts = parts[attribute.name + COUNT].tolist()
        for graph, value, count in zip(graphs, values, counts, strict=True):
            if attribute.number:
                graph[attribute.name] = value.item()
            elif attribute.axis is None:
                graph[attribute.name] = value
            else:
                graph[attribute.name] = value[:count].movedim(0, attribute.axis)
    return Batch.from_data_list([spec.kind.from_dict(graph) for graph in graphs])
