"""The user's own modules are never touched: threads, closures, compiled and wrapped models, and what is refused."""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace
from nullbayes.model.private import Modules, _marks_alone
from tests.cases.dense import (
    assert_kept,
    assert_predicts,
    assert_rows,
    fitted,
    normal,
    rows,
    seeded,
)
from tests.support import unchanged


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, 0])


@pytest.mark.parametrize("kind", [Lstm, Mlp])
@pytest.mark.parametrize("method", ["linearised", "sampled"])
def test_threads_and_the_users_own_calls(kind: type[nn.Module], method: str) -> None:
    model, x = seeded(kind), normal(6, 3, 3)
    posterior = fitted(model, [x])
    with torch.no_grad():
        plain = model(x)
    wanted, errors = posterior.predict(x, method=method).outputs, []
    worst = {"model": 0.0, "posterior": 0.0}

    def model_calls() -> None:
        for _ in range(60):
            with torch.no_grad():
                worst["model"] = max(worst["model"], float((model(x) - plain).abs().max()))

    def predictions() -> None:
        try:
            for _ in range(12):
                found = posterior.predict(x, method=method).outputs
                worst["posterior"] = max(worst["posterior"], float((found - wanted).abs().max()))
        except Exception as error:  # told by the assertion below
            errors.append(error)

    before, threads = sys.getswitchinterval(), []
    sys.setswitchinterval(1e-5)
    try:
        for work in (model_calls, predictions, predictions):
            threads.append(threading.Thread(target=work))
            threads[-1].start()
    finally:
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
    assert not errors
    assert worst == {"model": 0.0, "posterior": 0.0}


def test_a_fit_beside_the_users_own_calls() -> None:
    model, x = seeded(Mlp), normal(8, 3, 3)
    with torch.no_grad():
        plain = model(x)
    seen: list[float] = []
    stop = threading.Event()

    def calls() -> None:
        while not stop.is_set():
            with torch.no_grad():
                seen.append(float((model(x) - plain).abs().max()))

    thread = threading.Thread(target=calls)
    thread.start()
    try:
        posterior = fitted(model, x.split(2))
    finally:
        stop.set()
        thread.join()
    assert max(seen) == 0.0
    assert_rows(posterior, rows(model, x.split(1)))


# -- modules that refer to one another in odd ways --------------------------------------------------------


class Closures(nn.Module):
    """Children reached through closures, bound methods, partials, lists, dictionaries and defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.first = lambda x: torch.tanh(self.a(x))
        self.steps = [self._second]
        self.table = {"last": functools.partial(self._last, factor=2.0)}
        self.weights = [self.scale]
        child = self.b

        def second(x: Tensor) -> Tensor:
            return torch.tanh(child(x))

        self.second = second

    def _second(self, x: Tensor) -> Tensor:
        return self.second(x) * self.weights[0]

    def _last(self, x: Tensor, factor: float) -> Tensor:
        return factor * self.c(x)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for step in self.steps:
            h = step(h)
        return self.table["last"](h)


class Replaced(nn.Module):
    """`forward` exchanged on the instance, as tools that wrap models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        original = self.net.forward
        self.net.forward = functools.partial(self._around, original)  # type: ignore[method-assign]
        layer = self.net[0]
        layer.forward = types.MethodType(lambda me, x: 2 * nn.Linear.forward(me, x), layer)

    def _around(self, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return original(x) + 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Shared(nn.Module):
    """One module under two names, one weight in two modules, a weight in a list of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.again = self.a
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.a.weight
        self.extra = nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)) * self.extra[0]
        return self.last(torch.tanh(self.tied(self.again(h))) * self.extra[1])


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.net[0].register_forward_hook(lambda module, args, out: out + module.bias.sin())
        self.net[2].register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        nn.utils.parametrizations.spectral_norm(self.net[2])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "closures": Closures,
    "replaced": Replaced,
    "shared": Shared,
    "hooked": Hooked,
    "data parallel": lambda: nn.DataParallel(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_private_modules_are_the_users_in_all_but_weights(kind: str) -> None:
    model, x = seeded(MODELS[kind]), normal(5, 3)
    dense = rows(model, x.split(1))
    with unchanged(model):
        posterior = fitted(model, x.split(3))
        assert not posterior.functional.modules.shared
        assert_predicts(posterior, x, dense)
        posterior.predict(x, method="sampled")
    assert_rows(posterior, dense)
    assert_kept(posterior, dense)


def test_hooks_that_ask_for_a_gradient_alone_are_left_out() -> None:
    """What training with checkpoints leaves behind; an error within `torch.func`, which then took another way."""

    def marks(module: nn.Module, args: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    def changes(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output.requires_grad_()
        return output * 2

    def another(module: nn.Module, args: Any, output: Tensor) -> Any:
        output.requires_grad_()
        return args[0]

    assert [_marks_alone(hook) for hook in (marks, changes, another)] == [True, False, False]
    model, x = seeded(Mlp), normal(5, 2, 3)
    next(m for m in model.modules() if isinstance(m, nn.Linear)).register_forward_hook(marks)
    dense = rows(model, x.split(1))
    posterior = fitted(model, x.split(3))
    assert posterior.certificate.audit.methods == ("forward mode",)
    assert_rows(posterior, dense)
    assert_predicts(posterior, x, dense)


def test_a_forward_that_refers_to_the_model_from_outside() -> None:
    model, x = (
        seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))),
        normal(5, 3),
    )
    dense = rows(model, x.split(1))
    around = {"model": model}
    for forward in (
        lambda _, inputs: model(inputs),
        lambda _, inputs: GLOBAL["model"](inputs),
        functools.partial(_through, holder=around),
        Holder(model).call,
    ):
        GLOBAL["model"] = model
        posterior = fitted(model, x.split(3), forward=forward)
        assert_rows(posterior, dense)
        assert_predicts(posterior, x, dense)
        with torch.no_grad():
            wanted = model(x)
        posterior.predict(x, method="sampled")
        assert torch.equal(model(x), wanted)


GLOBAL: dict[str, nn.Module] = {}


def _through(_: nn.Module, inputs: Tensor, holder: dict[str, nn.Module]) -> Tensor:
    return holder["model"](inputs)


class Holder:
    """Not a module: keeps the model in an attribute of an object of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def call(self, _: nn.Module, inputs: Tensor) -> Tensor:
        return self.model(inputs)


def test_compiled_modules_are_run_uncompiled() -> None:
    net = lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))  # noqa: E731
    x = normal(6, 3)
    dense = rows(seeded(net), x.split(1))
    inner, in_place = seeded(net), seeded(net)
    inner[2] = torch.compile(inner[2], backend="eager")
    in_place.compile(backend="eager")
    for model in (torch.compile(seeded(net), backend="eager"), inner, in_place):
        posterior = fitted(model, [x])
        assert_rows(posterior, dense)
        assert_predicts(posterior, x, dense)


def test_what_a_private_copy_holds() -> None:
    model = seeded(Lstm)
    tensors = {id(p): torch.zeros_like(p) for p in model.parameters()}
    private, copier = Modules(model).private(tensors)
    assert type(private) is type(model)
    assert not any(bool(p.any()) for p in private.lstm._flat_weights)
    assert all(bool(p.any()) for p in model.parameters())
    private.new = 3
    assert copier.written() == ["new"]
    assert not hasattr(model, "new")


def test_substituted_weights_reach_every_place() -> None:
    for make in MODELS.values():
        model, x = seeded(make), normal(4, 3)
        functional = FunctionalModel(model, ParameterSpace.from_model(model))
        zeros = {n: torch.zeros_like(t) for n, t in functional.weights().items()}
        out = functional(zeros, functional.batch(x)).nan_to_num()  # a norm of zeros
        assert torch.equal(out, out[:1].expand_as(out))  # no weight of the user's is left in it


# -- refused ------------------------------------------------------------------------------------------------


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_named() -> None:
    x = normal(4, 3)
    part = seeded(small)
    part[0] = torch.jit.script(part[0])
    for model, path in (
        (torch.jit.script(seeded(small)), "the model is TorchScript"),
        (torch.jit.trace(seeded(small), x), "the model is TorchScript"),
        (part, "0 is TorchScript"),
    ):
        with pytest.raises(nb.ModelError, match=f"{path}.*Pass the Python module"):
            nb.NullSpacePosterior(model)
    for parameter in part[0].parameters():
        parameter.requires_grad_(False)
    dense = rows(part, x.split(1))
    assert_rows(fitted(part, [x], parameters=["2.weight", "2.bias"]), dense)


def test_lazy_modules_are_named() -> None:
    with pytest.raises(nb.ModelError, match=r"'0.weight', '0.bias'.*first input.*model\(x\)"):
        nb.NullSpacePosterior(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_modules_are_named() -> None:
    whole = torch.ao.quantization.quantize_dynamic(small().eval(), {nn.Linear}, torch.qint8)
    with pytest.raises(nb.ModelError, match="all weights are quantised"):
        nb.NullSpacePosterior(whole)
    q = torch.ao.nn.quantized
    linear = q.Linear(3, 4)  # whose weight is whatever was in memory
    weight = torch.quantize_per_tensor(normal(4, 3).float(), 0.05, 0, torch.qint8)
    linear.set_weight_bias(weight, torch.zeros(4))
    body = nn.Sequential(q.Quantize(0.05, 64, torch.quint8), linear, q.DeQuantize())
    model, x = nn.Sequential(body, nn.Linear(4, 2)).eval(), normal(4, 3).float()
    posterior = nb.NullSpacePosterior(model, preserve="outputs")
    posterior.fit([(x, torch.arange(4) % 2)], 2, progress=False)
    assert set(posterior.space.names) == {"1.weight", "1.bias"}
    weights = (
        torch.eye(3) * 100,
        torch.zeros(3, 3),
    )  # felt through the quantiser, or rounded away by it
    for weight in weights:
        behind = nn.Sequential(nn.Linear(3, 3), body).eval()
        behind[0].weight.data.copy_(weight)
        with pytest.raises(nb.ModelError, match="Quantised layers have no derivative"):
            nb.NullSpacePosterior(behind).fit([(x, torch.arange(4))], 2, progress=False)


def test_sharded_modules_are_named() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(3, 2)

    model: Any = nn.Sequential(FullyShardedDataParallel())
    with pytest.raises(nb.ModelError, match=r"\['0'\] hold a part of the weights"):
        nb.NullSpacePosterior(model)
