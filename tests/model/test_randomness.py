"""Frozen randomness: the same numbers in any batch, order and transformation, of the right distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Exponential, Normal, Uniform
from torch.nn import functional as F
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.jacobian.capture.generic import generic_rows
from nullbayes.model.batch import take
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace
from nullbayes.model.randomness import FrozenRandomness, Keyed, Replay, content_hash, keyed

F64 = torch.float64
Draw = Callable[[Tensor], Tensor]


def like(x: Tensor) -> Tensor:
    return torch.empty(len(x), 4, dtype=x.dtype)


def attention(x: Tensor) -> Tensor:
    q = x[:, None, :, None].expand(len(x), 2, 3, 4)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)


# What a model may draw for examples (B, 3).
DRAWS: dict[str, Draw] = {
    "randn": lambda x: torch.randn(len(x), 4, dtype=F64),
    "randn_like": torch.randn_like,
    "rand": lambda x: torch.rand(len(x), 4),
    "rand_like": torch.rand_like,
    "randint": lambda x: torch.randint(2, 9, (len(x),)),
    "randint_like": lambda x: torch.randint_like(x, 9),
    "single": lambda x: torch.randn(()).expand(len(x)),
    "folded": lambda x: torch.randn(len(x) * 5, 2).reshape(len(x), 5, 2),
    "normal": lambda x: torch.normal(x, 0.5),
    "normal_tensors": lambda x: torch.normal(x, x.abs()),
    "normal_size": lambda x: torch.normal(1.0, 2.0, (len(x), 4)),
    "normal_": lambda x: like(x).normal_(1, 2),
    "uniform_": lambda x: like(x).uniform_(-1, 2),
    "exponential_": lambda x: like(x).exponential_(2.0),
    "log_normal_": lambda x: like(x).log_normal_(0, 1),
    "cauchy_": lambda x: like(x).cauchy_(),
    "geometric_": lambda x: like(x).geometric_(0.3),
    "random_": lambda x: like(x).random_(3, 9),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli_p": lambda x: like(x).bernoulli_(0.3),
    "bernoulli_tensor": lambda x: x.clone().bernoulli_(x.sigmoid()),
    "multinomial": lambda x: torch.multinomial(x.softmax(1), 2),
    "multinomial_again": lambda x: torch.multinomial(x.softmax(1), 5, replacement=True),
    "dropout": lambda x: F.dropout(x, 0.5),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "dropout2d": lambda x: F.dropout2d(x[:, :, None, None].expand(-1, -1, 2, 2), 0.5),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "attention": attention,
    "gumbel_softmax": lambda x: F.gumbel_softmax(x),
    "Normal": lambda x: Normal(x, 0.5).rsample(),
    "Uniform": lambda x: Uniform(x, x + 1).rsample(),
    "Bernoulli": lambda x: Bernoulli(logits=x).sample(),
    "Categorical": lambda x: Categorical(logits=x).sample(),
    "Exponential": lambda x: Exponential(x.exp()).rsample(),
    "own generator": lambda x: torch.randn(len(x), 4, generator=torch.default_generator),
}


def examples(count: int = 6, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(5), dtype=dtype)


def replayed(draw: Draw, x: Tensor, seed: int = 0, number: int = 0) -> Tensor:
    frozen = keyed(x, len(x), seed, [number])
    with Replay(frozen.keys, seed):
        return draw(frozen.inputs)


@pytest.mark.parametrize("name", DRAWS)
def test_an_example_draws_the_same_in_any_batch_and_order(name: str) -> None:
    draw, x = DRAWS[name], examples(20)
    state = torch.get_rng_state()
    whole = replayed(draw, x)
    order = torch.tensor([3, 0, 5, 1])
    assert_close(replayed(draw, x[order]), whole[order], rtol=0, atol=0)
    assert_close(replayed(draw, x[2:3]), whole[2:3], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)  # the global stream is not read
    outside = draw(x)
    torch.set_rng_state(state)
    assert whole.shape == outside.shape and whole.dtype == outside.dtype
    if name != "single":
        assert not torch.equal(whole[:10], whole[10:])
    assert not torch.equal(replayed(draw, x, seed=1), whole)
    if name != "single":
        assert not torch.equal(replayed(draw, x, number=1), whole)


def test_numbers_of_one_pass_differ_from_each_other() -> None:
    x = examples(1000)
    a, b = replayed(lambda x: torch.stack([torch.randn(len(x)), torch.randn(len(x))]), x)
    assert abs(float((a * b).mean())) < 4 / math.sqrt(1000)
    many = replayed(lambda x: torch.randn(len(x), 2), x)
    assert abs(float((many[:, 0] * many[:, 1]).mean())) < 4 / math.sqrt(1000)
    other = replayed(lambda x: torch.randn(len(x)), x, number=1)
    assert abs(float((a * other).mean())) < 4 / math.sqrt(1000)


def empty(x: Tensor) -> Tensor:
    return torch.empty(len(x), 50, dtype=F64)


CONTINUOUS: dict[str, tuple[Draw, Draw]] = {
    "normal": (lambda x: torch.randn(len(x), 50, dtype=F64), torch.special.ndtr),
    "uniform": (lambda x: torch.rand(len(x), 50, dtype=F64), lambda v: v),
    "exponential": (lambda x: empty(x).exponential_(2.0), lambda v: 1 - (-2 * v).exp()),
    "cauchy": (
        lambda x: empty(x).cauchy_(1.0, 2.0),
        lambda v: ((v - 1) / 2).atan() / math.pi + 0.5,
    ),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_draws_have_their_distribution(name: str) -> None:
    """Kolmogorov's distance to the distribution function, at a level of 1e-4."""
    draw, distribution = CONTINUOUS[name]
    u = distribution(replayed(draw, examples(400)).flatten()).sort().values
    grid = torch.arange(1, len(u) + 1, dtype=F64) / len(u)
    assert float((u - grid).abs().max()) < 2.2 / math.sqrt(len(u))


def picked(x: Tensor) -> Tensor:
    weights = torch.tensor([0.1, 0.2, 0.7]).expand(len(x), 3)
    return F.one_hot(torch.multinomial(weights, 50, replacement=True), 3)


# Outcomes as ones and zeros (B, 50, K), and how often each is to be one.
DISCRETE: dict[str, tuple[Draw, list[float]]] = {
    "randint": (lambda x: F.one_hot(torch.randint(0, 4, (len(x), 50)), 4), [0.25] * 4),
    "multinomial": (picked, [0.1, 0.2, 0.7]),
    "dropout": (lambda x: (F.dropout(torch.ones(len(x), 50), 0.25) * 0.75)[..., None], [0.75]),
    "geometric": (lambda x: (empty(x).geometric_(0.3) == 1)[..., None], [0.3]),
    "bernoulli": (lambda x: torch.bernoulli(torch.full((len(x), 50), 0.3))[..., None], [0.3]),
}


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_draws_have_their_distribution(name: str) -> None:
    draw, expected = DISCRETE[name]
    found = replayed(draw, examples(400)).double().flatten(0, 1)
    p = torch.tensor(expected, dtype=F64)
    error = (p * (1 - p) / len(found)).sqrt()
    assert bool(((found.mean(0) - p).abs() < 4.5 * error).all())


def test_draws_without_replacement_are_distinct() -> None:
    picked = replayed(lambda x: torch.multinomial(x.new_ones(len(x), 6), 6), examples(20))
    assert torch.equal(picked.sort(1).values, torch.arange(6).expand(20, 6))


def test_zero_padding_and_dtype_leave_an_example_what_it_is() -> None:
    x = torch.randint(1, 50, (3, 4))
    padded = torch.cat([x, torch.zeros(3, 2, dtype=torch.int64)], dim=1)
    assert torch.equal(content_hash(x, 3), content_hash(padded, 3))
    y = examples(dtype=torch.float32)
    assert torch.equal(content_hash(y, 6), content_hash(y.double(), 6))
    assert torch.equal(content_hash(y * 0, 6), content_hash(y * -0.0, 6))
    assert len(content_hash(y, 6).unique()) == 6
    assert not torch.equal(content_hash(y, 6), content_hash(y.flip(1), 6))
    a, b = {"a": y, "n": torch.ones(2)}, {"a": y, "n": torch.zeros(2)}  # no batch axis
    assert torch.equal(content_hash(a, 6), content_hash(b, 6))


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda x: x + torch.randn(1, 3), r"shape \(1, 3\) for 6 examples.*one per example"),
        (lambda x: torch.poisson(x.abs()), "poisson.*no frozen form"),
        (lambda x: x[:, torch.randperm(3)], "randperm.*no frozen form"),
    ],
    ids=["shared", "poisson", "randperm"],
)
def test_what_cannot_be_frozen_says_so(draw: Draw, words: str) -> None:
    with pytest.raises(nb.ModelError, match=words):
        replayed(draw, examples())


class Several(nn.Module):
    """Noise in several places, behind a recurrent parameter that has no rule."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(torch.tanh(self.first(x)), 0.3) * self.scale
        h = h + torch.randn_like(h) * self.scale.exp()
        h = h * torch.rand(len(h), 1, dtype=h.dtype)
        if self.in_place:
            h = h + torch.empty(len(h), 4, dtype=h.dtype).normal_() * self.scale
        return self.last(h)


@pytest.mark.parametrize("in_place", [False, True])
def test_all_roads_see_the_same_noise(in_place: bool) -> None:
    """Vectorised rows, rows in a loop, forward mode and plain autograd agree; so do captured rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Several(in_place).double().eval()
    functional = FunctionalModel(
        model, ParameterSpace.from_model(model), randomness=FrozenRandomness(3)
    )
    x = functional.keyed(examples(), range(2))
    assert isinstance(x, Keyed) and len(x.keys) == 12
    cotangents = torch.randn(2, 12, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    names = functional.space.names
    looped = generic_rows(functional, names, x, cotangents, vmapped=False)
    if not in_place:  # what vmap refuses, the probe hands to the loop
        vmapped = generic_rows(functional, names, x, cotangents)
        for name in names:
            assert_close(vmapped[name], looped[name])
    tangent = {n: torch.randn_like(w) for n, w in functional.weights().items()}
    # Shape (12, 2).
    change = torch.func.jvp(lambda w: functional(w, x), (functional.weights(),), (tangent,))[1]
    along = sum(torch.einsum("bcp,p->bc", looped[n], tangent[n].flatten()) for n in names)
    assert_close((cotangents * change).sum(2).T, along)
    assert_close(functional.outputs(x)[4:6], functional.outputs(take(x, 4, 6)), rtol=0, atol=1e-14)


def test_settings_are_checked() -> None:
    model = nn.Linear(3, 2)
    for value in ("fixed", 3, object()):
        with pytest.raises(nb.InputError, match=r'`randomness` is .*"frozen"'):
            nb.NullSpacePosterior(model, randomness=value)  # type: ignore[arg-type]
    for draws in (0, 1.5, True):
        with pytest.raises(nb.InputError, match="`draws` is"):
            nb.NullSpacePosterior(model, randomness="frozen", draws=draws)  # type: ignore[arg-type]
    with pytest.raises(nb.InputError, match=r'all draws would be the same.*randomness="frozen"'):
        nb.NullSpacePosterior(model, draws=2)


def test_dropout_left_on_deliberately_is_frozen() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 2)).double().train()
    x, y = examples(), torch.tensor([0, 1, 0, 1, 0, 1])
    options: dict[str, Any] = {"prior_precision": 1.0, "delta": 0}
    with pytest.raises(nb.ModelError, match=r'training mode.*randomness="frozen"'):
        nb.NullSpacePosterior(model, **options).fit([(x, y)], progress=False)
    posterior = nb.NullSpacePosterior(model, randomness="frozen", **options)
    posterior.fit([(x, y)], num_samples=4, progress=False)
    assert model.training
    assert posterior.certificate.held
    whole, part = posterior.predict(x), posterior.predict(x[[4, 2]])
    assert_close(part.outputs, whole.outputs[:, [4, 2]])
    before, after = whole.point.softmax(1), whole.outputs.softmax(2)
    assert_close(after, before.expand_as(after), rtol=0, atol=1e-8)
    assert not torch.equal(posterior.predict(x, draw=1).point, whole.point)
    model[1].p = 0.0  # another network, as its outputs say
    with pytest.raises(nb.ModelError, match=r"outputs are others.*a setting that changed"):
        posterior.predict(x)
