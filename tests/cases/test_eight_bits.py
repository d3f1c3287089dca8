"""Adapters on a frozen base whose weights are eight-bit integers: the adapters' rows, and who is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import all_rows
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import dense_jacobian

import nullbayes as nb
from nullbayes.model.fingerprint import Watch, fingerprint, quick_digest
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.packed import opened
from nullbayes.model.parameters import ParameterSpace

X = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
TRAIN = [(X[:12], torch.arange(12) % 3), (X[12:], torch.arange(12) % 3)]


class Packed(Tensor):
    """Integers and a scale for each row; multiplies as a linear layer's weight and does nothing else."""

    inside: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor, scale: Tensor) -> Packed:
        new: Packed = Tensor._make_wrapper_subclass(cls, inside.shape, dtype=scale.dtype)  # type: ignore[attr-defined]
        new.inside, new.scale = inside, scale
        return new

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inside", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Packed:
        return Packed(inner["inside"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.inside.to(x.dtype) * weight.scale.to(x.dtype), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inside, args[0].scale)
        raise NotImplementedError(f"{func} of packed weights")


class Buffered(nn.Module):
    """Integers and scales as buffers."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        inside, scale = rounded(layer.weight)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("inside", inside)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inside.to(x.dtype) * self.scale.to(x.dtype), self.bias.to(x.dtype))


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


class Adapter(nn.Module):
    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.b(self.a(x))
        return out


def base() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)
    return nn.Sequential(*layers).eval().requires_grad_(requires_grad=False)


def adapted(model: nn.Sequential) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for place in (0, 2):
            model[place] = Adapter(model[place])
    return model.eval()


def packed(model: nn.Sequential) -> nn.Sequential:
    for place in (0, 2, 4):
        weight = Packed(*rounded(model[place].weight))
        model[place].weight = nn.Parameter(weight, requires_grad=False)
    return model


def buffered(model: nn.Sequential) -> nn.Sequential:
    for place in (0, 2):
        model[place] = Buffered(model[place])
    return model


def of_torchao(model: nn.Sequential) -> nn.Sequential:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def of_bitsandbytes(model: nn.Sequential) -> nn.Sequential:
    kinds = pytest.importorskip("bitsandbytes").nn
    for place in (0, 2):
        layer = model[place]
        new = kinds.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
        new.weight = kinds.Int8Params(
            layer.weight.data, requires_grad=False, has_fp16_weights=False
        )
        new.bias = layer.bias
        model[place] = new.to("cpu").eval()
    return model


def in_double(model: nn.Sequential, wide: tuple[int, ...]) -> nn.Sequential:
    """The same network in float64 without a packed weight: what an identity matrix gives are its weights."""
    out = base().double()
    for place in wide:
        layer, target = model[place], out[place]
        eye = torch.eye(target.in_features)
        with torch.no_grad():
            target.weight.copy_((layer(eye) - target.bias.float()).T)
    return adapted(out).double()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make, tolerance",
    [(packed, 1e-4), (buffered, 1e-4), (of_torchao, 1e-4), (of_bitsandbytes, 0.05)],
    ids=["packed", "buffered", "torchao", "bitsandbytes"],
)
def test_rows_of_adapters_are_those_of_the_dequantised_network(make: Any, tolerance: float) -> None:
    quantised = make(base())
    places = (0, 2) if make in (buffered, of_bitsandbytes) else (0, 2, 4)
    reference = in_double(quantised, places)
    model = adapted(quantised)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    before = fingerprint(model)
    posterior = nb.NullSpacePosterior(model).fit(TRAIN, 4, progress=False)
    assert posterior.certificate.held
    assert posterior.certificate.generic == ()
    assert list(posterior.space.names) == names
    assert len(names) == 4
    assert fingerprint(model) == before
    functional = FunctionalModel(model, ParameterSpace.from_model(model))
    operator = all_rows(functional, posterior._capture_plan(X[:6]), X[:6])
    rows = torch.cat(list(operator.iter_rows(18))).double()
    dense = dense_jacobian(reference, X[:6].double())
    assert float((rows - dense).norm() / dense.norm()) < tolerance


def test_what_is_inside_of_packed_weights_is_watched() -> None:
    model = packed(base())
    parts = opened(model[0].weight)
    assert set(parts) == {"inside", "scale"}
    assert opened(model[0].bias) == {"": model[0].bias}
    before, digest, watch = fingerprint(model), quick_digest(model), Watch(model)
    assert watch.same(model)
    assert {"0.weight.inside", "0.weight.scale", "0.bias"} <= set(before)
    parts["inside"].data[3, 5] += 1
    after = fingerprint(model)
    assert [n for n in after if after[n] != before[n]] == ["0.weight.inside"]
    assert quick_digest(model) != digest
    assert not watch.same(model)


def test_a_scale_that_is_no_number_is_named() -> None:
    model = adapted(packed(base()))
    model[0].base.weight.scale[2] = float("nan")
    with pytest.raises(nb.NonFiniteError, match=r"'0\.base\.weight'"):
        nb.NullSpacePosterior(model).fit(TRAIN, 4, progress=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_is_refused_with_the_mend() -> None:
    model = adapted(torch.ao.quantization.quantize_dynamic(base(), {nn.Linear}, torch.qint8))
    with pytest.raises(nb.ModelError, match=r"'0.base', '2.base', '4'.*whole batch.*bfloat16"):
        nb.NullSpacePosterior(model)
