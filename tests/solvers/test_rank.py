"""`rank` and `null_dim` of a certificate against the singular values of the rows, written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes import solvers

QUIET = {"progress": False}


def rows_of(posterior: Any) -> Tensor:
    """The constraint matrix by plain automatic differentiation in float64: outputs of every example."""
    model, x = posterior.model.double(), posterior.x.double()
    names, values = zip(*model.named_parameters(), strict=True)
    rows = []
    for one in x:

        def outputs(*weights: Tensor, one: Tensor = one) -> Tensor:
            moved = dict(zip(names, weights, strict=True))
            out: Tensor = torch.func.functional_call(model, moved, (one[None],))[0]
            return out

        parts = torch.autograd.functional.jacobian(outputs, values)
        rows.append(torch.cat([p.reshape(p.shape[0], -1) for p in parts], dim=1))
    return torch.cat(rows)


def network(dtype: torch.dtype, *, dead: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)).to(dtype).eval()
    if dead:
        with torch.no_grad():
            model[0].bias[:4] = -1e3
    return model


def examples(kind: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    model = network(dtype, dead=kind == "dead units")
    x = torch.randn(12, 4, dtype=dtype)
    if kind == "duplicates":
        x = torch.cat([x, x[:7]])
    elif kind == "many":
        x = torch.randn(60, 4, dtype=dtype)
    return model, x


def fitted(kind: str, dtype: torch.dtype, **options: Any) -> Any:
    model, x = examples(kind, dtype)
    batches = [
        (x[i : i + 5], torch.zeros(len(x[i : i + 5]), 2, dtype=dtype)) for i in range(0, len(x), 5)
    ]
    options = {"preserve": "outputs", "likelihood": "regression", "prior_precision": 1.0, **options}
    posterior = nb.NullSpacePosterior(model, **options).fit(batches, 6, **QUIET)
    posterior.x = x
    return posterior


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [solvers.DualCholesky, solvers.PrimalQR])
@pytest.mark.parametrize("kind", ["plain", "duplicates", "dead units", "many"])
@pytest.mark.parametrize("delta", [0, 1e-6])
def test_the_rank_is_that_of_the_rows(
    kind: str, solver: Any, dtype: torch.dtype, delta: float
) -> None:
    posterior = fitted(kind, dtype, solver=solver(), delta=delta)
    certificate = posterior.certificate
    values = torch.linalg.svdvals(rows_of(posterior))
    if delta:  # what two passes of a filter leave, or as many as it took
        if dtype == torch.float32:  # below this there is nothing but the rounding of the products
            values = values[values.square() > 1e-6 * values[0].square()]
        found = [
            float((1 - (delta / (values.square() + delta)) ** (2 * passes)).sum())
            for passes in range(1, 20)
        ]
        assert min(abs(certificate.rank - f) for f in found) <= 0.51
    else:
        # The numerical rank: what single precision cannot tell from zero is none.
        edge = 1e-4 if dtype == torch.float32 else 1e-9
        clear = values[(values > 0.1 * edge * values[0]) & (values < 10 * edge * values[0])]
        assert len(clear) == 0, "the test's own network has a doubtful rank"
        assert certificate.rank == int((values > edge * values[0]).sum())
    assert not certificate.rank_estimated
    assert certificate.null_dim == certificate.parameters - certificate.rank
    assert "estimates" not in str(certificate)


def test_a_rank_from_samples_is_called_an_estimate() -> None:
    posterior = fitted("plain", torch.float64, solver="conjugate gradients", delta=0)
    certificate = posterior.certificate
    assert certificate.rank_estimated
    assert "about" in str(certificate) and "(estimates)" in str(certificate)
    rank = int(torch.linalg.matrix_rank(rows_of(posterior)))
    assert abs(certificate.rank - rank) <= 5 * (2 * rank / 6) ** 0.5
