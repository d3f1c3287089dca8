"""Networks with several outputs, losses of one's own, and the rows of those losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb

F64 = torch.float64
QUIET: dict[str, Any] = {"progress": False}
# Settings whose dense reference is exact.
EXACT: dict[str, Any] = {"delta": 0, "prior_precision": 1.0}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return build().double().eval()


def flat_weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def losses_of(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> Callable[[Tensor], Tensor]:
    """``flat weights (P,) -> losses (N,)``, by torch alone."""
    shapes = {n: p.shape for n, p in model.named_parameters()}

    def function(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes.values()])
        weights = {n: p.reshape(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        holder = nn.Module()
        holder.model = model  # type: ignore[assignment]
        holder.forward = lambda: run(model)  # type: ignore[method-assign]
        moved = {f"model.{n}": w for n, w in weights.items()}
        return torch.func.functional_call(holder, moved, ())

    return function


def loss_rows(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> Tensor:
    """``∂ℓ_n/∂θ (N, P)`` by reverse mode through model and loss together."""
    return torch.func.jacrev(losses_of(model, run))(flat_weights(model))


def fitted_rows(posterior: nb.Posterior) -> Tensor:
    state = posterior._fitted().state
    assert state is not None
    eye = torch.eye(state.operator.shape[1], dtype=F64)
    return state.operator.matvec(eye).T.reshape(state.operator.shape)


def assert_same_null_space(posterior: nb.Posterior, rows: Tensor) -> None:
    """Rows equal and samples moved along none of them."""
    assert_close(fitted_rows(posterior), rows, rtol=1e-8, atol=1e-10)
    samples = posterior._samples()
    assert float((samples @ rows.T).abs().max()) < 1e-7 * float(samples.norm(dim=1).max())


X = normal(7, 4)
BATCHES = [X[:4], X[4:]]


def cut(batch: Any, *bounds: slice) -> list[Any]:
    """The same batch in pieces."""
    return [
        torch.utils._pytree.tree_map(lambda t, b=b: t[b] if isinstance(t, Tensor) else t, batch)
        for b in bounds
    ]


def squared(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().sum(1)


# -- errors ----------------------------------------------------------------------------------------


def fit(model: nn.Module, loss: Any, batches: Any = None, **options: Any) -> nb.Posterior:
    posterior = nb.NullSpacePosterior(model, loss=loss, preserve="loss", **EXACT, **options)
    return posterior.fit(BATCHES if batches is None else batches, 2, **QUIET)
