"""The primal solver by eigenvectors, against singular vectors of the rows in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.jacobian.operator import DenseOperator
from nullbayes.solvers import PrimalEigen, PrimalQR, Size, choose, eigen


def rows(count: int, columns: int, rank: int) -> Tensor:
    """Float32 rows of a known rank, singular values over two orders of magnitude."""
    generator = torch.Generator().manual_seed(count)
    u = torch.linalg.qr(torch.randn(count, rank, generator=generator).double()).Q
    v = torch.linalg.qr(torch.randn(columns, rank, generator=generator).double()).Q
    return (u * torch.logspace(0, -2, rank).double() @ v.T).float()


@pytest.mark.parametrize(("count", "rank"), [(300, 30), (300, 17), (20, 20)])
@pytest.mark.parametrize("block", [7, 1024])
def test_the_projector(count: int, rank: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigen, "BLOCK", block)
    a = rows(count, 30, rank)
    state = PrimalEigen().prepare(DenseOperator(a))
    state.factorise()
    assert state.rank == rank
    found = state.project(torch.eye(30)).value.double()
    basis = torch.linalg.svd(a.double(), full_matrices=False)[2][:rank]
    assert_close(found, torch.eye(30).double() - basis.T @ basis, rtol=0, atol=2e-6)


def test_laplace_and_more_rows() -> None:
    a, b = rows(300, 30, 30), rows(40, 30, 30)
    state = PrimalEigen().prepare(DenseOperator(a))
    state.factorise(1e-2)
    more = state.extended(DenseOperator(torch.cat([a, b])), DenseOperator(b))
    assert more is not None
    more.factorise(1e-2)
    for found, matrix in ((state, a), (more, torch.cat([a, b]))):
        precision = 1e-2 * torch.eye(30).double() + matrix.double().T @ matrix.double()
        got = found.covariance_times(torch.eye(30)).double()
        assert_close(got, 1e-2 * torch.linalg.inv(precision), rtol=0, atol=2e-6)


def test_rows_in_float64_are_refused() -> None:
    with pytest.raises(nb.SolverError, match="PrimalQR"):
        PrimalEigen().prepare(DenseOperator(rows(50, 10, 10).double()))


def test_it_is_chosen_where_the_triangular_factor_takes_too_long() -> None:
    few, many = Size(540_000, 500, 30, 1e9), Size(540_000, 2000, 30, 5e8)
    assert choose("auto", few, 2**34).solver.name == PrimalQR.name
    assert choose("auto", many, 2**34).solver.name == PrimalEigen.name
    double = Size(540_000, 2000, 30, 5e8, itemsize=8)
    assert choose("auto", double, 2**34).solver.name != PrimalEigen.name


def test_a_fit_names_it() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    data = (x, torch.arange(40) % 3)
    by = {
        name: nb.NullSpacePosterior(model.eval(), solver=name).fit(data, 3, progress=False)
        for name in ("primal eigen", "primal QR")
    }
    assert by["primal eigen"].certificate.solver == "primal eigen"
    size = float(by["primal QR"]._samples().norm())
    assert_close(
        by["primal eigen"]._samples(), by["primal QR"]._samples(), rtol=0, atol=1e-4 * size
    )
