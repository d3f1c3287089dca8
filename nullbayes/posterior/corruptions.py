"""Inputs shifted away from the data they come from, without any other data: numbers, images or tokens.

Some kinds teach a distilled module what higher novelty looks like, and two others judge it: what judges is none of what
teaches. Padding stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from nullbayes.model.batch import Inputs, batch_size, plain

Change = Callable[[Tensor, torch.Generator], Tensor]
# Of tokens, with which of them are no padding.
ChangeTokens = Callable[[Tensor, Tensor, torch.Generator], Tensor]
# Inputs whose names hold one of these say where something is, not what.
_STAYING = ("mask", "position")
# Examples that are shifted by the same two kinds.
TOGETHER = 16


def teaching(inputs: Inputs) -> tuple[str, ...]:
    """The kinds that teach: of numbers, or where a batch has none, of tokens, which differ in fewer ways."""
    shifted = _shifted_of(plain(inputs), batch_size(inputs))
    return TEACHING if any(leaf.is_floating_point() for leaf in shifted) else TEACHING_TOKENS


def corrupted(inputs: Inputs, kind: str, generator: torch.Generator) -> Inputs:
    """A batch with each of its tensors of numbers or tokens changed; masks, positions, padding, and what is no batch,
    stay.

    Args:
        kind: of :data:`TEACHING` or :data:`JUDGING`.
    """
    given = plain(inputs)
    which = {id(leaf) for leaf in _shifted_of(given, batch_size(inputs))}
    mask = given.get("attention_mask") if isinstance(given, Mapping) else None
    leaves, spec = tree_flatten(given)
    changed = [_changed(x, kind, generator, mask) if id(x) in which else x for x in leaves]
    return tree_unflatten(changed, spec)


def _shifted_of(given: Any, size: int) -> list[Tensor]:
    """The tensors of a batch that are numbers or tokens.

    A whole number for each example is a length or a place, unless there is nothing else.
    """
    if isinstance(given, Mapping):
        given = {k: v for k, v in given.items() if not any(name in str(k) for name in _STAYING)}
    found = [x for x in tree_flatten(given)[0] if _has_examples(x, size) and _is_data(x)]
    return [x for x in found if x.ndim > 1 or x.is_floating_point()] or found


def _has_examples(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and bool(leaf.ndim) and len(leaf) == size


def _is_data(leaf: Tensor) -> bool:
    if leaf.is_floating_point():
        return True
    return not leaf.is_complex() and leaf.dtype != torch.bool and int(leaf.amax()) > 1


def _changed(leaf: Tensor, kind: str, generator: torch.Generator, mask: Any) -> Tensor:
    if leaf.is_floating_point():
        return _NUMBERS[kind](leaf, generator)
    known = isinstance(mask, Tensor) and mask.shape == leaf.shape
    tokens = leaf if leaf.ndim > 1 else leaf.unsqueeze(1)
    real = mask.bool() if known else leaf != 0
    change = _TOKENS.get(kind, _some_replaced)
    return change(tokens, real.view_as(tokens), generator).view_as(leaf)


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


def _each(x: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """A number for each example, drawn between two."""
    drawn = torch.rand(len(x), *[1] * (x.ndim - 1), generator=generator)
    return _like(x, low + (high - low) * drawn)


def _smooth(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random fields of about unit variance, each as coarse as it happens to be; without axes, independent numbers."""
    if not 3 <= x.ndim <= 5:
        return _like(x, torch.randn(x.shape, generator=generator))
    mode, out = ("linear", "bilinear", "trilinear")[x.ndim - 3], []
    for _ in x:
        finest = [max(2, length // 2) for length in x.shape[2:]]
        coarse = [int(torch.randint(2, n + 1, (), generator=generator)) for n in finest]
        field = torch.randn(1, x.shape[1], *coarse, generator=generator)
        out.append(torch.nn.functional.interpolate(field, size=x.shape[2:], mode=mode))
    return _like(x, torch.cat(out))


def _fields(x: Tensor, generator: torch.Generator) -> Tensor:
    """No example at all: smooth noise with the data's mean, and some of its spread or more."""
    return x.mean() + x.std() * _each(x, 0.3, 1.5, generator) * _smooth(x, generator)


def _blobs(x: Tensor, generator: torch.Generator) -> Tensor:
    """Two values with a smooth boundary."""
    high, threshold = _each(x, 0.4, 1.0, generator), _each(x, -0.5, 1.2, generator)
    inside = _smooth(x, generator) > threshold
    return torch.where(inside, x.amin() + (x.amax() - x.amin()) * high, x.amin())


def _blurred(x: Tensor, generator: torch.Generator) -> Tensor:
    """Means over neighbours, up to a quarter of each axis to either side; without axes, over other examples."""
    if not 3 <= x.ndim <= 5:
        other = torch.randint(len(x), (3, len(x)), generator=generator).to(x.device)
        return (x + x[other].sum(0)) / 4
    pool = getattr(torch.nn.functional, f"avg_pool{x.ndim - 2}d")
    out = []
    for some in x.split(TOGETHER):
        far = [int(torch.randint(1, max(2, n // 4), (), generator=generator)) for n in x.shape[2:]]
        far = [min(by, (n - 1) // 2) for by, n in zip(far, x.shape[2:], strict=True)]
        out.append(pool(some, [2 * by + 1 for by in far], 1, far))
    return torch.cat(out)


def _sparse(x: Tensor, generator: torch.Generator) -> Tensor:
    """Some numbers only, the others as small as any."""
    share = _each(x, 0.1, 0.95, generator)
    kept = _like(x, torch.rand(x.shape, generator=generator)) < share
    return torch.where(kept, x, x.amin())


def _recombined(x: Tensor, generator: torch.Generator) -> Tensor:
    """The frequencies of one example where another has them; without axes, each number from an example of its own."""
    if x.ndim < 3:
        order = torch.rand(x.shape, generator=generator).argsort(0)
        return x.gather(0, order.to(x.device))
    other = x[torch.randperm(len(x), generator=generator).to(x.device)]
    axes = tuple(range(2, x.ndim))
    size, place = torch.fft.rfftn(x.float(), dim=axes), torch.fft.rfftn(other.float(), dim=axes)
    both = torch.polar(size.abs(), place.angle())
    return torch.fft.irfftn(both, s=x.shape[2:], dim=axes).to(x.dtype)


def _bent(x: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers between the smallest and the largest brought nearer to one of them."""
    low, width = x.amin(), (x.amax() - x.amin()).clamp_min(1e-12)
    power = _each(x, -1.5, 1.5, generator).exp()
    return low + width * ((x - low) / width) ** power


def _faded(x: Tensor, generator: torch.Generator) -> Tensor:
    """Less contrast, around another value."""
    low, width = x.amin(), x.amax() - x.amin()
    share, around = _each(x, 0, 1, generator), low + width * _each(x, 0, 1, generator)
    return x.lerp(around.expand_as(x), share)


def _twice(x: Tensor, generator: torch.Generator) -> Tensor:
    """Two other kinds, one after the other."""
    out = []
    for some in x.split(TOGETHER):
        for number in torch.randint(len(TEACHING) - 1, (2,), generator=generator):
            some = _NUMBERS[TEACHING[int(number)]](some, generator)
        out.append(some)
    return torch.cat(out)


def _drawn(x: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens of the batch, of any place."""
    some = x[real] if bool(real.any()) else x.reshape(-1)
    return some[torch.randint(len(some), x.shape, generator=generator).to(x.device)]


def _chosen(x: Tensor, real: Tensor, share: Tensor | float, generator: torch.Generator) -> Tensor:
    return (torch.rand(x.shape, generator=generator) < share).to(x.device) & real


def _shares(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(len(x), *[1] * (x.ndim - 1), generator=generator)


def _replaced(x: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the tokens are others of the batch."""
    return torch.where(_chosen(x, real, 0.5, generator), _drawn(x, real, generator), x)


def _some_replaced(x: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """Some tokens are others of the batch, a share of its own for each example."""
    share = _shares(x, generator)
    return torch.where(_chosen(x, real, share, generator), _drawn(x, real, generator), x)


def _spliced(x: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """The end of another example, as far as both have tokens."""
    order = torch.randperm(len(x), generator=generator).to(x.device)
    later = torch.arange(x.shape[-1], device=x.device) >= x.shape[-1] // 2
    if x.ndim == 2:  # half of the tokens that there are
        later = real.cumsum(1) > real.sum(1, keepdim=True) // 2
    return torch.where(later & real & real[order], x[order], x)


def _repeated(x: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """Some tokens are said again in the place of the next."""
    before = torch.cat([x[..., :1], x[..., :-1]], -1)
    return torch.where(_chosen(x, real, _shares(x, generator), generator), before, x)


def _one_token(x: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """One token of the batch in the place of many."""
    one = _drawn(x, real, generator)[..., :1].expand_as(x)
    return torch.where(_chosen(x, real, _shares(x, generator), generator), one, x)


def _ciphered(x: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """Some of the tokens that an example uses are others wherever they stand, as in another language."""
    low, high = int(x.amin()), int(x.amax()) + 1
    table = torch.randint(low, high, (len(x), high - low), generator=generator)
    chosen = torch.rand(table.shape, generator=generator) < torch.rand(
        len(x), 1, generator=generator
    )
    table = torch.where(chosen, table, torch.arange(low, high)).to(x)
    found = table.gather(1, (x - low).long().flatten(1)).view_as(x)
    return torch.where(real, found, x)


def _shuffled_tokens(x: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """The same tokens in an order that is no example's."""
    out = x.clone()
    for into, some in zip(out, real, strict=True):
        values = into[some]
        into[some] = values[torch.randperm(len(values), generator=generator).to(x.device)]
    return out


def _unlikely(x: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens drawn from the whole range of those that were seen."""
    low, high = int(x.amin()), int(x.amax()) + 1
    drawn = torch.randint(low, high, x.shape, generator=generator)
    return torch.where(real, drawn.to(x), x)


_NUMBERS: dict[str, Change] = {
    "noise": _noise,
    "mixed": _mixed,
    "rolled": _rolled,
    "patched": _patched,
    "scaled": _scaled,
    "blended": _blended,
    "edges": _edges,
    "fields": _fields,
    "blobs": _blobs,
    "blurred": _blurred,
    "sparse": _sparse,
    "recombined": _recombined,
    "bent": _bent,
    "faded": _faded,
    "twice": _twice,
    "shuffled": _shuffled,
    "inverted": _inverted,
}
_TOKENS: dict[str, ChangeTokens] = {
    "noise": _replaced,
    "mixed": _spliced,
    "rolled": _some_replaced,
    "patched": _repeated,
    "blended": _ciphered,
    "sparse": _one_token,
    "shuffled": _shuffled_tokens,
    "inverted": _unlikely,
}
JUDGING = ("shuffled", "inverted")
# The last one draws from all before it.
TEACHING = tuple(name for name in _NUMBERS if name not in JUDGING)
TEACHING_TOKENS = tuple(name for name in _TOKENS if name not in JUDGING)
