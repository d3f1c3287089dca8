"""Networks that forward mode, reverse mode and a deep copy agree about, and that do something else all the same."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import nullbayes as nb
from nullbayes.audit.sampling import Reservoir

X = torch.randn(10, 9, generator=torch.Generator().manual_seed(0)).double()
RARE = 8


class Two(nn.Module):
    """Two layers, and what a subclass adds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(9, 12), nn.Linear(12, 2)
        self.add()

    def add(self) -> None:
        """Parts of a subclass."""

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.hidden(x))


class Past(Two):
    """A weight acts past its gradient."""

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) + F.linear(x, self.a.weight.detach())


class Rarely(Two):
    """The same for the one example that asks for it."""

    def hidden(self, x: Tensor) -> Tensor:
        asks = (x[:, :1] == X[RARE, 0].to(x)).to(x)
        return torch.tanh(self.a(x)) + asks * F.linear(x, self.a.weight.detach())


class Locked(Two):
    """Cannot be copied."""

    def add(self) -> None:
        self.lock = threading.Lock()


class LockedPast(Past, Locked):
    pass


class Constant(Two):
    """Cannot be converted: a matrix that is neither parameter nor buffer."""

    def add(self) -> None:
        self.matrix = torch.eye(9, dtype=self.a.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.matrix)


class ConstantPast(Constant, Past):
    pass


class Remembers(Two):
    """Results by the identity of a weight."""

    def add(self) -> None:
        self.known: dict[int, Tensor] = {}

    def hidden(self, x: Tensor) -> Tensor:
        key = id(self.a.weight)
        if key not in self.known:
            self.known[key] = 1.0 * self.a.weight.detach()
        return torch.tanh(self.a(x)) + F.linear(x, self.known[key])


class Floored(Two):
    """Rounded down on the grid that the weights lie on."""

    def add(self) -> None:
        with torch.no_grad():
            self.a.weight.mul_(4).round_().div_(4)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, (4 * self.a.weight).floor() / 4, self.a.bias))


class Nearest(Floored):
    """Rounded to the nearest: weights on the grid have room on both sides."""

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, (4 * self.a.weight).round() / 4, self.a.bias))


class Orthogonal(Two):
    """PyTorch keeps signs of columns as numbers of 1 and -1, and cuts them to integers."""

    def add(self) -> None:
        parametrizations.orthogonal(self.a)


def made(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            return kind().eval()
        finally:
            torch.set_default_dtype(torch.float32)


def certified(kind: type[nn.Module], dtype: torch.dtype) -> tuple[Any, float]:
    """A certificate, and how far its samples move the training outputs of plain networks, beside other weights.

    The judge makes a network in float64 for each call, and takes central differences of all weights at a time.
    """
    model, x = made(kind, dtype), X.to(dtype)
    posterior = nb.NullSpacePosterior(
        model, nb.Regression(noise_variance=1.0), "outputs", delta=0.0, prior_precision=1.0
    ).fit([(x, x.new_zeros(len(x), 2))], 2, progress=False)
    trained = {n: t.double() for n, t in model.state_dict().items()}
    [sample] = posterior.sample(1)
    change = {n: sample[n] - t for n, t in trained.items()}
    generator = torch.Generator().manual_seed(1)
    other = {n: torch.randn(c.shape, generator=generator) * c.std() for n, c in change.items()}

    def moved(by: dict[str, Tensor]) -> float:
        ends = []
        for step in (1e-6, -1e-6):
            network = made(kind, torch.float64)
            network.load_state_dict({n: t + step * by[n] for n, t in trained.items()})
            with torch.no_grad():
                ends.append(torch.cat([network(row) for row in X.split(1)]))
        return float((ends[0] - ends[1]).norm())

    return posterior.certificate, moved(change) / moved(other)


WRONG = [
    (Rarely, torch.float64),
    (Rarely, torch.float32),
    (LockedPast, torch.float64),
    (ConstantPast, torch.float32),
    (Remembers, torch.float64),
    (Floored, torch.float32),
    (Orthogonal, torch.float64),
]
RIGHT = [
    (Locked, torch.float32),
    (Constant, torch.float32),
    (Nearest, torch.float32),
    (Nearest, torch.float64),
]


@pytest.mark.parametrize(("kind", "dtype"), WRONG, ids=str)
def test_no_guarantee_is_said_to_have_held(kind: type[nn.Module], dtype: torch.dtype) -> None:
    certificate, moved = certified(kind, dtype)
    assert moved > 0.02
    assert certificate.residual < 1e-3 and not certificate.held
    jumps = kind in (Floored, Orthogonal)
    assert ("jump" if jumps else "`.detach()`") in certificate.verdict
    assert (certificate.audit.jump > 0) == jumps


@pytest.mark.parametrize(("kind", "dtype"), RIGHT, ids=str)
def test_where_nothing_is_wrong_it_did(kind: type[nn.Module], dtype: torch.dtype) -> None:
    certificate, moved = certified(kind, dtype)
    assert moved < 1e-3
    assert certificate.held


# -- one example of many -------------------------------------------------------------------------

MANY = torch.randn(300, 9, generator=torch.Generator().manual_seed(2))
ALONE = 217


class OneOfMany(Two):
    """A way past the gradient that one example of 300 takes; 16 are audited."""

    def forward(self, x: Tensor) -> Tensor:
        asks = (x[:, :1] == MANY[ALONE, 0].to(x)).to(x)
        return super().forward(x) + asks * F.linear(x, self.a.weight[:2].detach())


class Kinks(Two):
    """Short steps cross some of them, and rows are right."""

    def hidden(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x))


@pytest.mark.parametrize("preserve", ["outputs", "predictions", "loss"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_example_of_many_is_audited_because_a_step_parts_it_from_its_rows(
    dtype: torch.dtype, preserve: str
) -> None:
    x, labels = MANY.to(dtype), torch.arange(300) % 2
    train = list(zip(x.split(80), labels.split(80), strict=True))
    audit = (
        nb.NullSpacePosterior(made(OneOfMany, dtype), preserve=preserve)
        .fit(train, 2, progress=False)
        .certificate.audit
    )
    assert not audit.passed and audit.worst_example == ALONE
    for kind in (Two, Kinks):
        model = made(kind, dtype)
        posterior = nb.NullSpacePosterior(model, preserve=preserve).fit(train, 2, progress=False)
        assert posterior.certificate.audit.passed


def test_suspects_come_before_those_that_are_drawn() -> None:
    def drawn(suspected: dict[int, float]) -> list[int]:
        reservoir = Reservoir(4, 0, 2**20)
        for start in range(0, 60, 20):
            some = MANY[start : start + 20]
            for number, share in suspected.items():
                if start <= number < start + 20:
                    reservoir.suspect(some, torch.arange(20), number - start, share, 2)
            reservoir.offer(some, torch.arange(20))
        for one in reservoir.drawn:
            torch.testing.assert_close(one.inputs, MANY[one.number : one.number + 1])
            assert int(one.targets) == one.number % 20
        return [one.number for one in reservoir.drawn]

    usual = drawn({})
    assert len(usual) == 4
    found = drawn({5: 0.2, 33: 0.9, 41: 0.3})  # the two that are suspected most
    assert len(found) == 4 and {33, 41} <= set(found) and 5 not in set(found) - set(usual)
    assert len(set(found) & set(usual)) >= 2
