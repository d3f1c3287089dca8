"""Products with captured rows in every order, and predictions that compute nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import Lambda, dense_jacobian

import nullbayes as nb
from nullbayes.errors import InputError
from nullbayes.jacobian import linearise
from nullbayes.jacobian.capture.verify import prove
from nullbayes.jacobian.factors import outer
from nullbayes.jacobian.factors import products as columns
from nullbayes.jacobian.factors.outer import OuterFactor
from nullbayes.jacobian.factors.products import gather, product, scatter_add
from nullbayes.jacobian.linearise import output_rows
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace, Slot

ORDERS = ("rows", "copied", "in place")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 7), (5,)),
    "linear-tokens": (lambda: nn.Linear(5, 7), (6, 5)),
    "linear-tokens-no-bias": (lambda: nn.Linear(5, 7, bias=False), (2, 3, 5)),
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 5, 4)),
    "conv-no-bias": (lambda: nn.Conv2d(3, 8, 3, stride=2, bias=False), (3, 5, 5)),
    "conv-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "conv-depthwise": (lambda: nn.Conv1d(6, 12, 3, groups=6, bias=False), (6, 9)),
    "conv-many-groups": (lambda: nn.Conv1d(7, 14, 3, groups=7), (7, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), (3, 3, 3)),
    "transposed-groups": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), (4, 6)),
}


def force(monkeypatch: pytest.MonkeyPatch, order: str) -> set[str]:
    """Send every product of an outer factor one way; the ways taken appear in the returned set."""
    taken: set[str] = set()
    monkeypatch.setattr(OuterFactor, "prefers_dense", False)
    monkeypatch.setattr(OuterFactor, "products_by_rows", lambda self, vectors: order == "rows")
    monkeypatch.setattr(outer, "COPIED_PRODUCT", 0 if order == "in place" else 2**62)
    for kind in ("_matvec_", "_rmatvec_"):
        for way in ORDERS:
            name = kind + way.replace(" ", "_")
            method = getattr(OuterFactor, name)

            def spy(self: Any, *args: Any, method: Any = method, name: str = name) -> Any:
                taken.add(name)
                return method(self, *args)

            monkeypatch.setattr(OuterFactor, name, spy)
    return taken


def rows_of(
    layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[JacobianOperator, Tensor]:
    """All output rows of a network around ``layer``, with columns scaled, and the same by other means."""
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    inputs = torch.randn(4, *shape, dtype=torch.float64)
    model(inputs)
    dense = dense_jacobian(model, inputs)
    scales = {name: 0.5 + i for i, (name, _) in enumerate(model.named_parameters())}
    dense *= torch.cat([torch.full((p.numel(),), scales[n]) for n, p in model.named_parameters()])
    model, inputs = model.to(dtype), inputs.to(dtype)
    functional = FunctionalModel(model, ParameterSpace.from_model(model))
    plan, none = prove(functional, inputs), torch.empty(0, functional.space.total)
    ((_, operator),) = output_rows(functional, plan, inputs, 3, none, scales)
    return operator, dense


@pytest.mark.parametrize(
    "near", [outer.NEAR_ELEMENTS, 100, 40], ids=["whole", "uneven pieces", "pieces"]
)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_order_of_a_product(
    kind: str, order: str, near: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = LAYERS[kind]
    taken = force(monkeypatch, order)
    monkeypatch.setattr(outer, "NEAR_ELEMENTS", near)
    monkeypatch.setattr(columns, "CHUNK_ELEMENTS", 100 * near)
    operator, dense = rows_of(make(), shape)
    vectors = torch.randn(5, dense.shape[1], dtype=torch.float64)
    weights = torch.randn(5, dense.shape[0], dtype=torch.float64)
    assert_close(operator.matvec(vectors), vectors @ dense.T, rtol=1e-10, atol=1e-12)
    assert_close(operator.rmatvec(weights), weights @ dense, rtol=1e-10, atol=1e-12)
    assert_close(torch.cat(list(operator.iter_rows(6))), dense, rtol=1e-10, atol=1e-12)
    assert_close(operator.gram(), dense @ dense.T, rtol=1e-10, atol=1e-12)
    way = order.replace(" ", "_")
    assert {f"_matvec_{way}", f"_rmatvec_{way}"} <= taken
    # Groups and transposed layouts have no way in place; the last linear layer always has.
    assert taken <= {f"_{m}_{w}" for m in ("matvec", "rmatvec") for w in (way, "copied")}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_order_in_single_precision(
    kind: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every product through oneDNN, where this build has it."""
    make, shape = LAYERS[kind]
    force(monkeypatch, order)
    monkeypatch.setattr(columns, "ONEDNN_PRODUCT", 0)
    operator, dense = rows_of(make(), shape, torch.float32)
    vectors = torch.randn(5, dense.shape[1])
    expected = (vectors.double() @ dense.T).float()
    assert_close(operator.matvec(vectors), expected, rtol=1e-4, atol=1e-5)
    rows = torch.cat(list(operator.iter_rows(6)))
    assert_close(rows, dense.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("layout", ["plain", "transposed", "cut", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_in_any_layout(
    layout: str, dtype: torch.dtype, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "ONEDNN_PRODUCT", 0 if large else 2**62)
    torch.manual_seed(0)
    x, y = torch.randn(17, 33, dtype=dtype), torch.randn(9, 33, dtype=dtype)
    if layout == "transposed":
        y = y.T.contiguous().T
    elif layout == "cut":
        x, y = torch.randn(17, 40, dtype=dtype)[:, 3:36], torch.randn(9, 40, dtype=dtype)[:, 3:36]
    elif layout == "expanded":
        x = x[:1].expand(17, -1)
    exact = torch.einsum("mk,nk->mn", x.double(), y.double())
    assert_close(product(x, y), exact.to(dtype), rtol=1e-5, atol=1e-5)


def test_the_cheaper_order_is_chosen() -> None:
    def by_rows(tokens: int, vectors: int, inputs: int = 64, cotangents: int = 10) -> bool:
        slot = Slot("w", torch.Size([32, inputs]), 0, 32 * inputs)
        a, g = torch.empty(2, tokens, 1, inputs), torch.empty(2, cotangents, tokens, 1, 32)
        return OuterFactor(slot, None, a, g).products_by_rows(vectors)

    assert by_rows(tokens=1024, vectors=30) and by_rows(tokens=64, vectors=30)
    assert not by_rows(tokens=1, vectors=30) and not by_rows(tokens=4, vectors=30)
    assert not by_rows(tokens=1024, vectors=3), "few vectors: the rows are not worth writing"
    assert by_rows(tokens=16, vectors=10, cotangents=1), "one row an example is cheap to write"


def test_columns_of_neighbours_are_one_view() -> None:
    slots = [Slot(str(i), torch.Size([4]), 4 * i, 4 * i + 4) for i in range(4)]
    vectors = torch.randn(3, 16)
    together = gather(vectors, slots[1:3])
    assert together._base is vectors
    assert_close(together, vectors[:, 4:12], rtol=0, atol=0)
    apart = gather(vectors, [slots[0], slots[1], slots[3]])
    assert_close(apart, torch.cat([vectors[:, :8], vectors[:, 12:]], 1), rtol=0, atol=0)
    out = torch.zeros(3, 16)
    scatter_add(out, [slots[0], slots[1], slots[3]], apart)
    assert_close(out, torch.cat([vectors[:, :8], torch.zeros(3, 4), vectors[:, 12:]], 1))


# -- predictions ----------------------------------------------------------------------------------


SEEN: list[int] = []


class Counting(nn.Module):
    """A small network that counts the examples it has seen, outside of itself: each call has modules of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(len(x))
        out: Tensor = self.body(x)
        return out


@pytest.fixture
def counted() -> tuple[Counting, nb.NullSpacePosterior, Tensor]:
    torch.manual_seed(0)
    model = Counting().double().eval()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
    posterior = nb.NullSpacePosterior(model, preserve="loss")
    posterior.fit([(x, y)], num_samples=5, progress=False)
    test = torch.randn(12, 4, dtype=torch.float64)
    posterior.predict(test)
    SEEN.clear()
    return model, posterior, test


def test_a_linearised_prediction_runs_the_network_once_on_a_way_that_was_compared(
    counted: tuple[Counting, nb.NullSpacePosterior, Tensor],
) -> None:
    model, posterior, x = counted
    prediction = posterior.predict(x)
    # For the rows; the shape of the outputs is known from the batch before, and no example can change its place.
    assert sum(SEEN) == len(x)
    SEEN.clear()
    posterior.predict(x[:7])
    assert sum(SEEN) == 2 * 7  # another way: once for the rows, once to prove them
    assert_close(prediction.point, model(x).detach())
    rows = dense_jacobian(model, x)
    change = (posterior._samples() @ rows.T).reshape(5, 12, 3)
    assert_close(prediction.outputs, prediction.point + change)


@pytest.mark.parametrize("step", [1, 5, 12])
def test_pieces_of_a_batch_make_no_difference(
    step: int,
    counted: tuple[Counting, nb.NullSpacePosterior, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, posterior, x = counted
    whole, score = posterior.predict(x), posterior.novelty(x, exact=False)
    monkeypatch.setattr(linearise, "examples_per_capture", lambda *args: step)
    pieces = posterior.predict(x)
    assert_close(pieces.outputs, whole.outputs)
    assert_close(pieces.point, whole.point)
    assert_close(posterior.novelty(x, exact=False), score)


def test_novelty_from_samples_is_their_spread(
    counted: tuple[Counting, nb.NullSpacePosterior, Tensor],
) -> None:
    _, posterior, x = counted
    prediction = posterior.predict(x)
    change = posterior.likelihood.centre(prediction.outputs - prediction.point)
    spread = change.square().mean(0).sum(1)
    assert_close(posterior.novelty(x, score="variance", exact=False), spread)


def test_an_input_that_fails_late_in_the_batch_is_explained() -> None:
    torch.manual_seed(0)
    mean = Lambda(lambda h: h.mean(1))
    model = nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), mean, nn.Linear(4, 3)).eval()
    x, y = torch.randint(0, 5, (8, 3)), torch.randint(0, 3, (8,))
    posterior = nb.NullSpacePosterior(model, preserve="loss")
    posterior.fit([(x, y)], num_samples=2, progress=False)
    x[6, 1] = 9
    with pytest.raises(InputError, match=r"`x`: the model's forward pass failed on \(8, 3\)"):
        posterior.predict(x)
