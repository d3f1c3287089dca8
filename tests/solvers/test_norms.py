"""Norms of samples with more weights than a piece holds."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from nullbayes.solvers import norms


def test_norms_do_not_depend_on_the_pieces(monkeypatch) -> None:
    a = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor(
        [sum(x * x for x in row) ** 0.5 for row in a.double().tolist()], dtype=torch.float64
    )
    assert_close(norms.row_norms(a), wanted, rtol=1e-12, atol=0)
    monkeypatch.setattr(norms, "_COLUMNS", 7)
    assert_close(norms.row_norms(a), wanted, rtol=1e-12, atol=0)
