"""Every batch is checked: what a rule gets wrong on a later batch is served in another way, or refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nullbayes as nb
from nullbayes.errors import ModelError
from nullbayes.jacobian.block import Block, common_layout
from nullbayes.jacobian.factors.dense import DenseFactor
from nullbayes.jacobian.factors.outer import OuterFactor
from tests.cases.dense import (
    assert_kept,
    assert_predicts,
    assert_rows,
    fitted,
    normal,
    rows,
    seeded,
)
from tests.support import QUIET, says


class Sorted(nn.Module):
    """Sorts its examples inside, as packed sequences do, and puts the outputs back in order."""

    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inner, self.head = inner(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x.detach().flatten(1)[:, 0].argsort(descending=True)
        return self.head(torch.tanh(self.inner(x[order])))[order.argsort()]


INNER: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 5), (4,)),
    "norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.PReLU()), (4,)),
    "conv": (
        lambda: nn.Sequential(nn.Conv1d(2, 5, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
        (2, 6),
    ),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("ordered", ["first", "all but the last", "none"])
def test_models_that_sort_their_batch(inner: str, ordered: str) -> None:
    """The first three examples, or all batches but the last, happen to be in order."""
    make, shape = INNER[inner]
    model, x = seeded(lambda: Sorted(make)), normal(12, *shape)
    first = x.flatten(1)[:, 0]
    count = {"first": 3, "all but the last": 8, "none": 0}[ordered]
    if count:
        x[:count] = x[:count][first[:count].argsort(descending=True)]
    dense = rows(model, x.split(1))
    posterior = fitted(model, x.split(4))
    assert_rows(posterior, dense)
    assert_kept(posterior, dense)
    test = normal(5, *shape, seed=1)
    assert_predicts(posterior, test, rows(model, test.split(1)))


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("size", [2, 5])
def test_all_batches_in_order_at_the_fit_and_others_at_use(inner: str, size: int) -> None:
    make, shape = INNER[inner]
    model, x = seeded(lambda: Sorted(make)), normal(2 * size, *shape)
    x = x[x.flatten(1)[:, 0].argsort(descending=True)]
    posterior = fitted(model, x.split(size))
    assert_rows(posterior, rows(model, x.split(1)))
    test = x.flip(0)[:size]
    assert_predicts(posterior, test, rows(model, test.split(1)))


def test_a_layer_that_does_nothing_at_the_fit() -> None:
    """The weight of a PReLU has rows of zero on positive numbers, whatever their order: nothing is proved by them."""
    model = seeded(lambda: Sorted(lambda: nn.Sequential(nn.PReLU(), nn.Linear(4, 5))))
    x = normal(6, 4).abs()
    posterior = fitted(model, x.split(3))
    test = -normal(3, 4, seed=1).abs()
    assert_predicts(posterior, test, rows(model, test.split(1)))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = (
            nn.Embedding(9, 4),
            nn.LSTM(4, 4, batch_first=True),
            nn.Linear(4, 2),
        )

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        sizes, order = lengths.sort(descending=True, stable=True)
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(ids[order]), sizes, batch_first=True)
        return self.head(self.lstm(packed)[1][0][-1])[order.argsort()]


@pytest.mark.parametrize("sizes", [(9,), (3, 5, 1)], ids=str)
def test_packed_sequences_sorted_by_length(sizes: tuple[int, ...]) -> None:
    model, generator = seeded(Packed), torch.Generator().manual_seed(0)
    ids = torch.randint(1, 9, (9, 5), generator=generator)
    lengths = torch.randint(1, 6, (9,), generator=generator)
    lengths[:3] = 5  # the first ones fill the window
    dense = rows(model, list(zip(ids.split(1), lengths.split(1), strict=True)))
    posterior = fitted(model, list(zip(ids.split(sizes), lengths.split(sizes), strict=True)))
    assert_rows(posterior, dense)
    assert_predicts(posterior, (ids[4:], lengths[4:]), dense[4:])


class Experts(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.gate, self.head = kind, nn.Linear(4, 3), nn.Linear(4, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        chosen, h = x[:, 0].sign().long() + 1, torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            index = (chosen == number).nonzero()[:, 0]
            if len(index) or self.kind == "always called":
                h = h.index_add(0, index, expert(x[index]) * share[index, number : number + 1])
        return self.head(h)


@pytest.mark.parametrize("kind", ["called where chosen", "always called"])
@pytest.mark.parametrize("sizes", [(12,), (4, 4, 4), (1,) * 12], ids=str)
def test_experts_that_the_first_examples_do_not_reach(kind: str, sizes: tuple[int, ...]) -> None:
    model, x = seeded(lambda: Experts(kind)), normal(12, 4)
    x[:, 0] = torch.tensor([-1.0] * 4 + [1.0] * 4 + [0.0] * 4)
    dense = rows(model, x.split(1))
    posterior = fitted(model, x.split(sizes))
    assert_rows(posterior, dense)
    assert_kept(posterior, dense)
    assert_predicts(posterior, x[[0, 5, 9]], dense[[0, 5, 9]])


class MaskToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 2)

    def forward(self, x: Tensor, masked: Tensor) -> Tensor:
        if bool(masked.any()):
            x = torch.where(masked[:, None], self.token, x)
        return self.head(torch.tanh(x))


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1,) * 8], ids=str)
def test_a_parameter_of_later_examples_alone(sizes: tuple[int, ...]) -> None:
    model, x = seeded(MaskToken), normal(8, 4)
    masked = torch.tensor([0, 0, 0, 0, 0, 1, 0, 1]).bool()
    alone = list(zip(x.split(1), masked.split(1), strict=True))
    posterior = fitted(model, list(zip(x.split(sizes), masked.split(sizes), strict=True)))
    assert_rows(posterior, rows(model, alone))


class Exits(nn.Module):
    """Examples that are clear leave after the first block; if all are, the second does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.out, self.deep = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        out, unclear = self.out(h), x[:, 0] > 0
        if not bool(unclear.any()):
            return out
        deep = self.deep(torch.tanh(self.second(h[unclear])))
        return out.index_put((unclear.nonzero()[:, 0],), deep)


@pytest.mark.parametrize("sizes", [(10,), (5, 5), (3, 3, 3, 1), (1,) * 10], ids=str)
def test_early_exits(sizes: tuple[int, ...]) -> None:
    model, x = seeded(Exits), normal(10, 3)
    x[:5, 0], x[5:, 0] = -x[:5, 0].abs(), x[5:, 0].abs()
    x[8, 0] = -1.0
    dense = rows(model, x.split(1))
    posterior = fitted(model, x.split(sizes))
    assert_rows(posterior, dense)
    assert_kept(posterior, dense)


def test_what_no_example_reaches_is_named_after_all_of_them_and_stays() -> None:
    model, x = seeded(Exits), normal(6, 3)
    x[:, 0] = -x[:, 0].abs()
    posterior = fitted(model, x.split(3))
    named = "depends on 'deep.bias', 'deep.weight', 'second.bias' and 1 more"
    assert any(named in n for n in posterior.certificate.notes)
    assert_kept(posterior, rows(model, x.split(1)))
    samples, deep = posterior._samples().double(), x.abs()  # others reach them
    staying = nn.utils.parameters_to_vector(
        [
            torch.full_like(p, n.split(".")[0] in ("deep", "second"))
            for n, p in model.named_parameters()
        ]
    ).bool()
    assert not samples[:, staying].any() and samples[:, ~staying].any()
    found = posterior.predict(deep).outputs - model(deep).detach()
    wanted = torch.einsum("nop,sp->sno", rows(model, deep.split(1)), samples)
    assert torch.allclose(found.double(), wanted, atol=1e-9)


class Views(nn.Module):
    """In-place activations behind views, which a linear layer returns for a batch of one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.lstm, self.layer = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.lstm(x)[0])
        if self.kind == "relu":
            h = F.relu_(h)
        elif self.kind == "view":
            h = F.relu_(h.view(-1, 2)).view(h.shape)
        else:
            h[..., :2] = h[..., :2].tanh()
            h.mul_(0.5)
        return self.head(h.mean(1))


@pytest.mark.parametrize("kind", ["relu", "view", "slice"])
@pytest.mark.parametrize("sizes", [(4, 1), (1, 4), (1, 1, 1), (5,)], ids=str)
def test_in_place_activations_behind_views(kind: str, sizes: tuple[int, ...]) -> None:
    model, x = seeded(lambda: Views(kind)), normal(sum(sizes), 4, 3)
    dense = rows(model, x.split(1))
    posterior = fitted(model, x.split(sizes))
    assert_rows(posterior, dense)
    for count in (1, len(x)):
        assert_predicts(posterior, x[:count], dense[:count])


# -- refused, with the batch ---------------------------------------------------------------------------


class Odd(nn.Module):
    """Ordinary on most batches; ``change`` is made to those whose first number is above 100."""

    def __init__(self, change: Callable[[Tensor], Tensor], everywhere: bool = False) -> None:
        super().__init__()
        self.layer, self.change, self.everywhere = nn.Linear(3, 2), change, everywhere

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return self.change(out) if self.everywhere or bool((x[:, 0] > 100).any()) else out


CALLS: list[int] = []


def counted(out: Tensor) -> Tensor:
    CALLS.append(1)
    return out * (1 + 0.1 * len(CALLS))


CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "mixing": (lambda h: h - 0.5 * h.mean(0), "mixes the examples"),
    "noise": (lambda h: h + 0.1 * torch.randn_like(h), "draws random numbers"),
    "rare dropout": (lambda h: F.dropout(h, 0.001, training=True), "draws random|mixes"),
    "numpy": (lambda h: h + float(np.random.default_rng().normal()), "random numbers|state"),
    "python": (lambda h: h * (1 + 1e-9 * random.random()), "random"),
    "state": (counted, "state|differ"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_goes_wrong_in_a_later_batch_names_it(change: str) -> None:
    function, words = CHANGES[change]
    model, x = seeded(lambda: Odd(function)), normal(9, 3)
    x[6, 0] = 101.0
    y = torch.zeros(9, 2, dtype=torch.float64)
    posterior = nb.NullSpacePosterior(model, nb.Regression(1.0))
    state = torch.get_rng_state()
    with pytest.raises(nb.ModelError, match=f"batch 2: .*({words})"):
        posterior.fit(list(zip(x.split(3), y.split(3), strict=True)), 2, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", ["mixing", "rare dropout", "state"])
def test_batches_of_one_hide_nothing(change: str) -> None:
    function, words = CHANGES[change]
    model, x = seeded(lambda: Odd(function, everywhere=True)), normal(4, 3)
    with pytest.raises(nb.ModelError, match=words):
        posterior = fitted(model, x.split(1))
        posterior.predict(x)


class Attribute(nn.Module):
    """A state in an attribute, a buffer or a container: the second call is another function."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer, self.count = kind, nn.Linear(3, 2), 0
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        if self.kind == "attribute":
            self.count += 1
            return out * (1 + self.count)
        self.calls += 1
        return out * (1 + 0.1 * self.calls.sin()) if self.kind == "buffer" else out


@pytest.mark.parametrize("kind", ["attribute", "buffer"])
def test_a_state_between_calls_is_refused(kind: str) -> None:
    with pytest.raises(nb.ModelError, match=r"keeps a state between calls.*(count|calls)"):
        fitted(seeded(lambda: Attribute(kind)), normal(4, 3).split(2))


def test_a_state_without_effect_is_not() -> None:
    model, x = seeded(lambda: Attribute("counts only")), normal(4, 3)
    posterior = fitted(model, x.split(2))
    assert float(model.calls) == 2.0  # those of this test
    assert_rows(posterior, rows(model, x.split(1)))


def test_a_squeeze_is_called_what_it_is() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).squeeze()

    model, x = seeded(Squeezed), normal(6, 3)
    y = torch.zeros(6, dtype=torch.float64)
    for sizes in ((3, 3), (1, 5), (5, 1)):
        with pytest.raises(nb.ModelError, match=r"squeeze"):
            nb.NullSpacePosterior(model, nb.Regression(1.0)).fit(
                list(zip(x.split(sizes), y.split(sizes), strict=True)), 2, progress=False
            )


# -- blocks with other factors ---------------------------------------------------------------------------


def test_blocks_of_other_factors_are_brought_together() -> None:
    from nullbayes.model.parameters import Slot

    weight, bias = Slot("w", torch.Size([2, 3]), 0, 6), Slot("b", torch.Size([2]), 6, 8)
    other = Slot("v", torch.Size([4]), 8, 12)

    def outer(tokens: int, seed: int) -> OuterFactor:
        a, g = normal(2, tokens, 1, 3, seed=seed), normal(2, 2, tokens, 1, 2, seed=seed + 1)
        return OuterFactor(weight, bias, a, g)

    ruled, longer = Block({("w", "b"): outer(1, 0)}, 2, 2), Block({("w", "b"): outer(3, 2)}, 2, 2)
    dense = DenseFactor([weight, bias, other], normal(2, 2, 12, seed=5))
    written = Block({("w", "b", "v"): dense}, 2, 2)
    alone = Block({("v",): DenseFactor([other], normal(2, 2, 4, seed=6))}, 2, 2)
    nothing = Block({}, 2, 2)
    for blocks in (
        [ruled, longer],
        [ruled, written, nothing],
        [nothing, longer, alone],
        [alone, written],
    ):
        wanted = torch.cat([matrix(b) for b in blocks])
        merged = Block.merge(blocks)
        torch.testing.assert_close(matrix(merged), wanted)
        for left in blocks:
            for right in blocks:
                out = torch.zeros(4, 4, dtype=torch.float64)
                left.gram(right, out)
                torch.testing.assert_close(out, matrix(left) @ matrix(right).T)
    layout = common_layout([ruled, nothing])
    assert layout.keys == [("w", "b")]  # what a batch does not reach costs nothing
    assert nothing.arranged(layout).nbytes < 400


def matrix(block: Block) -> Tensor:
    out = torch.zeros(block.num_rows, 12, dtype=torch.float64)
    for factor in block.factors.values():
        rows, at = factor.rows(), 0
        for slot in factor.slots:
            out[:, slot.start : slot.stop] += rows[:, at : at + slot.numel]
            at += slot.numel
    return out


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_gradients_divided_by_frequencies_are_named(kind: Any) -> None:
    """Gradients for training that are no derivatives; the mend that is named mends."""
    table = kind(6, 3, scale_grad_by_freq=True)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(3 if kind is nn.EmbeddingBag else 9, 2))
    tokens = torch.tensor([[0, 0, 1], [1, 2, 2]])
    posterior = nb.NullSpacePosterior(model.double().eval(), prior_precision=1.0)
    with says(ModelError, "'0'", "scale_grad_by_freq = False"):
        posterior.fit([(tokens, torch.tensor([0, 1]))], 2, **QUIET)
    table.scale_grad_by_freq = False
    assert posterior.fit([(tokens, torch.tensor([0, 1]))], 2, **QUIET).certificate.held
