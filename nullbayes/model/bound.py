"""A network at given weights for many small batches, where building a copy for each would cost as much as it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nullbayes.model.batch import Inputs, Keyed, plain, tensor_leaves
from nullbayes.model.private import Copier, Hooks

if TYPE_CHECKING:
    from nullbayes.model.functional import Forward, FunctionalModel


def bound(
    functional: FunctionalModel, weights: Mapping[str, Tensor], hooks: Hooks = ()
) -> Callable[[Inputs], Tensor]:
    """See :meth:`FunctionalModel.bound`."""
    if functional.modules.shared:
        return lambda inputs: functional(weights, inputs, hooks)
    made: list[tuple[nn.Module, Forward | None, Copier]] = []
    shapes: set[tuple[torch.Size, ...]] = set()

    def call(inputs: Inputs) -> Tensor:
        if isinstance(inputs, Keyed):
            with functional.drawing(inputs):
                return call(inputs.inputs)
        if not made:
            made.append(functional._copied(weights, hooks))
        given = functional._given(inputs)
        out = functional._flat(functional._run(*made[0][:2], given), inputs)
        shape = tuple(leaf.shape for leaf in tensor_leaves(plain(inputs)))
        if shape not in shapes:  # what is kept between calls goes by the shape, if by anything
            if made[0][2].written():
                made.clear()
            else:
                shapes.add(shape)
        return out

    return call
