"""One input at a time: what it costs, and that what is left out of it is not missed."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import dense_jacobian

import nullbayes as nb
from nullbayes.audit.route import route_of
from nullbayes.errors import ModelError
from nullbayes.jacobian.capture import checking
from nullbayes.jacobian.factors import outer
from nullbayes.jacobian.factors import products as sizes
from nullbayes.jacobian.factors.outer import OuterFactor
from nullbayes.model.fingerprint import Watch
from nullbayes.model.parameters import Slot

QUIET: dict[str, Any] = {"progress": False, "num_samples": 4}


class Branching(nn.Module):
    """Inputs of which the first number is positive use the first layer's weight once more, outside of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if bool(x[0, 0] > 0):
            h = h + nn.functional.linear(x, self.first.weight)
        out: Tensor = self.last(h)
        return out


def fitted(model: nn.Module, x: Tensor, **kwargs: Any) -> nb.NullSpacePosterior:
    y = torch.arange(len(x)) % 3
    batches = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    return nb.NullSpacePosterior(model, **kwargs).fit(batches, **QUIET)


def one(first: float, seed: int = 3) -> Tensor:
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed)).double()
    x[0, 0] = first
    return x


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows at each comparison of rows with plain differentiation."""
    seen: list[int] = []
    original = checking._compared

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(checking, "_compared", counting)
    return seen


def check_exact(posterior: nb.NullSpacePosterior, model: nn.Module, x: Tensor) -> None:
    prediction = posterior.predict(x)
    change = (posterior._samples() @ dense_jacobian(model, x).T).reshape(4, 1, 3)
    assert_close(prediction.outputs, model(x).detach() + change)


def test_one_input_is_compared_once_for_each_way_through_the_network(
    comparisons: list[int],
) -> None:
    torch.manual_seed(0)
    model = Branching().double().eval()
    # Training data take one way alone.
    x = torch.randn(8, 4).double()
    x[:, 0] = -x[:, 0].abs()
    posterior = fitted(model, x)
    comparisons.clear()
    check_exact(posterior, model, one(-1.0))
    first = len(comparisons)
    for seed in range(4):
        check_exact(posterior, model, one(-0.5, seed))
        posterior.novelty(one(-2.0, seed), exact=False)
    assert len(comparisons) == first  # a way that was compared is not compared again
    # The other way uses a weight where the layer's rule does not see it.
    check_exact(posterior, model, one(1.0))
    assert len(comparisons) > first
    again = len(comparisons)
    check_exact(posterior, model, one(2.0, 7))
    check_exact(posterior, model, one(-2.0, 7))
    check_exact(posterior, model, one(-2.5, 8))
    assert len(comparisons) <= again + 2


class Sorting(nn.Module):
    """Sorts the examples by their first number, and puts their outputs back: by an index, or by a matrix of ones."""

    def __init__(self, *, by_index: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.by_index = by_index

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        out: Tensor = self.last(torch.tanh(self.first(x[order])))
        if self.by_index:
            return out[order.argsort()]
        there: Tensor = nn.functional.one_hot(order, len(x)).to(out).T @ out
        return there


def plain_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def test_batches_whose_examples_stay_in_place_are_compared_once(comparisons: list[int]) -> None:
    torch.manual_seed(0)
    model = plain_network().double().eval()
    x = torch.randn(8, 4).double()
    posterior = nb.NullSpacePosterior(model).fit((x, torch.arange(8) % 3), **QUIET)
    comparisons.clear()
    for _ in range(3):
        check_exact_batch(posterior, model, torch.randn(6, 4).double())
    first = len(comparisons)
    assert first  # another number of examples is another way
    for _ in range(3):
        check_exact_batch(posterior, model, torch.randn(6, 4).double())
    assert len(comparisons) == first


@pytest.mark.parametrize("by_index", [True, False])
def test_batches_that_an_operation_may_reorder_are_compared_each_time(
    comparisons: list[int], *, by_index: bool
) -> None:
    torch.manual_seed(0)
    model = Sorting(by_index=by_index).double().eval()
    x = torch.randn(8, 4).double()
    posterior = nb.NullSpacePosterior(model).fit((x, torch.arange(8) % 3), **QUIET)
    x = x[x[:, 0].argsort()]  # in place in the order in which they come first
    check_exact_batch(posterior, model, x)
    for _ in range(3):
        comparisons.clear()
        check_exact_batch(posterior, model, x[torch.randperm(8)])
        assert comparisons


def check_exact_batch(posterior: nb.NullSpacePosterior, model: nn.Module, x: Tensor) -> None:
    change = (posterior._samples() @ dense_jacobian(model, x).T).reshape(4, len(x), 3)
    assert_close(posterior.predict(x).outputs, model(x).detach() + change)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4, bias=False), nn.LayerNorm(4), nn.GELU()),
    ],
)  # fmt: skip
def test_operations_that_leave_examples_in_place(make: Any) -> None:
    model, x = make().eval(), torch.randn(3, 1, 4, 4)
    weights = dict(model.named_parameters())
    found = route_of(model(x), weights, ())
    assert found is not None and found.in_place
    # A weight that is not of this network's is a matrix that may have been computed.
    weights.popitem()
    first = next(iter(weights))
    other = route_of(model(x), {n: w for n, w in weights.items() if n != first}, ())
    assert other is not None and not other.in_place


def test_operations_that_may_move_examples() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(4, 4)
    weights = dict(layer.named_parameters())
    computed = torch.eye(4)[torch.randperm(4)]
    for function in (
        lambda h: h[torch.randperm(4)],
        lambda h: computed @ h,
        lambda h: h @ h,
        lambda h: torch.bmm(h[None], h[None])[0],
        lambda h: h.sort(0).values,
        lambda h: h.roll(1, 0),
        lambda h: nn.functional.batch_norm(h, None, None, training=True),
        lambda h: (computed[:, :, None] * h).sum(1),
    ):
        found = route_of(function(layer(x)), weights, ())
        assert found is not None and not found.in_place


def test_routes() -> None:
    torch.manual_seed(0)
    model = Branching().double()
    weights = dict(model.named_parameters())

    def route(x: Tensor) -> Any:
        return route_of(model(x), weights, ())

    assert route(one(-1.0)) == route(one(-2.0, 5))
    assert route(one(1.0)) == route(one(2.0, 5))
    assert route(one(1.0)) != route(one(-1.0))
    twice = torch.cat([one(-1.0), one(-1.0)])
    assert route(twice) != route(one(-1.0))  # another shape
    first, last = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    both = {**dict(first.named_parameters(prefix="a")), **dict(last.named_parameters(prefix="b"))}
    x = one(1.0)
    # The same operations with weights at other places.
    assert route_of(last(first(x)), both, ()) != route_of(first(last(x)), both, ())
    assert route_of(x, both, ()) is None


class Ragged(nn.Module):
    """As many outputs as the first number of the input says."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)[:, : int(x[0, 0])]
        return out


@pytest.mark.parametrize("exact", [False, True])
def test_outputs_of_another_shape_than_those_before(*, exact: bool) -> None:
    torch.manual_seed(0)
    model = Ragged().double().eval()
    x = torch.randn(4, 4).double()
    x[:, 0] = 3.0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.sum(1) - targets).square()

    posterior = nb.NullSpacePosterior(model, loss=loss, preserve="loss")
    posterior.fit([(x[i : i + 1], torch.zeros(1).double()) for i in range(4)], **QUIET)
    for count in (3.0, 2.0, 5.0, 5.0, 3.0):
        some = one(count)
        width = int(count)
        assert posterior.predict(some).outputs.shape == (4, 1, width)
        found = posterior.novelty(some, score="variance", exact=exact)
        if not exact:
            change = posterior._samples() @ dense_jacobian(model, some).T
            assert_close(found, change.square().mean(0).sum()[None])


# -- products with few rows -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [3, 8, 1000])
def test_products_with_few_rows(
    columns: int,
    stored: torch.dtype | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sizes, "READ_COLUMNS", columns)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(5, 40, generator=generator).to(stored or dtype)
    rows = torch.randn(3, 29, generator=generator).to(dtype)
    found = sizes.few_rows(whole, slice(4, 33), rows)
    assert found.dtype == dtype
    assert_close(found.double(), whole[:, 4:33].double() @ rows.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("few", [0, 16])
@pytest.mark.parametrize("way", ["rows", "copied", "in place"])
def test_vectors_in_half_precision(way: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OuterFactor, "products_by_rows", lambda self, vectors: way == "rows")
    monkeypatch.setattr(outer, "COPIED_PRODUCT", 0 if way == "in place" else 2**62)
    monkeypatch.setattr(sizes, "FEW_ROWS", few)
    generator = torch.Generator().manual_seed(0)
    weight = Slot("w", torch.Size([4, 3]), 2, 14)
    bias = Slot("b", torch.Size([4]), 14, 18)
    a = torch.randn(2, 5, 1, 3, generator=generator)
    g = torch.randn(2, 3, 5, 1, 4, generator=generator)
    factor = OuterFactor(weight, bias, a, g)
    vectors = torch.randn(6, 20, generator=generator).bfloat16()
    dense = factor.rows()  # (B·C, 16)
    wanted = vectors[:, 2:18].double() @ dense.double().T
    assert_close(factor.matvec(vectors).double(), wanted, rtol=1e-4, atol=1e-4)


def test_samples_in_half_precision_are_never_widened_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x = torch.randn(8, 4)
    posterior = nb.NullSpacePosterior(model).fit((x, torch.arange(8) % 3), **QUIET)
    posterior.compact(dtype=torch.bfloat16)
    fit = posterior._fitted()
    change = (fit.samples @ dense_jacobian(model, x[:2]).T).reshape(4, 2, 3)
    wanted = model(x[:2]).detach() + change

    def refused(self: Any) -> Tensor:
        raise AssertionError("all samples were widened")

    monkeypatch.setattr(type(fit), "unit", property(refused))
    assert_close(posterior.predict(x[:2]).outputs, wanted, rtol=1e-4, atol=1e-4)
    assert posterior.novelty(x[:1]).isfinite().all()


# -- a model that changes ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_changes_behind_the_back_of_pytorch_are_seen(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Odd numbers of entries, a tensor that is a view of another, one that is not contiguous, one of booleans.
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7)).to(dtype)
    whole = torch.randn(9).to(dtype)
    model.register_buffer("view", whole[1:])
    model.register_buffer("turned", torch.randn(3, 5).to(dtype).T)
    model.register_buffer("flags", torch.tensor([True, False, True]))
    watch = Watch(model)
    assert watch.same(model)
    for tensor in (*model.parameters(), *model.buffers()):
        for place in range(tensor.numel()):
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), tensor.shape))
            before = tensor.data[index].clone()
            tensor.data[index] = ~before if before.dtype == torch.bool else before + 1
            assert not watch.same(model)
            tensor.data[index] = before
            assert watch.same(model)


def test_a_changed_model_is_refused_whatever_was_asked_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x = torch.randn(8, 4)
    posterior = nb.NullSpacePosterior(model).fit((x, torch.arange(8) % 3), **QUIET)
    before, kept = posterior.predict(x[:1]).outputs, model[0].weight.detach().clone()
    model[0].weight.data[0, 0] += 1
    with pytest.raises(ModelError, match="changed"):
        posterior.predict(x[:1])
    model[0].weight.data.copy_(kept)
    assert_close(posterior.predict(x[:1]).outputs, before, rtol=0, atol=0)


def test_a_watch_is_not_stored() -> None:
    model = nn.Linear(300, 300)
    watch = Watch(model)
    assert len(pickle.dumps(watch)) < 10_000
    assert not pickle.loads(pickle.dumps(watch)).same(model)
