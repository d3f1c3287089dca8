"""One small float64 network for each layer kind with a rule, its inputs wider than its data are many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Build = Callable[[], tuple[nn.Module, Any]]


@dataclass(frozen=True)
class Kind:
    """``free``: blocks that must have directions left, by the name of their weight."""

    name: str
    build: Build = field(repr=False)
    free: tuple[str, ...]
    fixed: tuple[str, ...] = ()

    def make(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = self.build()
        return model.to(dtype).eval(), torch.utils._pytree.tree_map(
            lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, inputs
        )

    def __str__(self) -> str:
        return self.name


KINDS: list[Kind] = []


def kind(name: str, *free: str, fixed: tuple[str, ...] = ()) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        KINDS.append(Kind(name, build, free, fixed))
        return build

    return add


class Calls(nn.Module):
    """Layers by name and a forward pass that is a function of them and the inputs."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, *args: Any) -> Tensor:
        return self.function(self, *args)


def pooled(*layers: nn.Module, width: int) -> nn.Module:
    """Layers, the mean over all axes but batch and channels, and a linear layer."""
    return Calls(
        lambda m, x: m.head(torch.tanh(m.body(x)).flatten(2).mean(2)),
        body=nn.Sequential(*layers),
        head=nn.Linear(width, 3),
    )


@kind("linear", "0.weight", "2.weight")
def _() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3)), torch.randn(5, 12)


@kind("linear-tokens", "0.weight")
def _() -> tuple[nn.Module, Any]:
    mean = Calls(lambda m, x: x.mean(dim=(1, 2)))
    return nn.Sequential(
        nn.Linear(40, 6, bias=False), nn.Tanh(), mean, nn.Linear(6, 3)
    ), torch.randn(4, 2, 3, 40)


@kind("bilinear", "pair.weight")
def _() -> tuple[nn.Module, Any]:
    model = Calls(
        lambda m, a, b: m.head(torch.tanh(m.pair(a, b))),
        pair=nn.Bilinear(4, 5, 6),
        head=nn.Linear(6, 3),
    )
    return model, (torch.randn(4, 4), torch.randn(4, 5))


@kind("conv1d-circular", "body.0.weight")
def _() -> tuple[nn.Module, Any]:
    conv = nn.Conv1d(12, 4, 3, padding=1, padding_mode="circular", stride=2)
    return pooled(conv, width=4), torch.randn(3, 12, 8)


@kind("conv2d-reflect-dilation", "body.0.weight")
def _() -> tuple[nn.Module, Any]:
    conv = nn.Conv2d(8, 4, 3, padding=2, padding_mode="reflect", dilation=2, stride=(2, 3))
    return pooled(conv, width=4), torch.randn(3, 8, 6, 7)


@kind("conv2d-replicate-groups", "body.0.weight")
def _() -> tuple[nn.Module, Any]:
    conv = nn.Conv2d(16, 6, 3, padding=1, padding_mode="replicate", groups=2, stride=2)
    return pooled(conv, width=6), torch.randn(3, 16, 6, 6)


@kind("conv2d-same", "body.0.weight")
def _() -> tuple[nn.Module, Any]:
    return pooled(nn.Conv2d(9, 5, (3, 1), padding="same"), width=5), torch.randn(2, 9, 3, 3)


@kind("conv2d-depthwise", "body.0.weight")
def _() -> tuple[nn.Module, Any]:
    return pooled(nn.Conv2d(5, 5, 5, groups=5), width=5), torch.randn(2, 5, 7, 7)


@kind("conv3d", "body.0.weight")
def _() -> tuple[nn.Module, Any]:
    return pooled(nn.Conv3d(3, 4, 3, padding=1, stride=2), width=4), torch.randn(2, 3, 4, 4, 4)


@kind("transpose1d", "body.0.weight")
def _() -> tuple[nn.Module, Any]:
    return pooled(nn.ConvTranspose1d(14, 4, 3, stride=2, padding=1), width=4), torch.randn(3, 14, 6)


@kind("transpose2d-all-options", "body.0.weight")
def _() -> tuple[nn.Module, Any]:
    layer = nn.ConvTranspose2d(
        12,
        6,
        (3, 2),
        stride=(3, 2),
        padding=(1, 2),
        output_padding=(2, 1),
        dilation=(2, 3),
        groups=2,
    )
    return pooled(layer, width=6), torch.randn(1, 12, 3, 2)


@kind("transpose3d", "body.0.weight")
def _() -> tuple[nn.Module, Any]:
    layer = nn.ConvTranspose3d(12, 4, 2, stride=2, bias=False)
    return pooled(layer, width=4), torch.randn(1, 12, 2, 2, 2)


@kind("embedding-padding", "table.weight")
def _() -> tuple[nn.Module, Any]:
    model = Calls(
        lambda m, t: m.head(m.table(t).mean(1)),
        table=nn.Embedding(30, 8, padding_idx=0),
        head=nn.Linear(8, 3),
    )
    return model, torch.tensor([[1, 5, 0], [7, 7, 2], [9, 0, 0]])


@kind("embedding-bag", "table.weight")
def _() -> tuple[nn.Module, Any]:
    model = Calls(
        lambda m, t: m.head(m.table(t)),
        table=nn.EmbeddingBag(30, 8, mode="mean"),
        head=nn.Linear(8, 3),
    )
    return model, torch.tensor([[1, 5, 3], [7, 7, 2], [9, 4, 4]])


@kind("tied-embedding", "table.weight")
def _() -> tuple[nn.Module, Any]:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(20, 40), nn.Linear(40, 20)
            self.out.weight = self.table.weight

        def forward(self, t: Tensor) -> Tensor:
            return self.out(torch.tanh(self.table(t).mean(1)))

    return Tied(), torch.tensor([[1, 5, 0], [7, 7, 2], [9, 0, 0]])


@kind("tied-linear-two-biases", "a.weight")
def _() -> tuple[nn.Module, Any]:
    a, b = nn.Linear(16, 16), nn.Linear(16, 16)
    b.weight = a.weight
    model = Calls(lambda m, x: m.head(m.b(torch.tanh(m.a(x)))), a=a, b=b, head=nn.Linear(16, 3))
    return model, torch.randn(3, 16)


@kind("module-used-twice", "a.weight")
def _() -> tuple[nn.Module, Any]:
    model = Calls(
        lambda m, x: m.head(m.a(torch.tanh(m.a(x)))), a=nn.Linear(16, 16), head=nn.Linear(16, 3)
    )
    return model, torch.randn(3, 16)


@kind("attention", "mix.in_proj_weight", "mix.out_proj.weight")
def _() -> tuple[nn.Module, Any]:
    mask = torch.tensor([[False, False, True], [False, False, False]])
    model = Calls(
        lambda m, x: m.head(m.mix(x, x, x, key_padding_mask=mask, need_weights=False)[0].mean(1)),
        mix=nn.MultiheadAttention(12, 3, batch_first=True),
        head=nn.Linear(12, 3),
    )
    return model, torch.randn(2, 3, 12)


@kind("attention-cross", "mix.in_proj_weight", "mix.out_proj.weight")
def _() -> tuple[nn.Module, Any]:
    model = Calls(
        lambda m, x, y: m.head(
            m.mix(x.transpose(0, 1), y.transpose(0, 1), value=y.transpose(0, 1))[0].mean(0)
        ),
        mix=nn.MultiheadAttention(12, 3, add_bias_kv=True),
        head=nn.Linear(12, 3),
    )
    return model, (torch.randn(2, 3, 12), torch.randn(2, 4, 12))


@kind("attention-own-sizes", "mix.q_proj_weight", "mix.k_proj_weight", fixed=("mix.in_proj_bias",))
def _() -> tuple[nn.Module, Any]:
    model = Calls(
        lambda m, x, y, z: m.head(m.mix(x, y, z)[0].mean(1)),
        mix=nn.MultiheadAttention(12, 3, kdim=14, vdim=10, batch_first=True),
        head=nn.Linear(12, 3),
    )
    return model, (torch.randn(2, 3, 12), torch.randn(2, 4, 14), torch.randn(2, 4, 10))


@kind(
    "transformer-layer",
    "body.linear1.weight",
    "body.linear2.weight",
    "body.self_attn.in_proj_weight",
)
def _() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, norm_first=True)
    return Calls(
        lambda m, x: m.head(m.body(x).mean(1)), body=layer, head=nn.Linear(16, 3)
    ), torch.randn(3, 2, 16)


def _recurrent(name: str, make: Callable[[], nn.Module], width: int) -> None:
    @kind(name, "body.weight_ih_l0", "body.weight_hh_l0")
    def _() -> tuple[nn.Module, Any]:
        model = Calls(
            lambda m, x: m.head(m.body(x)[0][:, -1]), body=make(), head=nn.Linear(width, 3)
        )
        return model, torch.randn(2, 4, 14)


_recurrent("lstm", lambda: nn.LSTM(14, 12, 2, batch_first=True, bidirectional=True), 24)
_recurrent("lstm-projected", lambda: nn.LSTM(14, 16, batch_first=True, proj_size=10), 10)
_recurrent("gru", lambda: nn.GRU(14, 12, 2, batch_first=True), 12)
_recurrent("rnn", lambda: nn.RNN(14, 12, batch_first=True, nonlinearity="relu", bias=False), 12)


@kind("lstm-packed", "body.weight_ih_l0", "body.weight_hh_l0_reverse")
def _() -> tuple[nn.Module, Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        lengths = torch.tensor([2, 4, 3])
        state = (torch.ones(2, 3, 12).to(x), torch.zeros(2, 3, 12).to(x))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(m.body(packed, state)[0], batch_first=True)
        return m.head(out.sum(1))

    body = nn.LSTM(14, 12, batch_first=True, bidirectional=True)
    return Calls(forward, body=body, head=nn.Linear(24, 3)), torch.randn(3, 4, 14)


@kind("cells", "a.weight_ih", "a.weight_hh", "b.weight_hh", "c.weight_hh")
def _() -> tuple[nn.Module, Any]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h, c = m.a(x)
        h, c = m.a(x, (h, c))
        return m.head(m.c(m.b(h, h), h))

    layers = {"a": nn.LSTMCell(14, 12), "b": nn.GRUCell(12, 12), "c": nn.RNNCell(12, 12)}
    return Calls(forward, **layers, head=nn.Linear(12, 3)), torch.randn(3, 14)


def _normed(name: str, make: Callable[[], nn.Module], *shape: int) -> None:
    """A norm of which some channels are constant over the data: theirs have one direction left."""

    @kind(name, "body.0.weight")
    def _() -> tuple[nn.Module, Any]:
        norm = make()
        for tensor in [*norm.parameters(), *norm.buffers()]:
            if tensor.is_floating_point():
                tensor.data.copy_(torch.rand_like(tensor) + 0.5)
        x = torch.randn(4, *shape)
        x[:, :-1] = 0.7
        return pooled(norm, width=shape[0]), x


_normed("batchnorm1d", lambda: nn.BatchNorm1d(5), 5, 3)
_normed("batchnorm2d", lambda: nn.BatchNorm2d(5), 5, 3, 3)
_normed("instancenorm1d", lambda: nn.InstanceNorm1d(5, affine=True), 5, 4)
_normed(
    "instancenorm2d-stats",
    lambda: nn.InstanceNorm2d(5, affine=True, track_running_stats=True),
    5,
    4,
    4,
)
_normed("groupnorm", lambda: nn.GroupNorm(5, 5), 5, 4)


@kind("layernorm", "norm.weight", "a.weight")
def _() -> tuple[nn.Module, Any]:
    # One example: each channel has one value.
    model = Calls(
        lambda m, x: m.head(torch.tanh(m.a(m.norm(x)))),
        norm=nn.LayerNorm((4, 5)),
        a=nn.Linear(5, 6),
        head=Calls(lambda m, h: h.flatten(1)[:, :3]),
    )
    return model, torch.randn(1, 4, 5)


@kind("rmsnorm", "a.weight")
def _() -> tuple[nn.Module, Any]:
    model = Calls(
        lambda m, x: m.head(torch.tanh(m.a(m.norm(x)))),
        norm=nn.RMSNorm(20),
        a=nn.Linear(20, 6),
        head=nn.Linear(6, 3),
    )
    return model, torch.randn(4, 20)
