"""Posteriors on a device that is not the CPU: the same answers, and few questions of the host.

A device stands in whose tensors are told apart as a GPU's are (`tests/elsewhere.py`): what would fail there for tensors
on two devices fails here, and each transfer is counted. `test_devices.py` runs this file in a process of its own, as
the rest of torch (`DataParallel`, the compiler) takes the device for an accelerator wherever it is registered.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from experiments.detection import families, running
from experiments.detection.base import Given
from experiments.tasks import small_resnet
from nullbayes import solvers
from nullbayes.common import memory
from nullbayes.datasets import Split
from nullbayes.demo.models import lenet
from tests import host_reads
from tests.devices.scenes import QUIET, Place, compare, scenes
from tests.elsewhere import Elsewhere, There, back, moved

HERE: Place = lambda x: x  # noqa: E731
# All of them take two minutes; these reach every room.
STANDING_IN = (
    "fit convolutions float32", "fit classes", "layers convolutions", "uses perceptron", "planned",
    "solver primal", "solver eigen", "solver cg-kronecker", "solver cg-pivoted", "solver alternating",
    "small memory", "within",
)  # fmt: skip


def there(x: Any) -> Any:
    return moved(x) if isinstance(x, nn.Module) else There(x.clone())


@pytest.mark.filterwarnings("ignore::nullbayes.errors.NullBayesWarning")  # of tiny data
@pytest.mark.parametrize("name", STANDING_IN)
def test_another_device_gives_the_same(name: str) -> None:
    scene = scenes(fused=False)[name]
    with Elsewhere():
        found = scene(there)
    compare(
        scene(HERE), {k: back(v) if isinstance(v, Tensor) else v for k, v in found.items()}, 1e-6
    )


# -- scores of the evaluation -------------------------------------------------------------------

SCORES: tuple[str, ...] = ("null space", "layer null space", "nearest input", "SCOD")
if importlib.util.find_spec("pytorch_ood") is not None:  # whose scores these are
    SCORES += ("KNN, k=1", "ViM, a quarter", "ReAct", "GradNorm")


def test_scores_on_another_device_are_the_same() -> None:
    """Of a network whose inputs are on a device of their own; targets, features and scores are on the CPU."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = small_resnet(3, widths=(3, 4)).eval()
    x, y = torch.rand(15, 1, 8, 8, generator=g), torch.arange(15) % 3
    some = Given(network, Split(x, y), x[:6], 6)
    test, near = Split(torch.rand(6, 1, 8, 8, generator=g), y[:6]), x[:4].flip(2)
    here = families.Problem(some, test, {"a": near}, {"b": 1 - near})
    found = {name: running.measured(running.SCORES[name], here) for name in SCORES}
    with Elsewhere():
        train = replace(some.train, inputs=there(x))
        given = replace(some, network=moved(network), train=train, reference=there(some.reference))
        place = families.Problem(
            given,
            replace(test, inputs=there(test.inputs)),
            {"a": there(near)},
            {"b": there(1 - near)},
        )
        for name in SCORES:
            other = running.measured(running.SCORES[name], place)
            assert "error" not in found[name], found[name]
            assert "error" not in other, other
            assert other["near"]["a"]["auroc"] == pytest.approx(found[name]["near"]["a"]["auroc"])
            assert other["far"]["b"]["auroc"] == pytest.approx(found[name]["far"]["b"]["auroc"])


# -- questions of the host -----------------------------------------------------------------------


DEPTHS = 1, 4
FEW: Any = QUIET | {"audit": 2}  # examples: to audit all of them asks most


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
    return counted.total


@pytest.mark.parametrize("layered", [False, True], ids=["rows", "layers"])
def test_use_asks_the_host_as_often_whatever_the_depth(layered: bool) -> None:
    counted = []
    with Elsewhere() as device:
        for depth in DEPTHS:
            kind = nb.LayerNullSpacePosterior if layered else nb.NullSpacePosterior
            less = QUIET if layered else FEW
            posterior: Any = kind(deep(depth)).fit(batches(2), 3, **less)
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


def test_launches_are_not_one_an_example() -> None:
    """Products large enough to be made one by one on a CPU, where that is faster."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = lenet(10).eval()
    x = torch.randn(132, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with Elsewhere() as device:
        train = [(x[:4], torch.arange(4))]
        posterior = nb.NullSpacePosterior(moved(model), prior_precision=1.0).fit(train, 10, **FEW)
        counted = []
        for size in (8, 128):
            posterior.predict(x[4 : 4 + size])
            before = device.launches
            posterior.predict(x[4 : 4 + size])
            counted.append(device.launches - before)
    assert counted[1] < 3 * counted[0]


def reads_of_one_more(fit: Callable[[int, int], Any]) -> list[float]:
    """What one more of something asks, for networks of two depths: ``fit(depth, 6)`` beside ``fit(depth, 2)``."""
    with Elsewhere() as device:
        each = [[reads(partial(fit, depth, count), device) for count in (2, 6)] for depth in DEPTHS]
    return [(many - few) / 4 for few, many in each]


def test_a_batch_more_of_a_fit_asks_as_often_whatever_the_depth() -> None:
    more = reads_of_one_more(
        lambda depth, count: nb.NullSpacePosterior(
            deep(depth), solver=solvers.DualCholesky(), prior_precision=1.0
        ).fit(batches(count), 3, **FEW)
    )
    assert more[1] <= 1.2 * more[0]


def test_an_iteration_asks_as_often_whatever_the_depth() -> None:
    """To stop needs an answer; nothing that grows with the network may be asked beside."""
    each = reads_of_one_more(
        lambda depth, count: nb.NullSpacePosterior(
            deep(depth),
            solver=solvers.ConjugateGradient(max_iterations=count, tolerance=1e-30),
            prior_precision=1.0,
        ).fit(batches(4), 3, **FEW)
    )
    assert each[1] <= each[0] + 2
    assert each[1] < 16


def test_an_iteration_launches_fewer_where_there_is_more_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A block of rows that suits a CPU's cache is a launch that an accelerator waits for."""
    x = torch.randn(4200, 4, generator=torch.Generator().manual_seed(1))
    train = list(zip(x.split(1400), (torch.arange(4200) % 3).split(1400), strict=True))
    each = []
    try:
        for gigabytes in (1, 400):
            monkeypatch.setattr(memory, "_all_memory", lambda n=gigabytes: n * 2**30)
            memory.times_on.cache_clear()
            with Elsewhere() as device:
                counted = []
                for steps in (1, 3):
                    solver = solvers.ConjugateGradient(max_iterations=steps, tolerance=1e-30)
                    before = device.launches
                    nb.NullSpacePosterior(deep(2), solver=solver, prior_precision=1.0).fit(
                        train, 3, **FEW
                    )
                    counted.append(device.launches - before)
                each.append((counted[1] - counted[0]) / 2)
    finally:
        memory.times_on.cache_clear()
    assert each[1] < 0.6 * each[0]


def test_the_stand_in_refuses_what_a_gpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_reads, "LIBRARY", Path(__file__).parent)  # reads of this file's lines
    with Elsewhere() as device:
        x = There(torch.ones(3))
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="generator"):
            torch.nn.init.normal_(x, generator=torch.Generator())
        assert x.sum().device == x.device
        with device.watch() as counted:
            assert float((x + 1).sum()) == 6
        assert counted.total == 1
        with contextlib.suppress(RuntimeError):
            assert x.numpy() is None
