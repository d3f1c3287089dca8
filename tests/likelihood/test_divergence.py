"""The prior precision that keeps training predictions: divergences, and the least value that suffices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, distributions, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.certificate.verdict import ALLOWED_DIVERGENCE
from nullbayes.likelihood import Likelihood, Moments

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_of_classes_one_or_many_positions() -> None:
    """Against torch.distributions; ignored positions do not count, class weights do not enter."""
    point, draws = normal(4, 5, 3), normal(6, 4, 5, 3, seed=1)  # three positions of five classes
    labels = torch.tensor([[0, 1, 2], [-100, 4, 0], [-100, -100, 3], [-100, -100, -100]])
    found = nb.Classification(class_axis=1, weight=[1.0, 2, 3, 4, 5]).divergence(
        point, draws, labels
    )
    each = distributions.kl_divergence(
        distributions.Categorical(logits=point.movedim(1, -1)),
        distributions.Categorical(logits=draws.movedim(2, -1)),
    )
    kept = (labels != -100).double()
    assert_close(found, (each * kept).sum(-1) / kept.sum(-1).clamp(min=1))
    soft = normal(4, 5, seed=2).softmax(1)
    found = nb.Classification().divergence(point[..., 0], draws[..., 0], soft)
    assert_close(found, each[..., 0])


def test_of_logits_and_of_real_outputs() -> None:
    point, draws = 3 * normal(4, 3), 3 * normal(6, 4, 3, seed=1)
    wanted = distributions.kl_divergence(
        distributions.Bernoulli(logits=point.expand(6, 4, 3)), distributions.Bernoulli(logits=draws)
    )
    assert_close(nb.Binary().divergence(point, draws, (point > 0).long()), wanted.mean(-1))
    noise = torch.tensor([0.1, 1.0, 4.0], dtype=F64)
    wanted = distributions.kl_divergence(
        distributions.Normal(point, noise.sqrt()), distributions.Normal(draws, noise.sqrt())
    )
    found = nb.Regression(noise_variance=noise).divergence(point, draws, torch.zeros(4, 3))
    assert_close(found, wanted.mean(-1))


class Poisson(Likelihood):
    """Outputs are log rates; only what has to be written."""

    name = "test-poisson"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.exp() - targets * outputs).flatten(1).sum(1)

    def moments(self, draws: Tensor, point: Tensor, linearised: bool) -> Moments:
        rate = draws.exp()
        return Moments(rate.mean(0), rate.var(0), rate.mean(0), rate.mean(0), rate.var(0))


def test_the_default_is_half_the_change_through_the_hessian() -> None:
    point, draws = normal(4, 3), normal(6, 4, 3, seed=1)
    targets = torch.ones(4, 3, dtype=F64)
    found = Poisson().divergence(point, draws, targets)
    assert_close(found, ((draws - point).square() * point.exp()).sum(-1) / 2 / 3)
    near = point + 1e-4 * draws  # where the exact divergence is of second order
    exact = distributions.kl_divergence(
        distributions.Poisson(point.exp()), distributions.Poisson(near.exp())
    ).mean(-1)
    assert_close(Poisson().divergence(point, near, targets), exact, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("options", [{"preserve": "loss"}, {"directions": 1}])
def test_the_evidence_gives_way_where_rows_leave_predictions_open(options: dict[str, Any]) -> None:
    """Many weights, few rows: the evidence's prior is far too wide for what the rows do not hold."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    x = torch.randn(12, 6, generator=generator)
    with torch.no_grad():
        y = model(x).argmax(1)
    posterior = nb.NullSpacePosterior(model, **options).fit([(x, y)], 20, progress=False)
    assert "it was raised to" in posterior.certificate.verdict

    def divergence() -> float:
        """Of linearised draws, by torch.distributions; not the certificate's own path."""
        draws = posterior.predict(x).outputs
        with torch.no_grad():
            before = distributions.Categorical(logits=model(x))
        return float(
            distributions.kl_divergence(before, distributions.Categorical(logits=draws)).mean()
        )

    assert 0.9 * ALLOWED_DIVERGENCE <= divergence() <= 1.001 * ALLOWED_DIVERGENCE
    assert posterior.certificate.posterior_score == 1
    whole = nb.NullSpacePosterior(model, delta=0).fit([(x, y)], 20, progress=False)
    # Where all rows are held, it is other data that decides: what the training data do is far below what is allowed.
    held = nb.NullSpacePosterior(model, delta=0, prior_precision=whole.prior_precision)
    posterior = held.fit([(x, y)], 20, progress=False)
    assert divergence() <= 1e-3 * ALLOWED_DIVERGENCE
    given = nb.NullSpacePosterior(model, prior_precision=0.5, **options)
    assert given.fit([(x, y)], 5, progress=False).prior_precision == 0.5


def test_a_summed_loss_may_not_grow_by_much() -> None:
    """A little for each of many outputs is too much for their sum; the certificate has to hold."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 60))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    x = torch.randn(10, 4, generator=generator)
    with torch.no_grad():
        y = model(x) + 0.03 * torch.randn(10, 60, generator=generator)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1) / 2

    posterior = nb.NullSpacePosterior(model, loss=loss, preserve="loss").fit(
        [(x, y)], 20, progress=False
    )
    c = posterior.certificate
    draws = posterior.predict(x).outputs
    with torch.no_grad():
        before = loss(model(x), y).mean()
        grown = float(torch.stack([loss(d, y) for d in draws]).mean() / before - 1)
    assert c.held
    assert 0.004 < grown < 0.0051
