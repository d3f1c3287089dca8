"""Joint covariances, derivatives and link approximations, against dense float64 algebra and finite differences."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support import QUIET, inputs, perceptron, says, unchanged
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import dense_jacobian

import nullbayes as nb

SOLVERS = {"dual": nb.solvers.DualCholesky(), "primal": nb.solvers.PrimalQR()}
DELTA = 1e-4


network = functools.partial(perceptron, width=7)


def data(outputs: int = 3, count: int = 6) -> tuple[Tensor, Tensor]:
    return inputs(count), torch.arange(count) % outputs


def dense_covariance(
    model: nn.Module, x: Tensor, y: Tensor, posterior: Any, prior: Tensor | float
) -> Tensor:
    """``Σ (P, P)`` from the definition: eigenvalues of the prior-scaled Gauss-Newton matrix, filtered."""
    probabilities = model(x).detach().softmax(1)
    hessian = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
    rows = dense_jacobian(model, x).reshape(len(x), -1, posterior.space.total)
    scale = torch.as_tensor(prior).double().rsqrt().expand(posterior.space.total)
    gauss_newton = torch.einsum("nop,noq,nqr->pr", rows, hessian, rows) * scale[:, None] * scale
    values, vectors = torch.linalg.eigh(gauss_newton)
    values = values.clamp(min=0)
    if isinstance(posterior, nb.LaplacePosterior):
        left = 1 / (1 + values)
    elif posterior.delta == 0:
        left = (values < 1e-9).double()
    else:
        left = (DELTA / (DELTA + values)) ** (2 * posterior._fit.state.passes)
    return (vectors * left) @ vectors.T * scale[:, None] * scale


def fitted(kind: Any, solver: str, prior: Any, **options: Any) -> tuple[nn.Module, Any, Tensor]:
    model, (x, y) = network(), data()
    posterior = kind(model, solver=SOLVERS[solver], prior_precision=prior, **options)
    posterior.fit([(x, y)], 5, **QUIET)
    per_weight: Any = prior
    if isinstance(prior, dict):
        slots = posterior.space.slots
        per_weight = torch.cat(
            [torch.full((s.numel,), prior[s.name], dtype=torch.float64) for s in slots]
        )
    return model, posterior, dense_covariance(model, x, y, posterior, per_weight)


LAYERS = {"0.weight": 0.5, "0.bias": 2.0, "2.weight": 1.3, "2.bias": 0.7}
CASES = [
    (nb.LaplacePosterior, {}, 0.7),
    (nb.NullSpacePosterior, {"delta": 0}, 0.7),
    (nb.NullSpacePosterior, {}, 1.0),
    (nb.LaplacePosterior, {}, LAYERS),
]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind, options, prior", CASES, ids=["laplace", "exact", "edge", "layers"])
def test_joint_and_covariance_are_the_dense_ones(
    kind: Any, options: Any, prior: Any, solver: str
) -> None:
    model, posterior, weights = fitted(kind, solver, prior, **options)
    x = 2 * inputs(5, 2)
    rows = dense_jacobian(model, x)
    wanted = rows @ weights @ rows.T
    with unchanged(model):
        found = posterior.joint(x)
    assert_close(found.mean, model(x).detach())
    assert_close(found.covariance, wanted, rtol=1e-7, atol=1e-9)
    blocks = torch.stack([wanted[3 * b : 3 * b + 3, 3 * b : 3 * b + 3] for b in range(5)])
    assert_close(posterior.predict(x).covariance, blocks, rtol=1e-7, atol=1e-9)
    posterior.prior_precision = 4 * posterior.prior_precision
    assert_close(posterior.joint(x).covariance, wanted / 4, rtol=1e-7, atol=1e-9)
    applied = posterior._fit.state.covariance_times(
        posterior.problem.isotropic(inputs(2, 3).repeat(1, 15)[:, :59])
    )
    expected = posterior.problem.isotropic(
        inputs(2, 3).repeat(1, 15)[:, :59] @ weights * posterior._fit.alpha / 4
    )
    assert applied.shape == expected.shape


@pytest.mark.parametrize("kind", [nb.LaplacePosterior, nb.NullSpacePosterior])
def test_samples_approach_the_joint_covariance(kind: Any, tmp_path: Path) -> None:
    model, (x, y) = network(), data()
    posterior = kind(model, prior_precision=0.7).fit([(x, y)], 3000, **QUIET)
    new = 2 * inputs(4, 2)
    exact = posterior.joint(new, exact=True).covariance
    sampled = posterior.joint(new, exact=False).covariance
    variance = exact.diagonal()
    error = ((variance[:, None] * variance + exact.square()) / 3000).sqrt()
    assert bool(((sampled - exact).abs() <= 5 * error + 1e-12).all())
    change = (posterior.predict(new).outputs - model(new).detach()).flatten(1)
    assert_close(sampled, change.T @ change / 3000)
    posterior.save(tmp_path / "p.safetensors")
    loaded = nb.load(tmp_path / "p.safetensors", model)
    assert_close(loaded.joint(new).covariance, sampled)
    blocks = torch.stack([sampled[3 * b : 3 * b + 3, 3 * b : 3 * b + 3] for b in range(4)])
    assert_close(loaded.predict(new).covariance, blocks)
    with says(nb.NotFittedError, "exact"):
        loaded.joint(new, exact=True)


def test_an_iterative_solver_gives_samples_or_as_exact_as_it_is() -> None:
    model, (x, y) = network(), data()
    solver = nb.solvers.ConjugateGradient(1e-9, 3000)
    posterior = nb.LaplacePosterior(model, solver=solver, prior_precision=0.7).fit(
        [(x, y)], 8, **QUIET
    )
    new = inputs(3, 2)
    change = (posterior.predict(new).outputs - model(new).detach()).flatten(1)
    assert_close(posterior.joint(new).covariance, change.T @ change / 8)
    rows = dense_jacobian(model, new)
    weights = dense_covariance(model, x, y, posterior, 0.7)
    assert_close(
        posterior.joint(new, exact=True).covariance, rows @ weights @ rows.T, rtol=1e-4, atol=1e-6
    )


def test_the_covariance_of_a_sampled_network_is_about_its_own_mean() -> None:
    model, (x, y) = network(), data()
    posterior = nb.NullSpacePosterior(model).fit([(x, y)], 9, **QUIET)
    prediction = posterior.predict(inputs(4, 2), method="sampled")
    for b in range(4):
        assert_close(prediction.covariance[b], prediction.outputs[:, b].T.cov())


def test_a_prediction_travels_with_its_covariance() -> None:
    model, (x, y) = network(), data()
    posterior = nb.LaplacePosterior(model).fit([(x, y)], 9, **QUIET)
    prediction = posterior.predict(x)
    copied = pickle.loads(pickle.dumps(prediction))
    assert_close(copied.covariance, prediction.covariance)
    late = posterior.predict(x)
    with torch.no_grad():
        model[0].weight.add_(0.1)
    with says(nb.ModelError, "changed"):
        _ = late.covariance


def test_several_positions_are_laid_end_to_end() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1)).double()
    x = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    posterior = nb.LaplacePosterior(model.eval(), prior_precision=1.0)
    posterior.fit([(x, torch.zeros(2, 3, 3).long())], 4, **QUIET)
    prediction = posterior.predict(x)
    assert prediction.covariance.shape == (2, 27, 27)
    assert posterior.joint(x).covariance.shape == (54, 54)
    exact = posterior.novelty(x, score="variance", exact=True)
    centred = torch.eye(27).double() - torch.eye(9).double().repeat(3, 3) / 3
    traces = (centred @ prediction.covariance @ centred).diagonal(dim1=1, dim2=2).sum(1)
    assert_close(traces, exact)
    with says(nb.InputError, "bridge", "whole inputs"):
        posterior.predict(x, link="bridge")
    probit = posterior.predict(x, link="probit").mean
    variance = prediction.covariance.diagonal(dim1=1, dim2=2).reshape(2, 3, 3, 3)
    assert_close(probit, (model(x).detach() / (1 + math.pi / 8 * variance).sqrt()).softmax(1))


# -- derivatives ---------------------------------------------------------------------------------


def numerical(function: Any, x: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar."""
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        move = torch.zeros_like(x).flatten()
        move[i] = step
        move = move.reshape(x.shape)
        out.view(-1)[i] = (function(x + move) - function(x - move)) / (2 * step)
    return out


FIELDS = ("mean", "variance", "covariance", "point", "total", "epistemic")


@pytest.mark.parametrize("kind", [nb.LaplacePosterior, nb.NullSpacePosterior])
@pytest.mark.parametrize("field", FIELDS)
def test_gradients_by_the_inputs(kind: Any, field: str) -> None:
    model, (x, y) = network(), data()
    posterior = kind(model, prior_precision=0.7).fit([(x, y)], 4, **QUIET)
    new = 2 * inputs(3, 2)
    weights = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(3)).double()

    def summed(values: Tensor) -> Tensor:
        return (values * weights.flatten()[: values.numel()].reshape(values.shape)).sum()

    leaf = new.clone().requires_grad_()
    with unchanged(model):
        prediction = posterior.predict(leaf, differentiable=True)
        summed(getattr(prediction, field)).backward()
    wanted = numerical(lambda z: summed(getattr(posterior.predict(z), field)), new)
    assert leaf.grad is not None and float(wanted.norm()) > 1e-6
    assert_close(leaf.grad, wanted, rtol=1e-5, atol=1e-8)
    assert_close(getattr(prediction, field).detach(), getattr(posterior.predict(new), field))


@pytest.mark.parametrize("exact", [True, False])
def test_gradients_of_the_joint_covariance(exact: bool) -> None:
    model, (x, y) = network(), data()
    posterior = nb.NullSpacePosterior(model, prior_precision=LAYERS).fit([(x, y)], 4, **QUIET)
    new = 2 * inputs(3, 2)
    weights = torch.randn(9, 9, generator=torch.Generator().manual_seed(3)).double()
    leaf = new.clone().requires_grad_()
    found = posterior.joint(leaf, exact=exact, differentiable=True)
    ((found.covariance * weights).sum() + found.mean.square().sum()).backward()

    def plain(z: Tensor) -> Tensor:
        at = posterior.joint(z, exact=exact)
        return (at.covariance * weights).sum() + at.mean.square().sum()

    assert_close(leaf.grad, numerical(plain, new), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_where_nothing_is_left_but_rounding(dtype: torch.dtype) -> None:
    """At training inputs of a null-space posterior: differences of large numbers, as exact as these are."""
    model = network(outputs=1).to(dtype)
    x = inputs(3).to(dtype)
    posterior = nb.NullSpacePosterior(model, nb.Regression(1e-6), delta=0, prior_precision=1.0)
    posterior.fit([(x, model(x).detach())], 4, **QUIET)
    leaf = x.clone().requires_grad_()
    away = posterior.joint(x + 1).covariance.trace()
    made = posterior.joint(leaf, differentiable=True).covariance.trace()
    assert made.detach() < 1e-4 * away
    posterior.joint(leaf, exact=False, differentiable=True).covariance.trace().backward()
    assert posterior.predict(leaf, differentiable=True).variance.max() < 1e-4 * away


def test_gradients_through_attention_and_the_sampled_network() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2)).double().eval()
    x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    posterior = nb.NullSpacePosterior(model, prior_precision=1.0)
    posterior.fit([(x, torch.arange(4) % 2)], 3, **QUIET)
    new = x[:1] + 0.5
    for method in ("linearised", "sampled"):
        leaf = new.clone().requires_grad_()
        posterior.predict(leaf, method=method, differentiable=True).variance.sum().backward()
        wanted = numerical(lambda z, m=method: posterior.predict(z, method=m).variance.sum(), new)
        assert_close(leaf.grad, wanted, rtol=1e-5, atol=1e-8)


def test_what_cannot_be_differentiated_is_said() -> None:
    model, (x, y) = network(), data()
    posterior = nb.NullSpacePosterior(model).fit([(x, y)], 3, **QUIET)
    with says(nb.InputError, "differentiable", "requires_grad_"):
        posterior.predict(x, differentiable=True)
    with says(nb.InputError, "differentiable", "one batch"):
        posterior.predict(torch.utils.data.DataLoader(x), differentiable=True)
    with says(nb.InputError, "joint covariance", "predict(x).covariance"):
        posterior.joint(inputs(9000))
    with says(nb.InputError, "link", "probit"):
        posterior.predict(x, link="mc")
    with says(nb.InputError, "link", "sampled"):
        posterior.predict(x, link="probit", method="sampled")


# -- links ---------------------------------------------------------------------------------------


def test_links_against_their_definitions_and_samples() -> None:
    model, (x, y) = network(), data()
    posterior = nb.LaplacePosterior(model, prior_precision=2.0).fit([(x, y)], 4000, **QUIET)
    new = inputs(5, 2)
    plain = posterior.predict(new)
    variance = plain.covariance.diagonal(dim1=1, dim2=2)
    probit = posterior.predict(new, link="probit")
    assert_close(probit.mean, (plain.point / (1 + math.pi / 8 * variance).sqrt()).softmax(1))
    assert_close(probit.total, -(probit.mean * probit.mean.log()).sum(1))
    bridge = posterior.predict(new, link="bridge").mean
    for b in range(5):  # Hobbhahn et al., equations 4 and 6, written out
        mean, cov = plain.point[b], plain.covariance[b]
        mean = mean - cov.sum(1) * mean.sum() / cov.sum()
        var = (cov - torch.outer(cov.sum(1), cov.sum(0)) / cov.sum()).diagonal()
        alpha = (1 - 2 / 3 + mean.exp() / 9 * (-mean).exp().sum()) / var
        assert_close(bridge[b], alpha / alpha.sum())
    assert float((probit.mean - plain.mean).abs().max()) < 0.05
    assert_close(bridge.sum(1), torch.ones(5).double())


def test_probit_of_one_logit() -> None:
    model, x = network(1), inputs(6)
    posterior = nb.LaplacePosterior(model, "binary", prior_precision=2.0)
    posterior.fit([(x, (x[:, :1] > 0).double())], 4000, **QUIET)
    plain, probit = posterior.predict(x), posterior.predict(x, link="probit")
    variance = plain.covariance[:, 0]
    assert_close(probit.mean, (plain.point / (1 + math.pi / 8 * variance).sqrt()).sigmoid())
    assert float((probit.mean - plain.mean).abs().max()) < 0.02
    regression = nb.LaplacePosterior(network(1), nb.Regression(0.1)).fit(
        [(x, x[:, :1])], 3, **QUIET
    )
    with says(nb.InputError, "probit", "Regression"):
        regression.predict(x, link="probit")


def test_a_copy_of_a_prediction_is_one() -> None:
    model, (x, y) = network(), data()
    prediction = nb.NullSpacePosterior(model).fit([(x, y)], 3, **QUIET).predict(x)
    assert_close(copy.copy(prediction).covariance, prediction.covariance)


class Waves(nn.Module):
    """Bends within a step of float32's differences."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sin(200 * x))


def test_differences_that_say_nothing_refuse_nothing() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Waves().eval(), torch.randn(4, 3)
    posterior = nb.NullSpacePosterior(model, prior_precision=1.0).fit(
        [(x[:2], torch.tensor([0, 1]))], 3, progress=False
    )
    at = x[2:].clone().requires_grad_()
    outputs = posterior.predict(at, differentiable=True).outputs
    found = torch.autograd.grad(outputs.square().sum(), at)[0]
    assert float(found.norm()) > 1
