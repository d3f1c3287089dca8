"""The layer posterior's score with neighbours against plain loops, one layer and one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nullbayes as nb
from nullbayes.errors import InputError


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs))
    return nn.Sequential(*layers).double().eval()


def data(count: int = 60, seed: int = 1) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(model: nn.Module, x: Tensor, likelihood: str = "classification", **options: Any) -> Any:
    y: Tensor = torch.arange(len(x)) % 3
    if likelihood == "regression":
        y = x.flatten(1).sum(1, keepdim=True)
    posterior = nb.LayerNullSpacePosterior(model, likelihood, **options)
    return posterior.fit([(x[:32], y[:32]), (x[32:], y[32:])], progress=False)


def seen(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """What each linear layer receives."""
    out = []
    for module in model:
        if isinstance(module, nn.Linear):
            out.append(x.detach())
        x = module(x)
    return out


def parts(model: nn.Sequential, query: Tensor, delta: float, *, itself: bool) -> list[list[float]]:
    """By example: log leverages, last direction, log distances, log distances of length one, energy."""
    train, asked = seen(model, data()), seen(model, query)
    rows = []
    for n in range(len(query)):
        sizes, last, plain, unit = [], 0.0, [], []
        for a, q in zip(train, asked, strict=True):
            ones = torch.cat([a, torch.ones(len(a), 1)], 1)
            v = torch.cat([q[n], torch.ones(1)])
            moments = ones.T @ ones
            ridge = delta * moments.diagonal().mean() * torch.eye(len(moments))
            leverage = v @ torch.linalg.inv(moments + ridge) @ v
            sizes.append(float(leverage.log()))
            last = float((leverage / (v @ v)).log())
            others = [i for i in range(len(a)) if not (itself and i == n)]
            plain.append(min(float((q[n] - a[i]).norm()) for i in others))
            unit.append(
                min(float((q[n] / q[n].norm() - a[i] / a[i].norm()).norm()) for i in others)
            )
        energy = -float(model(query[n : n + 1]).detach().exp().sum().log())
        logs = [torch.tensor(d).log().tolist() for d in (plain, unit)]
        rows.append([*sizes, last, *logs[0], *logs[1], energy])
    return rows


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_against_plain_loops(likelihood: str) -> None:
    model = network(3 if likelihood == "classification" else 1)
    posterior = fitted(model, data(), likelihood)
    delta = posterior._fitted().state.delta
    query = 1.5 * data(9, seed=3)
    known = torch.tensor(parts(model, data(), delta, itself=True)).double()
    found = torch.tensor(parts(model, query, delta, itself=False)).double()
    centre = known.quantile(0.5, 0)
    spread = (known.quantile(0.84, 0) - centre).clamp_min(1e-2)
    z = ((found - centre) / spread).clamp_min(0).square()
    expected = z[:, :3].mean(1) + 0.5 * z[:, 3] + z[:, 4:7].mean(1) + z[:, 7:10].mean(1)
    if likelihood == "classification":
        expected = expected + z[:, 10]
    score = posterior.novelty(query, score="neighbours")
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
    one = posterior.novelty(query[:1], score="neighbours")
    torch.testing.assert_close(one, score[:1])


def test_inputs_between_clusters_have_neighbours_far_away() -> None:
    """What lies between two clusters has no direction of its own, and is no larger than they are."""
    model = network(1)
    ways = torch.tensor([[3.0, 2.0, 0.0, 0.0], [3.0, -2.0, 0.0, 0.0]]).double()
    x = ways.repeat(30, 1) + 0.2 * data(60, seed=4)
    posterior = fitted(model, x, "regression")
    between = ways.mean(0) + 0.2 * data(40, seed=5)
    inside = ways.repeat(20, 1) + 0.2 * data(40, seed=6)

    def share(score: Callable[[Tensor], Tensor]) -> float:
        return float((score(between)[:, None] > score(inside)[None]).double().mean())

    assert share(lambda x: posterior.novelty(x, score="neighbours")) > 0.95
    assert share(lambda x: posterior._near.leverages.means(x)[0][:, 0]) < 0.3  # of the first layer


def test_maps_are_averaged_over_their_positions() -> None:
    """A convolution over time, its inputs windows of three; an LSTM-like axis order is found as for leverages."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.over, self.head = nn.Conv1d(2, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.over(x).tanh().mean(2))
            return out

    model = Net().double().eval()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 2, 8, generator=g, dtype=torch.float64)
    posterior = fitted(model, x)
    posterior.novelty(x[:2], score="neighbours")
    first, second = posterior._near.leverages.pooled(x[:5])[3]
    windows = F.unfold(x[:5, :, None], (1, 3)).mean(2)
    torch.testing.assert_close(first, windows)
    torch.testing.assert_close(second, model.over(x[:5]).tanh().mean(2).detach())


def test_a_table_of_words_has_no_distances() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(12, 3)).eval()
    x = torch.randint(0, 15, (40, 3), generator=torch.Generator().manual_seed(1))
    posterior = nb.LayerNullSpacePosterior(model)
    posterior.fit([(x, torch.arange(40) % 3)], progress=False)
    score = posterior.novelty(x, score="neighbours")
    assert bool(score.isfinite().all())
    unseen = posterior.novelty(torch.full((1, 3), 19), score="neighbours")
    assert float(unseen) > float(score.median())


def test_it_follows_the_data_and_is_not_in_a_file(tmp_path: Path) -> None:
    model = network()
    posterior = fitted(model, data())
    query = data(5, seed=9) + 2
    before = posterior.novelty(query, score="neighbours")
    posterior.update([(query, torch.zeros(5, dtype=torch.long))])
    after = posterior.novelty(query, score="neighbours")
    assert bool((after < before).all())
    posterior.save(tmp_path / "p.safetensors")
    loaded: Any = nb.load(tmp_path / "p.safetensors", model)
    with pytest.raises(InputError, match="two training examples"):
        loaded.novelty(query, score="neighbours")
