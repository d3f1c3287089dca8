"""Training that leaves what was learned as it is: steps of an optimiser, projected on the null space of each layer.

The idea is that of gradient projection memory (Saha, Garg & Roy, ICLR 2021) and of training in the null space of
features (Wang, Li, Sun & Xu, CVPR 2021); here from exact sums over all the data. Steps are projected, not gradients: an
optimiser that rescales gradients weight by weight, as Adam does, leaves the subspace again, and so does weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nullbayes.errors import InputError
from nullbayes.moments.blocks import Blocks
from nullbayes.moments.factor import Factor


class LayerProjector:
    """Projects changes of a model's weights on ``⊕_l R^O ⊗ ker C_l``, or softly by ``P = δ (C + δ I)⁻¹``.

    Parameters outside of all blocks do not move at all.
    """

    def __init__(self, model: nn.Module, blocks: Blocks, factors: list[Factor]) -> None:
        self.model, self.blocks, self.factors = model, blocks, factors

    def project(self, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Changes (or gradients) by parameter name, projected; names that are left out count as zero.

        Raises:
            InputError: a name that the model does not have, or another shape.
        """
        named = dict(self.model.named_parameters())
        for name, value in changes.items():
            if name not in named or value.shape != named[name].shape:
                found = "is no parameter of the model" if name not in named else "has another shape"
                raise InputError(
                    f"`changes` names {name!r}, which {found}: expected entries of `dict(model.named_parameters())`."
                )
        out = {name: torch.zeros_like(value) for name, value in changes.items()}
        for block, factor in zip(self.blocks.blocks, self.factors, strict=True):
            if not any(name in changes for name in block.names):
                continue
            whole = {n: changes.get(n, torch.zeros_like(named[n])).detach() for n in block.names}
            moved = factor.project(block.matrix(whole).to(torch.float64))
            for name, value in block.tensors(moved).items():
                if name in changes:
                    out[name] = value.to(changes[name])
        return out

    def attach(self, optimiser: torch.optim.Optimizer) -> Callable[[], None]:
        """Project every step of ``optimiser`` from now on; returns a function that ends it.

        Parameters of the model that the optimiser does not hold are not touched. Keep the model in evaluation mode
        where it has batch normalisation: running statistics are no weights, and would move.
        """
        names = {id(p): n for n, p in self.model.named_parameters()}
        held = {
            names[id(p)]: p
            for group in optimiser.param_groups
            for p in group["params"]
            if id(p) in names
        }
        before: dict[str, Tensor] = {}

        def remember(*_: Any) -> None:
            before.update({n: p.detach().clone() for n, p in held.items()})

        def correct(*_: Any) -> None:
            with torch.no_grad():
                steps = self.project({n: p - before[n] for n, p in held.items()})
                for name, parameter in held.items():
                    parameter.copy_(before[name] + steps[name])

        handles = [
            optimiser.register_step_pre_hook(remember),
            optimiser.register_step_post_hook(correct),
        ]

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach
