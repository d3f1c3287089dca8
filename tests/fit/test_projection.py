"""Iterative solvers that begin without a few examples: what these see of it, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes import solvers
from nullbayes.certificate import leave_one_out as leaving
from nullbayes.certificate.verdict import ALLOWED_LEFT_OUT
from nullbayes.fit.prior_samples import standard_normal
from nullbayes.jacobian.operator import DenseOperator
from nullbayes.solvers import block_cg
from nullbayes.solvers.checkpoint import Watch
from nullbayes.solvers.conjugate_gradient import ConjugateGradientState

QUIET: dict[str, Any] = {"progress": False}


def problem(examples: int = 60) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)).double().eval()
        with torch.no_grad():
            model[2].weight *= 4
        return model, torch.randn(examples, 6).double(), torch.arange(examples) % 3


def fitted(tolerance: float = 1e-4, checkpoint: Path | None = None, **options: Any) -> Any:
    model, x, y = problem()
    options = {"solver": solvers.ConjugateGradient(tolerance, 2000), **options}
    posterior = nb.NullSpacePosterior(model, **options)
    batches = [(x[:25], y[:25]), (x[25:], y[25:])]
    return posterior.fit(batches, 12, checkpoint=checkpoint, checkpoint_every=1e-9, **QUIET)


@given(
    seed=st.integers(0, 2**16),
    numerical=st.booleans(),
    equilibrate=st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=30, deadline=None)
@example(seed=442, numerical=True, equilibrate=0.0)
def test_first_without_some_rows_then_with_all(
    seed: int, numerical: bool, equilibrate: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    m, p = 14, 40
    a = torch.randn(m, p, generator=generator).double()
    v = torch.randn(5, p, generator=generator).double()
    spans = [slice(0, 2), slice(9, 12)]
    there = torch.ones(m, dtype=torch.bool)
    for span in spans:
        there[span] = False
    # A shift far below every eigenvalue: the numerical null space is the exact one.
    state = solvers.ConjugateGradient(1e-9, 2000, equilibrate=equilibrate).prepare(DenseOperator(a))
    state.factorise(1e-12 if numerical else 0.0, numerical=numerical)
    some = state.project_without(v, spans)
    assert some is not None
    rest = a[there]
    assert_close(some.value, v - v @ (torch.linalg.pinv(rest) @ rest), atol=1e-6, rtol=0)
    done = state.project(v)
    assert_close(done.value, v - v @ (torch.linalg.pinv(a) @ a), atol=1e-6, rtol=0)
    assert float(done.residual.max()) <= 1e-9
    again = state.project(v)  # later samples begin at the beginning
    assert_close(again.value, done.value, atol=1e-6, rtol=0)


def test_what_joins_late_saw_a_fit_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "FEWEST_HELD", 10)
    posterior = fitted(1e-8)
    fit, model, (_, x, y) = posterior._fit, posterior.model, problem()
    held = torch.arange(0, 60, 6)
    point = torch.cat([p for p, _, _ in fit.check.left_out])
    unit = torch.cat([u for _, u, _ in fit.check.left_out], 1)
    targets = torch.cat([t for _, _, t in fit.check.left_out])
    assert_close(point, model(x[held]).detach())
    assert torch.equal(targets, y[held])
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(model, w, (x,)))(
        dict(model.named_parameters())
    )
    rows = torch.cat([j.detach().flatten(2) for j in jacobian.values()], 2)  # (N, O, P)
    made = posterior.preserve.cotangents(posterior.likelihood, model(x), y, None).values
    constraints = torch.einsum("cno,nop->ncp", made, rows)
    kept = torch.ones(60, dtype=torch.bool)
    kept[held] = False
    rest = constraints[kept].flatten(0, 1)
    prior, _ = standard_normal(0, range(12), rows.shape[2], 0, unit)
    values, vectors = torch.linalg.eigh(rest.T @ rest)
    shift = fit.state.shift
    centre = posterior.likelihood.centre
    found = []
    for passes in (1, 2, 3):  # as many as the search took
        filtered = (shift / (values.clamp(min=0) + shift)) ** passes
        wanted = torch.einsum("nop,sp->sno", rows[held], prior @ (vectors * filtered) @ vectors.T)
        found.append(float((centre(unit) - centre(wanted)).abs().max()))
    assert min(found) < 1e-2 * float(centre(unit).abs().max())


def test_the_prior_heeds_it_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with_some = fitted()
    c = with_some.certificate
    assert c.left_out_divergence is not None and 0 < c.left_out_divergence <= ALLOWED_LEFT_OUT
    exact = fitted(solver=solvers.DualCholesky()).certificate
    # Half of these few examples are held out together, not one at a time: more of their rows are free.
    assert exact.left_out_divergence is not None
    assert 0.5 < c.prior_precision / exact.prior_precision < 20
    monkeypatch.setattr("nullbayes.fit.pipeline.held_out", lambda *_: [])
    at_once = fitted(prior_precision=c.prior_precision).certificate
    assert at_once.left_out_divergence is None
    assert c.residual == pytest.approx(at_once.residual, rel=0.2)
    assert c.prior_share == pytest.approx(at_once.prior_share, rel=0.02)
    assert c.held and at_once.held


@pytest.mark.parametrize(
    "options",
    [
        {"solver": solvers.ConjugateGradient(preconditioner="subset")},
        {"solver": solvers.AlternatingProjections()},
        {"solver": solvers.ConjugateGradient(), "prior_precision": 3.0},
    ],
    ids=["preconditioned", "alternating", "prior given"],
)
def test_where_nothing_is_held_out(options: dict[str, Any]) -> None:
    assert fitted(**options).certificate.left_out_divergence is None


def test_two_examples_are_enough_and_one_is_not() -> None:
    model, x, y = problem(4)
    for examples, told in ((1, False), (2, True)):
        posterior = nb.NullSpacePosterior(model, solver=solvers.ConjugateGradient())
        c = posterior.fit([(x[:examples], y[:examples])], 3, **QUIET).certificate
        assert (c.left_out_divergence is not None) is told


class Killed(BaseException):
    """Stands in for a signal that no code can catch."""


@pytest.mark.parametrize("at", ["first", "between", "second"])
def test_killed_and_resumed(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = fitted().certificate
    path = tmp_path / "fit.ckpt"
    offer = Watch.offer

    def killing(self: Watch, state: dict[str, Tensor], *, now: bool = False) -> None:
        second = self._before is not None
        if at == "between" and second:
            raise Killed
        offer(self, state, now=now)
        if (at == "first" and not second) or second:
            raise Killed

    with monkeypatch.context() as m:
        m.setattr(Watch, "offer", killing)
        with pytest.raises(Killed):
            fitted(checkpoint=path)
    assert path.exists()
    calls: list[int] = []
    without = ConjugateGradientState.project_without

    def counted(self: Any, *args: Any) -> Any:
        calls.append(1)
        return without(self, *args)

    monkeypatch.setattr(ConjugateGradientState, "project_without", counted)
    found = fitted(checkpoint=path).certificate
    assert len(calls) == (0 if at == "second" else 1)
    assert not path.exists()
    assert found.left_out_divergence == pytest.approx(wanted.left_out_divergence, rel=1e-2)
    assert found.prior_precision == pytest.approx(wanted.prior_precision, rel=1e-2)


def test_interrupted_while_some_are_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, calls = block_cg._advance, iter(range(1000))

    def interrupted(*args: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return advance(*args)

    path = tmp_path / "fit.ckpt"
    with monkeypatch.context() as m:
        m.setattr(block_cg, "_advance", interrupted)
        c = fitted(checkpoint=path).certificate
    assert c.status == solvers.Status.INTERRUPTED.value and not c.held
    assert c.left_out_divergence is None and 1e-3 < c.residual < 1
    assert path.exists()
    assert fitted(checkpoint=path).certificate.left_out_divergence is not None
