"""Observation noise by leave-one-out residuals against refits without each example, dense and in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.errors import InputError
from nullbayes.fit.observation_noise import LeftOut, left_out_residuals

F64 = torch.float64
SOLVERS = {"dual": nb.solvers.DualCholesky(), "primal": nb.solvers.PrimalQR()}
CASES = [("dual", 12, 30, 600.0), ("primal", 40, 7, 20.0)]  # solver, examples, inputs, penalty


def data(n: int, d: int, outputs: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + d)
    x = torch.randn(n, d, generator=g, dtype=F64)
    slope = torch.randn(d, outputs, generator=g, dtype=F64) / d**0.5
    spread = torch.tensor([0.5, 1.5], dtype=F64)[:outputs]
    return x, x @ slope + spread * torch.randn(n, outputs, generator=g, dtype=F64)


def ridge(x: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    """``(d, O)``, each output with a penalty of its own."""
    eye = torch.eye(x.shape[1], dtype=F64)
    gram = x.T @ x
    columns = [torch.linalg.solve(gram + p * eye, x.T @ y[:, k]) for k, p in enumerate(penalty)]
    return torch.stack(columns, 1)


def stationary(x: Tensor, y: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Weights and noise ``σ²`` that agree: penalties are ``shift σ²``, and ``σ²`` the training residuals'."""
    noise = torch.ones(y.shape[1], dtype=F64)
    for _ in range(500):
        weights = ridge(x, y, shift * noise)
        noise = (y - x @ weights).square().mean(0)
    return weights, noise


def refitted(x: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    """Residual of each example under weights that were fitted without it."""
    rows = []
    for i in range(len(x)):
        rest = torch.arange(len(x)) != i
        rows.append(y[i] - x[i] @ ridge(x[rest], y[rest], penalty))
    return torch.stack(rows)


def found_of(posterior: nb.NullSpacePosterior) -> LeftOut:
    fit = posterior._fit
    found = left_out_residuals(fit.problem, fit.rows, fit.state, fit.alpha)
    assert found is not None
    return found


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("name, n, d, shift", CASES)
def test_residuals_are_those_of_refits(
    name: str, n: int, d: int, shift: float, outputs: int
) -> None:
    x, y = data(n, d, outputs)
    weights, noise = stationary(x, y, shift)
    residuals, without = y - x @ weights, refitted(x, y, shift * noise)
    scaled = residuals / noise.sqrt(), without / noise.sqrt()
    c = float((scaled[0] * scaled[1]).mean() / scaled[0].square().mean())
    model = nn.Linear(d, outputs, bias=False, dtype=F64)
    model.weight.data.copy_(weights.T)
    posterior = nb.NullSpacePosterior(
        model, "regression", prior_precision=shift / c, solver=SOLVERS[name]
    ).fit((x, y), 4, progress=False)
    found = found_of(posterior)
    assert c > 1.01
    assert_close(found.residuals, scaled[0])
    assert_close(found.without, scaled[1], rtol=2e-3, atol=1e-3)  # c agrees to one in a thousand


@pytest.mark.parametrize("name, n, d, shift", CASES)
def test_variance_is_that_of_a_posterior_without_the_example(
    name: str, n: int, d: int, shift: float
) -> None:
    x, y = data(n, d, 1)
    weights, noise = stationary(x, y, shift)
    model = nn.Linear(d, 1, bias=False, dtype=F64)
    model.weight.data.copy_(weights.T)
    posterior = nb.NullSpacePosterior(model, "regression", solver=SOLVERS[name], delta=1e-2)
    posterior.fit((x, y), 4, progress=False)
    edge = posterior._fit.state.shift
    rows, eye = x / noise.sqrt(), torch.eye(d, dtype=F64)
    wanted = []
    for i in range(n):
        rest = rows[torch.arange(n) != i]
        cov = edge * torch.linalg.inv(rest.T @ rest + edge * eye) / posterior.prior_precision
        wanted.append(rows[i] @ cov @ rows[i])
    assert_close(found_of(posterior).variance[:, 0], torch.stack(wanted), rtol=1e-6, atol=1e-10)


def test_the_lesser_of_two_readings() -> None:
    g = torch.Generator().manual_seed(0)
    n = 4000
    residuals = torch.randn(n, 3, generator=g, dtype=F64)
    without = residuals * torch.tensor([2.0, 3.0, 0.5], dtype=F64)
    variance = torch.tensor([0.0, 7.0, 0.0], dtype=F64).expand(n, 3)
    factor = LeftOut(residuals, without, variance).factor()
    # 2 (against 4 without variance of its own), 9 - 7 (against 3), and never less than training residuals have
    assert_close(factor, torch.tensor([2.0, 2.0, 1.0], dtype=F64), rtol=0.08, atol=0.0)


def network(width: int = 20) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 1)).to(F64)


def overfitted() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    x, y = data(30, 5, 1)
    model = network()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        (model(x) - y).square().mean().backward()
        optimiser.step()
    return model, (x, y)


def test_fit_update_and_file(tmp_path) -> None:
    model, (x, y) = overfitted()
    with torch.no_grad():
        training = (model(x) - y).square().mean()
    posterior = nb.NullSpacePosterior(model, "regression").fit((x, y), 4, progress=False)
    factor = posterior.likelihood.noise_variance / training
    assert float(factor) > 1.2
    assert any("leave-one-out residuals: " in note for note in posterior.certificate.notes)
    assert_close(posterior.predict(x[:3]).aleatoric, (training * factor).expand(3, 1).to(F64))
    posterior.save(tmp_path / "p.safetensors")
    loaded = nb.load(tmp_path / "p.safetensors", model)
    assert_close(loaded.likelihood.noise_variance, posterior.likelihood.noise_variance)
    assert loaded.likelihood.estimate == "left-out"
    posterior.update((x[:5] + 0.1, y[:5]), progress=False)
    rows = posterior._fit.rows
    assert_close(rows.asked.likelihood.noise_variance, training.reshape(1))  # rows keep their unit
    assert float(posterior.likelihood.noise_variance) > float(training)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: nb.NullSpacePosterior(m, nb.Regression(estimate="training")),
        lambda m: nb.LaplacePosterior(m, "regression"),
        lambda m: nb.NullSpacePosterior(m, "regression", preserve="loss"),
    ],
)
def test_training_residuals_where_asked_or_nothing_else_can_be_had(make) -> None:
    model, (x, y) = overfitted()
    with torch.no_grad():
        training = (model(x) - y).square().mean()
    posterior = make(model).fit((x, y), 4, progress=False)
    assert_close(posterior.likelihood.noise_variance, training.reshape(1))


def test_given_noise_stays_and_a_wrong_word_is_refused() -> None:
    model, (x, y) = overfitted()
    posterior = nb.NullSpacePosterior(model, nb.Regression(0.3)).fit((x, y), 4, progress=False)
    assert float(posterior.likelihood.noise_variance) == 0.3
    with pytest.raises(InputError, match="estimate"):
        nb.Regression(estimate="validation")


def test_without_a_factorisation_the_certificate_says_so() -> None:
    model, (x, y) = overfitted()
    solver = nb.solvers.ConjugateGradient()
    posterior = nb.NullSpacePosterior(model, "regression", solver=solver)
    posterior.fit((x, y), 4, progress=False)
    assert any("understates" in note for note in posterior.certificate.notes)
