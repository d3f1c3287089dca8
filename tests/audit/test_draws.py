"""A network that draws random numbers is refused, whatever other threads do; numbers that they draw are not its own."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from support import says
from torch import Tensor, nn
from torch.nn import functional as F

import nullbayes as nb
from nullbayes.audit import draws
from nullbayes.audit.draws import without_draws
from nullbayes.model.functional import FunctionalModel, functional_model
from tests.audit.examples_setup import Calls

Draw = Callable[[], Any]
GLOBAL: dict[str, Draw] = {
    "torch": lambda: torch.rand(1),
    "NumPy": lambda: np.random.rand(),  # noqa: NPY002
    "Python's `random`": lambda: random.random(),
}
X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)


def functional(
    forward: Callable[..., Tensor] = lambda m, x: m.a(x), randomness: Any = None, **parts: nn.Module
) -> FunctionalModel:
    model = Calls(forward, a=nn.Linear(4, 3), **parts)
    return functional_model(model, None, None, None, randomness)


def looked(f: FunctionalModel) -> Tensor:
    return without_draws(f, lambda: f(f.weights(), X), "batch 4")


@contextmanager
def another(draw: Draw | None) -> Iterator[Draw]:
    """A thread that is alive, and draws whenever it is asked to, by what this gives; that waits until it has."""
    asked, drawn, over = threading.Event(), threading.Event(), threading.Event()

    def run() -> None:
        while not over.is_set():
            if asked.wait(0.01) and draw is not None:
                asked.clear()
                draw()
                drawn.set()

    def ask() -> None:
        drawn.clear()
        asked.set()
        assert drawn.wait(10)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ask
    finally:
        over.set()
        thread.join()


@contextmanager
def drawing(draw: Draw) -> Iterator[None]:
    """A thread that draws all the time."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            draw()
            time.sleep(1e-4)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(draws, "WAITING", 0.1)
    numbers, python = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield
    np.random.set_state(numbers)  # noqa: NPY002
    random.setstate(python)


@pytest.mark.parametrize("times", [1, 3])
def test_numbers_that_another_thread_draws_while_the_network_computes(times: int) -> None:
    with another(GLOBAL["torch"]) as ask:
        calls: list[int] = []

        def forward(m: Any, x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) <= times:
                ask()
            return m.a(x)

        f = functional(forward)
        expected = X @ f.model.a.weight.T + f.model.a.bias
        assert torch.equal(looked(f), expected)
        assert len(calls) == times + 1


@pytest.mark.parametrize("kind", GLOBAL)
def test_a_thread_that_draws_all_the_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "WAITING", 30.0)  # ended by what moves

    def forward(m: Any, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return m.a(x)

    with drawing(GLOBAL[kind]):
        looked(functional(forward))


def test_a_loader_of_another_thread() -> None:
    loader = torch.utils.data.DataLoader(torch.arange(4), shuffle=True)
    with another(lambda: list(loader)) as ask:
        calls: list[int] = []

        def forward(m: Any, x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) % 3 == 0:
                ask()
            return m.a(x)

        model = Calls(forward, a=nn.Linear(4, 3)).eval()
        data = [(X, torch.tensor([0, 1, 2]))]
        posterior = nb.NullSpacePosterior(model, "classification").fit(data)
        assert len(calls) > 11
        assert posterior.certificate.held


def test_a_frozen_network_beside_a_thread_that_draws() -> None:
    f = functional(lambda m, x: m.a(F.dropout(x, 0.5, training=True)), nb.FrozenRandomness())
    with drawing(GLOBAL["torch"]):
        without_draws(f, lambda: f(f.weights(), f.keyed(X)), "batch 4")


def test_a_generator_that_the_network_makes_anew() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(x) + torch.rand(3, generator=torch.Generator().manual_seed(2))

    with another(GLOBAL["torch"]) as ask:
        f = functional(forward)
        calls = iter([ask, *[lambda: None] * 9])

        def call() -> Tensor:
            next(calls)()
            return f(f.weights(), X)

        without_draws(f, call, "batch 4")


# -- what draws is refused -----------------------------------------------------------------------


def refused(f: FunctionalModel, *words: str) -> None:
    with says(nb.errors.ModelError, "batch 4: the network draws random numbers", *words):
        looked(f)


@pytest.mark.parametrize("beside", [None, "torch", "NumPy", "Python's `random`"])
@pytest.mark.parametrize("kind", ["torch", "noise.source"])
def test_torch_numbers_of_the_network(kind: str, beside: str | None) -> None:
    """Seen whatever other threads draw, and be it the same numbers."""
    held = nn.Identity()
    held.source = torch.Generator()  # type: ignore[assignment]

    def forward(m: Any, x: Tensor) -> Tensor:
        torch.rand(1, generator=m.noise.source if kind == "noise.source" else None)
        return m.a(x)

    with another(None) if beside is None else drawing(GLOBAL[beside]):
        refused(functional(forward, noise=held), kind, "model.eval()")


@pytest.mark.parametrize("kind", ["NumPy", "Python's `random`"])
def test_other_numbers_of_the_network(kind: str) -> None:
    with another(None):
        refused(functional(lambda m, x: (GLOBAL[kind](), m.a(x))[1]), kind, "another thread")
    with drawing(GLOBAL["torch"]):
        refused(functional(lambda m, x: (GLOBAL[kind](), time.sleep(0.01), m.a(x))[2]), kind)


@pytest.mark.parametrize("kind", GLOBAL)
def test_a_network_that_draws_once(kind: str) -> None:
    """The first call is the one that counts, though the next would move nothing."""
    times = iter([GLOBAL[kind]])

    def forward(m: Any, x: Tensor) -> Tensor:
        next(times, lambda: None)()
        return m.a(x)

    with another(None):
        refused(functional(forward), kind)


def test_a_network_that_draws_in_a_thread_of_its_own() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        thread = threading.Thread(target=GLOBAL["torch"])
        thread.start()
        thread.join()
        return m.a(x)

    with another(None):
        refused(functional(forward), "(torch)")


def test_an_operator_of_another_library_that_draws_unseen() -> None:
    """Its draw is inside, where no one looks; as nobody else draws, it is the network's."""

    @torch.library.custom_op("drawn_elsewhere::noise", mutates_args=())
    def noise(x: Tensor) -> Tensor:
        GLOBAL["torch"]()
        return x.clone()

    once = iter([noise])
    with another(None):
        refused(functional(lambda m, x: m.a(next(once, torch.clone)(x))), "(torch)")


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.rand(2),
        lambda x: torch.randn_like(x),
        lambda x: torch.randint(5, (2,)),
        lambda x: torch.randperm(4),
        lambda x: torch.bernoulli(x.abs()),
        lambda x: torch.multinomial(x.abs() + 1, 2),
        lambda x: torch.normal(x, 1.0),
        lambda x: torch.poisson(x.abs() + 1),
        lambda x: torch.binomial(torch.full((3,), 9.0), torch.full((3,), 0.5)),
        lambda x: torch.empty(2).uniform_(),
        lambda x: torch.empty(2).random_(),
        lambda x: torch.empty(2).exponential_(),
        lambda x: torch.empty(2).geometric_(0.5),
        lambda x: torch.empty(2).cauchy_(),
        lambda x: torch.empty(2).log_normal_(),
        lambda x: torch.rand(2, generator=torch.default_generator),
        lambda x: torch.distributions.Dirichlet(torch.ones(3)).sample(),
        lambda x: torch.distributions.Gamma(torch.ones(3), 1.0).sample(),
        lambda x: F.dropout(x, 0.5),
        lambda x: F.alpha_dropout(x, 0.5, training=True),
        lambda x: F.feature_alpha_dropout(x, 0.5, training=True),
        lambda x: F.gumbel_softmax(x),
        lambda x: F.rrelu(x, training=True),
        lambda x: F.fractional_max_pool2d(torch.ones(1, 1, 8, 8), 2, output_size=4),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        lambda x: nn.LSTM(4, 4, 2, dropout=0.5)(x.float()),
        lambda x: torch.svd_lowrank(x),
    ],
)
def test_every_random_operation_is_seen(draw: Callable[[Tensor], Any]) -> None:
    """Each beside a thread that draws the same numbers, so that only what is seen can tell."""
    f = functional(lambda m, x: (draw(x), m.a(x))[1])
    with drawing(GLOBAL["torch"]):
        refused(f, "(torch)")
