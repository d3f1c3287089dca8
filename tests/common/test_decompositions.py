"""Decompositions against matrices whose answer is known, and what they do where LAPACK gives up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nullbayes as nb
from nullbayes.common import decompositions

F64 = torch.float64


def known(dtype: torch.dtype, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Symmetric matrices ``(*batch, 6, 6)`` with eigenvalues that repeat, and those."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(*batch, 6, 6, generator=generator, dtype=F64)).Q
    values = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 5.0], dtype=F64)
    return ((basis * values) @ basis.mT).to(dtype), values


def failing(name: str, times: int, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """``torch.linalg.<name>`` gives up ``times`` times; the types that it was called with."""
    real, seen = getattr(torch.linalg, name), []

    def gives_up(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(matrix.dtype)
        if len(seen) <= times:
            raise torch.linalg.LinAlgError(f"linalg.{name}: The algorithm failed to converge")
        return real(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, name, gives_up)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("times", [0, 1, 2])
def test_eigenvalues_come_whatever_it_takes(
    dtype: torch.dtype, batch: tuple[int, ...], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, values = known(dtype, batch)
    seen = failing("eigh", times, monkeypatch)
    found, vectors = decompositions.eigh(1e-20 * matrix)
    assert found.dtype == vectors.dtype == dtype
    assert len(seen) == times + 1 and (times == 0 or seen[-1] == F64)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(
        1e20 * found.double(), values.expand(found.shape), atol=tolerance, rtol=0
    )
    again = (vectors * found[..., None, :]) @ vectors.mT
    torch.testing.assert_close(1e20 * again, matrix, atol=tolerance, rtol=0)


@pytest.mark.parametrize("times", [0, 1])
def test_singular_values_and_inverses(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, values = known(torch.float32)
    failing("svd", times, monkeypatch)
    failing("pinv", times, monkeypatch)
    failing("eigvalsh", times, monkeypatch)
    u, s, vt = decompositions.svd(matrix[:4])
    torch.testing.assert_close((u * s) @ vt, matrix[:4], atol=1e-5, rtol=0)
    inverse = decompositions.pinv(matrix, rtol=1e-4, hermitian=True)
    torch.testing.assert_close(matrix @ inverse @ matrix, matrix, atol=1e-5, rtol=0)
    found = decompositions.eigvalsh(matrix)
    torch.testing.assert_close(found.double(), values, atol=1e-5, rtol=0)


def test_a_singular_system_has_a_solution_of_least_norm() -> None:
    matrix = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=F64)
    right = torch.tensor([[4.0], [0.0]], dtype=F64)
    found = decompositions.solve(matrix, right)
    torch.testing.assert_close(found, torch.tensor([[2.0], [0.0]], dtype=F64))
    regular = matrix + torch.eye(2, dtype=F64)
    torch.testing.assert_close(
        decompositions.solve(regular, right), torch.linalg.solve(regular, right)
    )


@pytest.mark.parametrize("name", ["eigh", "eigvalsh", "svd", "pinv"])
def test_errors_are_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, _ = known(F64)
    bad = matrix.clone()
    bad[0, 0] = torch.nan
    failing(name, 1, monkeypatch)  # some routines answer NaN with NaN
    with pytest.raises(nb.NonFiniteError, match=r"\(6, 6\).*NaN or infinity.*float64"):
        getattr(decompositions, name)(bad)
    monkeypatch.undo()
    failing(name, 99, monkeypatch)
    with pytest.raises(nb.SolverError, match=r"\(6, 6\) could not be decomposed.*solver="):
        getattr(decompositions, name)(matrix)


def positive(size: int) -> Tensor:
    """Symmetric to the bit, which a product need not be, and positive definite, in float64."""
    a = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(3), dtype=F64)
    product = a @ a.T
    return product.triu() + product.triu(1).T


@pytest.mark.parametrize("size", [1, 7, 8, 50])
def test_a_factor_in_blocks_is_the_factor(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompositions, "BLOCKED", 8)
    monkeypatch.setattr(decompositions, "PANEL", 7)
    wanted = positive(size)
    room = wanted.clone()
    factor, info = decompositions.cholesky_(room)
    assert int(info) == 0
    assert (factor.data_ptr() == room.data_ptr()) == (size >= 8)  # in place
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.T, wanted, rtol=1e-12, atol=0)
    right = torch.ones(size, 2, dtype=F64)
    torch.testing.assert_close(wanted @ decompositions.solved(factor, right), right)


@pytest.mark.parametrize("place", [0, 20, 49])
def test_a_matrix_that_has_no_factor_is_not_lost(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decompositions, "BLOCKED", 8)
    monkeypatch.setattr(decompositions, "PANEL", 7)
    wanted = positive(50)
    wanted[place, place] = -1.0
    room = wanted.clone()
    assert int(decompositions.cholesky_(room)[1]) == place + 1
    decompositions.mirror_upper_(room).diagonal().copy_(wanted.diagonal())
    assert torch.equal(room, wanted)
