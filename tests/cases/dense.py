"""The judge of these cases: plain automatic differentiation of the user's model, one example alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb

QUIET: dict[str, Any] = {"progress": False}
Call = Callable[[nn.Module, Any], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double().eval()


def called(model: nn.Module, x: Any) -> Tensor:
    out: Tensor = model(*x) if isinstance(x, tuple) else model(x)
    return out


def rows(model: nn.Module, alone: Sequence[Any], call: Call = called) -> Tensor:
    """``J (N, O, P)`` of the examples in ``alone``, each a batch of one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for x in alone:
        out = call(model, x).reshape(-1)
        each = [
            torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True) for v in out
        ]
        found.append(
            torch.stack(
                [
                    torch.cat(
                        [
                            torch.zeros(p.numel(), dtype=torch.float64)
                            if g is None
                            else (g.to_dense() if g.is_sparse else g).reshape(-1).double()
                            for g, p in zip(grads, parameters, strict=True)
                        ]
                    )
                    for grads in each
                ]
            )
        )
    return torch.stack(found)


def fitted(model: nn.Module, batches: Sequence[Any], **options: Any) -> nb.NullSpacePosterior:
    """Every output of every example preserved, exactly."""
    likelihood = options.pop("likelihood", nb.Regression(noise_variance=1.0))
    options = {"preserve": "outputs", "prior_precision": 1.0, "delta": 0.0} | options
    loader = []
    for x in batches:
        with torch.no_grad():
            out = options["forward"](model, x) if "forward" in options else called(model, x)
        inputs = x if isinstance(x, tuple) else (x,)
        loader.append((*inputs, torch.zeros_like(out)))
    return nb.NullSpacePosterior(model, likelihood, **options).fit(loader, 4, **QUIET)


def assert_rows(posterior: nb.NullSpacePosterior, dense: Tensor, tolerance: float = 1e-9) -> None:
    """The captured rows are those of the dense Jacobian, whatever their order: ``AᵀA`` is ``JᵀJ``."""
    operator = posterior._fit.state.operator
    unit = torch.eye(dense.shape[-1], dtype=operator.dtype)
    ours = operator.rmatvec(operator.matvec(unit)).double()
    flat = dense.flatten(0, 1)
    wanted = flat.T @ flat
    assert_close(ours, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))
    gram = operator.gram()
    assert_close(
        torch.linalg.matrix_norm(gram), torch.linalg.matrix_norm(wanted), rtol=tolerance, atol=1e-12
    )


def assert_predicts(
    posterior: nb.NullSpacePosterior, x: Any, dense: Tensor, tolerance: float = 1e-9
) -> None:
    """Linearised outputs are ``f(x) + J(x) Δ`` for every sample, and novelty is that of these rows."""
    prediction = posterior.predict(x)
    samples = posterior._samples().double()
    change = torch.einsum("nop,sp->sno", dense, samples)
    wanted = prediction.point.double().reshape(1, *change.shape[1:]) + change
    scale = float(change.abs().max()) + float(prediction.point.abs().max())
    found = prediction.outputs.double().reshape(wanted.shape)
    assert_close(found, wanted, rtol=tolerance, atol=tolerance * scale)


def assert_kept(posterior: nb.NullSpacePosterior, dense: Tensor, tolerance: float = 1e-9) -> None:
    """Samples do not move the outputs of the training examples, by rows that the posterior never saw."""
    samples = posterior._samples().double()
    moved = torch.einsum("nop,sp->sno", dense, samples)
    prior = dense.norm() * samples.norm(dim=1).max() / samples.shape[1] ** 0.5
    assert float(moved.abs().max()) <= tolerance * float(prior)
