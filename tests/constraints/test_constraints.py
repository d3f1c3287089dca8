"""Cotangents against dense Hessians and Jacobians, and what `directions` leaves out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from nullbayes.constraints.directions import (
    AUTO_SHARE,
    Cotangents,
    leading_directions,
    resolve_directions,
)
from nullbayes.constraints.preserve import Preserve, register_preserve, resolve_preserve
from nullbayes.errors import InputError, NonFiniteError
from nullbayes.likelihood import Binary, Classification, Likelihood, Moments, Regression

F64 = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def labels(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def gram(factor: Tensor) -> Tensor:
    """``Σ_c l_c l_cᵀ`` of a factor (C, B, *out): (B, D, D)."""
    flat = factor.reshape(*factor.shape[:2], -1)
    return torch.einsum("cni,cnj->nij", flat, flat)


def dense_hessian(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    """Hessian of the loss by torch.func, example by example: (B, D, D)."""
    width = math.prod(outputs.shape[1:])
    one = [
        torch.func.hessian(lambda f, t=targets[n : n + 1]: likelihood.loss(f[None], t)[0])(
            outputs[n]
        )
        for n in range(outputs.shape[0])
    ]
    return torch.stack(one).reshape(-1, width, width)


def trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)


CASES = {
    "classes": (Classification(), 2 * normal(6, 7), labels(7, 6)),
    "tokens": (Classification(), 2 * normal(3, 4, 3), labels(3, 3, 4)),
    "pixels": (Classification(), 2 * normal(2, 3, 2, 2), labels(3, 2, 2, 2)),
    "binary": (Binary(), normal(5), labels(2, 5)),
    "multi-label": (Binary(), 2 * normal(5, 4), labels(2, 5, 4)),
    "gauss": (Regression([0.1, 1.0, 10.0]), normal(5, 3), normal(5, 3, seed=2)),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


# -- the three modes -----------------------------------------------------------------------------


@each_case
def test_predictions_factor_the_hessian(case):
    likelihood, outputs, targets = case
    preserve = resolve_preserve("predictions")
    result = preserve.cotangents(likelihood, outputs, targets)
    hessian = dense_hessian(likelihood, outputs, targets)
    assert result.values.shape == (preserve.rows(likelihood, outputs.shape[1:]), *outputs.shape)
    assert_close(gram(result.values), hessian)
    assert_close(result.trace, trace(hessian))
    assert result.discarded.count_nonzero() == 0


@each_case
def test_loss_is_one_row_of_the_gradient(case):
    likelihood, outputs, targets = case
    preserve = resolve_preserve("loss")
    result = preserve.cotangents(likelihood, outputs, targets)
    point = outputs.clone().requires_grad_()
    gradient = torch.autograd.grad(likelihood.loss(point, targets).sum(), point)[0]
    assert preserve.rows(likelihood, outputs.shape[1:]) == 1
    assert_close(result.values, gradient[None])
    assert_close(result.trace, gradient.reshape(len(outputs), -1).square().sum(1))


@each_case
def test_outputs_are_the_identity(case):
    likelihood, outputs, targets = case
    preserve = resolve_preserve("outputs")
    result = preserve.cotangents(likelihood, outputs, targets)
    width = math.prod(outputs.shape[1:])
    assert preserve.rows(likelihood, outputs.shape[1:]) == width
    assert result.values.shape == (width, *outputs.shape)
    identity = torch.eye(width, dtype=F64).expand(len(outputs), width, width)
    assert_close(result.values.reshape(width, len(outputs), width).transpose(0, 1), identity)
    assert_close(result.trace, torch.full((len(outputs),), float(width), dtype=F64))


def test_rows_pull_back_to_the_generalised_gauss_newton_matrix():
    """Σ_n over the rows of A, with A built from the cotangents, is the dense GGN of a small model."""
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)
    ).double()
    flat = normal(sum(p.numel() for p in model.parameters()))
    inputs, targets, likelihood = normal(5, 2), labels(3, 5), Classification()

    def outputs(weights: Tensor) -> Tensor:
        named, start = {}, 0
        for name, p in model.named_parameters():
            named[name] = weights[start : start + p.numel()].view_as(p)
            start += p.numel()
        return torch.func.functional_call(model, named, (inputs,))

    J = torch.func.jacrev(outputs)(flat)  # (B, O, P)
    f = outputs(flat)
    ggn = torch.einsum("nop,noq,nqr->pr", J, dense_hessian(likelihood, f, targets), J)
    values = resolve_preserve("predictions").cotangents(likelihood, f, targets).values
    A = torch.einsum("cno,nop->cnp", values, J).flatten(0, 1)
    assert_close(A.T @ A, ggn)


@pytest.mark.parametrize("mode", ["predictions", "outputs", "loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_detached_and_keep_dtype(mode, dtype):
    outputs = normal(4, 5, dtype=dtype).requires_grad_()
    preserve, state = resolve_preserve(mode), torch.get_rng_state()
    for directions in (None, 2, "auto") if preserve.takes_directions else (None,):
        result = preserve.cotangents(Classification(), outputs, labels(5, 4), directions)
        for tensor in (result.values, result.discarded, result.trace):
            assert tensor.dtype == dtype and not tensor.requires_grad
        assert result.discarded.shape == result.trace.shape == (4,)
    assert torch.equal(torch.get_rng_state(), state)


# -- directions ----------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("directions", [1, 2, 3, 100])
def test_leading_directions_are_the_best_of_their_rank(case, directions):
    likelihood, outputs, targets = case
    preserve = resolve_preserve("predictions")
    result = preserve.cotangents(likelihood, outputs, targets, directions)
    hessian = dense_hessian(likelihood, outputs, targets)
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    keep = min(directions, preserve.rows(likelihood, outputs.shape[1:]))
    best = vectors[..., -keep:] @ torch.diag_embed(eigenvalues[:, -keep:]) @ vectors[..., -keep:].mT
    assert result.values.shape == (keep, *outputs.shape)
    assert preserve.rows(likelihood, outputs.shape[1:], directions) == keep
    assert_close(gram(result.values), best)
    assert_close(result.discarded, trace(hessian) - trace(best), atol=1e-12, rtol=1e-6)
    assert_close(result.trace, trace(hessian))
    # The rows are orthogonal, longest first: what makes them directions.
    rows = result.values.reshape(keep, len(outputs), -1)
    cross = torch.einsum("cni,dni->ncd", rows, rows)
    assert_close(cross, torch.diag_embed(eigenvalues.flip(-1)[:, :keep]))


@given(
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(1, 8),
    st.floats(0, 4),
    st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_auto_keeps_the_fewest_that_reach_the_share(batch, count, width, decay, seed):
    sizes = torch.exp(-decay * torch.arange(width, dtype=F64))
    factor = normal(count, batch, width, seed=seed) * sizes
    result = leading_directions(factor, "auto")
    eigenvalues = torch.linalg.svdvals(factor.transpose(0, 1)).square()  # (B, min), descending
    kept = gram(result.values)
    used = (result.values.reshape(-1, batch, width).norm(dim=-1) > 0).sum(0)
    assert result.values.shape[0] == used.max()
    assert_close(result.discarded, result.trace - trace(kept), atol=1e-12, rtol=1e-6)
    assert_close(result.trace, eigenvalues.sum(1))
    for n in range(batch):
        share = eigenvalues[n].cumsum(0) / eigenvalues[n].sum()
        assert share[used[n] - 1] >= AUTO_SHARE - 1e-10
        assert used[n] == 1 or share[used[n] - 2] < AUTO_SHARE + 1e-10
    # Below the full Hessian, so the kept part never claims more than the data says.
    assert torch.linalg.eigvalsh(gram(factor) - kept).min() > -1e-10


def test_auto_in_one_batch_of_sure_and_unsure_examples():
    outputs = torch.tensor([[30.0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [9.0, 9, 0, 0, -9]], dtype=F64)
    preserve = resolve_preserve("predictions")
    result = preserve.cotangents(Classification(), outputs, labels(5, 3), "auto")
    used = (result.values.norm(dim=-1) > 0).sum(0)
    assert used.tolist() == [4, 4, 1]
    assert result.values.shape[0] == 4 <= preserve.rows(Classification(), (5,), "auto")
    assert result.discarded[:2].count_nonzero() == 0
    assert 0 < result.discarded[2] <= (1 - AUTO_SHARE) * result.trace[2]


def test_auto_without_curvature_is_one_zero_row():
    ignored = torch.full((3,), -100)
    result = resolve_preserve("predictions").cotangents(
        Classification(), normal(3, 5), ignored, "auto"
    )
    assert result.values.shape == (1, 3, 5)
    for tensor in (result.values, result.trace, result.discarded):
        assert tensor.count_nonzero() == 0


def test_float32_keeps_its_digits_for_confident_predictions():
    outputs = torch.tensor([[60.0, 0.0, -60.0, 3.0], [-60.0, 60.0, 55.0, 1.0]])
    result = resolve_preserve("predictions").cotangents(Classification(), outputs, labels(4, 2), 2)
    full = resolve_preserve("predictions").cotangents(
        Classification(), outputs.double(), labels(4, 2), 2
    )
    kept, expected = gram(result.values.double()), gram(full.values)
    assert ((kept - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))).max() < 1e-6
    assert (expected.norm(dim=(1, 2)) < 0.02).all()  # confident indeed


@pytest.mark.parametrize("directions", [3, "auto"])
def test_blocks_of_examples_change_nothing(monkeypatch, directions):
    factor = normal(4, 7, 6) * torch.tensor([1, 0.3, 0.1, 1e-2, 1e-3, 1e-4], dtype=F64)
    whole = leading_directions(factor, directions)
    monkeypatch.setattr("nullbayes.constraints.directions._BLOCK", 4 * 6 * 3)
    blocks = leading_directions(factor, directions)
    assert_close(gram(blocks.values), gram(whole.values))
    assert blocks.values.shape == whole.values.shape
    assert_close(blocks.discarded, whole.discarded, atol=1e-14, rtol=1e-9)
    assert_close(blocks.trace, whole.trace)


@pytest.mark.parametrize("spread", [1.0, 4.0, 15.0])
@pytest.mark.parametrize("directions", [1, 10, "auto"])
@pytest.mark.parametrize("soft", [False, True])
def test_many_classes_take_a_shortcut_to_the_same_rows(monkeypatch, spread, directions, soft):
    likelihood = Classification(weight=[1.0, 2.0] * 60)
    outputs, targets = spread * normal(6, 120), labels(120, 6)
    targets[2] = -100
    if soft:
        targets = normal(6, 120, seed=3).softmax(-1)
    preserve = resolve_preserve("predictions")
    taken = likelihood.leading_factor(outputs, targets, 10) is not None
    assert taken and likelihood.leading_factor(outputs, targets, 16) is None
    fast = preserve.cotangents(likelihood, outputs, targets, directions)
    monkeypatch.setattr(Classification, "leading_factor", Likelihood.leading_factor)
    slow = preserve.cotangents(likelihood, outputs, targets, directions)
    assert fast.values.shape == slow.values.shape
    assert_close(gram(fast.values), gram(slow.values), atol=1e-11, rtol=1e-7)
    assert_close(fast.discarded, slow.discarded, atol=1e-11, rtol=1e-7)
    assert_close(fast.trace, slow.trace, atol=1e-12, rtol=1e-9)
    # Where the shortcut is enough, it is the road taken.
    if spread == 15.0 and directions == "auto":
        monkeypatch.undo()
        monkeypatch.setattr(Classification, "hessian_factor", None)
        assert_close(preserve.cotangents(likelihood, outputs, targets, "auto").values, fast.values)


# -- refusals and extension ----------------------------------------------------------------------


def test_directions_are_checked():
    assert [resolve_directions(d) for d in (None, "auto", 1, 10)] == [None, "auto", 1, 10]
    for bad in (0, -1, 2.0, True, "all", [3]):
        with pytest.raises(
            InputError, match=r"directions is .*expected None .*'auto'.*whole number"
        ):
            resolve_directions(bad)
    for mode in ("outputs", "loss"):
        preserve = resolve_preserve(mode)
        with pytest.raises(InputError, match=f'directions=3 with preserve="{mode}".*"predictions"'):
            preserve.rows(Classification(), (5,), 3)
        with pytest.raises(InputError, match=f"directions='auto' with preserve=\"{mode}\""):
            preserve.cotangents(Classification(), normal(3, 5), labels(5, 3), "auto")


def test_resolve_preserve():
    for name in ("predictions", "outputs", "loss"):
        preserve = resolve_preserve(name)
        assert preserve.name == name and resolve_preserve(preserve) is preserve
    assert len({resolve_preserve(n).describe() for n in ("predictions", "outputs", "loss")}) == 3
    for bad in ("logits", None, 3, Preserve):
        with pytest.raises(InputError, match=r"'loss', 'outputs', 'predictions'"):
            resolve_preserve(bad)


class Broken(Binary):
    """A likelihood whose derivatives are not finite for the second example."""

    def loss_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        gradient = super().loss_gradient(outputs, targets)
        gradient[1] = math.nan
        return gradient

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        factor = super().hessian_factor(outputs, targets)
        factor[:, 1] = math.inf
        return factor

    def moments(self, draws: Tensor, point: Tensor, linearised: bool) -> Moments:
        raise NotImplementedError


@pytest.mark.parametrize("mode", ["predictions", "loss"])
def test_non_finite_cotangents_are_refused(mode):
    with pytest.raises(NonFiniteError, match=f'preserve="{mode}" hold NaN .* 1 of 3 .*example 1'):
        resolve_preserve(mode).cotangents(Broken(), normal(3, 2), labels(2, 3, 2))


class Margin(Preserve):
    """Keeps the margin between the first two outputs: what a user's file would hold."""

    name = "margin"

    def num_rows(self, likelihood: Likelihood, output_shape: tuple[int, ...]) -> int:
        return 1

    def build(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
        values = torch.zeros_like(outputs)
        values[:, 0], values[:, 1] = 1, -1
        return values.unsqueeze(0)

    def describe(self) -> str:
        return "the margin between the first two outputs"


def test_adding_a_thing_to_preserve(monkeypatch):
    monkeypatch.setattr("nullbayes.constraints.preserve._REGISTRY", {})
    register_preserve(Margin)
    result = resolve_preserve("margin").cotangents(Classification(), normal(3, 4), labels(4, 3))
    assert isinstance(result, Cotangents)
    assert_close(result.values[0, 2], torch.tensor([1.0, -1, 0, 0], dtype=F64))
    assert_close(result.trace, torch.full((3,), 2.0, dtype=F64))
    register_preserve(Margin)  # a notebook cell run twice
    with pytest.raises(InputError, match="belongs to Margin"):
        register_preserve(type("Other", (Margin,), {}))

    class Wrong(Margin):
        def build(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
            return torch.zeros_like(outputs)

    with pytest.raises(
        InputError, match=r"shape \(3, 4\) for outputs of shape \(3, 4\); .*\(C, 3, 4\)"
    ):
        Wrong().cotangents(Classification(), normal(3, 4), labels(4, 3))
