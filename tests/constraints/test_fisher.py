"""The empirical and the sampled Fisher matrix as rows: against dense gradients, and against the Hessian on average."""

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
from nullbayes.constraints.fisher import SampledFisher
from nullbayes.likelihood.callable import CallableLoss

X, Y = inputs(8), torch.arange(8) % 3


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``∇ℓ_n (N, P)``, one plain backward pass an example."""
    out = []
    for one, label in zip(x, y, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(one[None]), label[None]).backward()
        out.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    return torch.stack(out)


def test_the_empirical_fisher_is_that_of_gradients_at_labels() -> None:
    model = network()
    rows = gradients(model, X, Y).detach()
    posterior = nb.LaplacePosterior(model, curvature="empirical-fisher", prior_precision=0.7)
    with unchanged(model):
        posterior.fit((X, Y), 4, **QUIET)
    assert posterior.certificate.constraints == 8  # one row an example
    covariance = torch.linalg.inv(0.7 * torch.eye(rows.shape[1]).double() + rows.T @ rows)
    new = 2 * inputs(4, 5)
    jacobian = dense_jacobian(model, new)
    wanted = jacobian @ covariance @ jacobian.T
    assert_close(posterior.joint(new).covariance, wanted, rtol=1e-7, atol=1e-9)
    null = nb.NullSpacePosterior(model, curvature="empirical-fisher", delta=0).fit(
        (X, Y), 4, **QUIET
    )
    for state in null.sample(3):
        step = torch.cat([(state[n] - p.detach()).flatten() for n, p in model.named_parameters()])
        assert float((rows @ step).abs().max()) < 1e-7 * float(step.norm() * rows.norm())
    assert null.certificate.audit.passed
    evidence = posterior.log_marginal_likelihood()
    loss = nn.functional.cross_entropy(model(X), Y, reduction="sum").detach()
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    logdet = torch.linalg.slogdet(torch.eye(8).double() + rows @ rows.T / 0.7)[1]
    assert_close(evidence, -loss - 0.35 * theta.square().sum() - 0.5 * logdet)


def test_sampled_rows_are_gradients_at_labels_that_the_network_gives() -> None:
    model, count = network(), 4000
    likelihood = nb.Classification()
    out = model(X).detach()
    values = SampledFisher(count).build(likelihood, out, Y) * count**0.5  # (C, N, O)
    p = out.softmax(-1)
    labels = (p - values).argmax(-1)  # p - (p - e_k) = e_k
    assert_close(values, p - nn.functional.one_hot(labels, 3).double(), rtol=1e-9, atol=1e-12)
    frequency = nn.functional.one_hot(labels, 3).double().mean(0)
    error = (p * (1 - p) / count).sqrt()
    assert bool(((frequency - p).abs() <= 5 * error).all())
    hessian = torch.einsum("cno,cnq->noq", values, values) / count
    wanted = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    assert_close(hessian, wanted, rtol=0, atol=5 / count**0.5)
    both = torch.einsum("cno,cnq->cnoq", values[:, :-1], values[:, 1:])  # of two examples
    assert float(both.mean(0).abs().max()) < 5 * float(both.std(0).max()) / count**0.5


@pytest.mark.parametrize("case", ["binary", "regression", "callable", "positions", "weights"])
def test_other_likelihoods_are_right_on_average(case: str) -> None:
    count, generator = 3000, torch.Generator().manual_seed(0)
    out = torch.randn(2, 3, generator=generator).double()
    likelihood: Any = nb.Binary()
    targets: Any = torch.tensor([[0.0, 1, 0], [1, 1, 0]]).double()
    if case == "regression":
        likelihood, targets = nb.Regression([0.1, 0.4, 2.0]), torch.zeros(2, 3).double()
    if case == "callable":
        likelihood = CallableLoss(lambda f, y: (f.exp() - y * f + f.square()).sum(1))
        likelihood.layouts.flatten(out, 2)
    if case == "positions":
        out = torch.randn(2, 3, 2, generator=generator).double()
        likelihood = nb.Classification(ignore_index=-100)
        targets = torch.tensor([[0, 1], [-100, 2]])
    if case == "weights":
        likelihood, targets = nb.Classification(weight=[1.0, 2.0, 0.5]), torch.tensor([1, 2])
    factor = likelihood.hessian_factor(out, targets).flatten(2)
    hessian = torch.einsum("cni,cnj->nij", factor, factor)
    values = SampledFisher(count, seed=3).build(likelihood, out, targets).flatten(2)
    squares = torch.einsum("cni,cnj->cnij", values, values) * count
    error = squares.std(0) / count**0.5
    assert bool(((squares.mean(0) - hessian).abs() <= 5 * error + 1e-9).all())
    mean = values.mean(0) * count**0.5
    assert bool((mean.abs() <= 5 * values.std(0) + 1e-9).all())  # std of the mean, times √count
    if case == "positions":
        assert not bool(values.reshape(count, 2, 3, 2)[:, 1, :, 0].any())  # ignored


def test_labels_follow_from_the_number_of_an_example() -> None:
    model = network()

    def fitted(batches: Any, **options: Any) -> Any:
        curvature = nb.SampledFisher(samples=2, seed=5, **options)
        return nb.LaplacePosterior(model, curvature=curvature, prior_precision=1.0).fit(
            batches, 4, **QUIET
        )

    whole = fitted((X, Y))
    assert whole.certificate.constraints == 16 and whole.certificate.audit.passed
    split = fitted([(X[:3], Y[:3]), (X[3:], Y[3:])])
    assert_close(split.joint(X).covariance, whole.joint(X).covariance)
    grown = fitted((X[:3], Y[:3])).update((X[3:], Y[3:]), **QUIET)
    assert_close(grown.joint(X).covariance, whole.joint(X).covariance)
    assert grown.certificate.audit.passed
    other = nb.LaplacePosterior(model, curvature=nb.SampledFisher(2, 6), prior_precision=1.0)
    other.fit((X, Y), 4, **QUIET)
    assert float((other.joint(X).covariance - whole.joint(X).covariance).abs().max()) > 1e-3


def test_many_samples_approach_the_hessians_posterior() -> None:
    model = network()
    exact = nb.LaplacePosterior(model, prior_precision=1.0).fit((X, Y), 4, **QUIET)
    away = []
    for samples in (2, 200):
        found = nb.LaplacePosterior(
            model, curvature=nb.SampledFisher(samples), prior_precision=1.0
        ).fit((X, Y), 4, **QUIET)
        gap = found.joint(2 * X).covariance - exact.joint(2 * X).covariance
        away.append(float(gap.norm() / exact.joint(2 * X).covariance.norm()))
    assert away[1] < 0.1 < away[0]


def test_files_and_null_spaces(tmp_path: Path) -> None:
    model = network()
    posterior = nb.NullSpacePosterior(model, curvature="sampled-fisher").fit((X, Y), 4, **QUIET)
    assert "sampled labels" in repr(posterior) and posterior.certificate.audit.passed
    posterior.draw(3)
    assert posterior.certificate.audit.passed
    posterior.save(tmp_path / "p.safetensors")
    loaded = nb.load(tmp_path / "p.safetensors", model)
    assert_close(loaded.predict(X).mean, posterior.predict(X).mean)
    assert "8 rows" not in str(nb.plan(model, (X, Y), curvature="sampled-fisher"))


def test_what_does_not_go_together_is_said() -> None:
    model = network()
    with says(nb.InputError, "curvature", "'fisher'", "'sampled-fisher'"):
        nb.LaplacePosterior(model, curvature="fisher")
    with says(nb.InputError, "curvature", "preserve='loss'"):
        nb.LaplacePosterior(model, preserve="loss", curvature="sampled-fisher")
    with says(nb.InputError, "curvature", "directions=2"):
        nb.NullSpacePosterior(model, directions=2, curvature="empirical-fisher")
    with says(nb.InputError, "samples", "0"):
        nb.SampledFisher(0)
