"""A Gram matrix whose diagonal blocks are computed by halves, against rows written out in float64."""

from __future__ import annotations

import pytest
import torch
from support import operator_for
from torch import Tensor, nn

import nullbayes as nb
from nullbayes.common import decompositions
from nullbayes.jacobian import gram
from nullbayes.solvers import dual


def convolution() -> nn.Module:
    """Layers of several kinds: patches, one token, a bias."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 8, 4), nn.Tanh(), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(72, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


@pytest.mark.parametrize("halved", [1, 3, 10**6])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_halves_are_the_whole(halved: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "HALVED", halved)
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    operator, _ = operator_for(convolution(), x)
    rows = torch.cat(list(operator.iter_rows(100)))
    torch.testing.assert_close(operator.gram(), rows @ rows.T, rtol=1e-12, atol=1e-14)


def test_a_fit_in_blocks_is_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jitter has to be raised on the way, to well above rounding, which differs between processors."""
    x = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    x[4:] = x[:8].clone()  # examples come three times
    data = [(x, torch.arange(12) % 3)]

    def refused(matrix: Tensor) -> tuple[Tensor, Tensor]:
        if matrix[0, 0] - 1 < 5e-13:
            matrix[-1, -1] = -1.0  # no factor; what was overwritten has to be brought back
        return decompositions.cholesky_(matrix)

    monkeypatch.setattr(dual, "cholesky_", refused)

    def fitted() -> nb.NullSpacePosterior:
        solver = nb.solvers.DualCholesky(jitter=1e-19)
        posterior = nb.NullSpacePosterior(convolution(), delta=0, solver=solver)
        return posterior.fit(data, 4, progress=False)

    wanted = fitted()
    monkeypatch.setattr(decompositions, "BLOCKED", 8)
    monkeypatch.setattr(decompositions, "PANEL", 5)
    monkeypatch.setattr(gram, "HALVED", 4)
    found = fitted()
    assert any("Jitter was raised to 1e-12" in note for note in found.certificate.notes)
    assert found.certificate.rank == wanted.certificate.rank
    torch.testing.assert_close(found._samples(), wanted._samples(), rtol=1e-7, atol=1e-9)
