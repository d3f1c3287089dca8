"""One contract for every solver, against a singular value decomposition in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import operator_for
from torch import Tensor
from torch.testing import assert_close
from zoo import ZOO, dense_jacobian

from nullbayes import solvers
from nullbayes.errors import InputError, MemoryBudgetError, NonFiniteError
from nullbayes.fit.evidence import apart, fixed_point, interval
from nullbayes.jacobian.operator import DenseOperator, RowOperator
from nullbayes.solvers import Size, Spectrum
from nullbayes.solvers import spectrum as spectra
from nullbayes.solvers.base import Settled

SOLVERS: dict[str, Callable[..., solvers.Solver]] = {
    "dual": solvers.DualCholesky,
    "primal": solvers.PrimalQR,
    "cg": solvers.ConjugateGradient,
    "cg-subset": partial(
        solvers.ConjugateGradient, preconditioner=solvers.Subset(rows=8), max_iterations=3000
    ),
    "cg-sketch": partial(solvers.ConjugateGradient, preconditioner="sketch", max_iterations=3000),
    "cg-pivoted": partial(solvers.ConjugateGradient, preconditioner="pivoted", max_iterations=3000),
    "alternating": partial(solvers.AlternatingProjections, batch_rows=7, max_cycles=20000),
}
DIRECT = ("dual", "primal")


def gaussian(m: int, p: int, singular: Tensor | None = None) -> Tensor:
    g = torch.Generator().manual_seed(m * 1000 + p)
    a = torch.randn(m, p, generator=g, dtype=torch.float64)
    if singular is None:
        return a
    u, _, vt = torch.linalg.svd(a, full_matrices=False)
    return (u[:, : len(singular)] * singular) @ vt[: len(singular)]


def tied() -> Tensor:
    model, inputs = next(c for c in ZOO if c.name == "tied-linear").make()
    return dense_jacobian(model, inputs)


@dataclass(frozen=True)
class Problem:
    name: str
    matrix: Callable[[], Tensor]
    condition: float = 1.0

    def __str__(self) -> str:
        return self.name


PROBLEMS = [
    Problem("full-rank", lambda: gaussian(12, 40)),
    Problem("one-row", lambda: gaussian(1, 5)),
    Problem("rank-deficient", lambda: gaussian(30, 50, torch.rand(11).double() + 0.5)),
    Problem("duplicate-rows", lambda: torch.cat([gaussian(9, 30)] * 2)),
    Problem("zero-rows", lambda: torch.cat([gaussian(6, 20), torch.zeros(3, 20).double()])),
    Problem("more-rows-than-weights", lambda: gaussian(60, 25, torch.rand(20).double() + 0.5)),
    Problem("no-null-space", lambda: gaussian(40, 10)),
    Problem("condition-1e8", lambda: gaussian(20, 50, torch.logspace(0, -8, 20).double()), 1e8),
    Problem("rows-of-all-sizes", lambda: gaussian(15, 40) * torch.logspace(3, -9, 15)[:, None]),
    Problem("all-zero", lambda: torch.zeros(4, 6).double()),
    Problem("tied-weights", tied),
]


def accurate(name: str, tolerance: float = 1e-12) -> dict[str, float]:
    """Iterative solvers stop at 1e-2 unless told otherwise."""
    return {} if name in DIRECT else {"tolerance": tolerance}


def prepared(name: str, operator: RowOperator, shift: float = 0.0, **kwargs) -> solvers.State:
    state = SOLVERS[name](**kwargs).prepare(operator)
    state.factorise(shift)
    return state


def true_rank(a: Tensor) -> int:
    return int(torch.linalg.matrix_rank(a / a.norm(dim=1, keepdim=True).clamp(min=1e-300)))


# Singular values below 1e-12 of the largest are zero to a primal solver, by contract.
# Iterative solvers promise a residual, and directions that hardly count in it come last.
HARD = ("condition-1e8", "rows-of-all-sizes", "tied-weights")
PAIRS = [
    (s, p)
    for s in SOLVERS
    for p in PROBLEMS
    if s == "dual"
    or (s == "primal" and p.name != "rows-of-all-sizes")
    or (s not in DIRECT and p.name not in HARD)
]


@pytest.mark.parametrize(("solver", "problem"), PAIRS, ids=str)
def test_projector(solver: str, problem: Problem) -> None:
    a = problem.matrix()
    p = a.shape[1]
    # In the dense reference, too, rows are scaled: it changes no null space, and lets the singular
    # value decomposition see rows of all sizes.
    scaled = a / a.norm(dim=1, keepdim=True).clamp(min=1e-300)
    wanted = torch.eye(p).double() - torch.linalg.pinv(scaled, rtol=1e-13) @ scaled
    tolerance = 1e-14 if problem.condition > 1 else 1e-12
    kwargs = {"cutoff": 1e-13} if solver == "primal" else {}
    state = prepared(solver, DenseOperator(a), tolerance=tolerance, **kwargs)
    result = state.project(torch.eye(p).double())
    ours = result.value.T
    # An error e in a direction of singular value σ shows in the residual as σ e only.
    atol = max(1e-9, 1e-14 * problem.condition)
    assert_close(ours, wanted, atol=atol, rtol=0)
    assert_close(ours @ ours, ours, atol=atol, rtol=0)
    assert_close(a @ ours, torch.zeros_like(a), atol=1e-11 * float(a.norm()) + 1e-300, rtol=0)
    # The square of the condition is below float64 rounding for the dual solver.
    if solver in DIRECT and not (solver == "dual" and problem.condition > 1):
        assert state.rank == true_rank(a)
    before = a.norm(dim=0)
    after = (a @ ours).norm(dim=0)
    assert_close(
        result.residual,
        torch.where(before > 0, after / before.clamp(min=1e-300), 0),
        atol=1e-13,
        rtol=0,
    )


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shift", [0.3, 20.0])
def test_samples_with_a_shift_have_the_promised_covariance(
    solver: str, problem: Problem, shift: float
) -> None:
    """Exactly, not by sampling: the map from (v, ξ) to samples is linear, so its covariance is."""
    a = problem.matrix()
    m, p = a.shape
    state = prepared(solver, DenseOperator(a), shift, tolerance=1e-13)
    zero_v, zero_n = torch.zeros(m, p).double(), torch.zeros(p, m).double()
    from_v = state.project(torch.eye(p).double(), zero_n).value
    covariance = from_v.T @ from_v
    if solver != "primal":
        from_noise = state.project(zero_v, torch.eye(m).double()).value
        covariance = covariance + from_noise.T @ from_noise
    _, sigma, vt = torch.linalg.svd(a, full_matrices=False)
    wanted = torch.eye(p).double() - (vt.T * (sigma**2 / (sigma**2 + shift))) @ vt
    if solver in DIRECT:
        assert state.rank == pytest.approx(float((sigma**2 / (sigma**2 + shift)).sum()), abs=0.6)
    assert_close(covariance, wanted, atol=1e-9 if solver in DIRECT else 2e-6, rtol=0)


@pytest.mark.parametrize("preconditioner", ["none", "subset", "sketch", "pivoted", "alternating"])
@pytest.mark.parametrize("shift", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("rows", [40, 200])
def test_an_iterative_laplace_sample_is_as_near_as_the_tolerance_says(
    preconditioner: str, shift: float, rows: int
) -> None:
    """Beside the sample, where outputs and prior weigh; not beside the largest eigenvalue, which is gone in no time."""
    # Alternating projections take as many cycles as the condition number is large.
    slow = preconditioner == "alternating"
    a = gaussian(rows, 80, torch.logspace(1 if slow else 2, -3, min(rows, 80)).double())
    shift = max(shift, 0.3) if slow else shift
    generator = torch.Generator().manual_seed(7)
    v = torch.randn(5, 80, generator=generator).double()
    noise = torch.randn(5, rows, generator=generator).double()
    solver: solvers.Solver = solvers.AlternatingProjections(0.05, batch_rows=20, max_cycles=20000)
    if not slow:
        solver = solvers.ConjugateGradient(0.05, preconditioner=preconditioner)
    state = solver.prepare(DenseOperator(a))
    state.factorise(shift)
    done = state.project(v, noise)
    assert done.status is solvers.Status.CONVERGED
    hessian = a.T @ a + shift * torch.eye(80).double()
    wanted = torch.linalg.solve(hessian, (shift * v - shift**0.5 * noise @ a).T).T
    error = done.value - wanted
    energy = torch.einsum("sp,pq,sq->s", error, hessian, error)
    assert bool((energy <= 0.05**2 * shift * v.square().sum(1)).all())


@pytest.mark.parametrize("problem", PROBLEMS[:6], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_explained_variance_and_spectrum(solver: str, problem: Problem, shift: float) -> None:
    a = problem.matrix()
    p = a.shape[1]
    state = SOLVERS[solver](**accurate(solver)).prepare(DenseOperator(a))
    singular = torch.linalg.svdvals(a).square()
    spectrum = state.spectrum()
    assert spectrum.effective_rank(0.7) == pytest.approx(float((singular / (singular + 0.7)).sum()))
    state.factorise(shift)
    rows = gaussian(7, p)
    if shift:
        inner = a.T @ torch.linalg.solve(a @ a.T + shift * torch.eye(len(a)).double(), a)
    else:
        inner = torch.linalg.pinv(a) @ a
    atol = 1e-8 if solver in DIRECT else 1e-6
    found = state.explained(DenseOperator(rows))
    assert_close(found.flatten(), (rows @ inner * rows).sum(1), atol=atol, rtol=0)
    together = state.explained(DenseOperator(gaussian(6, p)), 3)  # two examples of three rows each
    wanted = [r @ inner @ r.T for r in gaussian(6, p).split(3)]
    assert_close((together + together.mT) / 2, torch.stack(wanted), atol=atol, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32_jacobian_reaches_its_tolerance(solver: str) -> None:
    model, inputs = next(c for c in ZOO if c.name == "conv2d").make(torch.float32)
    operator, _ = operator_for(model, inputs)
    kwargs = accurate(solver, 1e-5)
    result = prepared(solver, operator, **kwargs).project(torch.randn(8, operator.shape[1]))
    assert result.status is solvers.Status.CONVERGED
    assert float(result.residual.max()) <= 1e-5
    exact = dense_jacobian(model.double(), inputs.double())
    drift = (result.value.double() @ exact.T).norm(dim=1)
    assert float(drift.max()) <= 1e-4 * float(exact.norm())


@pytest.mark.parametrize("seed", range(4))
def test_an_exhausted_search_does_not_wander_in_the_null_space(seed: int) -> None:
    """No residual tells of it: twenty samples find a row space of sixty in three steps, what is left is rounding."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(60, 60, generator=generator).double())[0]
    right = torch.linalg.qr(torch.randn(300, 60, generator=generator).double())[0].T
    a = left * torch.logspace(0, -2, 60).double() @ right
    v = torch.randn(20, 300, generator=generator).double()
    state = solvers.ConjugateGradient(1e-10, 3000).prepare(DenseOperator(a))
    state.factorise()
    done = state.project(v)
    wanted = v - v @ right.T @ right
    assert done.status is solvers.Status.CONVERGED and done.iterations < 20
    assert float((done.value - wanted).norm()) <= 1e-3 * float(wanted.norm())


def test_too_little_work_is_admitted() -> None:
    a = gaussian(20, 50, torch.logspace(0, -6, 20).double())
    solver = solvers.DualCholesky(jitter=1e-3, max_iterations=1, tolerance=1e-12)
    state = solver.prepare(DenseOperator(a))
    state.factorise()
    result = state.project(torch.randn(2, 50).double())
    assert result.status is not solvers.Status.CONVERGED
    assert float(result.residual.max()) > 1e-12


def test_lanczos_quadrature_matches_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    a = gaussian(150, 400, torch.logspace(2, -3, 150).double())
    exact = spectra.gram_spectrum(a @ a.T)
    monkeypatch.setattr(spectra, "EXACT_UP_TO", 10)
    monkeypatch.setattr(spectra, "PROBES", 40)
    estimate = spectra.gram_spectrum(a @ a.T)
    assert exact.exact and not estimate.exact
    # 32 nodes resolve what is not too far below the largest eigenvalue (1e4 here).
    for shift in (1.0, 10.0, 100.0):
        assert estimate.effective_rank(shift) == pytest.approx(exact.effective_rank(shift), rel=0.1)


@pytest.mark.parametrize("steps", [4, 16])
@given(decades=st.floats(0.5, 6.0), rank=st.integers(5, 60))
@settings(deadline=None, max_examples=25)
def test_quadratures_bound_the_rank_that_all_steps_give(
    steps: int, decades: float, rank: int
) -> None:
    """From the same probes: fewer steps leave it between the two rules, whatever the shift."""
    a = gaussian(60, 90, torch.logspace(2, 2 - decades, rank).double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectra, "EXACT_UP_TO", 10)
        patch.setattr(spectra, "OPERATOR_STEPS", steps)
        early = spectra.operator_spectrum(DenseOperator(a))
        whole = spectra.operator_spectrum(DenseOperator(a), lambda _: False)
    assert early.bounds is not None and whole.bounds is not None
    low, high = early.bounds
    for shift in torch.logspace(-1, 4, 9).tolist():  # Lanczos ends at 1e-6 of the largest
        found = whole.effective_rank(shift)
        assert low.effective_rank(shift) <= found * (1 + 1e-6) + 1e-6
        assert high.effective_rank(shift) >= found * (1 - 1e-6) - 1e-6
        middle = (low.effective_rank(shift) + high.effective_rank(shift)) / 2
        assert early.effective_rank(shift) == pytest.approx(middle)


@pytest.mark.parametrize("kind", ["gram", "operator"])
def test_lanczos_goes_on_until_the_evidence_is_settled(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far below the largest eigenvalue few nodes tell nothing apart: Gauss takes it all for determined."""
    a = gaussian(300, 400, torch.logspace(2, -4, 300).double())
    weights = torch.full((400,), 0.5, dtype=torch.float64)
    exact = spectra.gram_spectrum(a @ a.T)
    wanted = fixed_point(exact, weights)
    monkeypatch.setattr(spectra, "EXACT_UP_TO", 10)
    monkeypatch.setattr(spectra, "STEPS", 8)
    monkeypatch.setattr(spectra, "OPERATOR_STEPS", 8)

    def estimated(enough: Settled | None) -> Spectrum:
        if kind == "gram":
            return spectra.gram_spectrum(a @ a.T, enough)
        return spectra.operator_spectrum(DenseOperator(a), enough)

    early = estimated(None)
    assert fixed_point(early.upper, weights) > 1.3 * wanted
    found = estimated(lambda s: apart(s, weights) <= 1)
    low, high = interval(found, weights)
    assert high <= 1.2 * low and low <= fixed_point(found, weights) <= high
    assert fixed_point(found, weights) == pytest.approx(wanted, rel=0.15)  # chance of the probes
    monkeypatch.setattr(spectra, "MOST_STEPS", 16)
    short = estimated(lambda s: apart(s, weights) <= 1)
    assert apart(short, weights) > 1  # admitted, not hidden


def test_rank_of_many_rows_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    from nullbayes.solvers import dual

    a = gaussian(60, 90, torch.rand(41).double() + 0.5)
    monkeypatch.setattr(dual, "EXACT_UP_TO", 10)
    assert abs(prepared("dual", DenseOperator(a)).rank - 41) <= 4


def test_auto_counts() -> None:
    assert solvers.choose("auto", Size(100, 10_000), 10**9).solver.name == "dual Cholesky"
    chosen = solvers.choose("auto", Size(100_000, 200), 10**9)
    assert chosen.solver.name == "primal QR" and "dual Cholesky" in chosen.why
    large = solvers.choose("auto", Size(540_000, 61_706, 30), 8 * 10**9)
    assert large.solver.name == "conjugate gradients" and "no exact solver" in large.why
    four_thousand, room = Size(36_000, 61_706, 30), 50 * 2**30  # ten classes
    assert solvers.choose("auto", four_thousand, room).solver.name == "conjugate gradients"
    there = replace(four_thousand, device="cuda")
    assert solvers.choose("auto", there, room).solver.name == "dual Cholesky"
    with pytest.raises(MemoryBudgetError, match="directions='auto'"):
        solvers.choose("auto", Size(100_000, 100_000), 10**6)
    with pytest.raises(InputError, match="`solver` is 'cg'"):
        solvers.choose("cg", Size(1, 1), 1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_nonfinite_rows_are_an_error(solver: str) -> None:
    a = gaussian(3, 5)
    a[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN"):
        prepared(solver, DenseOperator(a)).project(torch.ones(1, 5).double())
