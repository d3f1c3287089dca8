"""Parameters without a rule, served by running the module around them again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import unchanged
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.jacobian.capture import single_module as local
from nullbayes.jacobian.capture.capture import capture
from nullbayes.jacobian.capture.generic import generic_rows
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.capture.verify import block_rows, prove
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace

BATCH, CLASSES = 5, 3


class Attention(nn.Module):
    """A packed projection, a bias of relative positions from a module without inputs, a mask that is no batch."""

    def __init__(self, width: int = 4, length: int = 6) -> None:
        super().__init__()
        self.packed = nn.Parameter(0.5 * torch.randn(3 * width, width))
        self.positions = Positions(length)
        self.register_buffer("mask", torch.randn(length, length))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = nn.functional.linear(x, self.packed).chunk(3, -1)
        scores = q @ k.mT + self.positions() + (self.mask if mask is None else mask)
        weights = scores.softmax(-1)
        return weights @ v, weights


class Positions(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * length - 1))
        self.length = length

    def forward(self) -> Tensor:
        at = torch.arange(self.length)
        out: Tensor = self.table[at[:, None] - at + self.length - 1]
        return out


class Embedded(nn.Module):
    """A class token and positions, as vision transformers have them."""

    def __init__(self, width: int = 4, length: int = 5) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, length + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedded, self.attention = Embedded(), Attention()
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, CLASSES)
        # Owned by the model itself: nothing smaller sees the batch.
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedded(x)
        mask = torch.zeros(6, 6, dtype=x.dtype)
        h = h + self.attention(self.attention(h)[0], mask=mask)[0]  # used twice
        out: Tensor = self.head((self.norm(h) * self.scale)[:, 0])
        return out


def settled(model: nn.Module, x: Any) -> tuple[FunctionalModel, CapturePlan]:
    functional = FunctionalModel(model, ParameterSpace.from_model(model, None))
    return functional, prove(functional, x)


def rows_of(functional: FunctionalModel, plan: CapturePlan, x: Any, cots: Tensor) -> Tensor:
    made = type("Made", (), {"values": cots})()
    return block_rows(functional, capture(functional, plan, x, lambda _: made)[0])


def reference(functional: FunctionalModel, x: Any, cots: Tensor) -> Tensor:
    rows = generic_rows(functional, functional.space.names, x, cots, vmapped=False)
    return torch.cat([rows[n].flatten(0, 1) for n in functional.space.names], 1)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


def test_the_smallest_module_that_sees_the_batch_serves(net: nn.Module) -> None:
    x = torch.randn(BATCH, 5, 4).double()
    with unchanged(net):
        functional, plan = settled(net, x)
    served = {name: site.path for site in plan.local for name in site.names}
    # What is added or put beside its input is given to each example instead.
    assert set(plan.spread) == {"embedded.token", "embedded.positions"}
    assert served == {
        "attention.packed": "attention",
        "attention.positions.table": "attention",  # its own module takes no input
    }
    assert all(site.vmapped and site.axis == 0 for site in plan.local)
    assert set(plan.generic) == {*served, *plan.spread, "scale"}
    for size in (1, 2, 6, 12):  # 6 is the length of the mask, too
        x = torch.randn(size, 5, 4).double()
        cots = torch.randn(2, size, CLASSES).double()
        with unchanged(net):
            rows = rows_of(functional, plan, x, cots)
        assert_close(rows, reference(functional, x, cots), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers_run_alone_on_either_axis(kind: Any, batch_first: bool) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = kind(3, 4, batch_first=batch_first), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = self.cell(x if batch_first else x.transpose(0, 1))[0]
            out: Tensor = self.head(h[:, -1] if batch_first else h[-1])
            return out

    torch.manual_seed(1)
    model, x = Last().double().eval(), torch.randn(BATCH, 7, 3).double()
    functional, plan = settled(model, x)
    (site,) = plan.local
    assert (site.path, site.axis) == ("cell", 0 if batch_first else 1)
    cots = torch.randn(2, BATCH, CLASSES).double()
    assert_close(
        rows_of(functional, plan, x, cots), reference(functional, x, cots), rtol=1e-9, atol=1e-12
    )


def test_a_parameter_used_elsewhere_too_is_served_from_further_out() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.inner(x)) + self.inner.gain.square()

    torch.manual_seed(2)
    model = nn.Sequential(Outer(), nn.Linear(4, CLASSES)).double().eval()
    x, cots = torch.randn(BATCH, 4).double(), torch.randn(2, BATCH, CLASSES).double()
    functional, plan = settled(model, x)
    assert [(s.path, s.names) for s in plan.local] == [("0", ["0.inner.gain"])]
    assert_close(rows_of(functional, plan, x, cots), reference(functional, x, cots))


def test_what_mixes_its_leading_axis_is_not_run_alone() -> None:
    """Examples along the axis of features: the module's leading axis is a multiple of nothing."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(7))

        def forward(self, x: Tensor) -> Tensor:  # (7, 2, B)
            return torch.cumsum(x * self.gain[:, None, None], 0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turned, self.head = Turned(), nn.Linear(14, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.turned(x.permute(1, 2, 0)).permute(2, 0, 1).flatten(1))
            return out

    torch.manual_seed(3)
    model = Model().double().eval()
    functional, plan = settled(model, torch.randn(3, 7, 2).double())
    assert not plan.local and plan.generic == ["turned.gain"]
    for size in (7, 14):
        x, cots = torch.randn(size, 7, 2).double(), torch.randn(2, size, CLASSES).double()
        assert_close(rows_of(functional, plan, x, cots), reference(functional, x, cots))


def test_a_call_that_differs_from_the_probed_one_goes_through_the_whole_model() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return x * self.gain if bias is None else x * self.gain.exp() + bias

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gated, self.head = Gated(), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            extra = {"bias": torch.ones(4, dtype=x.dtype)} if x.shape[1] > 3 else {}
            h = self.gated(x.mean(1), **extra)
            out: Tensor = self.head(h)
            return out

    torch.manual_seed(4)
    model = Model().double().eval()
    functional, plan = settled(model, torch.randn(3, 2, 4).double())
    assert [s.path for s in plan.local] == ["gated"]
    x, cots = torch.randn(BATCH, 5, 4).double(), torch.randn(2, BATCH, CLASSES).double()
    assert_close(rows_of(functional, plan, x, cots), reference(functional, x, cots))


def test_buffers_and_counters_of_the_module_stay_as_they_are() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(4))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.gain

    torch.manual_seed(5)
    model = nn.Sequential(Counting(), nn.Linear(4, CLASSES)).eval()
    x, y = torch.randn(8, 4), torch.arange(8) % CLASSES
    with unchanged(model):
        posterior = nb.NullSpacePosterior(model).fit([(x, y)], 4, progress=False)
        assert posterior.certificate.generic == ("0.gain",)
        assert posterior._fit is not None and posterior._fit.plan is not None
        assert [s.path for s in posterior._fit.plan.local] == ["0"]


def test_one_module_costs_less_than_the_whole_model(net: nn.Module) -> None:
    """Counted, not timed: how often the layers outside the served modules run during a capture."""
    model = nn.Sequential(nn.Linear(4, 4), Embedded(), nn.Flatten(), nn.Linear(24, CLASSES)).eval()
    x = torch.randn(BATCH, 5, 4)
    functional, plan = settled(model, x)
    runs: list[int] = []
    handle = model[0].register_forward_hook(lambda *_: runs.append(1))
    made = type("Made", (), {"values": torch.randn(2, BATCH, CLASSES)})()
    capture(functional, plan, x, lambda _: made)
    handle.remove()
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("", []),
        ("a", ["a"]),
        ("a.b.c", ["a.b.c", "a.b", "a"]),
        ("a.b.c.d.e.f", ["a.b.c.d.e.f", "a.b.c.d.e", "a.b.c.d", "a.b.c", "a.b"]),
    ],
)
def test_ancestors(path: str, wanted: list[str]) -> None:
    assert list(local.ancestors(path)) == wanted
