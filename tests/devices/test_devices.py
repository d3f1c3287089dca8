"""Posteriors on a device that is not the CPU: the same answers, and few questions of the host.

With a GPU at hand every scene runs there, in a process of its own: torch takes one kind of accelerator at a time.
Without one, a device stands in whose tensors are told apart as a GPU's are (`tests/elsewhere.py`): what would fail
there for tensors on two devices fails here, and each transfer is counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes import solvers
from nullbayes.demo.models import lenet
from tests.devices.scenes import QUIET, Found, Place, scenes

GPU = torch.cuda.is_available()
if not GPU:
    try:
        from tests.elsewhere import Elsewhere, There, back, moved
    except AttributeError:  # older than PyTorch 2.9, which registers devices written in Python
        pytest.skip("this PyTorch has no devices written in Python", allow_module_level=True)
standing_in = pytest.mark.skipif(GPU, reason="a GPU is at hand")

HERE: Place = lambda x: x  # noqa: E731
# All of them take two minutes; these reach every room.
STANDING_IN = (
    "fit convolutions float32", "fit classes", "layers convolutions", "uses perceptron", "planned",
    "solver primal", "solver eigen", "solver cg-kronecker", "solver cg-pivoted", "solver alternating",
    "small memory", "within",
)  # fmt: skip


def there(x: Any) -> Any:
    return moved(x) if isinstance(x, nn.Module) else There(x.clone())


def _compare(scene: Callable[[Place], Found], found: Found, allowed: float) -> None:
    for name, value in scene(HERE).items():
        here, other = torch.as_tensor(value), torch.as_tensor(found[name])
        other = (other if GPU else back(other)).detach().cpu().double()
        size = here.detach().double().abs().max().clamp_min(1e-12)
        assert here.shape == other.shape, name
        assert float((here.detach().double() - other).abs().max() / size) < allowed, name


@standing_in
@pytest.mark.filterwarnings("ignore::nullbayes.errors.NullBayesWarning")  # of tiny data
@pytest.mark.parametrize("name", STANDING_IN)
def test_another_device_gives_the_same(name: str) -> None:
    scene = scenes(fused=False)[name]
    with Elsewhere():
        found = scene(there)
    _compare(scene, found, 1e-6)


@pytest.mark.filterwarnings("ignore::nullbayes.errors.NullBayesWarning")
@pytest.mark.skipif(not GPU, reason="no GPU at hand")
@pytest.mark.parametrize("name", scenes())
def test_a_gpu_gives_the_same(name: str) -> None:
    scene = scenes()[name]
    _compare(scene, scene(lambda x: x.to("cuda")), 2e-2 if "float32" in name else 1e-5)


# -- questions of the host -----------------------------------------------------------------------


def deep(layers: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = [part for _ in range(layers) for part in (nn.Linear(4, 4), nn.Tanh())]
        return moved(nn.Sequential(*body, nn.Linear(4, 3)).eval())


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(3 * count, 4, generator=torch.Generator().manual_seed(1))
    return list(zip(x.split(3), (torch.arange(3 * count) % 3).split(3), strict=True))


def reads(run: Callable[[], Any], device: Elsewhere) -> int:
    with device.watch() as counted:
        run()
    return sum(counted.values())


@standing_in
@pytest.mark.parametrize("layered", [False, True], ids=["rows", "layers"])
def test_use_asks_the_host_as_often_whatever_the_depth(layered: bool) -> None:
    counted = []
    with Elsewhere() as device:
        for depth in (1, 6):
            kind = nb.LayerNullSpacePosterior if layered else nb.NullSpacePosterior
            posterior: Any = kind(deep(depth)).fit(batches(2), 3, **QUIET)
            x = batches(1)[0][0]
            novelty = partial(posterior.novelty, x)
            uses = [partial(posterior.predict, x)]
            uses += (
                [partial(novelty, "leverage"), novelty]
                if layered
                else [partial(novelty, exact=exact) for exact in (True, False)]
            )
            for use in uses:
                use()  # the first call proves
            counted.append([reads(use, device) for use in uses])
    assert counted[0] == counted[1]
    assert max(counted[0]) <= 8


@standing_in
def test_launches_are_not_one_an_example() -> None:
    """Products large enough to be made one by one on a CPU, where that is faster."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = lenet(10).eval()
    x = torch.randn(132, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with Elsewhere() as device:
        train = [(x[:4], torch.arange(4))]
        posterior = nb.NullSpacePosterior(moved(model), prior_precision=1.0).fit(train, 10, **QUIET)
        counted = []
        for size in (8, 128):
            posterior.predict(x[4 : 4 + size])
            before = device.launches
            posterior.predict(x[4 : 4 + size])
            counted.append(device.launches - before)
    assert counted[1] < 3 * counted[0]


@standing_in
def test_a_batch_more_of_a_fit_asks_as_often_whatever_the_depth() -> None:
    more = []
    with Elsewhere() as device:
        for depth in (1, 6):
            few, many = (
                reads(
                    lambda n=n, d=depth: nb.NullSpacePosterior(
                        deep(d), solver=solvers.DualCholesky(), prior_precision=1.0
                    ).fit(batches(n), 3, **QUIET),
                    device,
                )
                for n in (2, 6)
            )
            more.append((many - few) / 4)
    assert more[1] <= 1.2 * more[0]


@standing_in
def test_an_iteration_asks_as_often_whatever_the_depth() -> None:
    """To stop needs an answer; nothing that grows with the network may be asked beside."""
    each = []
    with Elsewhere() as device:
        for depth in (1, 6):
            few, many = (
                reads(
                    lambda n=n, d=depth: nb.NullSpacePosterior(
                        deep(d),
                        solver=solvers.ConjugateGradient(max_iterations=n, tolerance=1e-30),
                        prior_precision=1.0,
                    ).fit(batches(4), 3, **QUIET),
                    device,
                )
                for n in (2, 6)
            )
            each.append((many - few) / 4)
    assert each[1] <= each[0] + 2
    assert each[1] < 16


@standing_in
def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    with Elsewhere() as device:
        x = There(torch.ones(3))
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="generator"):
            torch.nn.init.normal_(x, generator=torch.Generator())
        assert x.sum().device == x.device
        with device.watch() as counted:
            assert float((x + 1).sum()) == 6
        assert sum(counted.values()) == 1
        with contextlib.suppress(RuntimeError):
            assert x.numpy() is None
