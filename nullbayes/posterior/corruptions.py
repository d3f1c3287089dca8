"""Inputs shifted away from the data they come from, without any other data: numbers, images or tokens.

Two kinds teach a distilled module what higher novelty looks like, and two others judge it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from nullbayes.model.batch import Inputs, batch_size, plain

Change = Callable[[Tensor, torch.Generator], Tensor]


def corrupted(inputs: Inputs, kind: str, generator: torch.Generator) -> Inputs:
    """A batch with each of its tensors of numbers or tokens changed; masks, and what is no batch, stay.

    Args:
        kind: of :data:`TEACHING` or :data:`JUDGING`.
    """
    size = batch_size(inputs)
    leaves, spec = tree_flatten(plain(inputs))
    return tree_unflatten([_changed(leaf, size, kind, generator) for leaf in leaves], spec)


def _changed(leaf: Any, size: int, kind: str, generator: torch.Generator) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != size or leaf.is_complex():
        return leaf
    if leaf.is_floating_point():
        return _NUMBERS[kind](leaf, generator)
    if leaf.dtype == torch.bool or int(leaf.amax()) <= 1:
        return leaf
    return _TOKENS[kind](leaf, generator)


def _like(x: Tensor, values: Tensor) -> Tensor:
    return values.to(device=x.device, dtype=x.dtype)


def _noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of a size of its own for each example, up to that of the data."""
    size = torch.rand(len(x), *[1] * (x.ndim - 1), generator=generator)
    return x + _like(x, torch.randn(x.shape, generator=generator) * size) * x.std()


def _mixed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Halfway to another example."""
    return (x + x[torch.randperm(len(x), generator=generator).to(x.device)]) / 2


def _shuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    """The same values in an order that is no example's."""
    flat = x.reshape(len(x), -1)
    return flat[:, torch.randperm(flat.shape[1], generator=generator).to(x.device)].view_as(x)


def _inverted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Large where the data are small."""
    return x.amin() + x.amax() - x


def _replaced(x: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the tokens are others of the batch."""
    flat = x.reshape(-1)
    drawn = torch.randint(len(flat), x.shape, generator=generator).to(x.device)
    chosen = (torch.rand(x.shape, generator=generator) < 0.5).to(x.device)
    return torch.where(chosen & (x != 0), flat[drawn], x)


def _spliced(x: Tensor, generator: torch.Generator) -> Tensor:
    """The end of another example."""
    other = x[torch.randperm(len(x), generator=generator).to(x.device)]
    half = x.shape[-1] // 2
    return torch.cat([x[..., :half], other[..., half:]], -1)


def _unlikely(x: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens drawn from the whole range of those that were seen."""
    low, high = int(x.amin()), int(x.amax()) + 1
    drawn = torch.randint(low, high, x.shape, generator=generator)
    return torch.where(x == 0, x, drawn.to(x))


_NUMBERS: dict[str, Change] = {
    "noise": _noise,
    "mixed": _mixed,
    "shuffled": _shuffled,
    "inverted": _inverted,
}
_TOKENS: dict[str, Change] = {
    "noise": _replaced,
    "mixed": _spliced,
    "shuffled": _shuffled,
    "inverted": _unlikely,
}
TEACHING, JUDGING = ("noise", "mixed"), ("shuffled", "inverted")
