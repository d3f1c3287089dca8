"""Which tensors, and which axes of layers, have the batch: found out, whatever lengths happen to agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes.model.axes import Axes
from nullbayes.model.batch import Batch, select, take
from tests.cases.dense import (
    assert_kept,
    assert_predicts,
    assert_rows,
    fitted,
    normal,
    rows,
    seeded,
)


class SequenceFirst(nn.Module):
    """(B, L, d) in and out, the layers inside with the batch on the second axis."""

    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inner, self.head = inner(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.transpose(0, 1))
        h = h[0] if isinstance(h, tuple) else h
        return self.head(torch.tanh(h).mean(0))


INNER: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)),
    "norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.PReLU()),
    "lstm": lambda: nn.LSTM(3, 4),
    "bias alone": lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.RMSNorm(4)),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("sizes", [(1, 4, 4), (1, 3, 2), (4, 1, 4), (1, 1, 1), (2, 4, 1)], ids=str)
def test_layers_with_the_batch_on_the_second_axis(inner: str, sizes: tuple[int, ...]) -> None:
    model = seeded(lambda: SequenceFirst(INNER[inner]))
    x = normal(sum(sizes), 4, 3)  # as long as the batches of four
    dense = rows(model, x.split(1))
    posterior = fitted(model, x.split(sizes))
    assert_rows(posterior, dense)
    assert_kept(posterior, dense)
    for count in (4, 1, 3):
        test = normal(count, 4, 3, seed=1)
        assert_predicts(posterior, test, rows(model, test.split(1)))


class Positions(nn.Module):
    """Position ids (1, L), broadcast over the batch, as GPT-2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 4), nn.Embedding(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        where = torch.arange(ids.shape[1])[None]
        return self.head(torch.tanh(self.tokens(ids) + self.positions(where)).mean(1))


@pytest.mark.parametrize("sizes", [(1, 5), (5, 1), (1, 1, 1, 1), (6,), (2, 6)], ids=str)
def test_position_ids_that_all_examples_share(sizes: tuple[int, ...]) -> None:
    model = seeded(Positions)
    ids = torch.randint(0, 9, (sum(sizes), 6), generator=torch.Generator().manual_seed(0))
    dense = rows(model, ids.split(1))
    posterior = fitted(model, ids.split(sizes))
    assert_rows(posterior, dense)
    for count in (6, 1, 3):
        test = ids.flip(0)[:count]
        assert_predicts(posterior, test, rows(model, test.split(1)))


class Masked(nn.Module):
    """Attention under a mask (L, L) that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Parameter(torch.randn(4, 12) * 0.5), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (x @ self.qkv).chunk(3, -1)
        scores = (q @ k.transpose(-1, -2) / 2 + mask).softmax(-1)
        return self.head(torch.tanh(scores @ v).mean(1))


class MaskFirst(Masked):
    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        return super().forward(x, mask)


@pytest.mark.parametrize("sizes", [(8, 5), (5, 8), (5,), (5, 5), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("kind", [Masked, MaskFirst])
def test_a_mask_as_long_as_the_batch(kind: type[Masked], sizes: tuple[int, ...]) -> None:
    model = seeded(kind)
    mask = torch.full((5, 5), -1e9, dtype=torch.float64).triu(1)
    order = (lambda x: (mask, x)) if kind is MaskFirst else (lambda x: (x, mask))
    x = normal(sum(sizes), 5, 4)
    dense = rows(model, [order(one) for one in x.split(1)])
    posterior = fitted(model, [order(some) for some in x.split(sizes)])
    assert_rows(posterior, dense)
    assert_kept(posterior, dense)
    for count in (5, 1, 3):
        test = normal(count, 5, 4, seed=1)
        assert_predicts(posterior, order(test), rows(model, [order(t) for t in test.split(1)]))


def test_a_mask_first_seen_at_use() -> None:
    """Fitted where no length is the batch's; asked for as many examples as the mask is long."""
    model, mask = seeded(Masked), torch.full((4, 4), -1e9, dtype=torch.float64).triu(1)
    x = normal(6, 4, 4)
    posterior = fitted(model, [(x[:3], mask), (x[3:], mask)])
    assert_predicts(posterior, (x[:4], mask), rows(model, [(t, mask) for t in x[:4].split(1)]))


@pytest.mark.parametrize("lengths", [(4, 2), (3, 7), (5, 5, 1)], ids=str)
def test_batches_of_other_lengths(lengths: tuple[int, ...]) -> None:
    layers = lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), Mean(), nn.Linear(5, 2))  # noqa: E731
    for make in (layers, lambda: SequenceFirst(INNER["linear"])):
        model = seeded(make)
        batches = [normal(3, length, 3, seed=length) for length in lengths]
        dense = rows(model, [one for batch in batches for one in batch.split(1)])
        posterior = fitted(model, batches)
        assert_rows(posterior, dense)
        test = normal(3, 3, 3, seed=9)
        assert_predicts(posterior, test, rows(model, test.split(1)))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class OnTokens(nn.Module):
    """A layer on the tokens that a mask leaves: rows of its input belong to no example by their place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = x[..., 0] > 0
        h = x.new_zeros(*x.shape[:2], 4)
        h[mask] = torch.tanh(self.layer(x[mask]))
        return self.head(h.mean(1))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sizes", [(6,), (4, 2), (1, 5)], ids=str)
def test_layers_on_selected_tokens(seed: int, sizes: tuple[int, ...]) -> None:
    """With some seeds the number of tokens is a multiple of the batch, by chance."""
    model, x = seeded(OnTokens), normal(6, 4, 3, seed=seed)
    dense = rows(model, x.split(1))
    posterior = fitted(model, x.split(sizes))
    assert_rows(posterior, dense)
    assert_predicts(posterior, x[:2], dense[:2])


# -- the object itself -------------------------------------------------------------------------------


def axes_of(function: Callable[..., Tensor]) -> Axes:
    def evaluate(batch: Any) -> Tensor:
        return function(*batch.inputs)

    return Axes(evaluate)


def test_a_single_tensor_has_the_batch_and_costs_nothing() -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError("not to be asked")

    assert axes_of(never).batch((torch.zeros(1, 4),)).flags == (True,)
    assert axes_of(never).batch((torch.zeros(4, 4), 3.0, None)).flags == (True, False, False)


def test_evidence_from_one_batch_serves_the_others() -> None:
    calls: list[int] = []

    def attend(x: Tensor, mask: Tensor) -> Tensor:
        calls.append(len(x))
        return (x + mask).sum(-1)

    axes, mask = axes_of(attend), normal(4, 4)
    assert axes.batch((normal(3, 4, 4), mask)).flags == (True, False)  # other lengths say so
    assert not [n for n in calls if n != 3]
    seen = len(calls)
    assert axes.batch((normal(4, 4, 4), mask)).flags == (True, False)
    assert len(calls) == seen


def test_a_batch_of_one_settles_nothing() -> None:
    axes = axes_of(lambda x, ids: x + ids)
    assert axes.batch((normal(1, 4), normal(1, 4))).flags == (True, True)
    assert axes.batch((normal(5, 4), normal(1, 4))).flags == (True, False)
    assert axes.batch((normal(5, 4), normal(5, 4))).flags == (True, True)


def test_cutting_and_picking_follow_the_flags() -> None:
    x, mask = normal(4, 2), normal(4, 4)
    batch = Batch((x, mask), (True, False))
    cut, picked = take(batch, 1, 3), select(batch, torch.tensor([3, 0]))
    assert torch.equal(cut.inputs[0], x[1:3])
    assert cut.inputs[1] is mask
    assert torch.equal(picked.inputs[0], x[[3, 0]])


def test_outputs_of_another_shape_at_use_are_refused() -> None:
    class Reward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x: Tensor) -> Tensor:
            out = self.net(x)
            return out.squeeze(-1) if x.ndim == 3 else out

    model, x = seeded(Reward), normal(8, 2, 3)
    posterior = nb.NullSpacePosterior(model).fit([(x, torch.arange(8) % 2)], 3, progress=False)
    assert posterior.predict(x).point.shape == (8, 2)
    for method in ("linearised", "sampled"):
        with pytest.raises(nb.InputError, match=r"\(B, 1\).*fitted on.*\(B, 2\)"):
            posterior.predict(x[:, 0], method=method)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float64, 1e-3), (torch.float32, 2e-3), (torch.bfloat16, 1.0)],
    ids=str,
)
def test_a_shared_mask_that_says_little_is_shared(dtype: torch.dtype, size: float) -> None:
    """Cut with the batch, it moves outputs by no more than rounding of half precision does."""
    x, mask = normal(3, 3, 2).to(dtype), torch.ones(3, 3).tril().to(dtype)

    def model(batch: Batch) -> Tensor:
        some, own = batch.inputs
        return (some + size * (own / own.sum(-1, keepdim=True)) @ some).sum(1)

    assert Axes(model).batch((x, mask)).flags == (True, False)
    per_example = Axes(lambda b: b.inputs[0].sum(1) + size * b.inputs[1][:, :2])
    assert per_example.batch((x, mask)).flags == (True, True)
