"""What tests of several rooms share: small networks and data, and what must not change while they are used."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes import jacobian
from nullbayes.jacobian.capture.batches import output_operators
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.capture.verify import prove
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.model.functional import FunctionalModel

QUIET: dict[str, Any] = {"progress": False}


X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


Y = torch.tensor([0, 1, 2, 0, 1, 2, 0])


TRAIN = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def network(*layers: nn.Module, outputs: int = 3) -> nn.Module:
    """Linear(3, 6), the given layers, Linear(6, outputs): always the same weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), *layers, nn.Linear(6, outputs)).eval()


def perceptron(outputs: int = 3, seed: int = 0, *, width: int = 9) -> nn.Module:
    """Four inputs, one hidden layer, double precision: always the same weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs)
        return nn.Sequential(*layers).double().eval()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(count: int, seed: int = 1) -> Tensor:
    """``(count, 4)`` for it."""
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)).double()


def fit(
    model: nn.Module, loader: Any = None, *args: Any, num_samples: int = 3, **kwargs: Any
) -> Any:
    posterior = nb.NullSpacePosterior(model, *args, **kwargs)
    return posterior.fit(TRAIN if loader is None else loader, num_samples, **QUIET)


@contextmanager
def says(kind: type[Exception], *words: str) -> Iterator[None]:
    """The block raises ``kind`` (ours), and the message holds all the words."""
    assert issubclass(kind, nb.NullBayesError)
    with pytest.raises(kind) as caught:
        yield
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def snapshot(model: nn.Module) -> list[Any]:
    """Everything about a model and the process that a fit must not change."""
    modules = list(model.modules())
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [id(t) for t in tensors],
        [t.detach().clone() for t in tensors],
        [t._version for t in tensors],
        [t.requires_grad for t in tensors],
        [None if t.grad is None else t.grad.clone() for t in tensors],
        [(id(m), type(m), m.training, list(m._modules), list(m._parameters)) for m in modules],
        [[list(h.values()) for h in hooks(m)] for m in modules],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002  (the state that must not change)
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        torch.are_deterministic_algorithms_enabled(),
        [(t.dtype, t.device, t.data_ptr(), t.is_leaf) for t in model.parameters()],
        settings(),
    ]


def settings() -> tuple[Any, ...]:
    """Settings of the process, and of this thread."""
    return (
        torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_anomaly_enabled(),
        torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled,
        torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cudnn.enabled, torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(),
        len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_backward_hooks),
        torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(), np.geterr(),
    )  # fmt: skip


def hooks(module: nn.Module) -> list[Any]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [getattr(module, name) for name in names]


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, Tensor):
        assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b)
    else:
        assert found == wanted


def assert_threads(count: int) -> None:
    """No thread is left over; that of a progress bar takes a moment to end."""
    deadline = time.monotonic() + 5
    while threading.active_count() > count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= count  # one of an earlier test may have ended since


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The model, gradients, modes, hooks and random state are bit for bit as before the block."""
    before = snapshot(model)
    yield
    assert_same(snapshot(model), before)


class Countdown:
    """Outside of the module: each call of the library has modules of its own."""

    left = -1


class Delicate(nn.Module):
    """Rules and the generic path, statistics, a call counter, a frozen weight; fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.register_buffer("calls", torch.zeros(()))
        self.shared, self.error = Countdown(), KeyboardInterrupt

    @property
    def countdown(self) -> int:
        return self.shared.left

    @countdown.setter
    def countdown(self, left: int) -> None:
        self.shared.left = left

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1.0
        h = torch.tanh(self.norm(self.inner(x))) * self.scale
        self.shared.left -= 1
        if self.countdown == 0:
            raise self.error("stop")
        h = self.recurrent(h[:, None])[0][:, 0]
        out: Tensor = self.out(h)
        return out


def delicate() -> Delicate:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = Delicate().eval()
    model.out.weight.requires_grad_(False)
    model.scale.grad = torch.ones(8)
    model.norm.train(False)
    model.inner.register_forward_hook(lambda *_: None)
    model.requires_grad_(True).out.weight.requires_grad_(False)
    return model


def all_rows(functional: FunctionalModel, plan: CapturePlan, inputs: object) -> JacobianOperator:
    outputs = functional.outputs(inputs)[0].numel()
    parts = output_operators(functional, plan, inputs, outputs)
    return JacobianOperator(functional.space, [block for part in parts for block in part.blocks])


def operator_for(model: nn.Module, inputs: object) -> tuple[JacobianOperator, object]:
    functional = FunctionalModel(model, jacobian.ParameterSpace.from_model(model))
    plan = prove(functional, inputs)
    return all_rows(functional, plan, inputs), plan
