"""Samples that take the place of what they were projected from, and samples stored in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.common import memory
from nullbayes.fit.prior_samples import standard_normal
from nullbayes.solvers import DualCholesky, Size, dual
from tests.support import inputs, perceptron

QUIET: dict[str, Any] = {"progress": False}
OPTIONS: dict[str, Any] = {"solver": DualCholesky(), "prior_precision": 1.0}
Y = torch.arange(12) % 3


def data() -> list[tuple[Tensor, Tensor]]:
    x = inputs(12)
    return [(x[:5], Y[:5]), (x[5:], Y[5:])]


def rows_of(model: nn.Module) -> Tensor:
    """``(M, P)`` by plain differentiation: square root of the softmax's covariance times the Jacobian."""
    parameters, rows = list(model.parameters()), []
    for x in inputs(12):
        logits = model(x[None])[0]
        p = logits.detach().softmax(0)
        values, vectors = torch.linalg.eigh(torch.diag(p) - p[:, None] * p)
        for value, vector in zip(values[1:], vectors.T[1:], strict=True):
            g = torch.autograd.grad(logits @ vector, parameters, retain_graph=True)
            rows.append(value.sqrt() * torch.cat([t.reshape(-1) for t in g]))
    return torch.stack(rows)


@pytest.mark.parametrize("delta", [0.0, 1e-2])
def test_samples_written_over_are_those_of_the_dense_projection(
    delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = perceptron()
    plain = nb.NullSpacePosterior(model, delta=delta, **OPTIONS).fit(data(), 6, **QUIET)
    monkeypatch.setattr(dual, "WRITTEN_OVER", 1)
    posterior = nb.NullSpacePosterior(model, delta=delta, **OPTIONS).fit(data(), 6, **QUIET)
    a = rows_of(model)
    v, _ = standard_normal(0, range(6), a.shape[1], 0, a)
    gram = a @ a.T + delta * torch.eye(len(a))
    wanted = v
    for _ in range(posterior.certificate.iterations if delta else 1):
        wanted = wanted - torch.linalg.solve(gram, a @ wanted.T).T @ a
    assert_close(posterior._samples(), wanted, atol=1e-8, rtol=1e-6)
    ours, theirs = posterior.certificate, plain.certificate
    assert ours.held and ours.audit is not None and ours.audit.passed
    for name in ("left_out_divergence", "drift", "prior_share", "row_drift", "residual", "gamma"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-4, abs=1e-9)
    # More samples go on from the same stream, written over as well.
    for each in (posterior, plain):
        each.draw(3)
    assert_close(posterior._samples(), plain._samples(), atol=1e-8, rtol=1e-6)
    assert posterior.certificate.prior_share == pytest.approx(plain.certificate.prior_share)


def test_the_vectors_themselves_are_returned_and_may_have_been_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No second tensor of their size is made; a Laplace posterior still gets one of its own."""
    monkeypatch.setattr(dual, "WRITTEN_OVER", 1)
    for kind, same in ((nb.NullSpacePosterior, True), (nb.LaplacePosterior, False)):
        state = kind(perceptron(), **OPTIONS).fit(data(), 2, **QUIET)._fitted().state
        v, noise = standard_normal(5, range(4), state.operator.shape[1], 24, inputs(1))
        before = v.clone()
        wanted = state.project(v.clone(), noise).value
        done = state.consume(v, noise)
        assert (done.value is v) == same
        assert_close(done.value, wanted, atol=1e-9, rtol=1e-7)
        assert same or bool((v == before).all())


def test_the_estimate_counts_one_vector_a_sample_where_they_are_written_over() -> None:
    large = Size(72, 2**22, 30)
    once = DualCholesky().cost(Size(72, 2**22, 30, written_over=True)).nbytes
    assert once == 2 * 8 * 72**2 + 30 * 2**22 * 4
    assert DualCholesky().cost(large).nbytes > 3.9 * once
    small = DualCholesky().cost(Size(72, 2**10, 30, written_over=True))
    assert small.nbytes == DualCholesky().cost(Size(72, 2**10, 30)).nbytes


@pytest.mark.parametrize("method", ["linearised", "sampled"])
def test_stored_half_precision_is_widened_a_part_at_a_time(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = perceptron().float(), inputs(7, 2).float()
    batches = [(a.float(), b) for a, b in data()]
    posterior = nb.NullSpacePosterior(model, **OPTIONS)
    posterior.fit(batches, 8, sample_dtype=torch.bfloat16, **QUIET)
    fit = posterior._fitted()
    assert fit.stored.dtype == torch.bfloat16
    # What is measured is what is stored.
    moved = fit.state.operator.matvec(fit.unit)
    drift = float((moved.double().square().sum() / (8 * 12)).sqrt())
    assert posterior.certificate.row_drift == pytest.approx(drift * fit.alpha**-0.5, rel=1e-5)
    whole = nb.NullSpacePosterior(model, **OPTIONS).fit(batches, 8, **QUIET)
    object.__setattr__(whole._fitted(), "stored", fit.stored.float())
    widened: list[int] = []
    to = Tensor.to

    def watched(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype == torch.bfloat16:
            widened.append(self.numel())
        return to(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", watched)
    with memory.working_within(4 * fit.stored.shape[1] * 3):  # room for three of them
        found = posterior.predict(x, method=method).mean
    assert 0 < max(widened) < fit.stored.numel(), widened  # a layer, or a few samples, never all
    monkeypatch.undo()
    assert_close(found, whole.predict(x, method=method).mean, atol=1e-6, rtol=1e-5)
    assert_close(
        posterior.novelty(x, exact=False), whole.novelty(x, exact=False), atol=1e-6, rtol=1e-5
    )
