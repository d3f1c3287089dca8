"""`update` against one fit on all data, and the marginal likelihood against dense float64 algebra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import QUIET, inputs, says, unchanged
from support import perceptron as network
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import dense_jacobian

import nullbayes as nb

SOLVERS = {"dual": nb.solvers.DualCholesky, "primal": nb.solvers.PrimalQR}
CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def parts(*sizes: int, outputs: int = 3) -> list[tuple[Tensor, Tensor]]:
    x = inputs(sum(sizes))
    y = torch.arange(len(x)) % outputs
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


LAYERS = {"0.weight": 0.5, "0.bias": 2.0, "2.weight": 1.25, "2.bias": 0.75}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "null space": (nb.NullSpacePosterior, {}),
    "null space, prior given": (nb.NullSpacePosterior, {"prior_precision": 0.7}),
    "null space, exact": (nb.NullSpacePosterior, {"delta": 0}),
    "laplace": (nb.LaplacePosterior, {}),
    "laplace, layers": (nb.LaplacePosterior, {"prior_precision": LAYERS}),
    "loss": (nb.NullSpacePosterior, {"preserve": "loss"}),
    "outputs": (nb.NullSpacePosterior, {"preserve": "outputs"}),
    "directions": (nb.NullSpacePosterior, {"directions": "auto"}),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_updates_are_one_fit_on_all(kind: str, solver: str) -> None:
    make, options = KINDS[kind]
    model, batches = network(), parts(5, 3, 4)
    whole = make(model, solver=SOLVERS[solver](), **options).fit(batches, 6, 3, **QUIET)
    grown = make(model, solver=SOLVERS[solver](), **options).fit(batches[:1], 6, 3, **QUIET)
    new = 2 * inputs(4, 2)
    before = grown.joint(new).covariance
    with unchanged(model):
        assert grown.update(batches[1:2], **QUIET) is grown
        grown.update(batches[2], **QUIET)
    assert_close(grown.prior_precision, whole.prior_precision, rtol=1e-8, atol=0)
    assert_close(grown._fit.unit, whole._fit.unit, **CLOSE)
    assert_close(grown.predict(new).outputs, whole.predict(new).outputs, **CLOSE)
    assert_close(grown.joint(new).covariance, whole.joint(new).covariance, **CLOSE)
    assert float((grown.joint(new).covariance - before).abs().max()) > 1e-4
    ours, theirs = grown.certificate, whole.certificate
    for name in ("examples", "checked_examples", "constraints", "rank", "null_dim", "held"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("row_drift", "drift", "discarded_trace", "network_score", "posterior_score"):
        assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-8)
    assert_close(ours.left_out_divergence or 0.0, theirs.left_out_divergence or 0.0, **CLOSE)
    assert ours.audit is not None and ours.audit.passed
    assert ours.audit.examples == 12
    assert sum("added" in note for note in ours.notes) == 2
    whole.draw(2)
    grown.draw(2)
    assert_close(grown._fit.unit, whole._fit.unit, **CLOSE)


def test_the_new_examples_are_preserved_and_the_old_ones_stay() -> None:
    model, ((old, y), (new, more)) = network(), parts(8, 8)
    posterior = nb.NullSpacePosterior(model, delta=0).fit((old, y), 5, **QUIET)
    centred = torch.eye(3).double() - 1 / 3

    def moved(x: Tensor) -> float:
        change = posterior.predict(x).outputs - model(x).detach()
        return float((change @ centred).abs().max())

    assert moved(old) < 1e-8 < 1e-2 < moved(new)
    posterior.update((new, more), **QUIET)
    assert max(moved(old), moved(new)) < 1e-8
    assert posterior.certificate.held and posterior.certificate.examples == 16
    assert posterior.certificate.rank == 2 * 16


def test_examples_that_are_certain_have_no_rows_and_do_no_harm() -> None:
    model, batches = network(), parts(6, 4)
    with torch.no_grad():
        model[2].bias[0] = 2000.0  # probabilities of exactly one and zero
    options = {"solver": "dual Cholesky", "prior_precision": 1.0}
    whole = nb.NullSpacePosterior(model, **options).fit(batches, 3, **QUIET)
    grown = nb.NullSpacePosterior(model, **options).fit(batches[:1], 3, **QUIET)
    grown.update(batches[1], **QUIET)
    assert_close(grown._fit.unit, whole._fit.unit, **CLOSE)


@pytest.mark.parametrize("prior", ["evidence", 0.7])
@pytest.mark.parametrize("kind", [nb.NullSpacePosterior, nb.LaplacePosterior])
def test_an_iterative_solver_solves_again(kind: Any, prior: Any) -> None:
    model, batches = network(), parts(6, 5)
    solver = nb.solvers.ConjugateGradient(1e-9, 3000)
    grown = kind(model, solver=solver, prior_precision=prior).fit(batches[:1], 5, **QUIET)
    grown.update(batches[1], **QUIET)
    whole = kind(model, solver=solver, prior_precision=prior).fit(batches, 5, **QUIET)
    assert_close(grown._fit.unit, whole._fit.unit, rtol=1e-4, atol=1e-5)
    assert_close(grown.certificate.residual, whole.certificate.residual, rtol=1e-3, atol=1e-5)
    assert grown.certificate.held == whole.certificate.held
    assert any("solved for again" in note for note in grown.certificate.notes)


def test_regression_keeps_its_noise() -> None:
    model, ((x, _), (more, _)) = network(1), parts(8, 8)
    y, targets = x[:, :1] + 0.3, more[:, :1]
    grown = nb.NullSpacePosterior(model, nb.Regression(estimate="training"))
    grown.fit((x, y), 4, **QUIET)
    noise = grown.likelihood.noise_variance
    assert noise is not None
    grown.calibrate((inputs(9, 5), inputs(9, 5)[:, :1]), progress=False)
    assert not torch.equal(grown.likelihood.noise_variance, noise)
    grown.update((more, targets), **QUIET)
    assert_close(grown.likelihood.noise_variance, noise)
    assert grown.calibration is None
    both = (torch.cat([x, more]), torch.cat([y, targets]))
    whole = nb.NullSpacePosterior(model, nb.Regression(noise)).fit(both, 4, **QUIET)
    assert_close(grown._fit.unit, whole._fit.unit, **CLOSE)
    assert any("noise of the first" in note for note in grown.certificate.notes)


def test_a_convolution_in_single_precision() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 3)
        ).eval()
    x = torch.randn(14, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(14) % 3
    whole = nb.NullSpacePosterior(model, prior_precision=1.0).fit((x, y), 4, **QUIET)
    grown = nb.NullSpacePosterior(model, prior_precision=1.0).fit((x[:9], y[:9]), 4, **QUIET)
    grown.update((x[9:], y[9:]), **QUIET)
    assert_close(grown.predict(x + 1).outputs, whole.predict(x + 1).outputs, rtol=1e-3, atol=1e-3)
    assert grown.certificate.held


def test_what_cannot_be_updated_is_said_and_nothing_changes(tmp_path: Path) -> None:
    model, (first, (x, y)) = network(), parts(5, 3)
    posterior = nb.NullSpacePosterior(model)
    with says(nb.NotFittedError, "fit"):
        posterior.update((x, y), **QUIET)
    posterior.fit(first, 3, **QUIET)
    before = posterior._fit
    with says(nb.InputError, "more, batch 0", "labels reach 9"):
        posterior.update((x, y + 7), **QUIET)
    with says(nb.InputError, "`more`", "targets"):
        posterior.update(x, **QUIET)
    assert posterior._fit is before
    posterior.save(tmp_path / "p.safetensors")
    loaded = nb.load(tmp_path / "p.safetensors", model)
    with says(nb.NotFittedError, "loaded from a file", "update"):
        loaded.update((x, y), **QUIET)
    with torch.no_grad():
        model[0].bias.add_(1.0)
    with says(nb.ModelError, "changed"):
        posterior.update((x, y), **QUIET)


# -- the marginal likelihood ---------------------------------------------------------------------


def dense_evidence(
    model: nn.Module, x: Tensor, y: Tensor, alpha: Tensor, noise: Tensor | None
) -> Tensor:
    """Log likelihood, log density of the prior and ``-½ log det`` of the whole (P, P) precision; 2π cancels."""
    rows = dense_jacobian(model, x)
    out, p = model(x).detach(), rows.shape[1]
    if noise is None:
        probabilities = out.softmax(1)
        hessian = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in probabilities))
        likelihood = out.log_softmax(1)[torch.arange(len(y)), y].sum()
    else:
        hessian = torch.eye(len(rows)).double() / noise
        likelihood = torch.distributions.Normal(out, noise.sqrt()).log_prob(y).sum()
    theta = torch.cat([t.detach().flatten() for t in model.parameters()])
    precision = rows.T @ hessian @ rows + torch.diag(alpha.expand(p))
    prior = 0.5 * alpha.expand(p).log().sum() - 0.5 * (alpha * theta.square()).sum()
    return likelihood + prior - 0.5 * torch.linalg.slogdet(precision)[1]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", [nb.NullSpacePosterior, nb.LaplacePosterior])
def test_classification_evidence_and_its_slope(kind: Any, solver: str) -> None:
    model, ((x, y),) = network(), parts(9)
    posterior = kind(model, solver=SOLVERS[solver]()).fit((x, y), 3, **QUIET)
    alpha = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    found = posterior.log_marginal_likelihood(alpha)
    (slope,) = torch.autograd.grad(found, alpha)
    dense = dense_evidence(model, x, y, alpha, None)
    assert_close(found, dense, rtol=1e-8, atol=1e-8)
    assert_close(slope, torch.autograd.grad(dense, alpha)[0], rtol=1e-6, atol=1e-8)
    if kind is nb.LaplacePosterior:  # fitted where it is stationary
        at = torch.tensor(posterior.prior_precision, dtype=torch.float64, requires_grad=True)
        found = posterior.log_marginal_likelihood(at)
        assert_close(found, posterior.log_marginal_likelihood())
        assert abs(float(torch.autograd.grad(found, at)[0])) < 1e-6


def test_regression_evidence_in_prior_and_noise_after_an_update() -> None:
    model, x = network(2), inputs(11)
    y = x[:, :2] + 0.1
    posterior = nb.LaplacePosterior(model, nb.Regression(0.3)).fit((x[:6], y[:6]), 3, **QUIET)
    posterior.update((x[6:], y[6:]), **QUIET)
    alpha = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    factor = torch.tensor(1.9, dtype=torch.float64, requires_grad=True)
    found = posterior.log_marginal_likelihood(alpha, noise_factor=factor)
    dense = dense_evidence(model, x, y, alpha, 0.3 * factor)
    assert_close(found, dense, rtol=1e-8, atol=1e-8)
    ours = torch.autograd.grad(found, (alpha, factor))
    theirs = torch.autograd.grad(dense, (alpha, factor))
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, rtol=1e-6, atol=1e-8)


def test_evidence_with_one_precision_for_each_tensor() -> None:
    model, ((x, y),) = network(), parts(9)
    posterior = nb.LaplacePosterior(model, prior_precision=LAYERS).fit((x, y), 3, **QUIET)
    widths = [p.numel() for p in model.parameters()]
    alpha = torch.repeat_interleave(
        torch.tensor(list(LAYERS.values()), dtype=torch.float64), torch.tensor(widths)
    )
    dense = dense_evidence(model, x, y, alpha, None)
    assert_close(posterior.log_marginal_likelihood(), dense, rtol=1e-8, atol=1e-8)


def test_evidence_that_cannot_be_had_is_said(tmp_path: Path) -> None:
    model, (part,) = network(), parts(5)
    posterior = nb.NullSpacePosterior(model, preserve="loss").fit(part, 3, **QUIET)
    with says(nb.InputError, "Gauss-Newton", "'loss'"):
        posterior.log_marginal_likelihood()
    posterior = nb.LaplacePosterior(model).fit(part, 3, **QUIET)
    with says(nb.InputError, "prior_precision", "positive"):
        posterior.log_marginal_likelihood(-1.0)
    with says(nb.InputError, "noise_factor", "no observation noise"):
        posterior.log_marginal_likelihood(noise_factor=2.0)
    posterior.save(tmp_path / "p.safetensors")
    with says(nb.NotFittedError, "DualCholesky"):
        nb.load(tmp_path / "p.safetensors", model).log_marginal_likelihood()
    solver = nb.solvers.ConjugateGradient()
    posterior = nb.LaplacePosterior(model, solver=solver, prior_precision=1.0).fit(part, 3, **QUIET)
    with says(nb.NotFittedError, "PrimalQR"):
        posterior.log_marginal_likelihood()
