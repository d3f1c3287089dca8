"""The network as it is deployed: fused encoders, checkpointing, padding rows, operations without second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import nullbayes as nb
from nullbayes.jacobian import linearise
from tests.cases.dense import (
    assert_kept,
    assert_predicts,
    assert_rows,
    fitted,
    normal,
    rows,
    seeded,
)

# -- encoders that pack padded batches ------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, pool: bool, nested: bool = True, norm: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        last = nn.LayerNorm(4) if norm else None
        self.encoder = nn.TransformerEncoder(layer, 2, norm=last, enable_nested_tensor=nested)
        self.head, self.pool = nn.Linear(4 if pool else 12, 2), pool

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        h = self.encoder(x, src_key_padding_mask=pad)
        return self.head(h.mean(1) if self.pool else h.flatten(1))


def padded(count: int) -> tuple[Tensor, Tensor]:
    pad = torch.zeros(count, 3, dtype=torch.bool)
    pad[::2, 2] = True
    pad[::4, 1] = True
    return normal(count, 3, 4), pad


def deployed_change(model: nn.Module, inputs: Any, posterior: Any) -> Tensor:
    """Largest change of the outputs without gradients along each sample, by central differences."""
    step, found = 1e-5, []
    start = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for state in posterior.sample():
        ends = []
        for sign in (1, -1):
            moved = {n: start[n] + sign * step * (t - start[n]) for n, t in state.items()}
            model.load_state_dict(moved)
            with torch.no_grad():
                ends.append(model(*inputs))
        found.append((ends[0] - ends[1]).abs().max() / (2 * step))
    model.load_state_dict(start)
    return torch.stack(found)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("sizes", [(8,), (3, 5), (1, 7)], ids=str)
def test_the_deployed_encoder_is_the_one_that_is_preserved(
    pool: bool, norm: bool, sizes: tuple[int, ...]
) -> None:
    model = seeded(lambda: Encoder(pool, norm=norm))
    x, pad = padded(8)
    posterior = fitted(model, list(zip(x.split(sizes), pad.split(sizes), strict=True)))
    with torch.no_grad():
        deployed = model(x, pad)
    assert_close(posterior.predict((x, pad)).point, deployed, rtol=0, atol=1e-12)
    assert float(deployed_change(model, (x, pad), posterior).max()) < 1e-6
    assert_close(posterior.predict((x[:1], pad[:1])).point, deployed[:1], rtol=0, atol=1e-12)
    assert type(model.encoder) is nn.TransformerEncoder
    assert model.encoder.use_nested_tensor


def test_an_encoder_without_nested_tensors_needs_nothing() -> None:
    model = seeded(lambda: Encoder(pool=True, nested=False))
    x, pad = padded(6)
    posterior = fitted(model, [(x, pad)])
    assert not posterior.functional.padded
    assert_rows(posterior, rows(model, list(zip(x.split(1), pad.split(1), strict=True))))


def test_a_forward_pass_that_asks_for_gradients_is_refused() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * (2.0 if torch.is_grad_enabled() else 1.0)

    with pytest.raises(nb.ModelError, match=r"batch 0.*when gradients are recorded"):
        fitted(seeded(Asks), [normal(4, 3)])


# -- activation checkpointing -----------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(3, 4), block, nn.Linear(4, 2)
        self.reentrant, self.on = reentrant, True

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.on:
            h = checkpoint(self.block, h, use_reentrant=self.reentrant)
        else:
            h = self.block(h)
        return self.head(h.mean(1))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
    "parametrised": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
}
QUIET_KERNELS = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@QUIET_KERNELS
@pytest.mark.parametrize("block", BLOCKS)
def test_activation_checkpointing(block: str) -> None:
    model = seeded(lambda: Checkpointed(BLOCKS[block](), reentrant=False))
    x = normal(6, 3, 3)
    posterior = fitted(model, x.split((2, 4)))
    prediction = posterior.predict(x[:3], method="sampled")
    assert bool(prediction.outputs.isfinite().all())
    model.on = False
    dense = rows(model, x.split(1))
    assert_rows(posterior, dense)
    assert_kept(posterior, dense)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("block", BLOCKS)
def test_reentrant_checkpointing_is_refused_with_the_mend(block: str) -> None:
    model = seeded(lambda: Checkpointed(BLOCKS[block](), reentrant=True))
    with pytest.raises(nb.ModelError, match="use_reentrant=False"):
        fitted(model, normal(6, 3, 3).split(3))
    assert all(p.grad is None for p in model.parameters())


# -- rows of padding --------------------------------------------------------------------------------------


class Bag(nn.Module):
    def __init__(self, kind: str, tied: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.kind = kind
        table = nn.EmbeddingBag if kind == "bag" else nn.Embedding
        self.table = table(
            7, 4, padding_idx=-7 if kind == "negative" else 2 if kind == "two" else 0
        )
        self.head = nn.Linear(4, 7, bias=bias)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return self.head(torch.tanh(h if h.ndim == 2 else h.mean(1)))


@pytest.mark.parametrize("kind", ["zero", "two", "negative", "bag"])
@pytest.mark.parametrize("solver", [None, nb.solvers.PrimalQR()], ids=str)
def test_the_padding_row_stays_where_it_is(kind: str, solver: Any) -> None:
    model, ids = seeded(lambda: Bag(kind)), torch.arange(24).reshape(6, 4) % 7
    options = {} if solver is None else {"solver": solver, "delta": 1e-3}
    posterior = fitted(model, ids.split(3), **options)
    row = 2 if kind == "two" else 0
    posterior.draw(2)
    for state in posterior.sample():
        moved = (state["table.weight"] != model.table.weight).any(1)
        assert not bool(moved[row])
        assert int(moved.sum()) == 6
    assert posterior.space.free == posterior.space.total - 4
    if solver is None:
        dense = rows(model, ids.split(1))
        assert_rows(posterior, dense)
        assert_predicts(posterior, ids, dense)


def _elsewhere(self: Bag, ids: Tensor) -> Tensor:
    """The table is also the output layer's, and only the forward pass shows it."""
    h = torch.tanh(self.table(ids).mean(1))
    return F.linear(h, self.table.weight) + self.head(h)


class Elsewhere(Bag):
    forward = _elsewhere


class Transposed(Bag):
    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.table(ids).mean(1))
        return self.head(h @ self.table.weight.T @ self.table.weight)


TIED: dict[str, Callable[[], nn.Module]] = {
    "head": lambda: Bag("zero", tied=True),
    "head with bias": lambda: Bag("two", tied=True, bias=True),
    "bag": lambda: Bag("bag", tied=True),
    "functional": lambda: Elsewhere("zero"),
    "products": lambda: Transposed("zero"),
}


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("preserve", ["outputs", "predictions"])
def test_a_tied_padding_row_stays_too(kind: str, preserve: str) -> None:
    """The output layer's use of the row has a gradient, the lookup's has none: the row is a constant of both."""
    model, ids = seeded(TIED[kind]), torch.arange(12).reshape(3, 4) % 7
    posterior = fitted(model, ids.split(2), preserve=preserve)
    certificate = posterior.certificate
    assert certificate.held and certificate.audit is not None and certificate.audit.passed
    row = 2 if kind == "head with bias" else 0
    dense = _without_row(rows(model, ids.split(1)), model, row)
    for state in posterior.sample():
        moved = (state["table.weight"] != model.table.weight).any(1)
        assert not bool(moved[row]) and int(moved.sum()) == 6
    assert posterior.space.free == posterior.space.total - 4
    assert_rows(posterior, dense)
    queries = (torch.arange(20).reshape(5, 4) * 3) % 7
    assert_predicts(posterior, queries, _without_row(rows(model, queries.split(1)), model, row))
    words = [note for note in certificate.notes if "padding_idx" in note]
    assert len(words) == (1 if kind.startswith("head") or kind == "bag" else 0)


def _without_row(dense: Tensor, model: nn.Module, row: int) -> Tensor:
    parts = [torch.ones_like(p) for p in model.parameters()]
    place = [n for n, _ in model.named_parameters()].index("table.weight")
    parts[place][row] = 0
    return dense * torch.cat([p.flatten() for p in parts])


def test_small_steps_of_a_tied_table_agree_with_its_rows() -> None:
    """Sampled and linearised predictions meet for small steps: nothing reads a row that moved unseen."""
    model, ids = seeded(TIED["head"]), torch.arange(12).reshape(3, 4) % 7
    posterior = fitted(model, ids.split(2))
    posterior.prior_precision = 1e8
    queries = (torch.arange(20).reshape(5, 4) * 3) % 7
    linear, sampled = posterior.predict(queries), posterior.predict(queries, method="sampled")
    size = float((linear.outputs - linear.point).abs().max())
    assert size > 1e-5
    assert float((sampled.outputs - linear.outputs).abs().max()) < 1e-2 * size


# -- operations without forward mode or second derivatives -----------------------------------------------------


class Attention(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*parts.unbind(0), is_causal=True)
        return self.head(out.transpose(1, 2).flatten(2)).mean(1)


class Distances(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer, self.centres = nn.Linear(8, 5), nn.Parameter(torch.randn(outputs, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.layer(x[:, 0]), self.centres)


class Summed(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(11, 6, mode="sum"), nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag((x[..., 0] * 3).long() % 11)))


class Twice(torch.autograd.Function):
    """Once differentiable, and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.detach() ** 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class Custom(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 5), nn.Linear(5, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Twice.apply(self.layer(x[:, 0])))


@QUIET_KERNELS
@pytest.mark.parametrize("kind", [Attention, Distances, Summed, Custom])
@pytest.mark.parametrize("outputs", [2, 9, 70])
def test_products_of_any_differentiable_operation(kind: type[nn.Module], outputs: int) -> None:
    """With more outputs than twice the samples, products are taken without rows, where that can be."""
    model, x = seeded(lambda: kind(outputs)), normal(4, 3, 8)
    posterior = fitted(model, [x], preserve="loss")
    dense = rows(model, x.split(1))
    assert_predicts(posterior, x, dense, 1e-7)
    assert posterior.novelty(x, score="variance", exact=False).shape == (4,)


def test_attention_in_terms_of_its_operations() -> None:
    q, k, v = normal(3, 2, 2, 5, 4).unbind(0)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    attend = F.scaled_dot_product_attention
    several: list[dict[str, Any]] = [{}, {"is_causal": True}, {"attn_mask": mask, "scale": 0.3}]
    for options in several:
        mine = functools.partial(attend, key=k, value=v, **options)
        wanted = attend(q, k, v, **options)
        with linearise.Mathematical():
            assert_close(attend(q, k, v, **options), wanted)
            tangent = torch.func.jvp(mine, (q,), (v,))[1]
        step = 1e-6
        ends = [attend(q + sign * step * v, k, v, **options) for sign in (1, -1)]
        assert_close(tangent, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_directions_that_stay_are_not_counted_as_free() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 2))
    ids = torch.randint(1, 5, (4, 2))
    posterior = nb.NullSpacePosterior(model.double().eval(), delta=0)
    certificate = posterior.fit([(ids, torch.arange(4) % 2)], 2, progress=False).certificate
    assert certificate.parameters - certificate.rank - certificate.null_dim == 3
