"""Which way a network took through its operations: what captured rows depend on beside the values.

Rows of one example are made of what layers received and of gradients at their outputs. Where two passes have the same
graph, operation by operation, with the same weights at the same places, and the same layers were called on the same
shapes, rows that equal plain automatic differentiation in one of them do in the other.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from torch import Tensor

# Operations of a graph that are looked at; a larger one has no route, and its rows are compared.
MOST = 20_000


def route_of(
    outputs: Tensor, weights: Mapping[str, Tensor], called: Iterable[Hashable]
) -> Hashable | None:
    """The route by which ``outputs`` came about; None where the graph is too large to look at.

    Args:
        weights: the leaves of the graph, by name.
        called: layers in the order of their calls, with the shapes that they received.
    """
    if outputs.grad_fn is None:
        return None
    names = {id(leaf): name for name, leaf in weights.items()}
    numbers: dict[Any, int] = {outputs.grad_fn: 0}  # also keeps the nodes from being made anew
    waiting, found = [outputs.grad_fn], list[Hashable]()
    for node in waiting:
        following = []
        for other, place in node.next_functions:
            if other is not None and other not in numbers:
                numbers[other] = len(waiting)
                waiting.append(other)
            following.append((None if other is None else numbers[other], place))
        if len(waiting) > MOST:
            return None
        leaf = getattr(node, "variable", None)
        found.append((node.name(), None if leaf is None else names.get(id(leaf)), *following))
    return (outputs.shape, tuple(called), tuple(found))
