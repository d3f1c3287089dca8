"""Matrices that are singular or indefinite by rounding, and parameters that no row reaches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes import solvers
from nullbayes.jacobian.operator import DenseOperator
from nullbayes.likelihood.helpers import without_rounding
from nullbayes.solvers.block_cg import Objective, block_cg
from nullbayes.solvers.preconditioners import Kronecker, Pivoted, Subset, positive_factor
from tests.support import operator_for

F64 = torch.float64


def test_a_matrix_that_rounding_made_indefinite_is_factorised() -> None:
    a = torch.randn(40, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    gram = a @ a.T
    scale = gram.diagonal().rsqrt()
    gram = scale[:, None] * gram * scale
    noise = torch.randn(40, 40, dtype=F64, generator=torch.Generator().manual_seed(1)) * 1e-6
    gram = gram + (noise + noise.T) / 2
    assert float(torch.linalg.eigvalsh(gram).min()) < -1e-6
    factor = positive_factor(gram.clone(), 1e-7, "it")
    left = factor @ factor.T - gram
    assert float(left.abs().max()) < 1e-3
    with pytest.raises(nb.SolverError, match="it could not be factorised even with jitter 1e-02"):
        positive_factor(-gram, 1e-7, "it")


def test_the_subset_preconditioner_serves_rows_that_repeat() -> None:
    """Single precision, 60 rows of rank 4: the Gram matrix of the subset has eigenvalues below zero."""
    generator = torch.Generator().manual_seed(0)
    a = (torch.randn(60, 4, generator=generator) @ torch.randn(4, 30, generator=generator)).float()
    operator = DenseOperator(a)
    solver = solvers.ConjugateGradient(1e-3, preconditioner=Subset(rows=40))
    state = solver.prepare(operator)
    state.factorise(0.0)
    v = torch.randn(3, 30, generator=generator)
    done = state.project(v).value.double()
    basis = torch.linalg.svd(a.double())[2][:4]
    torch.testing.assert_close(done, v.double() - v.double() @ basis.T @ basis, atol=1e-3, rtol=0)


def test_the_pivoted_preconditioner_inverts_what_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    a = (
        torch.randn(20, 30, generator=generator, dtype=F64)
        * torch.logspace(-3, 3, 20, dtype=F64)[:, None]
    )
    chosen = Pivoted()
    chosen.prepare(DenseOperator(a), 1e-3)
    r = torch.randn(2, 20, generator=generator, dtype=F64)
    dense = torch.linalg.inv(
        chosen._factor @ chosen._factor.T + chosen.mu * torch.eye(20, dtype=F64)
    )
    torch.testing.assert_close(
        chosen.apply(r), r @ dense, rtol=1e-6, atol=1e-9 * float((r @ dense).abs().max())
    )


def test_the_kronecker_preconditioner_leaves_parameters_without_rows_alone() -> None:
    """Memory that nothing was written to held whatever had been there before: the fit of seed 30613."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    operator, _ = operator_for(model, torch.randn(5, 3, dtype=F64))
    chosen = Kronecker()
    chosen.prepare(operator, 1e-3)
    chosen._layers = chosen._layers[:1]  # as where a layer has no rows
    r = torch.randn(2, operator.shape[1], dtype=F64)
    for _ in range(3):
        torch.full_like(r, math.nan)  # what the next tensor of that size may find in its memory
        out = chosen.apply(r)
        assert bool(out.isfinite().all())
        torch.testing.assert_close(out[:, 16:], r[:, 16:], atol=0, rtol=0)


def test_a_search_whose_directions_have_no_length_ends() -> None:
    operator = DenseOperator(torch.eye(3, 4, dtype=F64))
    start = torch.ones(2, 4, dtype=F64)

    def nothing(r: Tensor) -> Tensor:
        return torch.zeros_like(r)

    done = block_cg(
        Objective(operator, start), lambda image, _: image * 1e9, 20, precondition=nothing
    )
    torch.testing.assert_close(done.value, start)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_hessian_of_a_loss_has_no_directions_of_rounding(dtype: torch.dtype) -> None:
    """A softmax has no curvature along what all logits share; its root of rounding was a row."""
    posterior = nb.NullSpacePosterior(
        nn.Linear(2, 4).to(dtype),
        loss=lambda out, y: nn.functional.cross_entropy(out, y, reduction="none"),
    )
    likelihood = posterior.likelihood
    outputs = torch.tensor([[0.3, -0.2, 0.1, 0.0], [2.0, 0.0, -1.0, 0.5]], dtype=dtype)
    targets = torch.tensor([0, 0])
    factor = likelihood.hessian_factor(outputs, targets).double()
    p = outputs.double().softmax(1)
    exact = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    assert float(factor.sum(-1).abs().max()) < 1e3 * torch.finfo(dtype).eps
    found = torch.einsum("cbi,cbj->bij", factor, factor)
    size = exact.abs().amax((1, 2), keepdim=True)
    torch.testing.assert_close(found / size, exact / size, atol=20 * torch.finfo(dtype).eps, rtol=0)
    assert (torch.linalg.matrix_rank(factor.transpose(0, 1)) == 3).all()


def test_small_curvature_beside_large_is_no_rounding() -> None:
    hessian = torch.diag_embed(torch.tensor([[1.0, 1e-12, 0.0]], dtype=F64))
    values, vectors = torch.linalg.eigh(hessian)
    kept = without_rounding(values, vectors, hessian, torch.float32)
    assert kept.tolist() == [[0.0, 1e-12, 1.0]]
