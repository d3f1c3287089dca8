"""Losses of one's own on outputs of any structure: rows, batches and output Hessians against dense ones."""

from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.constraints.preserve import resolve_preserve
from nullbayes.likelihood import CallableLoss
from nullbayes.likelihood.output_hessian import OutputHessian
from nullbayes.model.structure import Layouts
from tests.posterior.generative_setup import (
    BATCHES,
    EXACT,
    F64,
    QUIET,
    X,
    assert_same_null_space,
    cut,
    fitted_rows,
    flat_weights,
    loss_rows,
    losses_of,
    normal,
    seeded,
    squared,
)


@dataclass
class Record:
    image: Tensor
    code: Tensor | None
    name: str = "record"


Named = namedtuple("Named", ["image", "code"])
WRAPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda image, code: (image, code),
    "list": lambda image, code: [image, code],
    "dict": lambda image, code: {"image": image, "code": code},
    "ordered": lambda image, code: OrderedDict(image=image, code=code),
    "dataclass": lambda image, code: Record(image, code),
    "named tuple": lambda image, code: Named(image, code),
    "nested": lambda image, code: {"out": (image, [code, None]), "n": 3, "top": code.argmax(1)},
}
PARTS: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "tuple": tuple,
    "list": tuple,
    "dict": lambda out: (out["image"], out["code"]),
    "ordered": lambda out: (out["image"], out["code"]),
    "dataclass": lambda out: (out.image, out.code),
    "named tuple": tuple,
    "nested": lambda out: (out["out"][0], out["out"][1][0]),
}


class Coder(nn.Module):
    """An image (2, 2, 2) and a code (3,) from 4 numbers, in any structure."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.encode, self.code = nn.Linear(4, 5), nn.Linear(5, 3)
        self.decode = nn.Linear(3, 8)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        code = self.code(torch.tanh(self.encode(x)))
        return self.wrap(self.decode(torch.tanh(code)).reshape(-1, 2, 2, 2), code)


def mixed_loss(parts: Callable[[Any], tuple[Tensor, Tensor]]) -> Callable[[Any, Tensor], Tensor]:
    """Convex but not diagonal in the outputs, and each of them matters."""

    def loss(out: Any, x: Tensor) -> Tensor:
        image, code = parts(out)
        fit = (image.flatten(1)[:, :4] - x).square().sum(1) + image.flatten(1).logsumexp(1)
        return fit + code.exp().sum(1) + 0.3 * (code.sum(1) * image[:, 0, 0, 0])

    return loss


# -- structures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRAPS)
def test_loss_rows_of_every_structure(kind: str) -> None:
    model, loss = seeded(lambda: Coder(WRAPS[kind])), mixed_loss(PARTS[kind])
    posterior = nb.NullSpacePosterior(model, loss=loss, preserve="loss", **EXACT)
    posterior.fit(BATCHES, 4, **QUIET)
    assert_same_null_space(posterior, loss_rows(model, lambda m: loss(m(X), X)))
    certificate = posterior.certificate
    assert certificate.score_name == "loss" and certificate.constraints == 7
    expected = loss(model(X), X).mean().item()
    assert certificate.network_score == pytest.approx(expected)
    prediction = posterior.predict(X)
    assert len(prediction) == 7
    image, code = PARTS[kind](prediction.outputs)
    assert image.shape == (4, 7, 2, 2, 2) and code.shape == (4, 7, 3)
    assert type(prediction.mean) is (dict if kind == "ordered" else type(model(X)))
    whole, flat = PARTS[kind](prediction.point), model(X)
    assert_close(whole, PARTS[kind](flat))
    variance = PARTS[kind](prediction.variance)
    assert_close(variance[0], (image - whole[0]).square().mean(0))
    assert float(variance[1].min()) > 0
    novelty = posterior.novelty(X, score="variance", exact=False)
    assert_close(novelty, variance[0].flatten(1).sum(1) + variance[1].sum(1))
    moved = torch.cat([(image - whole[0]).flatten(2), (code - whole[1]).flatten(2)], 2)
    size = sum(float(p.detach().square().sum()) for p in model.parameters())
    told = torch.einsum("sbo,tbo->bst", moved, moved) / 4
    told *= posterior.prior_precision * size / certificate.rank
    expected = torch.logdet(torch.eye(4, dtype=F64) + told) / 2
    assert_close(posterior.novelty(X, exact=False), expected, rtol=1e-5, atol=1e-6)
    sampled = posterior.predict(X[:2], method="sampled")
    weights = list(posterior.sample())
    outside = torch.func.functional_call(model, weights[1], (X[:2],))
    assert_close(PARTS[kind](sampled.outputs)[0][1], PARTS[kind](outside)[0])


def test_structures_keep_constants_and_say_what_they_dropped() -> None:
    layouts = Layouts()
    value = {"a": (normal(3, 2), None), "n": 4, "ids": torch.arange(3), "other": object()}
    flat = layouts.flatten(value, 3)
    assert flat.shape == (3, 2)
    back = layouts.unflatten(torch.stack([flat, flat]))
    assert back["a"][0].shape == (2, 3, 2) and back["a"][1] is None and back["n"] == 4
    assert back["ids"] is None and back["other"] is None
    layout = layouts.layout(flat)
    assert layout is not None and layout.dropped == {"ids": "torch.int64", "other": "object"}
    with pytest.raises(nb.ModelError, match="two structures with 2 elements"):
        layouts.flatten((normal(3, 1), normal(3, 1)), 3)
    longer = layouts.flatten({**value, "a": (normal(3, 5), None)}, 3)  # other padding
    assert layouts.unflatten(longer)["a"][0].shape == (3, 5)
    assert layouts.unflatten(flat)["a"][0].shape == (3, 2)


def test_hugging_face_output() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: Tensor) -> Any:
            logits = self.head(x) * scale[:, None]
            return outputs.SequenceClassifierOutput(logits=logits, hidden_states=(x * 2,))

    model = seeded(Model)

    def loss(out: Any, y: Tensor) -> Tensor:
        assert out.loss is None and out.hidden_states[0].shape == (len(y), 4)
        return F.cross_entropy(out.logits, y, reduction="none")

    y, scale = torch.arange(7) % 3, normal(7).abs()
    batches = cut({"x": X, "scale": scale, "labels": y}, slice(0, 4), slice(4, 7))
    posterior = nb.NullSpacePosterior(model, loss, "loss", **EXACT).fit(batches, 3, **QUIET)
    assert_same_null_space(posterior, loss_rows(model, lambda m: loss(m(X, scale), y)))
    prediction = posterior.predict({"x": X, "scale": scale})
    assert type(prediction.mean) is outputs.SequenceClassifierOutput
    assert prediction.variance.logits.shape == (7, 3)


# -- batches ---------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) * self.b(z)


Z = normal(7, 2, seed=9)
T = normal(7, 3, seed=8)


LABELS = {"t": T, "weight": Z[:, 0], "power": 2}


@pytest.mark.parametrize(
    ("batch", "loss", "target"),
    [
        ((X, Z, T), squared, T),
        ({"x": X, "z": Z, "target": T}, squared, T),
        ({"x": X, "z": Z}, lambda out, batch: squared(out, batch["x"][:, :3]), {"x": X}),
        (((X, Z),), lambda out, batch: squared(out, batch[0][:, :3]), (X, Z)),
        ((X, Z, LABELS), lambda out, t: squared(out, t["t"]) * t["weight"], LABELS),
        (((X, Z), None), lambda out, batch: squared(out, batch[0][:, :3]), (X, Z)),
    ],
    ids=["several", "mapping", "mapping alone", "inputs alone", "mapping of targets", "no targets"],
)
def test_batches_of_every_form(
    batch: Any, loss: Callable[[Tensor, Any], Tensor], target: Any
) -> None:
    model = seeded(TwoInputs)
    options: dict[str, Any] = {"loss": loss, "preserve": "loss"}
    posterior = nb.NullSpacePosterior(model, **options, **EXACT)
    posterior.fit(cut(batch, slice(0, 4), slice(4, 7)), 3, **QUIET)
    assert_same_null_space(posterior, loss_rows(model, lambda m: loss(m(X, Z), target)))
    plan = nb.plan(model, cut(batch, slice(0, 4), slice(4, 7)), **options)
    assert plan.rows == 7 and plan.examples == 7


def test_max_examples_and_calibration() -> None:
    model = seeded(lambda: Coder(WRAPS["tuple"]))
    loss = mixed_loss(PARTS["tuple"])
    posterior = nb.NullSpacePosterior(model, loss=loss, preserve="loss", **EXACT)
    posterior.fit(BATCHES, 5, max_examples=5, **QUIET)
    assert_same_null_space(posterior, loss_rows(model, lambda m: loss(m(X[:5]), X[:5])))
    with warnings.catch_warnings():  # it was not even trained
        warnings.simplefilter("ignore", nb.NullBayesWarning)
        path = posterior.calibrate([normal(6, 4, seed=4)], **QUIET)
    assert path.score_name == "loss" and path.examples == 6
    assert all(value == value for value in path.nll)
    assert "training loss" in str(posterior.certificate)


def test_a_single_tensor_keeps_its_shape() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(1, (2, 3))))
    posterior = nb.NullSpacePosterior(
        model, lambda out, x: out.square().sum((1, 2)), "loss", **EXACT
    )
    posterior.fit(BATCHES, 3, **QUIET)
    assert posterior.predict(X).outputs.shape == (3, 7, 2, 3)


# -- the output Hessian ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_predictions_rows_are_the_gauss_newton_matrix(kind: str) -> None:
    model, loss = seeded(lambda: Coder(WRAPS[kind])), mixed_loss(PARTS[kind])
    posterior = nb.NullSpacePosterior(model, loss=loss, **EXACT).fit(BATCHES, 3, **QUIET)
    rows = fitted_rows(posterior)
    assert rows.shape == (7 * 11, sum(p.numel() for p in model.parameters()))
    layouts = Layouts()
    # Shape (7, 11, P).
    jacobian = torch.func.jacrev(losses_of(model, lambda m: layouts.flatten(m(X), 7)))(
        flat_weights(model)
    )
    flat = layouts.flatten(model(X), 7).detach()
    hessian = torch.stack(
        [
            torch.func.hessian(lambda f, n=n: loss(layouts.unflatten(f[None]), X[n : n + 1])[0])(
                flat[n]
            )
            for n in range(7)
        ]
    )
    values, vectors = torch.linalg.eigh(hessian)
    clipped = vectors @ torch.diag_embed(values.clamp(min=0)) @ vectors.mT
    wanted = torch.einsum("nop,nor,nrq->pq", jacobian, clipped, jacobian)
    assert_close(rows.T @ rows, wanted, rtol=1e-8, atol=1e-9)
    two = nb.NullSpacePosterior(model, loss=loss, directions=2, **EXACT).fit(BATCHES, 3, **QUIET)
    assert two.certificate.constraints == 14
    kept = vectors[..., -2:] @ torch.diag_embed(values[:, -2:]) @ vectors[..., -2:].mT
    found = fitted_rows(two)
    wanted = torch.einsum("nop,nor,nrq->pq", jacobian, kept, jacobian)
    assert_close(found.T @ found, wanted, rtol=1e-8, atol=1e-9)
    left = 1 - float(values[:, -2:].sum() / values.clamp(min=0).sum())
    assert two.certificate.discarded_trace == pytest.approx(left)


def separable(out: Tensor, target: Tensor) -> Tensor:
    return F.softplus(out).flatten(1).sum(1) + (out - target).pow(4).flatten(1).sum(1)


def coupled(out: Tensor, target: Tensor) -> Tensor:
    return separable(out, target) + (out * target).flatten(1).sum(1).square()


def test_a_diagonal_hessian_is_found_and_a_coupled_one_is_not_taken_for_it() -> None:
    out, target = normal(5, 4, 3), normal(5, 4, 3, seed=2)
    diagonal = OutputHessian(separable, out, target).diagonal()
    dense = torch.func.vmap(torch.func.hessian(lambda f, t: separable(f[None], t[None])[0]))(
        out, target
    ).reshape(5, 12, 12)
    assert diagonal is not None
    assert_close(torch.diag_embed(diagonal), dense)
    assert OutputHessian(coupled, out, target).diagonal() is None
    assert OutputHessian(lambda o, t: (o * t).sum((1, 2)), out, target).diagonal() is not None
    factor = CallableLoss(separable).hessian_factor(out, target).flatten(2)
    assert_close(torch.einsum("cni,cnj->nij", factor, factor), dense)


@pytest.mark.parametrize(("loss", "width"), [(separable, 40), (separable, 400), (coupled, 40)])
@pytest.mark.parametrize("directions", [3, "auto"])
def test_leading_directions_by_products(loss: Any, width: int, directions: Any) -> None:
    """The shortcut of a callable loss keeps what the decomposition of the whole Hessian keeps."""
    out, target = normal(4, width) * 0.5, normal(4, width, seed=3)
    dense = torch.func.vmap(torch.func.hessian(lambda f, t: loss(f[None], t[None])[0]))(out, target)
    values, vectors = torch.linalg.eigh(dense)
    made = resolve_preserve("predictions").cotangents(CallableLoss(loss), out, target, directions)
    flat = made.values.flatten(2)
    kept = torch.einsum("cni,cnj->nij", flat, flat)
    assert_close(made.trace, values.sum(1))
    if directions == 3:
        top = vectors[..., -3:] @ torch.diag_embed(values[:, -3:]) @ vectors[..., -3:].mT
        assert_close(kept, top, rtol=1e-7, atol=1e-7)
        assert_close(made.discarded, values[:, :-3].sum(1))
    else:
        share = made.discarded / made.trace
        assert float(share.max()) <= 1e-3
        assert_close(kept.diagonal(dim1=1, dim2=2).sum(1), made.trace - made.discarded)


@pytest.mark.parametrize("spectrum", ["decay", "repeated", "low rank", "indefinite"])
def test_krylov_directions_of_a_large_hessian(spectrum: str) -> None:
    """Quadratic losses with a known Hessian, too large for the dense road: (3, 500) outputs."""
    width, k = 500, 4
    leading, last = {
        "decay": ([], -1),
        "repeated": ([5.0] * 6, 0),
        "low rank": ([4.0, 2.0, 0.0, 0.0], -1),
        "indefinite": ([7.0, 6.0, 5.0, 4.0], -8),
    }[spectrum]
    values = torch.linspace(1, last, width, dtype=F64)
    if last == -1:
        values = (10 * 0.8 ** torch.arange(width, dtype=F64)) * (spectrum == "decay")
    values[: len(leading)] = torch.tensor(leading, dtype=F64)
    basis = torch.linalg.qr(normal(3, width, width))[0]
    matrix = basis @ torch.diag_embed(values.expand(3, width)) @ basis.mT

    def loss(out: Tensor, which: Tensor) -> Tensor:
        return 0.5 * torch.einsum("ni,nij,nj->n", out, matrix[which], out)

    which = torch.arange(3)
    found = CallableLoss(loss).leading_factor(normal(3, width), which, k)
    assert found is not None
    factor, eigenvalues, trace = found
    assert factor.shape == (k, 3, width)
    assert_close(eigenvalues, values[:k].expand(3, k), rtol=1e-6, atol=1e-7)
    rows = factor.transpose(0, 1)
    gram = rows @ rows.mT
    assert_close(gram, torch.diag_embed(eigenvalues), rtol=1e-6, atol=1e-6)
    residual = rows @ matrix - eigenvalues.unsqueeze(2) * rows
    assert float(residual.abs().max()) < 1e-3
    if spectrum != "indefinite":
        assert_close(trace, values.sum().expand(3), rtol=0.15, atol=0)
    repeat = CallableLoss(loss).leading_factor(normal(3, width), which, k)
    assert repeat is not None and torch.equal(repeat[0], factor)
