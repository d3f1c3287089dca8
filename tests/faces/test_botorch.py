"""The BoTorch model against Bayesian linear regression in the weights (dense float64), and in BoTorch's machinery."""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from typing import Any

import pytest
import torch
from support import QUIET, says
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb

pytest.importorskip("botorch")

from botorch.acquisition import (
    UpperConfidenceBound,
    qKnowledgeGradient,
    qLogExpectedImprovement,
    qUpperConfidenceBound,
)
from botorch.acquisition.objective import LinearMCObjective, ScalarizedPosteriorTransform
from botorch.models.transforms import Normalize
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler

from nullbayes.botorch import PosteriorModel

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(9, 2, generator=GENERATOR, dtype=torch.float64)
NOISE, ALPHA = 0.04, 2.0
BOUNDS = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def targets(x: Tensor, outputs: int) -> Tensor:
    return torch.stack([torch.sin(5 * x[:, 0] + i) + x[:, 1] ** 2 for i in range(outputs)], -1)


def trained(outputs: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs)).double()
    optimiser = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(150):
        optimiser.zero_grad()
        (model(X) - targets(X, outputs)).square().mean().backward()
        optimiser.step()
    return model.eval()


def laplace(outputs: int = 1) -> nb.LaplacePosterior:
    likelihood = nb.Regression(NOISE if outputs == 1 else [NOISE, 2 * NOISE][:outputs])
    posterior = nb.LaplacePosterior(trained(outputs), likelihood, prior_precision=ALPHA)
    return posterior.fit((X, targets(X, outputs)), 5, **QUIET)


@pytest.fixture(scope="module")
def single() -> PosteriorModel:
    return PosteriorModel(laplace())


@pytest.fixture(scope="module")
def double() -> PosteriorModel:
    return PosteriorModel(laplace(2))


# -- the reference: Bayesian linear regression in the weights ----------------------------------------


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """``(n·D, P)``, output by output."""
    parameters, rows = list(model.parameters()), []
    for value in model(x).flatten():
        found = torch.autograd.grad(value, parameters, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def variances(outputs: int, points: int) -> Tensor:
    return torch.tensor([NOISE, 2 * NOISE][:outputs], dtype=torch.float64).repeat(points)


def covariance_of_weights(model: nn.Module, x: Tensor, outputs: int) -> Tensor:
    rows = jacobian(model, x)
    scaled = rows / variances(outputs, len(x)).sqrt()[:, None]
    return torch.linalg.inv(
        ALPHA * torch.eye(rows.shape[1], dtype=torch.float64) + scaled.T @ scaled
    )


def reference(
    model: nn.Module,
    x: Tensor,
    outputs: int,
    seen: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean ``(q, D)`` and covariance at ``x``, after further observations: the weights' Gaussian, updated."""
    weights = covariance_of_weights(model, X, outputs)
    shift = torch.zeros(len(weights), dtype=torch.float64)
    if seen is not None:
        at, y = seen
        rows, noise = jacobian(model, at), variances(outputs, len(at))
        precision = torch.linalg.inv(weights) + rows.T @ (rows / noise[:, None])
        weights = torch.linalg.inv(precision)
        shift = weights @ (rows.T @ ((y - model(at)).flatten() / noise))
    rows = jacobian(model, x)
    return (model(x).flatten() + rows @ shift).reshape(len(x), outputs), rows @ weights @ rows.T


def matrices(found: Any) -> tuple[Tensor, Tensor]:
    return found.mean, found.distribution.covariance_matrix


@pytest.mark.parametrize("outputs", [1, 2])
def test_points_are_jointly_gaussian(outputs: int, single: Any, double: Any) -> None:
    model = single if outputs == 1 else double
    x = torch.rand(2, 3, 4, 2, generator=GENERATOR, dtype=torch.float64)
    mean, covariance = matrices(model.posterior(x))
    assert mean.shape == (2, 3, 4, outputs) and model.num_outputs == outputs
    for i in range(2):
        for j in range(3):
            wanted = reference(model.fitted.model, x[i, j], outputs)
            assert_close(mean[i, j], wanted[0], rtol=1e-8, atol=1e-9)
            assert_close(covariance[i, j], wanted[1], rtol=1e-6, atol=1e-9)
    noisy = matrices(model.posterior(x, observation_noise=True))[1]
    extra = variances(outputs, 4).diag().expand_as(covariance)
    assert_close(noisy - covariance, extra, rtol=1e-8, atol=1e-10)
    given = torch.full((4, outputs), 0.5, dtype=torch.float64)
    noisy = matrices(model.posterior(x, observation_noise=given))[1]
    assert_close((noisy - covariance).diagonal(dim1=-2, dim2=-1).mean().item(), 0.5)


def test_outputs_one_by_one(double: PosteriorModel) -> None:
    x = X[:3] + 0.1
    whole, covariance = matrices(double.posterior(x))
    for part in (double.posterior(x, output_indices=[1]), double.subset_output([-1]).posterior(x)):
        assert_close(part.mean, whole[:, 1:])
        assert_close(part.distribution.covariance_matrix, covariance[1::2, 1::2])
    noisy = double.subset_output([1]).posterior(x, observation_noise=True)
    assert_close(noisy.variance - part.variance, torch.full_like(part.variance, 2 * NOISE))
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    scalar = double.posterior(x, posterior_transform=ScalarizedPosteriorTransform(weights))
    assert_close(scalar.mean[:, 0], whole @ weights)


def test_gradients_by_the_points(double: PosteriorModel) -> None:
    direction = torch.randn(2, 3, 2, generator=GENERATOR, dtype=torch.float64)
    x = torch.rand(2, 3, 2, generator=GENERATOR, dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        mean, covariance = matrices(double.posterior(x))
        return (mean.sin()).sum() + covariance.cos().sum()

    leaf = x.clone().requires_grad_()
    slope = (torch.autograd.grad(value(leaf), leaf)[0] * direction).sum()
    step = 1e-5
    wanted = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    assert_close(slope, wanted, rtol=1e-5, atol=1e-7)
    assert not double.posterior(x).mean.requires_grad


@pytest.mark.parametrize("outputs", [1, 2])
def test_fantasies_are_bayesian_updates(outputs: int, single: Any, double: Any) -> None:
    model = single if outputs == 1 else double
    x, at = (torch.rand(3, 2, generator=GENERATOR, dtype=torch.float64) for _ in "ab")
    y = torch.randn(3, outputs, generator=GENERATOR, dtype=torch.float64)
    told = model.condition_on_observations(at, y)
    wanted = reference(model.fitted.model, x, outputs, (at, y))
    for found, expected in zip(matrices(told.posterior(x)), wanted, strict=True):
        assert_close(found, expected, rtol=1e-6, atol=1e-8)
    # one observation after the other is both at once
    stepwise = model.condition_on_observations(at[:1], y[:1])
    stepwise = stepwise.condition_on_observations(at[1:], y[1:])
    assert_close(stepwise.posterior(x).mean, wanted[0], rtol=1e-6, atol=1e-8)
    # the covariance is that of `update`, which takes rows in and leaves the mean
    updated = copy.copy(model.fitted).update((at, y), **QUIET)
    joint = updated.joint(x)
    assert_close(
        told.posterior(x).distribution.covariance_matrix, joint.covariance, rtol=1e-5, atol=1e-8
    )
    assert model.given is None and model.fitted.certificate.examples == len(X)


def test_fantasies_of_a_null_space_posterior_without_noise_are_its_update() -> None:
    posterior = nb.NullSpacePosterior(
        trained(), nb.Regression(NOISE), prior_precision=ALPHA, delta=0
    )
    posterior.fit((X, targets(X, 1)), 5, **QUIET)
    model = PosteriorModel(posterior)
    x, at = X[:3] + 0.2, X[4:6] - 0.3
    assert model.posterior(X).variance.max() < 1e-8 < model.posterior(x).variance.min()
    told = model.condition_on_observations(at, model.posterior(at).mean, torch.zeros(1))
    assert told.posterior(at).variance.max() < 1e-8
    joint = copy.copy(posterior).update((at, targets(at, 1)), **QUIET).joint(x)
    found = told.posterior(x)
    assert_close(found.distribution.covariance_matrix, joint.covariance, rtol=1e-4, atol=1e-7)
    assert_close(found.mean, joint.mean, rtol=1e-6, atol=1e-6)


def test_a_batch_of_fantasies(single: PosteriorModel) -> None:
    at = torch.rand(2, 1, 2, generator=GENERATOR, dtype=torch.float64)
    fantasies = single.fantasize(at, SobolQMCNormalSampler(torch.Size([4]), seed=0))
    assert fantasies.batch_shape == (4, 2) and isinstance(fantasies, PosteriorModel)
    x = torch.rand(3, 2, generator=GENERATOR, dtype=torch.float64)
    found = fantasies.posterior(x.expand(4, 2, 3, 2))
    for i, j in ((0, 0), (3, 1)):
        y = fantasies.given.Y[i, j]
        wanted = reference(single.fitted.model, x, 1, (at[j], y))
        assert_close(found.mean[i, j], wanted[0], rtol=1e-6, atol=1e-8)
    assert found.mean.std(0).max() > 1e-3


# -- in BoTorch's own machinery -----------------------------------------------------------------------


def acquisitions(model: PosteriorModel) -> dict[str, Any]:
    sampler = SobolQMCNormalSampler(torch.Size([32]), seed=0)
    return {
        "UCB": UpperConfidenceBound(model, beta=2.0),
        "qUCB": qUpperConfidenceBound(model, beta=2.0, sampler=sampler),
        "qEI": qLogExpectedImprovement(model, best_f=0.5, sampler=sampler),
        "KG": qKnowledgeGradient(model, num_fantasies=2),
    }


@pytest.mark.parametrize("name", ["UCB", "qUCB", "qEI", "KG"])
def test_acquisitions_are_optimised(name: str, single: PosteriorModel) -> None:
    acquisition, q = acquisitions(single)[name], 1 if name in ("UCB", "KG") else 2
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of BoTorch, about how its optimiser ended
        torch.manual_seed(0)
        point, value = optimize_acqf(
            acquisition,
            BOUNDS,
            q,
            num_restarts=2,
            raw_samples=16,
            options={"maxiter": 20},
        )
        assert point.shape == (q, 2) and bool(((point >= 0) & (point <= 1)).all())
        if name != "KG":  # of which a value costs an optimisation
            with torch.no_grad():
                others = acquisition(torch.rand(64, q, 2, dtype=torch.float64))
            assert value >= others.max() - 1e-6


def test_the_bound_is_what_it_says(single: PosteriorModel) -> None:
    x = X[:4, None] + 0.1
    mean, covariance = reference(single.fitted.model, x[:, 0], 1)
    wanted = mean[:, 0] + (2 * covariance.diagonal()).sqrt()
    assert_close(UpperConfidenceBound(single, beta=2.0)(x), wanted, rtol=1e-6, atol=1e-8)


def test_objectives_of_several_outputs(double: PosteriorModel) -> None:
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
    acquisition = qUpperConfidenceBound(double, beta=0.5, objective=LinearMCObjective(weights))
    assert acquisition(X[:4, None]).shape == (4,)


def test_inputs_may_be_transformed(single: PosteriorModel) -> None:
    scaled = PosteriorModel(single.fitted)
    scaled.input_transform = Normalize(2, bounds=10 * BOUNDS)
    scaled.eval()  # BoTorch calls it before it optimises
    x = X[:4] + 0.1
    assert_close(scaled.posterior(10 * x).mean, single.posterior(x).mean)
    told = scaled.condition_on_observations(10 * x, targets(x, 1))
    wanted = single.condition_on_observations(x, targets(x, 1))
    assert_close(told.posterior(10 * X).mean, wanted.posterior(X).mean)


def test_single_precision_and_samples(single: PosteriorModel) -> None:
    model = copy.deepcopy(single.fitted.model).float()
    posterior = nb.LaplacePosterior(model, nb.Regression(NOISE), prior_precision=ALPHA)
    posterior.fit((X.float(), targets(X, 1).float()), 400, **QUIET)
    x = X[:4] + 0.2
    found = PosteriorModel(posterior).posterior(x)
    assert found.mean.dtype == torch.float64
    assert_close(found.variance, single.posterior(x).variance, rtol=1e-3, atol=1e-5)
    assert found.rsample(torch.Size([3])).shape == (3, 4, 1)
    rough = PosteriorModel(posterior, exact=False).posterior(x)
    assert_close(rough.variance, single.posterior(x).variance, rtol=0.25, atol=1e-3)


def test_a_posterior_from_a_file(single: PosteriorModel, tmp_path: Any) -> None:
    single.fitted.save(tmp_path / "p.safetensors")
    loaded = PosteriorModel(nb.load(tmp_path / "p.safetensors", single.fitted.model))
    with says(nb.InputError, "from a file", "posterior(X)"):
        _ = loaded.num_outputs
    assert_close(loaded.posterior(X).mean, single.posterior(X).mean)
    assert loaded.num_outputs == 1
    point = (X[:2, None] + 0.1).requires_grad_()
    UpperConfidenceBound(loaded, beta=2.0)(point).sum().backward()
    assert point.grad is not None and bool(point.grad.isfinite().all())


def test_the_network_is_left_alone(single: PosteriorModel) -> None:
    network = single.fitted.model
    network.zero_grad()
    before = {n: t.clone() for n, t in network.state_dict().items()}
    single.train()
    single.eval()
    assert not network.training and not list(single.parameters())
    single.posterior((X + 0.1).requires_grad_()).mean.sum().backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())


def test_what_cannot_be_used_is_said(single: PosteriorModel, double: PosteriorModel) -> None:
    with says(nb.InputError, "`posterior`", "Sequential", "fitted"):
        PosteriorModel(single.fitted.model)  # type: ignore[arg-type]
    with says(nb.NotFittedError, "not been fitted"):
        PosteriorModel(nb.LaplacePosterior(single.fitted.model, "regression"))
    for bad in (X[0], X.long(), X.numpy()):
        with says(nb.InputError, "`X`", "(*batch, q, d)"):
            single.posterior(bad)
    with says(nb.InputError, "holds no points"):
        single.posterior(X[:0])
    with says(nb.InputError, "forward pass failed", "(4, 3)"):
        single.posterior(torch.zeros(4, 3, dtype=torch.float64))
    with says(nb.InputError, "outputs [2]", "has 2"):
        double.posterior(X, output_indices=[2])
    with says(nb.InputError, "observation noise", "(5,)"):
        single.posterior(X, observation_noise=torch.ones(5))
    with says(nb.InputError, "`Y`", "(*batch, 9, 2)"):
        double.condition_on_observations(X, targets(X, 1))
    with says(nb.InputError, "batch axes", "(3,)", "(2,)"):
        told = single.condition_on_observations(X.expand(2, 9, 2), targets(X, 1).expand(2, 9, 1))
        told.posterior(X.expand(3, 9, 2))
    with says(nb.InputError, "subset", "whole one"):
        double.subset_output([0]).condition_on_observations(X, targets(X, 1))
    labels = (targets(X, 1)[:, 0] > 0).long()
    classifier = nb.LaplacePosterior(trained(2), prior_precision=1.0).fit((X, labels), 3, **QUIET)
    with says(nb.InputError, "observation noise", "regression"):
        PosteriorModel(classifier).posterior(X, observation_noise=True)


def test_without_botorch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("botorch", "botorch.models.model"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "nullbayes.botorch")
    with says(nb.MissingExtraError, "nullbayes[botorch]"):
        importlib.import_module("nullbayes.botorch")
