"""Weights that lie in memory under a second name: loading a sample moves both, and the certificate has to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nullbayes as nb
from tests.support import says

X = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
TRAIN = [(X[:5], torch.zeros(5, 2)), (X[5:], torch.zeros(3, 2))]


class Two(nn.Module):
    """Two layers; ``second`` is what a subclass holds beside them."""

    second: Any

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(12, 9), nn.Linear(9, 2)
        self.add()

    def add(self) -> None:
        """What lies in the memory of a weight."""

    def beside(self, x: Tensor) -> Tensor | float:
        """What outputs have of it."""
        return 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.a(x))) + self.beside(x)


class Attribute(Two):
    def add(self) -> None:
        self.second = [self.a.weight.data[:2]]

    def beside(self, x: Tensor) -> Tensor:
        return F.linear(x, self.second[0])


class Buffer(Two):
    def add(self) -> None:
        self.register_buffer("second", self.a.weight.detach()[3:5])

    def beside(self, x: Tensor) -> Tensor:
        return F.linear(x, self.second)


class View(Two):
    def add(self) -> None:
        self.second = self.a.weight.T

    def beside(self, x: Tensor) -> Tensor:
        return (x @ self.second)[:, :2]


class Array(Two):
    def add(self) -> None:
        self.second = self.a.weight.detach().numpy()[:2, ::-1]

    def beside(self, x: Tensor) -> Tensor:
        return x @ torch.from_numpy(self.second.copy()).to(x).T


class Closure(Two):
    def add(self) -> None:
        weight = self.a.weight.data
        self.second = lambda x: F.linear(x, weight)[:, :2]

    def beside(self, x: Tensor) -> Tensor:
        return self.second(x)


class Box:
    """No module."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


class Object(Two):
    def add(self) -> None:
        self.second = Box(self.a.weight.data)

    def beside(self, x: Tensor) -> Tensor:
        return F.linear(x, self.second.weight)[:, :2]


class Parameters(Two):
    def add(self) -> None:
        self.second = nn.Linear(12, 9)
        self.second.weight = nn.Parameter(self.a.weight.data)

    def beside(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.second(x))[:, :2]


class Frozen(Parameters):
    def add(self) -> None:
        super().add()
        self.second.requires_grad_(False)


class Unread(Two):
    """The same memory, and no output depends on it."""

    def add(self) -> None:
        self.register_buffer("second", self.a.weight.detach())
        self.other = self.o.bias.detach().numpy()


class Neighbours(Two):
    """Weights that lie in one piece of memory, each at a place of its own."""

    def add(self) -> None:
        memory = torch.cat([p.detach().reshape(-1) for p in self.parameters()])
        at = 0
        for p in self.parameters():
            p.data = memory[at : at + p.numel()].view_as(p)
            at += p.numel()


POSTERIORS: dict[str, Callable[[nn.Module], Any]] = {
    "rows": lambda m: nb.NullSpacePosterior(m, nb.Regression(noise_variance=1.0), "outputs"),
    "layers": lambda m: nb.LayerNullSpacePosterior(m, nb.Regression(noise_variance=1.0), delta=0.0),
}


def made(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1), dtype=like.dtype)


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize(
    "kind", [Attribute, Buffer, View, Array, Closure, Object, Parameters, Frozen]
)
def test_what_moves_with_a_weight_is_named(kind: type[nn.Module], posterior: str) -> None:
    """Samples of the weights alone, loaded into such a network, gave another one under a certificate that held."""
    name = "a tensor of shape" if kind in (Closure, Object) else "second"
    with says(nb.ModelError, name, "['a.weight']", "`parameters=`", "`.clone()`"):
        POSTERIORS[posterior](made(kind)).fit(TRAIN, 2, progress=False)


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("kind", [Unread, Neighbours])
def test_memory_that_no_output_depends_on_is_no_matter(
    kind: type[nn.Module], posterior: str
) -> None:
    """A fresh network that samples are loaded into keeps its training outputs as the certificate says."""
    model = made(kind)
    fitted = POSTERIORS[posterior](model).fit(TRAIN, 2, progress=False)
    assert fitted.certificate.held
    fresh, size = made(kind).double(), 1.0 if posterior == "layers" else 1e-4
    trained = {n: t.clone() for n, t in fresh.state_dict().items()}

    def moved(change: dict[str, Tensor]) -> float:
        fresh.load_state_dict({n: t + size * change[n] for n, t in trained.items()})
        with torch.no_grad():
            return float((fresh(X.double()) - before).norm())

    with torch.no_grad():
        before = fresh(X.double())
    for sample in fitted.sample(2):
        change = {n: sample[n] - t for n, t in trained.items()}
        other = {n: noise(c) * c.square().mean().sqrt() for n, c in change.items()}
        assert moved(change) < 1e-3 * moved(other)


def test_without_the_weight_there_is_nothing_to_move() -> None:
    fitted = nb.NullSpacePosterior(
        made(Buffer), nb.Regression(noise_variance=1.0), "outputs", parameters=["o.weight"]
    ).fit(TRAIN, 2, progress=False)
    assert fitted.certificate.held
