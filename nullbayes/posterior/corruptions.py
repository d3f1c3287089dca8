"""Inputs shifted away from the data they come from, without any other data: numbers, images or tokens.

Some kinds teach a distilled module what higher novelty looks like, and two others judge it.
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


def _rolled(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each example moved around its axes by a distance of its own; features without axes come from another example."""
    if x.ndim < 3:
        other = x[torch.randperm(len(x), generator=generator).to(x.device)]
        return torch.where((torch.rand(x.shape, generator=generator) < 0.5).to(x.device), other, x)
    axes = tuple(range(1, x.ndim - 1))
    lengths = x.shape[2:]
    far = [[int(torch.randint(max(1, n), (), generator=generator)) for n in lengths] for _ in x]
    return torch.stack([one.roll(by, axes) for one, by in zip(x, far, strict=True)])


def _patched(x: Tensor, generator: torch.Generator) -> Tensor:
    """A box of another example, or an empty one."""
    out, other = x.clone(), torch.randperm(len(x), generator=generator)
    start = 2 if x.ndim > 2 else 1
    for n in range(len(x)):
        box: list[slice] = []
        for length in x.shape[start:]:
            wide = int(torch.randint(length // 4, length, (), generator=generator)) + 1
            at = int(torch.randint(length - min(wide, length) + 1, (), generator=generator))
            box.append(slice(at, at + wide))
        where = (*[slice(None)] * (start - 1), *box)
        empty = bool(torch.rand((), generator=generator) < 0.5)
        out[n][where] = 0 if empty else x[other[n]][where]
    return out


def _scaled(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each example times a number between 0.3 and 2."""
    size = 0.3 + 1.7 * torch.rand(len(x), *[1] * (x.ndim - 1), generator=generator)
    return x * _like(x, size)


def _blended(x: Tensor, generator: torch.Generator) -> Tensor:
    """Another example shines through, here more and there less."""
    other = x[torch.randperm(len(x), generator=generator).to(x.device)]
    if x.ndim == 4:
        coarse = torch.rand(len(x), 1, 7, 7, generator=generator)
        share = torch.nn.functional.interpolate(coarse, size=x.shape[2:], mode="bilinear")
    else:
        share = torch.rand(len(x), *[1] * (x.ndim - 1), generator=generator)
    return x.lerp(other, _like(x, share))


def _edges(x: Tensor, generator: torch.Generator) -> Tensor:
    """How numbers differ from their neighbours; without axes, from those of another example."""
    if x.ndim < 3:
        return x - x[torch.randperm(len(x), generator=generator).to(x.device)]
    apart = [(x - x.roll(1, axis)).abs() for axis in range(2, x.ndim)]
    return torch.stack(apart).sum(0).clamp(max=x.amax())


def _shuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    """The same values in an order that is no example's."""
    flat = x.reshape(len(x), -1)
    return flat[:, torch.randperm(flat.shape[1], generator=generator).to(x.device)].view_as(x)


def _inverted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Large where the data are small."""
    return x.amin() + x.amax() - x


def _some_replaced(x: Tensor, generator: torch.Generator) -> Tensor:
    """Some tokens are others of the batch, a share of its own for each example."""
    flat = x.reshape(-1)
    drawn = torch.randint(len(flat), x.shape, generator=generator).to(x.device)
    share = torch.rand(len(x), *[1] * (x.ndim - 1), generator=generator)
    chosen = (torch.rand(x.shape, generator=generator) < share).to(x.device)
    return torch.where(chosen & (x != 0), flat[drawn], x)


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
    "rolled": _rolled,
    "patched": _patched,
    "scaled": _scaled,
    "blended": _blended,
    "edges": _edges,
    "shuffled": _shuffled,
    "inverted": _inverted,
}
_TOKENS: dict[str, Change] = {
    "noise": _replaced,
    "mixed": _spliced,
    "rolled": _some_replaced,
    "patched": _spliced,
    "scaled": _some_replaced,
    "blended": _spliced,
    "edges": _some_replaced,
    "shuffled": _shuffled,
    "inverted": _unlikely,
}
TEACHING = ("noise", "mixed", "rolled", "patched", "scaled", "blended", "edges")
JUDGING = ("shuffled", "inverted")
