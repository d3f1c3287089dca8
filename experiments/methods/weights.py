"""Predictions of a network whose weights are drawn: linearised, or the network itself re-weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nullbayes.jacobian.capture.verify import prove
from nullbayes.jacobian.linearise import linearised_outputs
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace


def sampled(
    network: nn.Module, names: Sequence[str], changes: Tensor, x: Tensor, scale: float = 1.0
) -> Tensor:
    """``f(θ̂ + scale · Δ_s, x)``: ``(S, B, O)``.

    Args:
        names: of the weights that change, in the order of the columns of ``changes (S, P)``.
    """
    named = dict(network.named_parameters())
    shapes = [named[name].shape for name in names]
    out = []
    with torch.no_grad():
        for change in changes:
            parts = change.split([shape.numel() for shape in shapes])
            moved = {
                name: named[name] + scale * part.reshape(shape)
                for name, part, shape in zip(names, parts, shapes, strict=True)
            }
            out.append(functional_call(network, moved, (x,)))
    return torch.stack(out)


class Linearised:
    """``f(θ̂, x)`` and ``J(x) Δ`` for given weight changes, by the library's own products.

    Used for the peers' posteriors: for the same weight draws this is their linearised (GLM) predictive, at a fraction
    of the memory of explicit Jacobians.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], probe: Tensor) -> None:
        self.network = network
        self.space = ParameterSpace.from_model(network, list(names))
        if self.space.names != tuple(names):
            raise ValueError(f"weights come in the order {self.space.names}, not {tuple(names)}.")
        self.functional = FunctionalModel(network, self.space, None)
        with _derivatives():
            self.plan = prove(self.functional, probe)

    def __call__(self, changes: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, O)`` and ``(S, B, O)`` for ``changes (S, P)``."""
        with _derivatives():
            return linearised_outputs(self.functional, self.plan, changes, x)


def _derivatives() -> Any:
    return torch.random.fork_rng(devices=[])


def last_weights(network: nn.Module, share: float = 0.0) -> list[str]:
    """Names of the weights of the last modules that make up ``share`` of all; of one module at least."""
    owners = {n: m for n, m in network.named_modules() if [*m.parameters(recurse=False)]}
    wanted = share * sum(p.numel() for p in network.parameters())
    names: list[str] = []
    held = 0
    for path, module in reversed(owners.items()):
        if names and held >= wanted:
            break
        held += sum(p.numel() for p in module.parameters(recurse=False))
        own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        names = own + names
    return names
