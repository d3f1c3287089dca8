"""Every way in which the audit differentiates an example, against autograd of one example alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import generator, unchanged
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from zoo import ZOO, Case

import nullbayes as nb
from nullbayes.audit.derivative import DIFFERENCES, FORWARD, ROWS, TWICE, Derivative
from nullbayes.audit.network import NetworkCopy, WrittenOut
from nullbayes.model.batch import take
from tests.audit.examples_setup import F64, Calls, dense, functional

# -- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_every_way_gives_the_derivative_of_every_network(case: Case) -> None:
    model, x = case.make(F64)
    f = functional(model)
    one = take(f.batch(x), 0, 1)
    directions = torch.randn(3, f.space.total, dtype=F64, generator=generator(1))
    # Reverse mode takes a table's row for padding for a constant, which it is as long as nobody moves it.
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            f.space.fix(f"{name}.weight", [module.padding_idx])
    f.space.fix_(directions)
    outputs = f.outputs(one)
    jacobian = torch.stack(
        [
            Derivative(f)._pulled(one, unit.reshape(outputs.shape))
            for unit in torch.eye(outputs.numel(), dtype=F64)
        ]
    )
    wanted = (directions @ jacobian.T).reshape(3, *outputs.shape[1:])
    for way, rtol in ((FORWARD, 1e-9), (TWICE, 1e-9), (ROWS, 1e-9), (DIFFERENCES, 1e-6)):
        try:
            found = Derivative(f, (way,))(one, directions)
        except nb.errors.ModelError:
            assert way in (FORWARD, TWICE), way  # some operations have no such formula
            continue
        assert float((found - wanted).norm()) <= rtol * float(wanted.norm()) + 1e-11, way


def test_attention_written_out_is_attention() -> None:
    q, k, v = (torch.randn(2, 4, 5, 3, dtype=F64, generator=generator(n)) for n in range(3))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    cases: list[dict[str, Any]] = [
        {},
        {"is_causal": True},
        {"attn_mask": causal},
        {"attn_mask": torch.randn(5, 5, dtype=F64), "scale": 0.3},
    ]
    for options in cases:
        wanted = F.scaled_dot_product_attention(q, k, v, **options)
        with WrittenOut():
            found = F.scaled_dot_product_attention(q, k, v, **options)
        assert_close(found, wanted)
    grouped = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
    with WrittenOut():
        found = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
    assert_close(found, grouped)


@pytest.mark.parametrize("heads", ["function", "module"])
def test_fused_attention_is_differentiated_in_forward_mode(heads: str) -> None:
    if heads == "module":
        model = Calls(
            lambda m, x: m.out(m.mha(x, x, x, need_weights=False)[0].mean(1)),
            mha=nn.MultiheadAttention(4, 2, batch_first=True),
            out=nn.Linear(4, 3),
        )
    else:
        model = Calls(
            lambda m, x: m.out(F.scaled_dot_product_attention(*m.qkv(x).chunk(3, -1)).mean(1)),
            qkv=nn.Linear(4, 12),
            out=nn.Linear(4, 3),
        )
    f, x = functional(model), torch.randn(1, 6, 4, dtype=F64, generator=generator(0))
    directions = torch.randn(2, f.space.total, dtype=F64, generator=generator(1))
    along = Derivative(f)
    wanted = torch.einsum("op,kp->ko", dense(f, x)[0], directions)
    assert_close(along(x, directions), wanted)
    assert along.way == FORWARD


def test_coarse_arithmetic_inside_is_doubted_and_not_believed() -> None:
    """A network that rounds to float32 inside has no derivative by short steps; longer ones know how far they err."""
    model = Calls(
        lambda m, x: m.b(torch.tanh(m.a(x)).float().double()), a=nn.Linear(4, 6), b=nn.Linear(6, 3)
    )
    f, x = functional(model), torch.randn(1, 4, dtype=F64, generator=generator(0))
    directions = torch.randn(2, f.space.total, dtype=F64, generator=generator(1))
    along = Derivative(f, (DIFFERENCES,))
    found = along(x, directions)
    away = float((found - torch.einsum("op,kp->ko", dense(f, x)[0], directions)).norm())
    assert away <= 2 * along.doubt and along.doubt < 1e-2 * float(found.norm())


def test_a_copy_runs_the_network_and_not_the_users() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double().eval()
    f, x = functional(model), torch.randn(5, 4, dtype=F64, generator=generator(0))
    delta = torch.randn(f.space.total, dtype=F64, generator=generator(1))
    with unchanged(model):
        copied = NetworkCopy(f)
        before, after = copied.outputs(x), copied.outputs(x, delta)
    assert_close(before, model(x).detach())
    moved = {
        n: p + d
        for (n, p), d in zip(
            model.named_parameters(), f.space.unflatten(delta).values(), strict=True
        )
    }
    assert_close(after, torch.func.functional_call(model, moved, (x,)).detach())
    assert_close(copied.outputs(x), before)
