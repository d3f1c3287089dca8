"""Which way a network took through its operations: what captured rows depend on beside the values.

Rows of one example are made of what layers received and of gradients at their outputs. Where two passes have the same
graph, operation by operation, with the same weights at the same places, and the same layers were called on the same
shapes, rows that equal plain automatic differentiation in one of them do in the other.

Of several examples that is so where no operation can move one to the place of another by a number that it computed
(:attr:`Route.in_place`): sorting, indexing and products of two computed matrices may, and leave the graph as it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Operations of a graph that are looked at; a larger one has no route, and its rows are compared.
MOST = 20_000

# Operations that leave each example where it is whatever the numbers, by the name of their derivative.
_IN_PLACE = frozenset(
    f"{name}Backward{version}"
    for version in (0, 1)
    for name in (
        "Add", "Sub", "Neg", "Relu", "Tanh", "Sigmoid", "Gelu", "Silu", "Elu", "LeakyRelu", "Softplus", "Hardswish",
        "Hardtanh", "Hardsigmoid", "Mish", "PreluKernel", "Mean", "AvgPool2D", "AdaptiveAvgPool2D", "AvgPool3D",
        "AdaptiveAvgPool3D", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "NativeBatchNorm", "NativeLayerNorm",
        "NativeGroupNorm", "View", "UnsafeView", "ReshapeAlias", "Alias", "Clone", "ToCopy",
    )
)  # fmt: skip
# Products, by where their factors are among what they follow: each with a weight as it is stored.
_PRODUCTS = {
    "AddmmBackward0": (1, 2),
    "MmBackward0": (0, 1),
    "ConvolutionBackward0": (1,),
}
# What a weight may pass through before it is a factor.
_OF_WEIGHTS = frozenset({"TBackward0", "ToCopyBackward0", "ViewBackward0"})


@dataclass(frozen=True)
class Route:
    """A way through a network.

    Attributes:
        key: equal for equal ways.
        in_place: whether each operation leaves every example at its place, whatever the numbers.
    """

    key: Hashable
    in_place: bool = field(compare=False)


def route_of(
    outputs: Tensor, weights: Mapping[str, Tensor], called: Iterable[Hashable]
) -> Route | None:
    """The route by which ``outputs`` came about; None where the graph is too large to look at.

    Args:
        weights: the leaves of the graph, by name.
        called: layers in the order of their calls, with the shapes that they received.
    """
    if outputs.grad_fn is None:
        return None
    names = {id(leaf): name for name, leaf in weights.items()}
    numbers: dict[Any, int] = {outputs.grad_fn: 0}  # also keeps the nodes from being made anew
    waiting, found, in_place = [outputs.grad_fn], list[Hashable](), True
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
        in_place = in_place and (leaf is not None or _stays(node, names))
    return Route((outputs.shape, tuple(called), tuple(found)), in_place)


def _stays(node: Any, weights: Mapping[int, str]) -> bool:
    """Whether an operation leaves each example at its place."""
    name = node.name()
    if name in _IN_PLACE:
        # Statistics of the batch would make of each example a function of all.
        return not getattr(node, "_saved_training", False)
    if name in _OF_WEIGHTS:
        return _is_weight(node, weights)
    factors = [node.next_functions[i][0] for i in _PRODUCTS.get(name, ())]
    return any(_is_weight(factor, weights) for factor in factors)


def _is_weight(node: Any, weights: Mapping[int, str]) -> bool:
    while node is not None and node.name() in _OF_WEIGHTS:
        node = node.next_functions[0][0]
    leaf = getattr(node, "variable", None)
    return leaf is not None and id(leaf) in weights
