"""The layer posterior's combined score against the formula, one layer and one example at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes.errors import InputError


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs))
        .double()
        .eval()
    )


def data(count: int = 60, seed: int = 1) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(model: nn.Module, likelihood: str = "classification", **options: Any) -> Any:
    x = data().to(next(model.parameters()).dtype)
    y = torch.arange(len(x)) % 3
    if likelihood == "regression":
        y = x.sum(1, keepdim=True)
    posterior = nb.LayerNullSpacePosterior(model, likelihood, **options)
    return posterior.fit([(x[:32], y[:32]), (x[32:], y[32:])], progress=False)


def logs(model: nn.Sequential, x: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """By layer: log leverages of sizes and of directions, from all training inputs of the layer."""
    layers = [0, 2, 4]
    train, query = data(), x
    sizes, directions = [], []
    for index, module in enumerate(model):
        if index in layers:
            a, q = (torch.cat([z, torch.ones(len(z), 1)], 1).detach() for z in (train, query))
            moments = a.T @ a
            ridge = delta * moments.diagonal().mean()
            inverse = torch.linalg.inv(moments + ridge * torch.eye(len(moments)))
            leverage = torch.einsum("ni,ij,nj->n", q, inverse, q)
            sizes.append(leverage.log())
            directions.append((leverage / q.square().sum(1)).log())
        train, query = module(train), module(query)
    return torch.stack(sizes, 1), torch.stack(directions, 1)


def expected(model: nn.Sequential, x: Tensor, delta: float, *, energy: bool) -> Tensor:
    def figures(z: Tensor) -> Tensor:
        sizes, directions = logs(model, z, delta)
        parts = [sizes, directions[:, -1:]]
        if energy:
            parts.append(-model(z).detach().exp().sum(1, keepdim=True).log())
        return torch.cat(parts, 1)

    train = figures(data())
    centre = train.quantile(0.5, 0)
    spread = (train.quantile(0.84, 0) - centre).clamp_min(1e-2)
    z = ((figures(x) - centre) / spread).clamp_min(0).square()
    total = z[:, :3].mean(1) + z[:, 3]
    return total + 0.5 * z[:, 4] if energy else total


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_the_formula(likelihood: str) -> None:
    energy = likelihood == "classification"
    model = network(3 if energy else 1)
    posterior = fitted(model, likelihood, delta=1e-2)
    query = 2 * data(9, seed=5)
    found = posterior.novelty(query)
    torch.testing.assert_close(
        found, expected(model, query, 1e-2, energy=energy), rtol=1e-6, atol=1e-6
    )
    alone = torch.cat([posterior.novelty(one[None]) for one in query])
    torch.testing.assert_close(alone, found, rtol=1e-9, atol=1e-12)


def test_what_a_layer_does_not_reach_adds_nothing() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = x.new_zeros(len(x), 3)
            up = x[:, 0] > 0
            if up.any():
                out[up] = self.first(x[up])
            if not up.all():
                out[~up] = self.second(x[~up])
            return out

    torch.manual_seed(0)
    posterior = fitted(Gate().double().eval())
    scores = posterior.novelty(data(12, seed=3))
    assert scores.isfinite().all()
    for score in ("combined", "leverage"):
        one = torch.cat([posterior.novelty(x[None], score) for x in data(12, seed=3)])
        torch.testing.assert_close(posterior.novelty(data(12, seed=3), score), one)


def test_far_inputs_and_unseen_directions_score_higher() -> None:
    posterior = fitted(network())
    x = data(40, seed=8)
    inside = posterior.novelty(x)
    assert posterior.novelty(6 * x).median() > 10 * inside.median() + 1


def test_references_travel_with_the_file(tmp_path: Path) -> None:
    model = network()
    posterior = fitted(model)
    query = data(7, seed=5)
    posterior.save(tmp_path / "layers.safetensors")
    again = nb.load(tmp_path / "layers.safetensors", model)
    torch.testing.assert_close(again.novelty(query), posterior.novelty(query))
    again.update([data(10, seed=9)])
    assert again.novelty(query).isfinite().all()


def test_without_references_it_says_what_to_do() -> None:
    posterior = fitted(network())
    state = posterior._fitted().state
    state.gathered.kept.clear()
    state.references = None
    with pytest.raises(InputError, match="score='leverage'"):
        posterior.novelty(data(3))
    assert posterior.novelty(data(3), "leverage").isfinite().all()


@pytest.mark.parametrize("score", ["combined", "leverage"])
def test_what_overflows_is_no_score(score: str) -> None:
    posterior = fitted(network().float())
    with pytest.raises(nb.NonFiniteError, match="scaled as in training"):
        posterior.novelty(torch.full((3, 4), 3e38), score)
