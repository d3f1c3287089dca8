"""Inputs without a batch axis: posteriors against dense float64 rows of one example alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import QUIET, says
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_map

import nullbayes as nb
from nullbayes.model.ragged import Structured, regular, restored

LENGTHS = (3, 1, 4, 2, 2, 5, 1)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])


def sequences(count: int = len(LENGTHS), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in LENGTHS[:count]]


def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 9, (n,), generator=generator) for n in LENGTHS]


class Sums(nn.Module):
    """Of each of a list of sequences: a layer position by position, the sum, a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, sequences: list[Tensor]) -> Tensor:
        summed = torch.stack([self.first(s).tanh().sum(0) for s in sequences])
        out: Tensor = self.second(summed)
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, packed: PackedSequence) -> Tensor:
        assert isinstance(packed, PackedSequence)
        out: Tensor = self.out(self.cell(packed)[1][-1])
        return out


class Bag(nn.Module):
    def __init__(self, weighted: bool) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4, mode="sum" if weighted else "mean")
        self.out = nn.Linear(4, 3)

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        out: Tensor = self.out(self.bag(ids, offsets, weights).tanh())
        return out


class Jagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, nested: Tensor) -> Tensor:
        assert nested.is_nested
        # What torch has derivatives of: not of a sum over a jagged axis, nor of tanh of the older layout.
        if nested.layout == torch.jagged:
            summed = torch.nested.to_padded_tensor(self.first(nested).tanh(), 0.0).sum(1)
        else:
            summed = torch.stack([part.tanh().sum(0) for part in self.first(nested).unbind()])
        out: Tensor = self.second(summed)
        return out


def bagged(rows: list[Tensor], weighted: bool) -> Structured:
    flat = torch.cat(rows)
    lengths = torch.tensor([len(r) for r in rows])
    weights = 1 + torch.arange(len(flat), dtype=torch.float64) / 7 if weighted else None
    return nb.bags(flat, lengths.cumsum(0) - lengths, weights)


def bag_alone(i: int, weighted: bool) -> tuple[Tensor, ...]:
    rows = tokens()
    start = sum(LENGTHS[:i])
    weights = 1 + torch.arange(start, start + len(rows[i]), dtype=torch.float64) / 7
    return (rows[i], torch.zeros(1, dtype=torch.int64), *([weights] if weighted else []))


def nested(rows: list[Tensor], layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor(rows, layout=layout)


@dataclass(frozen=True)
class Case:
    """``some(indices)``: examples as the user has them; ``alone(i)``: the arguments of one, without this library."""

    make: Callable[[], nn.Module]
    some: Callable[[list[int]], Any]
    alone: Callable[[int], tuple[Any, ...]]


def picked(index: list[int], seed: int = 0) -> list[Tensor]:
    rows = sequences(seed=seed)
    return [rows[i] for i in index]


def sorted_packed(index: list[int]) -> PackedSequence:
    """Longest first, as many people sort them: without indices."""
    rows = sorted(picked(index), key=len, reverse=True)
    return pack_sequence(rows)


def bag_some(index: list[int], weighted: bool) -> Structured:
    whole = bagged(tokens(), weighted)
    return tree_map(lambda t: t[torch.tensor(index)], whole)


CASES = {
    "ragged list": Case(Sums, lambda i: nb.ragged(picked(i)), lambda i: ([sequences()[i]],)),
    "packed": Case(
        Recurrent,
        lambda i: pack_sequence(picked(i), enforce_sorted=False),
        lambda i: (pack_sequence([sequences()[i]]),),
    ),
    "bags": Case(lambda: Bag(False), lambda i: bag_some(i, False), lambda i: bag_alone(i, False)),
    "weighted bags": Case(
        lambda: Bag(True), lambda i: bag_some(i, True), lambda i: bag_alone(i, True)
    ),
    "jagged": Case(
        Jagged,
        lambda i: nested(picked(i), torch.jagged),
        lambda i: (nested([sequences()[i]], torch.jagged),),
    ),
    "strided nested": Case(
        Jagged,
        lambda i: nested(picked(i), torch.strided),
        lambda i: (nested([sequences()[i]], torch.strided),),
    ),
}
# Of torch: nested tensors are a prototype, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:.*[nN]ested.*")


def made(case: Case) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return case.make().double().eval()


def rows_alone(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """``f (3,)`` and ``J (3, P)`` of one example."""
    parameters, found = list(model.parameters()), []
    out = model(*arguments)[0]
    for value in out:
        grads = torch.autograd.grad(value, parameters, retain_graph=True)
        found.append(torch.cat([g.reshape(-1) for g in grads]))
    return out.detach(), torch.stack(found)


def dense(model: nn.Module, case: Case, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs ``(N, 3)``, rows ``(N, 3, P)`` and the full Laplace covariance ``(P, P)``."""
    parts = [rows_alone(model, case.alone(i)) for i in range(len(LENGTHS))]
    outputs, rows = (torch.stack(p) for p in zip(*parts, strict=True))
    p = outputs.softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    precision = torch.einsum("nop,noq,nqr->pr", rows, hessian, rows)
    eye = torch.eye(rows.shape[-1], dtype=torch.float64)
    return outputs, rows, torch.linalg.inv(precision + alpha * eye)


@pytest.mark.parametrize("name", CASES)
def test_posteriors_are_those_of_dense_rows_of_one_example_alone(name: str) -> None:
    case = CASES[name]
    model = made(case)
    outputs, rows, covariance = dense(model, case, 0.7)
    batches = [(case.some([0, 1, 2, 3]), LABELS[:4]), (case.some([4, 5, 6]), LABELS[4:])]
    posterior = nb.LaplacePosterior(model, prior_precision=0.7).fit(batches, 3, **QUIET)
    assert posterior.certificate.examples == len(LENGTHS)
    assert posterior.certificate.audit is not None and posterior.certificate.audit.passed
    order = [6, 2, 0, 5]
    x = case.some(order)
    joint = posterior.joint(x)
    flat = rows[order].flatten(0, 1)
    assert_close(joint.mean, outputs[order], rtol=1e-9, atol=1e-10)
    assert_close(joint.covariance, flat @ covariance @ flat.T, rtol=1e-6, atol=1e-9)
    prediction = posterior.predict(x)
    change = torch.einsum("nop,sp->sno", rows[order], posterior._samples())
    assert_close(prediction.outputs, outputs[order] + change, rtol=1e-8, atol=1e-9)
    # one at a time, and in a loader
    alone = [posterior.predict(case.some([i])).outputs for i in order]
    assert_close(torch.cat(alone, 1), prediction.outputs, rtol=1e-8, atol=1e-9)
    assert posterior.novelty(x).shape == (4,)
    stream = iter([(case.some([6, 2]), LABELS[:2]), (case.some([0, 5]), LABELS[:2])])
    assert_close(posterior.predict(stream).outputs, prediction.outputs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_the_null_space_preserves_what_was_learned(name: str) -> None:
    case = CASES[name]
    model = made(case)
    _, rows, _ = dense(model, case, 1.0)
    batches = [(case.some([0, 1, 2, 3]), LABELS[:4])]
    posterior = nb.NullSpacePosterior(model, preserve="outputs", delta=0)
    posterior.fit(batches, 3, **QUIET)
    assert posterior.certificate.held
    moved = torch.einsum("nop,sp->sno", rows[:4], posterior._samples())
    assert moved.abs().max() < 1e-8 * float(rows.norm() * posterior._samples().norm())


def test_sequences_that_came_sorted_arrive_as_they_were() -> None:
    packed = sorted_packed([0, 1, 2, 3])
    assert packed.sorted_indices is None
    again = restored(regular(packed))
    assert again.sorted_indices is None
    assert torch.equal(again.data, packed.data) and torch.equal(
        again.batch_sizes, packed.batch_sizes
    )
    unsorted = pack_sequence(picked([0, 1, 2]), enforce_sorted=False)
    again = restored(regular(unsorted))
    assert torch.equal(again.unsorted_indices, unsorted.unsorted_indices)


def test_what_a_structure_is_made_of() -> None:
    made_again = restored(regular({"x": nested(picked([0, 1]), torch.jagged), "scale": 2}))
    assert made_again["scale"] == 2 and made_again["x"].layout == torch.jagged
    for a, b in zip(made_again["x"].unbind(), picked([0, 1]), strict=True):
        assert torch.equal(a, b)
    some = nb.ragged(picked([0, 1, 2]))
    assert len(some) == 3 and [len(r) for r in restored(some)] == [3, 1, 4]
    cut = tree_map(lambda t: t[1:], some)
    assert [len(r) for r in restored(cut)] == [1, 4]
    assert all(len(t) == 3 for t in tree_flatten(some)[0])
    arrays = nb.ragged([row.numpy() for row in picked([0, 1])])
    assert torch.equal(restored(arrays)[1], sequences()[1])


def test_other_inputs_beside_a_ragged_one() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sums, self.linear = Sums(), nn.Linear(3, 3)

        def forward(self, sequences: list[Tensor], x: Tensor) -> Tensor:
            out: Tensor = self.sums(sequences) + self.linear(x)
            return out

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Both().double().eval()
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    some = nb.ragged(sequences())
    posterior = nb.LaplacePosterior(model, prior_precision=1.0)
    posterior.fit([(some, x, LABELS)], 3, **QUIET)
    prediction = posterior.predict((some, x))
    for i in range(7):
        parameters = list(model.parameters())
        out = model([sequences()[i]], x[i : i + 1])[0]
        rows = torch.stack(
            [
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(v, parameters, retain_graph=True)]
                )
                for v in out
            ]
        )
        assert_close(prediction.outputs[:, i], out.detach() + posterior._samples() @ rows.T)


def test_frozen_randomness_is_that_of_an_example_whatever_its_padding() -> None:
    class Noisy(Sums):
        def forward(self, sequences: list[Tensor]) -> Tensor:
            out = super().forward(sequences)
            return out + torch.randn_like(out)

    model = made(Case(Noisy, lambda i: i, lambda i: (i,)))
    posterior = nb.LaplacePosterior(model, prior_precision=1.0, randomness="frozen")
    posterior.fit([(nb.ragged(picked([0, 1, 2, 3])), LABELS[:4])], 3, **QUIET)
    together = posterior.predict(nb.ragged(picked([1, 5]))).point[:1]
    assert_close(posterior.predict(nb.ragged(picked([1]))).point, together)


def test_forms_of_data(tmp_path: Any) -> None:
    model = made(CASES["ragged list"])
    wanted = nb.LaplacePosterior(model).fit([(nb.ragged(sequences()), LABELS)], 3, **QUIET)
    examples = list(zip(sequences(), LABELS, strict=True))

    def collate(some: list[Any]) -> Any:
        return nb.ragged([x for x, _ in some]), torch.stack([y for _, y in some])

    x = nb.ragged(sequences())
    for data in (
        (x, LABELS),
        nb.Batches(examples, collate=collate, batch_size=2),
        torch.utils.data.DataLoader(examples, 3, collate_fn=collate),  # type: ignore[arg-type]
    ):
        found = nb.LaplacePosterior(copy.deepcopy(model)).fit(data, 3, **QUIET)
        assert_close(found.predict(x).outputs, wanted.predict(x).outputs, rtol=1e-5, atol=1e-7)
    wanted.save(tmp_path / "p.safetensors")
    loaded: Any = nb.load(tmp_path / "p.safetensors", model)
    assert_close(loaded.predict(x).outputs, wanted.predict(x).outputs)
    recurrent = made(CASES["packed"])
    packed = pack_sequence(sequences(), enforce_sorted=False)
    found = nb.LaplacePosterior(recurrent).fit((packed, LABELS), 3, **QUIET)
    assert found.predict(packed).mean.shape == (7, 3)
    assert found.predict(iter([packed])).mean.shape == (7, 3)
    jagged = nested(sequences(), torch.jagged)
    found = nb.LaplacePosterior(made(CASES["jagged"])).fit((jagged, LABELS), 3, **QUIET)
    assert found.certificate.examples == 7


def test_gradients_by_ragged_inputs() -> None:
    model = made(CASES["ragged list"])
    posterior = nb.LaplacePosterior(model, prior_precision=1.0)
    posterior.fit((nb.ragged(sequences()), LABELS), 3, **QUIET)
    leaves = [row.clone().requires_grad_() for row in picked([0, 1])]
    posterior.predict(nb.ragged(leaves), differentiable=True).variance.sum().backward()
    assert all(leaf.grad is not None and bool(leaf.grad.abs().max() > 0) for leaf in leaves)


def test_layer_posteriors_take_them_too() -> None:
    model = made(CASES["ragged list"])
    posterior = nb.LayerNullSpacePosterior(model).fit([nb.ragged(picked([0, 1, 2]))], **QUIET)
    assert posterior.predict(nb.ragged(sequences())).mean.shape == (7, 3)


def test_what_cannot_be_used_is_said() -> None:
    with says(nb.InputError, "`examples`", "without any"):
        nb.ragged([])
    with says(nb.InputError, "`examples`", "(2,)", "(3,)"):
        nb.ragged([torch.zeros(2, 3), torch.zeros(2, 2)])
    with says(nb.InputError, "`ids`", "(2, 3)", "no bags"):
        nb.bags(torch.zeros(2, 3), torch.zeros(2).long())
    for offsets in (torch.tensor([1, 2]), torch.tensor([0, 9]), torch.tensor([0, 2, 1]), [0, 1]):
        with says(nb.InputError, "`offsets`", "from 0 to at most 4"):
            nb.bags(torch.zeros(4).long(), offsets)  # type: ignore[arg-type]
    with says(nb.InputError, "`weights`", "4 tokens"):
        nb.bags(torch.zeros(4).long(), torch.tensor([0, 2]), torch.ones(3))
    odd = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(2, 2)], layout=torch.strided)
    with says(nb.InputError, "nested tensor", "first axis"):
        regular(odd)
    model = made(CASES["ragged list"])
    with says(nb.ModelError, "nb.ragged"):
        nb.LaplacePosterior(model).fit([(sequences(), LABELS)], 3, **QUIET)
    with says(nb.InputError, "nb.bags"):
        ids, offsets = torch.cat(tokens()), torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)
        nb.LaplacePosterior(made(CASES["bags"])).fit([(ids, offsets, LABELS)], 3, **QUIET)


def test_padding_has_no_say(tmp_path: Any) -> None:
    """A sequence among longer ones is what it is alone, also to a network that would see padding."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(1, 2)

        def forward(self, sequences: list[Tensor]) -> Tensor:
            lengths = torch.tensor([[float(len(s))] for s in sequences], dtype=torch.float64)
            out: Tensor = self.out(lengths)
            return out

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Counts().double().eval()
    posterior = nb.LaplacePosterior(model, prior_precision=1.0)
    posterior.fit([(nb.ragged(sequences()), LABELS % 2)], 3, **QUIET)
    found = posterior.predict(nb.ragged(sequences())).point
    wanted = model.out(torch.tensor([[float(n)] for n in LENGTHS], dtype=torch.float64))
    assert_close(found, wanted.detach())
    packed = pack_padded_sequence(torch.ones(2, 4, 3), torch.tensor([4, 2]), batch_first=True)
    assert restored(regular(packed)).batch_sizes.tolist() == [2, 2, 1, 1]


def test_plans_parts_updates_and_evaluations() -> None:
    model = made(CASES["ragged list"])
    data = [
        (nb.ragged(picked([0, 1, 2, 3])), LABELS[:4]),
        (nb.ragged(picked([4, 5, 6])), LABELS[4:]),
    ]
    posterior = nb.LaplacePosterior(model, prior_precision=1.0)
    assert posterior.plan(data).rows == 14
    whole = copy.copy(posterior).fit(data, 3, **QUIET)
    first = posterior.fit(data, 3, max_examples=5, **QUIET)
    assert first.certificate.examples == 5
    first.update([(nb.ragged(picked([5, 6])), LABELS[5:])], **QUIET)
    x = nb.ragged(sequences(seed=5))
    assert_close(first.joint(x).covariance, whole.joint(x).covariance, rtol=1e-6, atol=1e-9)
    assert sorted(whole.select(x, 2).tolist()) == sorted(set(whole.select(x, 2).tolist()))
    evaluation = whole.evaluate(data, shifted={"others": [x]}, progress=False)
    assert "others" in str(evaluation)
