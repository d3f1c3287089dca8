"""Preconditioners of equilibrated rows: the same answers, sooner; and rows that are held out stay out."""

from __future__ import annotations

import pytest
import torch
from support import QUIET
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import dense_jacobian

import nullbayes as nb
from nullbayes import solvers
from nullbayes.jacobian.operator import DenseOperator
from nullbayes.jacobian.single_rows import row_bytes, single_rows
from nullbayes.solvers import Size, choose, preconditioners
from nullbayes.solvers.preconditioners import Rows, Subset, drawn, inclusion
from nullbayes.solvers.row_scaling import RowScaled, RowWeighted


def smooth(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix whose singular values and rows spread over decades."""
    g = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=g, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, generator=g, dtype=torch.float64)).Q
    count = min(rows, columns)
    values = torch.logspace(2, -2, count, dtype=torch.float64)
    lengths = torch.logspace(0, -2, rows, dtype=torch.float64)[torch.randperm(rows, generator=g)]
    return lengths[:, None] * (left[:, :count] * values) @ right[:count]


def test_the_gram_matrix_and_parts_of_scaled_rows_are_those_of_the_matrix() -> None:
    a = smooth(30, 20)
    weights = torch.linspace(0.5, 2, 30, dtype=torch.float64)
    weighted = RowWeighted(DenseOperator(a), weights)
    b = weights[:, None] * a
    assert_close(weighted.gram(), b @ b.T)
    some = weighted.subset(8, torch.Generator().manual_seed(3))
    index = DenseOperator(a).subset(8, torch.Generator().manual_seed(3)).chosen
    assert index is not None
    eye = torch.eye(20, dtype=torch.float64)
    assert_close(some.matvec(eye).T, b[index])


def test_rows_of_a_network_know_which_were_chosen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    x, y = torch.randn(24, 3, dtype=torch.float64), torch.arange(24) % 3
    batches = list(zip(x.split(5), y.split(5), strict=True))
    fitted = nb.NullSpacePosterior(model, preserve="outputs").fit(batches, 2, **QUIET)._fitted()
    assert fitted.rows is not None
    operator, dense = fitted.rows.operator, dense_jacobian(model, x)
    some = operator.subset(20, torch.Generator().manual_seed(1))
    assert some.chosen is not None
    v = torch.randn(2, operator.shape[1], dtype=torch.float64)
    assert_close(some.matvec(v), operator.matvec(v)[:, some.chosen])
    assert_close(some.matvec(v), v @ dense[some.chosen].T)


@pytest.mark.parametrize("name", ["subset", "rows", "kronecker"])
def test_samples_of_a_network_are_the_exact_ones(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.arange(40) % 3
    batches = list(zip(x.split(8), y.split(8), strict=True))
    chosen = {"subset": Subset(30), "rows": Rows(30)}.get(name, name)

    def fit(equilibrate: float, preconditioner: object) -> nb.NullSpacePosterior:
        solver = solvers.ConjugateGradient(1e-11, 3000, preconditioner, equilibrate)  # type: ignore[arg-type]
        return nb.NullSpacePosterior(model, solver=solver, delta=1e-2).fit(batches, 5, **QUIET)

    wanted, found = fit(0.5, "none"), fit(0.5, chosen)
    # Both solve the same scaled equations, to the same end.
    assert_close(found._fit.unit, wanted._fit.unit, rtol=1e-6, atol=1e-6)
    assert found.certificate.iterations < wanted.certificate.iterations
    # Only one that maps the row space to itself can do without some rows at first.
    assert (found.certificate.left_out_divergence is None) == (name == "kronecker")


def test_equilibrated_rows_and_a_subset_need_fewer_passes_than_either() -> None:
    a = smooth(300, 200)
    v = torch.randn(8, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def residual(**options: object) -> float:
        solver = solvers.ConjugateGradient(1e-12, 20, **options)  # type: ignore[arg-type]
        state = solver.prepare(DenseOperator(a))
        state.factorise(1e-6, numerical=True)
        x = state.project(v).value
        # Of rows of one length, which confident examples count in as others do.
        rows = a / a.norm(dim=1, keepdim=True)
        return float((rows @ x.T).norm() / (rows @ v.T).norm())

    both = residual(preconditioner=Subset(60), equilibrate=0.5)
    assert both < 0.8 * residual(equilibrate=0.5)
    assert both < 0.8 * residual(preconditioner=Subset(60))


def test_rows_are_taken_by_their_squares_and_stand_for_all() -> None:
    a = smooth(60, 20)
    squares = a.square().sum(1)
    chance = inclusion(squares, 24)
    assert_close(chance.sum(), torch.tensor(24.0, dtype=torch.float64))
    assert float(chance.max()) == 1 and int((chance == 1).sum()) < 24
    rest = chance < 1
    assert_close((chance / squares)[rest], (chance / squares)[rest][:1].expand(int(rest.sum())))
    assert bool((squares[~rest].min() >= squares[rest].max()).all())
    total = torch.zeros(20, 20, dtype=torch.float64)
    count = 4000
    generator = torch.Generator().manual_seed(0)
    squared = torch.zeros_like(total)
    for _ in range(count):
        taken = drawn(chance, generator)
        assert len(taken) in (23, 24, 25)
        rows = a[taken] / chance[taken, None].sqrt()
        total += rows.T @ rows
        squared += (rows.T @ rows).square()
    mean = total / count
    error = ((squared / count - mean.square()) / count).clamp(min=0).sqrt()
    assert ((mean - a.T @ a).abs() <= 5 * error + 1e-9).all()


def test_single_rows_of_a_network_are_those_of_the_matrix() -> None:
    torch.manual_seed(0)
    first = nn.Sequential(
        nn.Embedding(5, 3), nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )
    model = first.double().eval()
    x, y = torch.randint(5, (24, 2)), torch.arange(24) % 3
    batches = list(zip(x.split(5), y.split(5), strict=True))
    fitted = nb.NullSpacePosterior(model, preserve="outputs").fit(batches, 2, **QUIET)._fitted()
    assert fitted.rows is not None
    operator, dense = fitted.rows.operator, dense_jacobian(model, x)
    index = torch.tensor([0, 2, 3, 17, 40, 41, 71])
    v = torch.randn(2, operator.shape[1], dtype=torch.float64)
    some = single_rows(operator, index)
    assert torch.equal(some.chosen, index)  # type: ignore[arg-type]
    assert_close(some.matvec(v), v @ dense[index].T)
    assert_close(some.gram(), dense[index] @ dense[index].T)
    assert_close(some.rmatvec(v[:, :7]), v[:, :7] @ dense[index])
    # About what its numbers take: 3 of the table (at 2 tokens), 4 and 3 inputs and gradients, 9 and 3 of the last.
    assert 8 * 20 < row_bytes(operator) < 8 * 60


def test_rows_by_length_need_fewer_passes_than_rows_by_chance() -> None:
    g = torch.Generator().manual_seed(1)
    # Most examples are confident: a tenth of the rows has most of the length.
    lengths = torch.logspace(0, -4, 600, dtype=torch.float64)[torch.randperm(600, generator=g)]
    spectrum = torch.logspace(0, -2, 200, dtype=torch.float64)
    a = lengths[:, None] * torch.randn(600, 200, generator=g, dtype=torch.float64) * spectrum
    v = torch.randn(8, 200, generator=g, dtype=torch.float64)
    left = {}
    for chosen in (Subset(40), Rows(40)):
        state = solvers.ConjugateGradient(1e-12, 6, chosen).prepare(DenseOperator(a))
        state.factorise(1e-6, numerical=True)
        x = state.project(v).value
        left[chosen.name] = float((a @ x.T).norm() / (a @ v.T).norm())
    assert left["rows"] < 0.8 * left["subset"], left


def test_all_rows_or_none_or_those_of_many_tokens_are_no_trouble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a = smooth(40, 60)
    a[5:20] = 0
    v = torch.randn(3, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    basis = torch.linalg.svd(a)[2][:25]
    for rows in (10, 25, 30, 40):
        state = solvers.ConjugateGradient(1e-10, 400, Rows(rows)).prepare(DenseOperator(a))
        state.factorise(0.0)
        assert_close(state.project(v).value, v - (v @ basis.T) @ basis, rtol=0, atol=1e-6)
    nothing = Rows(10)
    nothing.prepare(DenseOperator(torch.zeros_like(a)), 1e-3)
    assert_close(nothing.apply(v), v)
    # Copies would take too much: whole examples, as `Subset` takes them.
    monkeypatch.setattr(Rows, "_copied", staticmethod(lambda rows: 0))
    plain, chosen = Subset(10), Rows(10)
    for preconditioner in (plain, chosen):
        preconditioner.prepare(DenseOperator(a), 1e-3)
    assert plain._some.shape == chosen._some.shape
    assert_close(plain._some.gram(), chosen._some.gram())


def test_a_factor_in_single_precision_is_near_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    a = smooth(300, 200)
    v = torch.randn(8, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found: dict[int, tuple[torch.dtype, Tensor, Tensor]] = {}
    for least in (1, 10**9):
        monkeypatch.setattr(preconditioners, "SINGLE", least)
        chosen = Subset(60)
        state = solvers.ConjugateGradient(1e-12, 20, chosen, 0.5).prepare(DenseOperator(a.float()))
        state.factorise(1e-6, numerical=True)
        x = state.project(v.float()).value.double()
        left = (a @ x.T).norm() / (a @ v.T).norm()
        found[least] = chosen._factor.dtype, chosen.apply(v.float()), left
    single, double = found[1], found[10**9]
    assert single[0] == torch.float32 and double[0] == torch.float64
    assert_close(single[1], double[1], rtol=0, atol=1e-3 * float(v.norm(dim=1).max()))
    assert single[2] < 1.1 * double[2]
    # Rows in float64 keep theirs, whatever their number.
    monkeypatch.setattr(preconditioners, "SINGLE", 1)
    chosen = Subset(60)
    chosen.prepare(DenseOperator(a), 1e-6)
    assert chosen._factor.dtype == torch.float64


def test_rows_that_are_held_out_are_not_seen_through_the_preconditioner() -> None:
    a = smooth(60, 100)
    v = torch.randn(4, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solver = solvers.ConjugateGradient(1e-12, 4000, Subset(40), 0.5)
    state = solver.prepare(DenseOperator(a))
    state.factorise(0.0)
    spans = [slice(n, n + 1) for n in range(0, 60, 6)]
    done = state.project_without(v, spans)
    assert done is not None
    rest = torch.ones(60, dtype=torch.bool)
    rest[::6] = False
    basis = torch.linalg.svd(a[rest], full_matrices=False).Vh
    assert_close(done.value, v - (v @ basis.T) @ basis, rtol=0, atol=1e-6)
    basis = torch.linalg.svd(a, full_matrices=False).Vh
    assert_close(state.project(v).value, v - (v @ basis.T) @ basis, rtol=0, atol=1e-5)


def test_the_scale_of_rows_is_that_of_all() -> None:
    a = smooth(40, 30)
    scaled = RowScaled(DenseOperator(a), 0.5)
    some = scaled.subset(10, torch.Generator().manual_seed(0))
    whole = scaled.matvec(torch.eye(30, dtype=torch.float64)).T
    index = DenseOperator(a).subset(10, torch.Generator().manual_seed(0)).chosen
    assert index is not None
    assert_close(some.matvec(torch.eye(30, dtype=torch.float64)).T, whole[index])


def test_a_finer_tolerance_gets_a_preconditioner_where_it_fits() -> None:
    size, room = Size(540_000, 61_706, 30), 8 * 2**30
    plain, finer = (choose("auto", size, room, t).solver for t in (None, 0.01))
    assert isinstance(plain, solvers.ConjugateGradient)
    assert isinstance(finer, solvers.ConjugateGradient)
    assert (plain.preconditioner, finer.preconditioner) == ("none", "rows")
    assert plain.equilibrate == finer.equilibrate > 0
    less = choose("auto", size, 2**30, 0.01).solver
    assert isinstance(less, solvers.ConjugateGradient)
    assert less.preconditioner == "none"
