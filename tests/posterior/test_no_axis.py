"""Outputs ``(B,)`` of a network that squeezes its last axis give the figures of outputs ``(B, 1)``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import QUIET
from torch import nn
from torch.testing import assert_close

import nullbayes as nb

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X.sum(1) + X[:, 0].sin()


def network(*last: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1), *last).double()


def fitted(likelihood: str, *, squeezed: bool) -> Any:
    targets = Y if likelihood == "regression" else (Y > 0).double()
    targets = targets if squeezed else targets[:, None]
    model = network(*([nn.Flatten(0)] if squeezed else []))
    posterior = nb.NullSpacePosterior(model, likelihood, "outputs")
    return posterior.fit([(X[:16], targets[:16]), (X[16:], targets[16:])], 8, **QUIET)


@pytest.mark.parametrize("likelihood", ["regression", "binary"])
def test_figures_are_those_of_one_output(likelihood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flat, wide = (fitted(likelihood, squeezed=squeezed) for squeezed in (True, False))
    new = 2 * X[:6].flip(1)
    if likelihood == "regression":
        noise = [p.likelihood.noise_variance.reshape(-1) for p in (flat, wide)]
        assert_close(*noise)
    assert_close(flat.predict(new).mean, wide.predict(new).mean[:, 0])
    for exact in (True, False):
        assert_close(flat.novelty(new, exact=exact), wide.novelty(new, exact=exact))
    assert_close(flat.select(new, 3), wide.select(new, 3))
    monkeypatch.setattr("nullbayes.posterior.novelty.Scorer.too_many_rows", lambda *_: True)
    scores = [p.novelty(new, score="variance", exact=False) for p in (flat, wide)]
    assert_close(*scores)
