"""Small random models of every supported layer kind, each with data: the ground of most tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

Build = Callable[[], tuple[nn.Module, Any]]


@dataclass(frozen=True)
class Case:
    name: str
    build: Build = field(repr=False)
    #: parameters expected on the generic path; everything else must have a rule
    generic: tuple[str, ...] = ()

    def make(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = self.build()
        model = model.to(dtype).eval()
        return model, torch.utils._pytree.tree_map(
            lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, inputs
        )

    def __str__(self) -> str:
        return self.name


ZOO: list[Case] = []


def case(name: str, *generic: str) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        ZOO.append(Case(name, build, generic))
        return build

    return add


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Tensor:
        return self.function(*args)


def warm(norm: nn.Module) -> nn.Module:
    """Weights, biases and running statistics away from their trivial starting values."""
    for tensor in [*norm.parameters(), *norm.buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand_like(tensor) + 0.5)
    return norm


@case("linear")
def _() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(5, 4)


@case("linear-no-bias-inplace-relu")
def _() -> tuple[nn.Module, Any]:
    layers = nn.Linear(4, 8, bias=False), nn.ReLU(inplace=True), nn.Linear(8, 3)
    return nn.Sequential(*layers), torch.randn(5, 4)


@case("linear-token-axes")
def _() -> tuple[nn.Module, Any]:
    pool = Lambda(lambda h: h.mean(dim=(1, 2)))
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), pool, nn.Linear(5, 3)), torch.randn(4, 2, 3, 3)


@case("linear-batch-second")
def _() -> tuple[nn.Module, Any]:
    first, last = Lambda(lambda x: x.transpose(0, 1)), Lambda(lambda h: h.mean(0))
    return nn.Sequential(first, nn.Linear(3, 5), nn.Tanh(), last, nn.Linear(5, 3)), torch.randn(
        4, 6, 3
    )


@case("linear-windows")
def _() -> tuple[nn.Module, Any]:
    fold = Lambda(lambda x: x.reshape(-1, 2, 3))
    unfold = Lambda(lambda h: h.reshape(-1, 6, 5).mean(1))
    return nn.Sequential(fold, nn.Linear(3, 5), nn.Tanh(), unfold, nn.Linear(5, 3)), torch.randn(
        4, 6, 3
    )


@case("module-used-twice")
def _() -> tuple[nn.Module, Any]:
    shared = nn.Linear(5, 5)
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), shared, nn.Tanh(), shared, nn.Linear(5, 3)
    ), torch.randn(4, 4)


@case("conv-used-twice")
def _() -> tuple[nn.Module, Any]:
    shared = nn.Conv2d(2, 2, 3, padding=1)
    flat = nn.Flatten()
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), flat, nn.Linear(32, 3)), torch.randn(
        4, 2, 4, 4
    )


class TiedLinear(nn.Module):
    """A weight shared by two layers, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.two(torch.tanh(self.one(x)))))


@case("tied-linear")
def _() -> tuple[nn.Module, Any]:
    return TiedLinear(), torch.randn(5, 4)


class TiedLanguageModel(nn.Module):
    """Embedding tied to the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(x))).mean(1))


@case("tied-embedding")
def _() -> tuple[nn.Module, Any]:
    return TiedLanguageModel(), torch.randint(0, 7, (4, 5))


class Transposed(nn.Module):
    """A weight that a rule sees once and the model uses twice: the probe must notice."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.out = nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(torch.tanh(self.encode(x)), self.encode.weight.T))


@case("hidden-second-use", "encode.bias", "encode.weight")
def _() -> tuple[nn.Module, Any]:
    return Transposed(), torch.randn(4, 5)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7)),
    "conv1d-same": (lambda: nn.Conv1d(2, 3, 3, padding="same", dilation=2), (2, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 5)),
    "conv2d-stride-dilation": (
        lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1)),
        (2, 7, 5),
    ),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 4, 4)),
    "conv2d-depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, bias=False), (3, 4, 4)),
    "conv2d-reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 4)),
    "conv2d-circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    "conv2d-replicate": (
        lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="replicate"),
        (2, 4, 4),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, stride=(1, 2, 1), padding=1), (2, 3, 4, 3)),
    "transpose1d": (
        lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1),
        (2, 4),
    ),
    "transpose2d": (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, dilation=2), (3, 3, 2)),
    "transpose2d-cut": (lambda: nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1), (3, 3, 3)),
    "transpose2d-groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False),
        (4, 2, 2),
    ),
    "transpose3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=2, padding=1), (2, 2, 3, 2)),
}


def _convolution(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Build:
    def build() -> tuple[nn.Module, Any]:
        layer = make()
        x = torch.randn(4, *shape)
        width = layer(x)[0].numel()
        return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)), x

    return build


for _name, (_make, _shape) in CONVOLUTIONS.items():
    ZOO.append(Case(_name, _convolution(_make, _shape)))

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batchnorm1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "batchnorm2d": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "batchnorm3d": (lambda: nn.BatchNorm3d(2), (2, 2, 2, 2)),
    "groupnorm": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "instancenorm1d": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 5)),
    "instancenorm2d": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 3, 3)),
    "instancenorm3d": (lambda: nn.InstanceNorm3d(2, affine=True), (2, 2, 2, 3)),
    "instancenorm2d-stats": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (3, 3, 3),
    ),
    "layernorm": (lambda: nn.LayerNorm(4), (3, 4)),
    "layernorm-no-bias-2d": (lambda: nn.LayerNorm((3, 4), bias=False), (2, 3, 4)),
    "rmsnorm": (lambda: nn.RMSNorm(4), (3, 4)),
}


def _norm(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Build:
    def build() -> tuple[nn.Module, Any]:
        width = torch.Size(shape).numel()
        mix = nn.Linear(shape[-1], shape[-1])
        x = torch.randn(4, *shape)
        return nn.Sequential(mix, warm(make()), nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)), x

    return build


for _name, (_make, _shape) in NORMS.items():
    ZOO.append(Case(_name, _norm(_make, _shape)))


@case("embedding-padding")
def _() -> tuple[nn.Module, Any]:
    pool = Lambda(lambda h: h.mean(1))
    return nn.Sequential(
        nn.Embedding(11, 4, padding_idx=2), nn.Tanh(), pool, nn.Linear(4, 3)
    ), torch.randint(0, 11, (4, 6))


class Tokens(nn.Module):
    """Class token and positional table: parameters of no layer; a table looked up once for all."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, 4))
        self.table = nn.Embedding(5, 4)
        self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.table(torch.arange(x.shape[1], device=x.device))
        return self.out(torch.tanh(self.mix(x))[:, 0])


@case("class-token", "cls", "table.weight")
def _() -> tuple[nn.Module, Any]:
    return Tokens(), torch.randn(3, 4, 4)


@case(
    "transformer",
    "0.self_attn.in_proj_weight",
    "0.self_attn.in_proj_bias",
    "0.self_attn.out_proj.weight",
    "0.self_attn.out_proj.bias",
)
def _() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    pool = Lambda(lambda h: h.mean(1))
    return nn.Sequential(layer, pool, nn.Linear(4, 3)), torch.randn(3, 5, 4)


def _recurrent(kind: type[nn.RNNBase]) -> Build:
    def build() -> tuple[nn.Module, Any]:
        last = Lambda(lambda out: out[0][:, -1])
        return nn.Sequential(kind(3, 4, batch_first=True), last, nn.Linear(4, 3)), torch.randn(
            3, 5, 3
        )

    return build


for _kind in (nn.LSTM, nn.GRU, nn.RNN):
    _generic = tuple(f"0.{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    ZOO.append(Case(_kind.__name__.lower(), _recurrent(_kind), _generic))


@case(
    "parametrised",
    "0.parametrizations.weight.original0",
    "0.parametrizations.weight.original1",
)
def _() -> tuple[nn.Module, Any]:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)
    ), torch.randn(4, 4)


class Scale(nn.Module):
    """A custom module with a data-dependent branch: no vectorised generic path."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e6:
            x = x / 2
        return self.out(torch.sin(x * self.scale))


@case("custom-control-flow", "scale")
def _() -> tuple[nn.Module, Any]:
    return Scale(), torch.randn(4, 4)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out(torch.tanh(self.left(a) * self.right(input=b)))


@case("two-inputs")
def _() -> tuple[nn.Module, Any]:
    return TwoInputs(), (torch.randn(4, 3), torch.randn(4, 2))


@case("dict-inputs")
def _() -> tuple[nn.Module, Any]:
    return TwoInputs(), {"a": torch.randn(4, 3), "b": torch.randn(4, 2)}


@case("dense-output")
def _() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1)), torch.randn(
        3, 2, 3, 3
    )


def dense_jacobian(model: nn.Module, inputs: Any) -> Tensor:
    """``J (N*O, P)`` by plain reverse mode over the whole model: code that shares nothing with ours.

    Rows of padding are constants, whatever a table is tied to.
    """
    constant = {
        id(m.weight): m.padding_idx
        for m in model.modules()
        if isinstance(m, nn.Embedding) and m.padding_idx is not None
    }
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    weights = [p for _, p in model.named_parameters() if p.requires_grad]
    assert names
    if isinstance(inputs, dict):
        out = model(**inputs)
    else:
        out = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    rows = []
    for value in out.reshape(-1):
        grads = torch.autograd.grad(value, weights, retain_graph=True, materialize_grads=True)
        for weight, g in zip(weights, grads, strict=True):
            if id(weight) in constant:
                g[constant[id(weight)]] = 0
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows).detach()
