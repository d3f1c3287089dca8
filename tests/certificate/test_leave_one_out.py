"""Leave-one-out: what a posterior does to examples that it has not seen, against fits without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes import datasets
from nullbayes.certificate import leave_one_out as leaving
from nullbayes.certificate.verdict import ALLOWED_LEFT_OUT
from nullbayes.fit.prior_samples import standard_normal
from nullbayes.jacobian.operator import DenseOperator

QUIET: dict[str, Any] = {"progress": False}
SOLVERS = [nb.solvers.DualCholesky(jitter=1e-14), nb.solvers.PrimalQR()]


def problem(classes: int = 3, examples: int = 9) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, classes)).double().eval()
        return model, torch.randn(examples, 3).double(), torch.arange(examples) % classes


def one_pass(rows: Tensor, v: Tensor, shift: float) -> Tensor:
    """``(I + AᵀA / shift)⁻¹ v`` by definition."""
    p = rows.shape[1]
    out: Tensor = torch.linalg.solve(torch.eye(p).double() + rows.T @ rows / shift, v.T).T
    return out


@given(seed=st.integers(0, 2**16), m=st.integers(2, 12), p=st.integers(3, 16))
@settings(max_examples=40, deadline=None)
def test_rows_left_out_are_those_of_a_solution_without_them(seed: int, m: int, p: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Rows of very unequal length, as those of confident examples are.
    a = torch.randn(m, p, generator=generator).double()
    a *= 10 ** (-4 * torch.rand(m, 1, generator=generator).double())
    v = torch.randn(5, p, generator=generator).double()
    cut = int(torch.randint(1, m, (), generator=generator))
    spans, shift = [slice(0, cut), slice(cut, m)], 1e-3
    state = nb.solvers.DualCholesky(jitter=1e-15).prepare(DenseOperator(a))
    state.factorise(shift, numerical=True)
    found = state.left_out(v, spans)
    assert found is not None
    for span, values in zip(spans, found, strict=True):
        rest = torch.cat([a[: span.start], a[span.stop :]])
        wanted = one_pass(rest, v, shift) @ a[span].T
        assert_close(values, wanted, rtol=1e-4, atol=1e-6 * float(a.norm()))


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
@pytest.mark.parametrize("directions", [None, "auto"])
def test_examples_left_out_are_those_of_a_fit_without_them(solver: Any, directions: Any) -> None:
    model, x, y = problem()
    alpha, delta, samples = 2.0, 1e-3, 6
    options = {"solver": solver, "delta": delta, "prior_precision": alpha, "directions": directions}
    posterior = nb.NullSpacePosterior(model, **options)
    posterior.fit([(x[:5], y[:5]), (x[5:], y[5:])], samples, **QUIET)
    fit = posterior._fit
    assert fit is not None and fit.check is not None and fit.state is not None
    point = torch.cat([p for p, _, _ in fit.check.left_out])
    unit = torch.cat([u for _, u, _ in fit.check.left_out], 1)
    assert_close(point, model(x).detach())  # all of them, in order
    p = posterior.space.total
    prior, _ = standard_normal(0, range(samples), p, 0, unit)
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(model, w, (x,)))(
        dict(model.named_parameters())
    )
    rows = torch.cat([j.detach().flatten(2) for j in jacobian.values()], 2)  # (N, O, P)
    likelihood, preserve = posterior.likelihood, posterior.preserve
    made = preserve.cotangents(likelihood, model(x), y, directions).values  # (C, N, O)
    constraints = torch.einsum("cno,nop->ncp", made, rows)
    for n in range(len(x)):
        rest = constraints[torch.arange(len(x)) != n].flatten(0, 1)
        wanted = one_pass(rest, prior, delta * alpha) @ rows[n].T
        if directions is None:  # up to a common shift of the logits, which no prediction sees
            found, wanted = (
                likelihood.centre(unit[:, n : n + 1])[:, 0],
                wanted - wanted.mean(1, True),
            )
            assert_close(found, wanted, rtol=2e-3, atol=2e-4)
        else:
            b = made[:, n]
            assert_close(unit[:, n] @ b.T, wanted @ b.T, rtol=2e-3, atol=2e-4)


def test_the_certificate_tells_and_the_prior_heeds_it() -> None:
    model, x, y = problem(examples=14)
    with torch.no_grad():
        model[2].weight *= 6  # type: ignore[index]
    posterior = nb.NullSpacePosterior(model).fit([(x, y)], 20, **QUIET)
    c = posterior.certificate
    assert c.left_out_divergence is not None and 0 < c.left_out_divergence <= ALLOWED_LEFT_OUT
    assert c.left_out_divergence > 0.5 * ALLOWED_LEFT_OUT  # the bound is what decided
    assert c.evidence is not None and c.prior_precision > c.evidence
    assert "it was raised to" in c.verdict and "divergence, left out" in str(c)
    assert "Decide with `calibrate`" in c.verdict
    tight = c.left_out_divergence
    posterior.prior_precision = c.prior_precision / 100
    assert (posterior.certificate.left_out_divergence or 0) > 3 * tight
    assert posterior.certificate.held  # the training data are kept as before
    assert "evidence" not in posterior.certificate.verdict  # which no longer decides


@pytest.mark.parametrize(
    "options",
    [
        {"likelihood": "regression"},
        {"solver": nb.solvers.AlternatingProjections()},
        {"solver": nb.solvers.PrimalQR(), "delta": 0},
    ],
    ids=["regression", "iterative", "primal, exact"],
)
def test_where_it_cannot_be_told_it_is_not(options: dict[str, Any]) -> None:
    model, x, y = problem()
    targets = torch.randn(len(y), 3).double() if "likelihood" in options else y
    posterior = nb.NullSpacePosterior(model, **options).fit([(x, targets)], 4, **QUIET)
    assert posterior.certificate.left_out_divergence is None
    assert "left out" not in str(posterior.certificate)


def test_the_estimate_is_that_of_data_never_seen() -> None:
    """Trained on half of the digits: leave-one-out against the other half."""
    digits = datasets.digits(train=300, validation=300)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 10))
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(digits.train.inputs), digits.train.targets)
            loss.backward()
            optimiser.step()
    posterior = nb.NullSpacePosterior(model.eval())
    posterior.fit(digits.train.loader(100), 30, **QUIET)
    x, y = digits.validation.inputs, digits.validation.targets
    for alpha in (posterior.prior_precision, posterior.prior_precision / 10):
        posterior.prior_precision = alpha
        prediction = posterior.predict(x)
        seen = posterior.likelihood.divergence(prediction.point, prediction.outputs, y)
        estimate = posterior.certificate.left_out_divergence
        assert estimate is not None and 0.4 < estimate / float(seen.mean()) < 1.6


def test_few_examples_are_left_out_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = problem(examples=12)
    monkeypatch.setattr(leaving, "MOST_EXAMPLES", 5)
    posterior = nb.NullSpacePosterior(model).fit([(x[:7], y[:7]), (x[7:], y[7:])], 3, **QUIET)
    assert posterior._fit is not None and posterior._fit.check is not None
    points = torch.cat([p for p, _, _ in posterior._fit.check.left_out])
    assert_close(points, model(x[[0, 2, 4, 7, 9]]).detach())


def test_tokens_of_examples_with_fewer_labels_than_their_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The longest example of the batch is none of those left out, so that they have fewer rows than it was given."""
    monkeypatch.setattr(leaving, "MOST_EXAMPLES", 2)  # the first and the fifth of nine
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double().eval()
        x, y = torch.randn(9, 5, 3).double(), torch.randint(0, 4, (9, 5))
    y[:, 3:] = -100
    y[2] = torch.arange(5) % 4
    found = []
    for sizes in (9, 1):
        posterior = nb.NullSpacePosterior(
            model, nb.Classification(class_axis=-1), "token-loss", prior_precision=1.0
        )
        posterior.fit(list(zip(x.split(sizes), y.split(sizes), strict=True)), 4, **QUIET)
        found.append(posterior.certificate.left_out_divergence)
    assert found[0] is not None and found[0] > 1e-3
    assert found[0] == pytest.approx(found[1], rel=1e-6)
