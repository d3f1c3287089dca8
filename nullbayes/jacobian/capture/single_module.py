"""Rows of parameters without a layer rule, from the smallest module around them that sees the batch.

Differentiating the whole model example by example costs another forward pass and another backward pass for every
row. Where the module that uses a parameter has the batch on one axis of its input and of its output, the backward
pass that serves the layer rules also says what arrives at that output, and only the module itself has to be run
again: an attention's packed projection, a table of relative positions. Which modules these are is found by trying, on a
probe batch, from a parameter's owner outwards (``verify.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from nullbayes.jacobian.capture.generic import VMAP_ELEMENTS, well_shaped
from nullbayes.model.functional import FunctionalModel

# Modules around a parameter's owner that are tried: further out there is little left to save.
ANCESTORS = 4
# Numbers that a forward and backward pass of a module holds, as a multiple of its inputs and outputs.
HELD = 6


class LocalFailed(Exception):
    """Modules could not be run by themselves: ``sites``; those of ``hopeless`` not in any way."""

    def __init__(self, sites: list[LocalSite], hopeless: list[LocalSite]) -> None:
        super().__init__(", ".join(site.path for site in sites))
        self.sites, self.hopeless = sites, hopeless


class _Unfit(Exception):
    """Why one module does not do."""


@dataclass
class LocalSite:
    """A module that is run by itself, and the parameters that it accounts for.

    Attributes:
        names: canonical names of the parameters, each used nowhere outside the module.
        axis: where the module's inputs and output have the batch, or a multiple of it.
        vmapped: one vectorised pass over the examples, or a loop over them.
        batched: which of its inputs have the batch, by how it is called; settled on the probe batch, since another
            batch may happen to be as long as something that is none.
    """

    path: str
    module: nn.Module
    names: list[str]
    axis: int = 0
    vmapped: bool = True
    batched: dict[str, tuple[bool, ...]] = field(default_factory=dict)


@dataclass
class LocalUse:
    """One call of a local site's module: its inputs, and where the gradient of its output arrives."""

    site: LocalSite
    leaves: list[Any]
    spec: Any
    versions: list[int]
    edge: GradientEdge

    @property
    def takes_tensors(self) -> bool:
        return any(isinstance(t, Tensor) and t.ndim for t in self.leaves)

    @property
    def numel(self) -> int:
        return sum(t.numel() for t in self.leaves if isinstance(t, Tensor))


def ancestors(path: str) -> Iterator[str]:
    """Paths of a module and of those around it, without the model itself."""
    parts = path.split(".") if path else []
    for depth in range(len(parts), max(0, len(parts) - 1 - ANCESTORS), -1):
        yield ".".join(parts[:depth])


def record_use(site: LocalSite, args: tuple[Any, ...], kwargs: Any, out: Any) -> LocalUse | None:
    """What a forward hook saw; None where no gradient comes back through the output."""
    result = _first_tensor(out)
    if result is None or not result.requires_grad:
        return None
    leaves, spec = tree_flatten((args, dict(kwargs)))
    if any(isinstance(t, Tensor) and t.is_nested for t in (result, *leaves)):
        return None  # without axes to tell examples by; the check will say that a use is missing
    versions = [t._version if isinstance(t, Tensor) else 0 for t in leaves]
    kept = [t.detach() if isinstance(t, Tensor) else t for t in leaves]
    return LocalUse(site, kept, spec, versions, get_gradient_edge(result))


def local_rows(
    functional: FunctionalModel, use: LocalUse, g: Tensor, size: int, *, settled: bool
) -> dict[str, Tensor]:
    """Rows ``(B, C, numel)`` for output gradients ``g (C, *output)``, by parameter.

    Args:
        settled: the probe is done; calls that it did not see are refused.

    Raises:
        Exception: the module does not have the batch where it should, or does not run by itself.
    """
    site = use.site
    moved = (
        isinstance(t, Tensor) and t._version != version
        for t, version in zip(use.leaves, use.versions, strict=True)
    )
    if any(moved):
        raise _Unfit("its input was changed in place")
    flags = _batched(use, settled=settled)
    run = _vmapped if site.vmapped else _looped
    rows = run(functional, use, _split(use, flags, size), flags, _cut(g, site.axis + 1, size), size)
    if not well_shaped(functional, rows, size, len(g)):
        raise _Unfit("its rows have another shape")
    return {name: t.reshape(size, len(g), -1) for name, t in rows.items()}


def _batched(use: LocalUse, *, settled: bool) -> tuple[bool, ...]:
    site, axis, called = use.site, use.site.axis, repr(use.spec)
    if called not in site.batched:
        if settled:
            raise _Unfit("it was called with other arguments than on the probe batch")
        first = next((t for t in use.leaves if isinstance(t, Tensor) and t.ndim > axis), None)
        if first is None:
            raise _Unfit("it takes no tensor that could have the batch")
        site.batched[called] = tuple(
            isinstance(t, Tensor) and t.ndim > axis and t.shape[axis] == first.shape[axis]
            for t in use.leaves
        )
    return site.batched[called]


def _split(use: LocalUse, flags: tuple[bool, ...], size: int) -> list[Any]:
    """The inputs, those with the batch cut into ``(B, k)`` along its axis."""
    return [
        _cut(t, use.site.axis, size) if has else t for t, has in zip(use.leaves, flags, strict=True)
    ]


def _cut(t: Tensor, axis: int, size: int) -> Tensor:
    if t.ndim <= axis or t.shape[axis] % size:
        raise _Unfit(f"shape {tuple(t.shape)} has no axis {axis} of {size} examples")
    return t.unflatten(axis, (size, t.shape[axis] // size))


def _call(functional: FunctionalModel, use: LocalUse) -> Callable[..., Tensor]:
    """``(chosen weights, leaves) -> output`` of a private copy of the module."""
    module = use.site.module
    named = {n: p for n, p in functional.model.named_parameters() if n in use.site.names}

    def call(chosen: dict[str, Tensor], leaves: Sequence[Any]) -> Tensor:
        args, kwargs = tree_unflatten(list(leaves), use.spec)
        wide = functional.widened
        tensors = {
            id(p): chosen[n] if wide is not None else chosen[n].to(p.dtype)
            for n, p in named.items()
        }
        private, _ = functional.modules.private(tensors, root=module, widened=wide)
        with functional.computing():
            result = _first_tensor(private(*args, **kwargs))
        assert result is not None
        return result

    return call


def _vmapped(
    functional: FunctionalModel,
    use: LocalUse,
    leaves: list[Any],
    flags: tuple[bool, ...],
    g: Tensor,
    size: int,
) -> dict[str, Tensor]:
    call, axis = _call(functional, use), use.site.axis
    weights = functional.weights()
    chosen = {n: weights[n] for n in use.site.names}
    varying = [t for t, has in zip(leaves, flags, strict=True) if has]

    def one(some: list[Tensor], cots: Tensor) -> dict[str, Tensor]:
        rest = iter(some)
        mine = [next(rest) if has else t for t, has in zip(leaves, flags, strict=True)]
        pull = torch.func.vjp(lambda w: call(w, mine), chosen)[1]
        return torch.vmap(lambda c: pull(c)[0])(cots)

    passing = sum(t.numel() for t in varying) + g[0].numel()
    width = len(g) * (sum(t.numel() for t in chosen.values()) + HELD * passing // size)
    chunk = min(size, max(1, VMAP_ELEMENTS // max(1, width)))
    axes = ([axis] * len(varying), axis + 1)
    return torch.vmap(one, in_dims=axes, chunk_size=chunk)(varying, g)


def _looped(
    functional: FunctionalModel,
    use: LocalUse,
    leaves: list[Any],
    flags: tuple[bool, ...],
    g: Tensor,
    size: int,
) -> dict[str, Tensor]:
    call, axis = _call(functional, use), use.site.axis
    weights = functional.weights()
    chosen = {n: weights[n].detach().requires_grad_() for n in use.site.names}
    out = {n: w.new_zeros(size, len(g), *w.shape) for n, w in weights.items() if n in chosen}
    for n in range(size):
        mine = [t.select(axis, n) if has else t for t, has in zip(leaves, flags, strict=True)]
        with torch.enable_grad():
            result = call(chosen, mine)
        if not result.requires_grad:
            continue
        for c, cots in enumerate(g):
            grads = torch.autograd.grad(
                result,
                list(chosen.values()),
                cots.select(axis, n),
                retain_graph=c + 1 < len(g),
                allow_unused=True,
            )
            for name, found in zip(chosen, grads, strict=True):
                if found is not None:
                    out[name][n, c] = found.to_dense() if found.is_sparse else found
    return out


def _first_tensor(value: Any) -> Tensor | None:
    return next((t for t in tree_flatten(value)[0] if isinstance(t, Tensor)), None)
