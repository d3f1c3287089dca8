"""Five whole networks with data, fits without bars, and whether two posteriors are one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb


class Encoder(nn.Module):
    """A small transformer over sequences of vectors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(96, 4, 128, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class Decoder(nn.Module):
    """A causal language model whose output layer is its table of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 80)
        self.mix = nn.MultiheadAttention(80, 4, batch_first=True)
        self.norm = nn.LayerNorm(80)
        self.up, self.down = nn.Linear(80, 100), nn.Linear(100, 80)
        self.out = nn.Linear(80, 40, bias=False)
        self.out.weight = self.table.weight

    def forward(self, t: Tensor) -> Tensor:
        h = self.table(t)
        mask = torch.ones(t.shape[1], t.shape[1], dtype=torch.bool).triu(1)
        n = self.norm(h)
        h = h + self.mix(n, n, n, attn_mask=mask, need_weights=False)[0]
        return self.out(h + self.down(torch.relu(self.up(h))))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(60, 80, 2, batch_first=True)
        self.head = nn.Linear(80, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 40, 3, stride=2, padding=1), nn.BatchNorm2d(40), nn.ReLU(),
        nn.Conv2d(40, 30, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(120, 4),
    )  # fmt: skip


def mlp(inputs: int = 60, width: int = 80) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )


NETWORKS: dict[str, Any] = {
    "mlp": (mlp, lambda: torch.randn(20, 60), "classification"),
    "convnet": (conv_net, lambda: torch.randn(4, 4, 8, 8), "classification"),
    "encoder": (Encoder, lambda: torch.randn(8, 5, 96), "classification"),
    "decoder": (Decoder, lambda: torch.randint(0, 30, (4, 6)), nb.Classification(class_axis=-1)),
    "lstm": (Reader, lambda: torch.randn(8, 5, 60), "classification"),
}


def network(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Any]:
    make, data, likelihood = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, x = make(), data()
    return model.to(dtype).eval(), x.to(dtype) if x.is_floating_point() else x, likelihood


def quiet(model: nn.Module, x: Any, likelihood: Any = "classification", **options: Any) -> Any:
    seed = options.pop("seed", 0)
    posterior = nb.LayerNullSpacePosterior(model, likelihood, **options)
    return posterior.fit(x, num_samples=4, seed=seed, progress=False)


def same_posterior(a: Any, b: Any, tolerance: float = 1e-8) -> None:
    for mine, other in zip(a._fit.state.factors, b._fit.state.factors, strict=True):
        assert type(mine) is type(other)
    for index in range(2):
        mine, other = a._fit.state.change(index), b._fit.state.change(index)
        for name in mine:
            # A parameter without a free direction has rounding alone, which is compared with the weights.
            size = other[name].norm() + b.model.get_parameter(name).norm()
            assert (mine[name] - other[name]).norm() <= tolerance * size, name
    assert a.certificate.examples == b.certificate.examples
