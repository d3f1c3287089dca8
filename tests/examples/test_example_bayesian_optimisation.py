"""The search for a maximum, at a tiny size."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("botorch")

import itertools

from examples import bayesian_optimisation as example


def test_a_search_by_each_method() -> None:
    figures = example.run(example.SMALL, ["Branin (2)"])
    found = figures["regret"]["Branin (2)"]
    assert set(found) == {"chance", "Gaussian process", "network"}
    first = {tuple(curves[0][: example.SMALL.first]) for curves in found.values()}
    assert len(first) == 1  # the same points at first
    for (curve,) in found.values():
        assert len(curve) == example.SMALL.points
        assert all(a >= b >= -1e-6 for a, b in itertools.pairwise(curve))
    text = example.summary(figures)
    assert "Branin (2)" in text and "of 1" in text


def test_the_prior_is_as_wide_as_the_values() -> None:
    """A model that is linear in its weights: the amplitude at which half of it explains the values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Linear(5, 1, bias=False).double()
        x = torch.randn(400, 5, dtype=torch.float64)
        y = x @ torch.randn(5, 1, dtype=torch.float64) * 3
    alpha = example.prior_precision(net, x[:5], y[:5])
    weights = torch.linalg.solve(x[:5], y[:5])
    assert 4 * alpha == pytest.approx(5 / float(weights.square().sum()), rel=0.05)
