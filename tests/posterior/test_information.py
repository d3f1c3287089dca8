"""Novelty as information: what an observation at an input would tell of the weights, against dense determinants."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from support import inputs, perceptron
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import dense_jacobian

import nullbayes as nb

QUIET: dict[str, Any] = {"progress": False}
SOLVERS = {
    "dual": nb.solvers.DualCholesky(),
    "primal": nb.solvers.PrimalQR(),
    "iterative": nb.solvers.ConjugateGradient(1e-9, 3000),
}


network = functools.partial(perceptron, width=12)


def weights_squared(model: nn.Module) -> float:
    return sum(float(p.detach().square().sum()) for p in model.parameters())


def dense(model: nn.Module, x: Tensor, covariance: Tensor, scale: Tensor | None = None) -> Tensor:
    """``½ log det(I + J Σ Jᵀ)`` of changes without their mean (or in units of ``scale``), one input at a time."""
    rows = dense_jacobian(model, x).reshape(len(x), -1, len(covariance))
    rows = rows - rows.mean(1, keepdim=True) if scale is None else rows / scale
    eye = torch.eye(rows.shape[1]).double()
    return torch.stack([0.5 * torch.logdet(eye + r @ covariance @ r.T) for r in rows])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", [nb.NullSpacePosterior, nb.LaplacePosterior])
def test_exact_information_is_the_log_determinant(solver: str, kind: Any) -> None:
    model, x, y = network(), inputs(15), torch.arange(15) % 3
    options = {} if kind is nb.LaplacePosterior else {"delta": 0}
    posterior = kind(model, solver=SOLVERS[solver], prior_precision=0.7, **options)
    posterior.fit([(x, y)], 5, **QUIET)
    rows = dense_jacobian(model, x).reshape(15, 3, -1)
    factor = posterior.likelihood.hessian_factor(model(x).detach(), y)  # (C, N, O)
    a = torch.einsum("cno,nop->ncp", factor, rows).flatten(0, 1)
    eye = torch.eye(a.shape[1]).double()
    if kind is nb.NullSpacePosterior:
        covariance = eye - torch.linalg.pinv(a) @ a
    else:
        covariance = torch.linalg.inv(eye + a.T @ a / 0.7)
    natural = posterior.certificate.rank / weights_squared(model)
    new = 3 * inputs(6, 2)
    wanted = dense(model, new, covariance / natural)
    found = posterior.novelty(new, score="information", exact=True)
    assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert float(wanted.max()) > 0.1  # nats
    posterior.prior_precision = 50.0  # what is new stays what it is
    assert_close(posterior.novelty(new, score="information", exact=True), found)
    assert posterior.novelty(new, score="variance").max() < found.max()


def test_information_of_samples_approaches_it() -> None:
    model, x, y = network(), inputs(10), torch.arange(10) % 3
    posterior = nb.NullSpacePosterior(model).fit([(x, y)], 4000, **QUIET)
    new = 2 * inputs(5, 2)
    exact = posterior.novelty(new, score="information", exact=True)
    assert_close(
        posterior.novelty(new, score="information", exact=False), exact, rtol=0.05, atol=0.01
    )
    assert_close(posterior.novelty(new), exact)  # the default score, exact where that is cheap


@pytest.mark.parametrize("samples", [6, 60])
def test_more_outputs_than_samples_or_fewer(samples: int, tmp_path: Path) -> None:
    model, x, y = network(20), inputs(3), torch.arange(3)
    posterior = nb.NullSpacePosterior(model).fit([(x, y)], samples, **QUIET)
    new = inputs(4, 2)
    found = posterior.novelty(new, score="information", exact=False)
    prediction = posterior.predict(new)
    change = posterior.likelihood.centre(prediction.outputs - prediction.point)
    natural = posterior.certificate.rank / weights_squared(model)
    covariance = torch.einsum("sbi,sbj->bij", change, change) / samples
    covariance = covariance * posterior.prior_precision / natural
    assert_close(found, 0.5 * torch.logdet(torch.eye(20).double() + covariance))
    posterior.save(tmp_path / "p.safetensors")
    assert_close(
        nb.load(tmp_path / "p.safetensors", model).novelty(new, score="information"), found
    )


def test_regression_counts_in_noise() -> None:
    model, x = network(2), inputs(6)
    y = model(x).detach() + torch.tensor([0.1, 0.4]).double() * inputs(6, 5)[:, :2]
    noise = torch.tensor([0.01, 0.16]).double()
    new = 2 * inputs(5, 2)
    likelihood = nb.Regression(noise)
    posterior = nb.NullSpacePosterior(model, likelihood, delta=0).fit([(x, y)], 5, **QUIET)
    rows = dense_jacobian(model, x)
    covariance = torch.eye(rows.shape[1]).double() - torch.linalg.pinv(rows) @ rows
    natural = posterior.certificate.rank / weights_squared(model)
    wanted = dense(model, new, covariance / natural, noise.sqrt()[:, None])
    assert_close(
        posterior.novelty(new, score="information", exact=True), wanted, rtol=1e-6, atol=1e-8
    )


def test_one_output_keeps_the_order_of_the_variance() -> None:
    model, x = network(1), inputs(6)
    posterior = nb.NullSpacePosterior(model, nb.Regression(0.1)).fit([(x, x[:, :1])], 9, **QUIET)
    new = 2 * inputs(50, 2)
    order = posterior.novelty(new, exact=True).argsort()
    assert torch.equal(posterior.novelty(new, score="information", exact=True).argsort(), order)


def test_weights_without_a_size() -> None:
    model, x = nn.Linear(4, 2).double().eval(), inputs(4, 3)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    posterior = nb.NullSpacePosterior(model, prior_precision=5.0)
    posterior.fit([(x[:2], torch.tensor([0, 1]))], 4, **QUIET)
    found = posterior.novelty(x, exact=True)
    assert bool(found.isfinite().all()) and float(found[2:].max()) > float(found[:2].max())
