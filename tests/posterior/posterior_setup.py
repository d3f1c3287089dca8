"""A small problem, and dense projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from zoo import dense_jacobian

from nullbayes.model.batch import batch_size

QUIET: dict[str, Any] = {"progress": False}
# Settings whose dense reference is exact: the projection refined to the end, a fixed prior.
EXACT: dict[str, Any] = {"delta": 0, "prior_precision": 1.0}


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with more weights (57) than constraints, and 7 labelled examples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3)
        )
        x, y = torch.randn(7, 3), torch.randint(0, 3, (7,))
    return model.to(dtype).eval(), x.to(dtype), y


def loader(x: Any, y: Tensor, size: int = 3) -> list[tuple[Any, Tensor]]:
    """Batches with a partial one at the end."""
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(y), size)]


def dense_rows(model: nn.Module, x: Any, y: Tensor, preserve: str) -> Tensor:
    """The constraint matrix written out from its definition (float64)."""
    jacobian = dense_jacobian(model, x).reshape(
        batch_size(x), -1, sum(p.numel() for p in model.parameters())
    )
    outputs = model(*x) if isinstance(x, tuple) else model(**x) if isinstance(x, dict) else model(x)
    outputs = outputs.detach().reshape(len(jacobian), -1)
    p = outputs.softmax(1)
    if preserve == "outputs":
        return jacobian.flatten(0, 1)
    if preserve == "loss":
        gradient = p - torch.nn.functional.one_hot(y, p.shape[1])
        return torch.einsum("bo,bop->bp", gradient, jacobian)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    values, vectors = torch.linalg.eigh(hessian)
    # The smallest eigenvalue is zero; its rounding, under a square root, would be rows of size 1e-8.
    root = (vectors * values.clamp(min=0).sqrt()[:, None, :])[..., 1:]
    return torch.einsum("boc,bop->bcp", root, jacobian).flatten(0, 1)
