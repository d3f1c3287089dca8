"""Every kind of lie about a batch is caught, against rows by plain reverse mode; ordinary networks pass."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import says
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from zoo import ZOO, Case

import nullbayes as nb
from nullbayes.audit.batches import (
    MOST_WEIGHT,
    check_separate,
    gradient_mismatches,
    plain_gradient,
    random_weights,
)
from nullbayes.audit.signatures import Signature, SignatureSet
from nullbayes.model.batch import Batch, batch_size, take
from nullbayes.model.functional import FunctionalModel, functional_model
from tests.audit.examples_setup import Calls

F64 = torch.float64


def functional(model: nn.Module) -> FunctionalModel:
    return functional_model(model.to(F64).eval(), None, None, None, None)


def inputs(examples: int = 7, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(examples, *(shape or (4,)), generator=generator, dtype=F64)


def dense_rows(f: FunctionalModel, x: Any, cotangents: Tensor) -> Tensor:
    """``(B, C, P)`` by plain reverse mode, one example alone."""
    named = {n: p for n, p in f.model.named_parameters() if n in f.space.names}
    rows = torch.zeros(cotangents.shape[1], len(cotangents), f.space.total, dtype=f.dtype)
    for n in range(rows.shape[0]):
        one = take(x, n, n + 1)
        out = f.model(*one) if isinstance(one, tuple) else f.model(one)
        for c in range(rows.shape[1]):
            grads = torch.autograd.grad(
                out,
                list(named.values()),
                cotangents[c, n : n + 1],
                retain_graph=True,
                allow_unused=True,
            )
            flat = [
                torch.zeros(p.numel(), dtype=f.dtype) if g is None else g.to_dense().reshape(-1)
                for p, g in zip(named.values(), grads, strict=True)
            ]
            rows[n, c] = torch.cat(flat)
    return rows


def mismatches(f: FunctionalModel, x: Any, rows: Tensor, cotangents: Tensor) -> list[str]:
    weights, total = random_weights(cotangents, 0, 3)
    expected = plain_gradient(f, x, total)
    return gradient_mismatches(f.space, expected, weights @ rows.flatten(0, 1))


def cotangents_of(f: FunctionalModel, x: Any, count: int = 2) -> Tensor:
    outputs = f.outputs(x)
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, *outputs.shape, generator=generator, dtype=F64).to(outputs)


# -- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_right_rows_of_ordinary_networks_pass(case: Case) -> None:
    model, x = case.make(F64)
    f = functional_model(model, None, None, None, None)
    x = f.batch(x)
    cotangents = cotangents_of(f, x)
    one_by_one = [
        dense_by_library(f, take(x, n, n + 1), cotangents[:, n]) for n in range(batch_size(x))
    ]
    rows = torch.stack(one_by_one)
    assert mismatches(f, x, rows, cotangents) == []
    check_separate(f, x, f.outputs(x), "the batch")


def dense_by_library(f: FunctionalModel, one: Any, cotangents: Tensor) -> Tensor:
    """``(C, P)`` of one example by plain reverse mode through the functional model."""
    return torch.stack([plain_gradient(f, one, c[None]) for c in cotangents])


def test_one_backward_pass_is_the_sum_of_dense_rows() -> None:
    model = Calls(
        lambda m, ids: m.out(torch.tanh(m.table(ids)).mean(1)),
        table=nn.Embedding(9, 4, sparse=True),
        out=nn.Linear(4, 3),
    )
    f, ids = functional(model), torch.arange(10).reshape(5, 2) % 9
    cotangents = cotangents_of(f, ids)
    rows = dense_rows(f, ids, cotangents)
    for n in range(5):
        picked = torch.zeros_like(cotangents[0])
        picked[n] = cotangents[1, n]
        assert_close(plain_gradient(f, ids, picked), rows[n, 1], rtol=1e-12, atol=1e-14)
    assert plain_gradient(f, ids, cotangents[0]).dtype == F64


@pytest.mark.parametrize("out", [(), (3,), (2, 3)])
def test_weights_belong_to_rows_and_leave_none_out(out: tuple[int, ...]) -> None:
    cotangents = torch.randn(4, 6, *out, dtype=F64, generator=torch.Generator().manual_seed(1))
    cotangents[:, 2] *= 1e-9
    cotangents[1, 3] = 0
    state = torch.random.get_rng_state()
    r, total = random_weights(cotangents, 0, 1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert r.shape == (24,) and total.shape == cotangents.shape[1:]
    wanted = torch.einsum("nc,cn...->n...", r.reshape(6, 4), cotangents)
    assert_close(total, wanted)
    norms = cotangents.reshape(4, 6, -1).norm(dim=2).T
    sizes = r.reshape(6, 4).abs() * norms / norms.max()
    # Each row counts for about as much as the largest, as far as MOST_WEIGHT allows.
    usual = norms > norms.max() / MOST_WEIGHT
    assert float(sizes[usual].min()) >= 0.5 and float(sizes[usual].max()) <= 1.5
    assert float(r.abs().max()) <= 1.5 * MOST_WEIGHT
    again, other = random_weights(cotangents, 0, 1)[0], random_weights(cotangents, 0, 2)[0]
    assert torch.equal(r, again) and not torch.equal(r.sign(), other.sign())
    nothing, _ = random_weights(torch.zeros(2, 3, 4), 0, 0)
    assert bool((nothing.abs() >= 0.5).all())


def sorted_inside(m: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return m.out(torch.tanh(m.inner(x[order]))[order.argsort()])


def test_rows_of_a_batch_that_is_sorted_inside_are_given_to_the_wrong_examples() -> None:
    f = functional(Calls(sorted_inside, inner=nn.Linear(4, 5), out=nn.Linear(5, 3)))
    x = inputs()
    cotangents = cotangents_of(f, x)
    rows = dense_rows(f, x, cotangents)
    assert mismatches(f, x, rows, cotangents) == []
    # As a hook sees them: the inner layer's part of row n is that of the example in place n after sorting.
    slots = [s for s in f.space.slots if s.name.startswith("inner")]
    lie = rows.clone()
    for slot in slots:
        lie[:, :, slot.start : slot.stop] = rows[x[:, 0].argsort(), :, slot.start : slot.stop]
    assert mismatches(f, x, lie, cotangents) == ["inner.weight", "inner.bias"]


def test_a_single_pair_of_examples_exchanged_among_many_is_noticed() -> None:
    f = functional(
        Calls(
            lambda m, x: m.out(torch.tanh(m.inner(x))), inner=nn.Linear(4, 5), out=nn.Linear(5, 3)
        )
    )
    x = inputs(200)
    cotangents = cotangents_of(f, x)
    cotangents[:, 150:] *= 1e-2  # confident ones
    rows = dense_rows(f, x, cotangents)
    rows[[160, 170]] = rows[[170, 160]]
    assert len(mismatches(f, x, rows, cotangents)) == 4


def test_a_layer_that_is_used_outside_its_module_too() -> None:
    model = Calls(
        lambda m, x: m.out(torch.tanh(F.linear(torch.tanh(m.inner(x)), m.inner.weight))),
        inner=nn.Linear(4, 4),
        out=nn.Linear(4, 3),
    )
    f, x = functional(model), inputs()
    cotangents = cotangents_of(f, x)
    rows = dense_rows(f, x, cotangents)
    assert mismatches(f, x, rows, cotangents) == []
    lie, slot = rows.clone(), f.space.by_name["inner.weight"]
    other = functional(
        Calls(
            lambda m, x: m.out(
                torch.tanh(F.linear(torch.tanh(m.inner(x)), m.inner.weight.detach()))
            ),
            inner=nn.Linear(4, 4),
            out=nn.Linear(4, 3),
        )
    )
    seen = dense_rows(other, x, cotangents)  # what hooks on the module see: one of its two uses
    lie[:, :, slot.start : slot.stop] = seen[:, :, slot.start : slot.stop]
    assert mismatches(f, x, lie, cotangents) == ["inner.weight"]


def test_the_batch_taken_for_the_axis_of_positions() -> None:
    """A layer that sees (positions, examples, features), with as many positions as examples."""
    model = Calls(
        lambda m, x: m.out(torch.tanh(m.inner(x.transpose(0, 1))).mean(0)),
        inner=nn.Linear(3, 5),
        out=nn.Linear(5, 2),
    )
    f, x = functional(model), inputs(6, 6, 3)
    cotangents = cotangents_of(f, x, 1)
    rows = dense_rows(f, x, cotangents)
    assert mismatches(f, x, rows, cotangents) == []
    lie, slot = rows.clone(), f.space.by_name["inner.weight"]
    h = torch.tanh(F.linear(x, model.inner.weight, model.inner.bias))
    g = (cotangents[0] @ model.out.weight)[:, None] * (1 - h**2) / 6  # (B, L, 5)
    by_position = torch.einsum("nlo,nli->loi", g, x).reshape(6, 1, -1)
    lie[:, :, slot.start : slot.stop] = by_position.detach()
    assert mismatches(f, x, lie, cotangents) == ["inner.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_excuse_for_wrong_rows(dtype: torch.dtype) -> None:
    """Twenty thousand roundings of half precision would excuse anything; a cap forbids that."""
    f = functional(Calls(lambda m, x: m.a(x), a=nn.Linear(4, 3)))
    x = inputs()
    cotangents = cotangents_of(f, x)
    rows = dense_rows(f, x, cotangents)
    weights, total = random_weights(cotangents, 0, 3)
    expected, found = plain_gradient(f, x, total), weights @ rows.flatten(0, 1)
    assert gradient_mismatches(f.space, expected, found, rounding=dtype) == []
    wrong = gradient_mismatches(f.space, expected, 1.2 * found, rounding=dtype)
    assert wrong == ["a.weight", "a.bias"]
    assert "a.weight" in gradient_mismatches(f.space, expected, 1.03 * found, rounding=dtype)
    found[0] = math.nan
    assert gradient_mismatches(f.space, expected, found, rounding=dtype) == ["a.weight"]


def test_a_gradient_that_is_zero_in_exact_arithmetic_is_held_against_the_row() -> None:
    f = functional(Calls(lambda m, x: m.a(x), a=nn.Linear(4, 3)))
    expected = torch.zeros(f.space.total, dtype=F64)
    expected[:12] = 1.0
    rounded = expected.clone()
    rounded[12:] = 1e-15
    assert gradient_mismatches(f.space, expected, rounded) == []
    rounded[12:] = 1e-9
    assert gradient_mismatches(f.space, expected, rounded) == ["a.bias"]
    assert gradient_mismatches(f.space, expected, rounded, scale=1e6) == []


# -- examples ------------------------------------------------------------------------------------


def refused(forward: Callable[..., Tensor], *words: str, x: Any = None, **parts: nn.Module) -> None:
    model = Calls(forward, a=nn.Linear(4, 3), **parts).to(F64).eval()
    f = functional_model(model, None, None, None, None)
    x = inputs() if x is None else x
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
        outputs = f(f.weights(), x)
        with says(nb.errors.ModelError, "train_loader, batch 4", *words):
            check_separate(f, x, outputs, "train_loader, batch 4", 4)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def test_examples_that_mix() -> None:
    refused(lambda m, x: m.a(x - 0.5 * x.mean(0)), "mixes the examples", "model.eval()")
    refused(lambda m, x: m.a(x.cumsum(0)), "mixes the examples")
    refused(lambda m, x: m.a(x) * x.abs().amax(), "mixes the examples")


def test_little_is_enough() -> None:
    refused(lambda m, x: m.a(x) + 1e-6 * x.mean(0)[:3], "mixes the examples")


def test_a_batch_size_written_into_the_network() -> None:
    refused(lambda m, x: m.a(x.reshape(7, 4)), "fails on", "batch size")
    refused(
        lambda m, x: m.a(x).mean(0, keepdim=True).expand(7, 3),
        "outputs of shape",
    )


def test_rare_noise() -> None:
    refused(lambda m, x: m.a(F.dropout(x, 0.001, training=True)), "draws random numbers", "(torch)")
    refused(lambda m, x: m.a(x) + 0 * float(np.random.rand()), "NumPy")  # noqa: NPY002
    refused(lambda m, x: m.a(x) + 0 * random.random(), "Python's `random`")


def test_a_generator_of_the_networks_own() -> None:
    def noisy(m: Any, x: Tensor) -> Tensor:
        return m.a(x) + 0 * torch.rand(len(x), 3, generator=m.noise.source)

    held = nn.Identity()
    held.source = torch.Generator()
    refused(noisy, "draws random numbers", "noise.source", noise=held)


def test_a_state_between_calls() -> None:
    calls: list[int] = []

    def drifting(m: Any, x: Tensor) -> Tensor:
        calls.append(1)
        return m.a(x) * (1 + 0.1 * len(calls))

    refused(drifting, "keeps a state between calls")


def test_another_path_with_gradients() -> None:
    refused(
        lambda m, x: m.a(x) * (2.0 if torch.is_grad_enabled() else 1.0), "gradients are recorded"
    )


def test_the_fused_path_of_transformer_encoders() -> None:
    """At padded positions it gives zeros where the other path gives numbers."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    model = Calls(
        lambda m, x, pad: m.a(m.e(x, src_key_padding_mask=pad).mean(1)),
        e=nn.TransformerEncoder(layer, 1),
        a=nn.Linear(4, 3),
    )
    model = model.double().eval()
    f = functional_model(model, None, None, None, None)
    pad = torch.zeros(5, 3, dtype=torch.bool)
    pad[::2, 2] = True
    x = Batch((inputs(5, 3, 4), pad), (True, True))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        deployed = model(*x.inputs)
    with says(nb.errors.ModelError, "gradients are recorded", "set_fastpath_enabled"):
        check_separate(f, x, deployed, "the batch")


def test_a_mask_that_is_as_long_as_the_batch() -> None:
    def masked(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.a(torch.softmax(x @ x.transpose(1, 2) + mask, -1) @ x).mean(1)

    model = Calls(masked, a=nn.Linear(4, 3)).double().eval()
    f = functional_model(model, None, None, None, None)
    mask = torch.triu(torch.full((6, 6), -3.0, dtype=F64), 1)
    x = inputs(6, 6, 4)
    outputs = f.outputs(Batch((x, mask), (True, False)))
    check_separate(f, Batch((x, mask), (True, False)), outputs, "the batch")
    with says(nb.errors.ModelError, "the batch", "another length than the batch"):
        check_separate(f, Batch((x, mask), (True, True)), outputs, "the batch")


def test_one_example_alone_and_two() -> None:
    f = functional(Calls(lambda m, x: m.a(x), a=nn.Linear(4, 3)))
    for size in (1, 2, 3):
        x = inputs(size)
        check_separate(f, x, f.outputs(x), "the batch", size)
    squeezed = functional(Calls(lambda m, x: m.a(x).squeeze(), a=nn.Linear(4, 1)))
    x = inputs(2)
    with says(nb.errors.ModelError, "squeeze()"):
        check_separate(squeezed, x, squeezed.model(x).detach(), "the batch")


def test_it_leaves_random_state_and_network_alone() -> None:
    f, x = functional(Calls(lambda m, x: m.a(x), a=nn.Linear(4, 3))), inputs()
    before = torch.random.get_rng_state(), random.getstate(), f.model.a.weight.clone()
    check_separate(f, x, f.outputs(x), "the batch")
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == random.getstate()
    assert torch.equal(before[2], f.model.a.weight) and f.model.a.weight.grad is None


# -- signatures ----------------------------------------------------------------------------------


def test_batches_are_told_apart_by_what_can_change_their_path() -> None:
    proved = SignatureSet()
    x = torch.randn(5, 3, 8, 8)
    proved.add(Signature.of(x))
    assert proved.covers(Signature.of(torch.randn(9, 3, 8, 8)))  # another length of batch is none
    unlike = {
        "one example": x[:1],
        "shape": torch.randn(5, 3, 8, 9),
        "dtype": x.double(),
        "memory": x.to(memory_format=torch.channels_last),
        "several tensors": (x, x),
        "a mapping": {"x": x},
        "an axis as long as the batch": torch.randn(8, 3, 8, 8),
    }
    for what, other in unlike.items():
        assert not proved.covers(Signature.of(other)), what
    assert SignatureSet([Signature.of((x, 2))]).covers(Signature.of((x[:4], 2)))
    assert not SignatureSet([Signature.of((x, 2))]).covers(Signature.of((x[:4], 3)))
    mask = torch.zeros(5, 5)
    shared = Batch((x, mask), (True, False))
    assert Signature.of(shared) != Signature.of(Batch((x, mask), (True, True)))
    assert len(proved) == 1
