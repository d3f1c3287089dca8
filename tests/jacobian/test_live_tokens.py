"""Rows without dead tokens, and panels of the Gram matrix, against rows written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.jacobian import gram as grams
from nullbayes.jacobian import live_tokens
from nullbayes.jacobian.block import Block
from nullbayes.jacobian.factors import products
from nullbayes.jacobian.factors.dense import DenseFactor
from nullbayes.jacobian.factors.lookup import LookupFactor
from nullbayes.jacobian.factors.outer import OuterFactor
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.model.parameters import ParameterSpace

F64 = torch.float64
B, C, T, I, O, V = 9, 3, 16, 6, 10, 8


def space() -> ParameterSpace:
    table, layer, norm = nn.Embedding(V, I), nn.Linear(I, O), nn.Linear(3, 1, bias=False)
    return ParameterSpace.from_model(nn.ModuleList([table, layer, norm]).double())


def block(lengths: list[int], of: ParameterSpace) -> Block:
    """Rows with random numbers, zeros behind each length; of the second example also in the middle."""
    alive = torch.arange(T) < torch.tensor(lengths)[:, None]
    alive[1, 3:5] = False
    table, weight, bias, norm = of.slots
    g = torch.randn(B, C, T, O, dtype=F64) * alive[:, None, :, None]
    looked = torch.randn(B, C, T, I, dtype=F64) * alive[:, None, :, None]
    a = torch.randn(B, T, 1, I, dtype=F64)
    factors = [
        LookupFactor(table, torch.randint(-1, V, (B, T)), looked),
        OuterFactor(weight, bias, a, g[:, :, :, None]),
        DenseFactor([norm], torch.randn(B, C, norm.numel, dtype=F64)),
    ]
    return Block({tuple(s.name for s in f.slots): f for f in factors}, B, C)


def written(block: Block, of: ParameterSpace) -> Tensor:
    return torch.cat(list(JacobianOperator(of, [block]).iter_rows(10**6)))


@pytest.mark.parametrize(
    "lengths", [[16] * B, [2, 9, 16, 5, 5, 3, 1, 12, 8], [1] * B, [0, 4, 4, 4, 4, 4, 4, 4, 4]]
)
def test_rows_stay_and_dead_tokens_go(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_tokens, "FROM", 0)
    torch.manual_seed(0)
    of = space()
    whole = block(lengths, of)
    rows = written(whole, of).unflatten(0, (B, C))
    live = [max(1, n) for n in lengths]
    live[1] -= len({3, 4} & set(range(lengths[1])))
    seen, nbytes = [], 0
    for index, part, kind in live_tokens.by_length(whole):
        which = torch.arange(B) if index is None else index
        assert_close(written(part, of).unflatten(0, (-1, C)), rows[which], atol=1e-13, rtol=0)
        seen += which.tolist()
        nbytes += part.nbytes
        longest = max(live[n] for n in which.tolist())
        tokens = [f.tokens for f in part.factors.values() if not isinstance(f, DenseFactor)]
        assert all(t == (longest if longest <= 0.9 * T else T) for t in tokens)
        steps = {live[n] * live_tokens.STEPS // T for n in which.tolist()}
        assert {min(step, live_tokens.STEPS - 1) for step in steps} == {kind}
    assert sorted(seen) == list(range(B))
    if max(lengths) < T:
        assert nbytes < 0.6 * whole.nbytes


def test_small_pieces_and_short_ones_are_left_alone() -> None:
    of = space()
    whole = block([2] * B, of)
    assert [(i, p is whole, k) for i, p, k in live_tokens.by_length(whole)] == [(None, True, 0)]


class Texts(nn.Module):
    """Padded tokens are masked, and the head reads the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(20, 6), nn.Linear(6, 12)
        self.last, self.head = nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        alive = (ids > 0)[..., None]
        h = torch.tanh(self.inner(self.table(ids))) * alive
        h = torch.tanh(self.last(h + h.mean(1, keepdim=True)))
        out: Tensor = self.head(h)[:, 0]
        return out


def test_a_posterior_is_the_same_without_dead_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Texts().double().eval()
    ids = torch.randint(1, 20, (30, 16))
    ids *= torch.arange(16) < torch.randint(2, 17, (30, 1))
    data = [(ids[i : i + 10], torch.arange(10) % 3) for i in (0, 10, 20)]
    options: dict[str, Any] = {"prior_precision": 1.0, "delta": 1e-6}
    whole = nb.NullSpacePosterior(model, **options).fit(data, 4, progress=False)
    monkeypatch.setattr(live_tokens, "FROM", 0)
    monkeypatch.setattr("nullbayes.constraints.memory_budget.BLOCK_BYTES", 2**15)
    short = nb.NullSpacePosterior(model, **options).fit(data, 4, progress=False)
    kept = [sum(b.nbytes for b in p._fitted().rows.operator.blocks) for p in (short, whole)]
    assert kept[0] < 0.9 * kept[1] and len(short._fitted().rows.operator.blocks) > 3
    assert short.certificate.held and short.certificate.audit.passed
    assert_close(short._samples(), whole._samples(), atol=1e-8, rtol=1e-6)
    for name in ("drift", "left_out_divergence", "row_drift", "posterior_score"):
        mine, theirs = (getattr(p.certificate, name) for p in (short, whole))
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("span", [1, 3, 100])
@pytest.mark.parametrize("stripe", [4, 1000])
def test_the_gram_matrix_by_panels(span: int, stripe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    of = space()
    parts = [block([16, 5, *[9] * 7], of), block([1] * B, of)]
    parts[1] = next(iter(live_tokens.by_length(parts[1])))[1]
    operator = JacobianOperator(of, parts)
    rows = torch.cat(list(operator.iter_rows(10**6)))
    calls = []

    def counted(*args: Any) -> None:
        calls.append(args)
        grams_add(*args)

    grams_add = grams.add_panels
    monkeypatch.setattr(grams, "add_panels", counted)
    monkeypatch.setattr(grams, "WIDE", 0)
    monkeypatch.setattr(OuterFactor, "gram_by_rows", True)
    monkeypatch.setattr("nullbayes.jacobian.factors.panels.STRIPE", stripe)
    monkeypatch.setattr("nullbayes.jacobian.factors.panels.FEWEST", span)
    monkeypatch.setattr(grams, "PANEL_ROWS_BYTES", 1)
    assert_close(operator.gram(), rows @ rows.T, atol=1e-10, rtol=1e-10)
    assert len(calls) == 1


def test_products_through_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pieces of outputs and examples as there can be."""
    torch.manual_seed(0)
    of = space()
    operator = JacobianOperator(of, [block([16, 5, *[9] * 7], of)])
    rows = torch.cat(list(operator.iter_rows(10**6)))
    monkeypatch.setattr(products, "ONEDNN_PRODUCT", 0)
    monkeypatch.setattr("nullbayes.jacobian.factors.outer.near_elements", lambda device: 1)
    monkeypatch.setattr(OuterFactor, "products_by_rows", lambda *_: True)
    v, w = torch.randn(5, of.total, dtype=F64), torch.randn(5, B * C, dtype=F64)
    assert_close(operator.matvec(v), v @ rows.T, atol=1e-10, rtol=1e-10)
    assert_close(operator.rmatvec(w), w @ rows, atol=1e-10, rtol=1e-10)
    expected = v - w @ rows
    assert operator.subtract_(v, w) is v
    assert_close(v, expected, atol=1e-10, rtol=1e-10)
    half = torch.randn(5, of.total).bfloat16()
    assert_close(operator.matvec(half), half.double() @ rows.T, atol=1e-10, rtol=1e-10)
