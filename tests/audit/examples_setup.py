"""Networks as the audit sees them, and dense rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nullbayes.model.batch import batch_size, take
from nullbayes.model.functional import FunctionalModel, functional_model

F64 = torch.float64


class Calls(nn.Module):
    """A network that is one function, with weights from a seed."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            for name, part in parts.items():
                self.add_module(name, part)
                for p in part.parameters():
                    nn.init.normal_(p, std=0.7)
        self.to(F64).eval()

    def forward(self, *args: Any) -> Tensor:
        return self.function(self, *args)


def functional(model: nn.Module) -> FunctionalModel:
    return functional_model(model, None, None, None, None)


def dense(f: FunctionalModel, x: Any) -> Tensor:
    """``(N, O, P)`` by plain reverse mode of a plain call, one example alone."""
    named = dict(f.model.named_parameters())
    rows = []
    for n in range(batch_size(x)):
        one = take(x, n, n + 1)
        out = f.model(*one) if isinstance(one, tuple) else f.model(one)
        grads = [
            torch.autograd.grad(
                o, [named[n] for n in f.space.names], retain_graph=True, allow_unused=True
            )
            for o in out.reshape(-1)
        ]
        flat = [
            torch.cat(
                [
                    torch.zeros_like(named[n]).reshape(-1)
                    if g is None
                    else g.to_dense().reshape(-1)
                    for n, g in zip(f.space.names, row, strict=True)
                ]
            )
            for row in grads
        ]
        rows.append(torch.stack(flat))
    return torch.stack(rows)
