"""Covariances and the guarantee of both posteriors against dense projections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import ZOO, Case

import nullbayes as nb
from nullbayes.fit.prior_samples import standard_normal
from nullbayes.model.batch import batch_size
from tests.posterior.posterior_setup import EXACT, QUIET, dense_rows, loader, problem


def projector(rows: Tensor, rtol: float = 1e-12) -> Tensor:
    _, s, vt = torch.linalg.svd(rows, full_matrices=False)
    basis = vt[s > rtol * s[0]]
    return torch.eye(rows.shape[1], dtype=rows.dtype) - basis.T @ basis


def assert_covariance(samples: Tensor, wanted: Tensor) -> None:
    """Each entry of the sample covariance about zero within 5.5 of its standard errors."""
    count = len(samples)
    found = samples.T @ samples / count
    variance = wanted.diagonal()
    error = ((variance[:, None] * variance + wanted**2) / count).sqrt()
    assert bool(((found - wanted).abs() <= 5.5 * error + 1e-9).all())


@pytest.mark.parametrize("preserve", ["predictions", "outputs", "loss"])
@pytest.mark.parametrize(
    "solver", [nb.solvers.DualCholesky(), nb.solvers.PrimalQR()], ids=lambda s: s.name
)
def test_covariance_of_the_null_space_posterior(preserve: str, solver: nb.solvers.Solver) -> None:
    model, x, y = problem()
    posterior = nb.NullSpacePosterior(
        model, preserve=preserve, solver=solver, delta=0, prior_precision=4.0
    )
    posterior.fit(loader(x, y), num_samples=20_000, **QUIET)
    wanted = projector(dense_rows(model, x, y, preserve)) / 4.0
    assert_covariance(posterior._samples(), wanted)
    assert posterior.certificate.rank == 57 - round(float(wanted.trace() * 4))
    assert posterior.certificate.held


@pytest.mark.parametrize(
    "solver", [nb.solvers.DualCholesky(), nb.solvers.PrimalQR()], ids=lambda s: s.name
)
def test_covariance_of_the_numerical_null_space(solver: nb.solvers.Solver) -> None:
    model, x, y = problem()
    posterior = nb.NullSpacePosterior(model, solver=solver, delta=0.05, prior_precision=4.0)
    posterior.fit(loader(x, y), num_samples=20_000, **QUIET)
    rows = dense_rows(model, x, y, "predictions")
    _, s, vt = torch.linalg.svd(rows, full_matrices=True)
    share = torch.ones(57).double()
    share[: len(s)] = (0.2 / (s**2 + 0.2)) ** posterior.certificate.iterations
    assert_covariance(posterior._samples(), (vt.T * share**2) @ vt / 4.0)
    gamma = float((1 - share**2).sum())
    assert posterior.certificate.rank == pytest.approx(gamma, abs=1)


@pytest.mark.parametrize(
    "solver", [nb.solvers.DualCholesky(), nb.solvers.PrimalQR()], ids=lambda s: s.name
)
def test_covariance_of_the_laplace_posterior(solver: nb.solvers.Solver) -> None:
    model, x, y = problem()
    posterior = nb.LaplacePosterior(model, solver=solver, prior_precision=0.7)
    posterior.fit(loader(x, y), num_samples=20_000, **QUIET)
    rows = dense_rows(model, x, y, "predictions")
    assert_covariance(
        posterior._samples(), torch.linalg.inv(0.7 * torch.eye(57).double() + rows.T @ rows)
    )


def test_a_precision_per_tensor() -> None:
    model, x, y = problem()
    prior = {name: 0.5 + i for i, (name, _) in enumerate(model.named_parameters())}
    posterior = nb.NullSpacePosterior(model, prior_precision=prior, delta=0)
    posterior.fit(loader(x, y), num_samples=20_000, **QUIET)
    sd = torch.cat(
        [torch.full((p.numel(),), prior[n] ** -0.5) for n, p in model.named_parameters()]
    ).double()
    inner = projector(dense_rows(model, x, y, "predictions") * sd)
    assert_covariance(posterior._samples(), sd[:, None] * inner * sd)
    laplace = nb.LaplacePosterior(model, prior_precision=prior).fit(
        loader(x, y), num_samples=20_000, **QUIET
    )
    rows = dense_rows(model, x, y, "predictions")
    assert_covariance(laplace._samples(), torch.linalg.inv(torch.diag(sd**-2) + rows.T @ rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("preserve", ["predictions", "outputs", "loss"])
@pytest.mark.parametrize("case", ZOO, ids=str)
def test_residual_on_every_layer_kind(case: Case, preserve: str, dtype: torch.dtype) -> None:
    """Against rows that share no code with ours, in float64, on the weights as they are."""
    model, x = case.make(dtype)
    if case.name == "dense-output":
        model = nn.Sequential(model, nn.Flatten()).eval()
    size = batch_size(x)
    with torch.no_grad():
        classes = (
            model(*x) if isinstance(x, tuple) else model(**x) if isinstance(x, dict) else model(x)
        ).shape[1]
    y = torch.arange(size) % classes
    batch = (
        (*x, y) if isinstance(x, tuple) else {**x, "labels": y} if isinstance(x, dict) else (x, y)
    )
    posterior = nb.NullSpacePosterior(model, preserve=preserve, **EXACT).fit(
        [batch], num_samples=4, **QUIET
    )
    limit = 1e-5 if dtype == torch.float32 else 1e-9
    assert posterior.certificate.residual <= limit
    double = torch.utils._pytree.tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, x
    )
    delta = posterior._samples().double()
    rows = dense_rows(model.double(), double, y, preserve)
    v, _ = standard_normal(0, range(4), delta.shape[1], 0, torch.empty(0, dtype=dtype))
    if case.name == "embedding-padding":  # the padding vector is no weight: it stays where it is
        padding = torch.stack([w["0.weight"][2] for w in posterior.sample()])
        assert torch.equal(padding, model.get_parameter("0.weight")[2].expand_as(padding))
    v[:, posterior.space.fixed] = 0
    ratio = (delta @ rows.T).norm(dim=1) / (v.double() @ rows.T).norm(dim=1)
    # The reference rows differ from float32 ones by rounding, whatever the solver does.
    assert float(ratio.max()) <= (3e-5 if dtype == torch.float32 else 1e-9)
    if dtype == torch.float64:
        # An error e in a direction of singular value s shows as s e only: compare where it shows.
        kept = projector(rows, 1e-4) @ delta.T
        assert_close(
            rows @ kept, torch.zeros_like(rows @ kept), atol=1e-3 * float(rows.norm()), rtol=0
        )
        assert_close(delta.T, projector(rows, 1e-7) @ v.T, atol=2e-2, rtol=0)
