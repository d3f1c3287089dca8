"""Jacobian rows of any parameter of any model, by automatic differentiation example by example.

The slow road that is always there: packed attention projections, recurrent cells, tables that are indexed by hand,
parametrisations, custom modules. It costs ``B*C`` rows of memory for the parameters it serves and
nothing for the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from nullbayes.model.batch import Batch, Inputs, Keyed, flags_of, plain, take
from nullbayes.model.functional import FunctionalModel

# Elements of rows that one vmapped call may hold (128 MB of float32).
VMAP_ELEMENTS = 32 * 2**20


def generic_rows(
    functional: FunctionalModel,
    names: Sequence[str],
    inputs: Inputs,
    cotangents: Tensor,
    *,
    vmapped: bool = True,
) -> dict[str, Tensor]:
    """Rows ``(B, C, numel)`` of the named parameters for ``cotangents (C, B, *out)``.

    Args:
        vmapped: one vectorised pass over the examples; otherwise a loop over them, for models
            that ``torch.vmap`` cannot follow (recurrent kernels, data-dependent control flow).
    """
    rows = (_vmapped if vmapped else _looped)(functional, names, inputs, cotangents)
    size = cotangents.shape[1]
    if not well_shaped(functional, rows, size, len(cotangents)):
        raise ValueError("a vectorised operation gave rows of another shape")
    return {name: t.reshape(size, len(cotangents), -1) for name, t in rows.items()}


def well_shaped(
    functional: FunctionalModel, rows: dict[str, Tensor], size: int, count: int
) -> bool:
    """Whether rows are ``(B, C, *shape)``: vectorised operations have been seen to give others (`prelu`)."""
    slots = functional.space.by_name
    return all(t.shape == (size, count, *slots[name].shape) for name, t in rows.items())


def _vmapped(
    functional: FunctionalModel, names: Sequence[str], inputs: Inputs, cotangents: Tensor
) -> dict[str, Tensor]:
    weights = functional.weights()
    chosen = {n: weights[n] for n in names}
    size = cotangents.shape[1]
    leaves, spec = tree_flatten(plain(inputs))
    flags = flags_of(inputs, size)
    varying = [t for t, has in zip(leaves, flags, strict=True) if has]

    def one(some: list[Tensor], cots: Tensor) -> dict[str, Tensor]:
        def f(w: dict[str, Tensor]) -> Tensor:
            rest = iter(some)
            mine = [next(rest)[None] if has else t for t, has in zip(leaves, flags, strict=True)]
            single = Batch(tree_unflatten(mine, spec), flags)
            return functional({**weights, **w}, single).squeeze(0)

        pull = torch.func.vjp(f, chosen)[1]
        return torch.vmap(lambda c: pull(c)[0])(cots)

    width = max(1, len(cotangents) * sum(t.numel() for t in chosen.values()))
    chunk = min(size, max(1, VMAP_ELEMENTS // width))
    if not isinstance(inputs, Keyed):
        return torch.vmap(one, in_dims=(0, 1), chunk_size=chunk)(varying, cotangents)
    parts = []
    for start in range(0, size, chunk):
        some = take(inputs, start, min(start + chunk, size))
        cots = cotangents[:, start : start + chunk]
        # Below vmap a random operation has the examples of the chunk on its first axis.
        with functional.drawing(some):
            part = [t[start : start + chunk] for t in varying]
            parts.append(torch.vmap(one, in_dims=(0, 1), randomness="different")(part, cots))
    return {name: torch.cat([part[name] for part in parts]) for name in chosen}


def _looped(
    functional: FunctionalModel, names: Sequence[str], inputs: Inputs, cotangents: Tensor
) -> dict[str, Tensor]:
    count, size = cotangents.shape[:2]
    weights = functional.weights()
    leaves = {n: weights[n].detach().requires_grad_() for n in names}
    out = {n: weights[n].new_zeros(size, count, *weights[n].shape) for n in names}
    for n in range(size):
        with torch.enable_grad():
            f = functional({**weights, **leaves}, take(inputs, n, n + 1))
        if not f.requires_grad:
            continue
        for c in range(count):
            grads = torch.autograd.grad(
                f,
                list(leaves.values()),
                cotangents[c, n : n + 1],
                retain_graph=c + 1 < count,
                allow_unused=True,
            )
            for name, g in zip(leaves, grads, strict=True):
                if g is not None:
                    out[name][n, c] = g.to_dense() if g.is_sparse else g
    return out
