"""Rows, products and Gram matrices of every layer kind against a dense Jacobian in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import all_rows, operator_for
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import ZOO, Case, dense_jacobian

from nullbayes import jacobian
from nullbayes.errors import ModelError
from nullbayes.jacobian.capture.batches import capture_batch
from nullbayes.jacobian.capture.verify import prove
from nullbayes.jacobian.factors import contraction
from nullbayes.jacobian.factors import products as sizes
from nullbayes.jacobian.factors.products import flushed
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.model.batch import batch_size
from nullbayes.model.functional import FunctionalModel


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_rows_products_and_gram(case: Case) -> None:
    model, inputs = case.make()
    dense = dense_jacobian(model, inputs)
    operator, plan = operator_for(model, inputs)
    assert sorted(plan.generic) == sorted(case.generic)
    assert operator.shape == dense.shape
    assert_close(torch.cat(list(operator.iter_rows(5))), dense)
    vectors = torch.randn(3, dense.shape[1], dtype=torch.float64)
    weights = torch.randn(3, dense.shape[0], dtype=torch.float64)
    assert_close(operator.matvec(vectors), vectors @ dense.T)
    assert_close(operator.rmatvec(weights), weights @ dense)
    assert_close(operator.gram(), dense @ dense.T)
    assert_close(operator.cross_gram(operator), dense @ dense.T)
    assert_close(operator.squared_norms(), dense.square().sum(1))


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_the_model_is_left_as_it_was(case: Case) -> None:
    model, inputs = case.make(torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    operator_for(model, inputs)
    # An instance norm of torch 2.6 writes its running statistics back in evaluation mode, too, rounded anew.
    rounding = 1e-7 if "instancenorm" in case.name and torch.__version__ < "2.7" else 0
    assert_close(dict(model.state_dict()), before, rtol=0, atol=rounding)
    assert all(bool((p.grad == 1).all()) and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_blocks_of_several_batches_multiply(case: Case) -> None:
    model, inputs = case.make()
    dense = dense_jacobian(model, inputs)
    functional = FunctionalModel(model, jacobian.ParameterSpace.from_model(model))
    plan = prove(functional, inputs)
    size = batch_size(inputs)
    numel = dense.shape[0] // size
    blocks = []
    for n in range(size):
        part = torch.utils._pytree.tree_map(lambda t, n=n: t[n : n + 1], inputs)
        blocks += all_rows(functional, plan, part).blocks
    operator = JacobianOperator(functional.space, blocks)
    assert operator.shape[0] == size * numel
    assert_close(operator.gram(), dense @ dense.T)
    single = JacobianOperator(functional.space, blocks[:1])
    assert_close(operator.cross_gram(single), dense @ dense[:numel].T)


@pytest.mark.parametrize(
    "cheapest, tokens, directions, shape",
    [("pairs", 2, 2, (40, 50)), ("folded", 12, 5, (200, 80)), ("rows", 12, 5, (40, 50))],
)
def test_all_ways_to_contract_tokens_agree(
    cheapest: str,
    tokens: int,
    directions: int,
    shape: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each way, whichever the layer takes itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*shape), nn.Flatten(), nn.Linear(tokens * shape[1], directions))
    inputs = torch.randn(4, tokens, shape[0], dtype=torch.float64)
    operator, _ = operator_for(model.double(), inputs)
    factor = operator.blocks[0].factors[("0.weight", "0.bias")]
    assert (factor.tokens, factor.cotangents) == (tokens, directions)
    costs = {w: getattr(contraction, f"{w}_cost")(factor) for w in ("rows", "pairs", "folded")}
    assert min(costs, key=lambda w: costs[w]) == cheapest
    assert factor.gram_by_rows == (cheapest == "rows")
    dense = dense_jacobian(model, inputs)
    wanted = dense[:, : (shape[0] + 1) * shape[1]]
    wanted = wanted @ wanted.T
    part, rest = factor.narrow(1, 3), wanted[directions : 3 * directions]
    for way in (contraction.by_rows, contraction.by_pairs, contraction.folded):
        assert_close(way(factor, factor), wanted)
        assert_close(way(part, factor), rest)
    # In as many pieces as can be.
    monkeypatch.setattr(contraction, "FOLDED_ELEMENTS", 1)
    monkeypatch.setattr(sizes, "CHUNK_ELEMENTS", 1)
    for way in (contraction.by_rows, contraction.by_pairs, contraction.folded):
        assert_close(way(factor, part), rest.T)
    assert_close(operator.gram(), dense @ dense.T)


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    transpose=st.booleans(),
    size=st.tuples(st.integers(5, 7), st.integers(5, 7)),
)
def test_any_convolution(kernel, stride, padding, dilation, groups, bias, transpose, size) -> None:
    kind = nn.ConvTranspose2d if transpose else nn.Conv2d
    torch.manual_seed(0)
    layer = kind(
        2, 4, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias
    )
    model = nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    inputs = torch.randn(2, 2, *size, dtype=torch.float64)
    if 0 in model[0](inputs).shape:
        return
    operator, plan = operator_for(model, inputs)
    assert not plan.generic
    assert_close(torch.cat(list(operator.iter_rows(99))), dense_jacobian(model, inputs))


def test_chosen_parameters_only() -> None:
    model, inputs = ZOO[0].make()
    space = jacobian.ParameterSpace.from_model(model, ["2.weight"])
    functional = FunctionalModel(model, space)
    operator = all_rows(functional, prove(functional, inputs), inputs)
    dense = dense_jacobian(model, inputs)
    assert_close(torch.cat(list(operator.iter_rows(99))), dense[:, 30:48])


def test_frozen_parameters_are_left_out() -> None:
    model, inputs = ZOO[0].make()
    model[0].requires_grad_(False)
    operator, _ = operator_for(model, inputs)
    assert operator.shape[1] == 21
    assert not model[0].weight.requires_grad


def test_column_scales_are_folded_in() -> None:
    model, inputs = next(c for c in ZOO if c.name == "tied-embedding").make()
    functional = FunctionalModel(model, jacobian.ParameterSpace.from_model(model))
    plan = prove(functional, inputs)
    scales = {name: 0.5 + i for i, name in enumerate(functional.space.names)}
    eye = torch.eye(7, dtype=torch.float64)[:, None].expand(7, 4, 7)
    made = capture_batch(
        functional, plan, inputs, lambda o, s: SimpleNamespace(values=eye[:, s]), 7, scales
    )
    blocks = [block for block, _, _ in made]
    precision = {name: value**-2 for name, value in scales.items()}
    dense = dense_jacobian(model, inputs) * functional.space.scales(precision)
    operator = JacobianOperator(functional.space, blocks)
    assert_close(operator.gram(), dense @ dense.T)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x - x.mean(0))


class Noisy(Mixing):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + torch.randn_like(x))


class Dead(Mixing):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.unused(x).detach()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Mixing(), "evaluated alone"),
        (Noisy(), 'two forward passes.*randomness="frozen"'),
        (Dead(), "no gradient path leads from the output to .*unused.weight"),
        (nn.Sequential(Mixing(), nn.Flatten(0)), "one entry per example"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_models_without_per_example_rows_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        _, plan = operator_for(model, torch.randn(4, 3))
        plan.check_reached(FunctionalModel(model, jacobian.ParameterSpace.from_model(model)))
    assert not any(m._forward_hooks for m in model.modules())


class MaskedAttention(nn.Module):
    """As a Swin transformer masks: -100 where tokens must not meet; the last token of four is all alone."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))
        mask = torch.zeros(4, 4)
        mask[3, :3] = mask[:3, 3] = -100.0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT + self.mask
        return (scores.softmax(-1) @ self.value(x)).flatten(1)[:, -8:]


def test_rows_hold_no_subnormal_numbers() -> None:
    """They would make every product with them fifty times slower."""
    torch.manual_seed(3)
    model, x = MaskedAttention(), torch.randn(5, 4, 6)
    # What the network itself computes at the lone token is as small as that.
    query, key = model.query(x).detach().requires_grad_(), model.key(x).detach()
    (query @ key.mT + model.mask).softmax(-1)[:, 3, :3].sum().backward()
    assert query.grad is not None and _subnormal(query.grad)
    operator, plan = operator_for(model, x)
    assert not plan.generic  # type: ignore[attr-defined]
    for block in operator.blocks:
        with block.opened() as opened:
            for factor in opened.factors.values():
                assert not any(_subnormal(t) for t in factor.tensors())
    dense = dense_jacobian(model.double(), x.double())
    assert_close(torch.cat(list(operator.iter_rows(5))).double(), dense, rtol=1e-5, atol=1e-6)


def _subnormal(x: Tensor) -> bool:
    return bool(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_flushing_leaves_what_counts(dtype: torch.dtype) -> None:
    x = torch.tensor([[3.0, -1e-20, 0.0, 1e-37, -1e-12]], dtype=dtype)
    wanted = x.clone()
    if dtype != torch.float64:  # eps⁴ is 5e-63 there
        wanted[0, 3] = 0
    assert torch.equal(flushed(x), wanted)
    assert flushed(wanted) is wanted
    small = torch.tensor([[1e-36, 1e-38]], dtype=torch.float32)
    assert torch.equal(flushed(small), torch.tensor([[1e-36, 0.0]]))
    many = torch.ones(100, 2)
    many[:, 1] = 1e-40  # the same of every example; one example's alone would cost nothing
    assert torch.equal(flushed(many), torch.tensor([1.0, 0.0]).expand(100, 2))
    odd = torch.tensor([float("nan"), 1e-40, float("inf")])
    assert flushed(odd) is odd and not len(flushed(x[:0]))
