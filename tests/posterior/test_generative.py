"""Callable losses on whatever a model returns: rows, Hessians, predictions and errors against torch.func in float64."""

from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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

F64 = torch.float64
QUIET: dict[str, Any] = {"progress": False}
# Settings whose dense reference is exact.
EXACT: dict[str, Any] = {"delta": 0, "prior_precision": 1.0}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return build().double().eval()


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


def flat_weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def losses_of(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> Callable[[Tensor], Tensor]:
    """``flat weights (P,) -> losses (N,)``, by torch alone."""
    shapes = {n: p.shape for n, p in model.named_parameters()}

    def function(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes.values()])
        weights = {n: p.reshape(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        holder = nn.Module()
        holder.model = model  # type: ignore[assignment]
        holder.forward = lambda: run(model)  # type: ignore[method-assign]
        moved = {f"model.{n}": w for n, w in weights.items()}
        return torch.func.functional_call(holder, moved, ())

    return function


def loss_rows(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> Tensor:
    """``∂ℓ_n/∂θ (N, P)`` by reverse mode through model and loss together."""
    return torch.func.jacrev(losses_of(model, run))(flat_weights(model))


def fitted_rows(posterior: nb.Posterior) -> Tensor:
    state = posterior._fitted().state
    assert state is not None
    eye = torch.eye(state.operator.shape[1], dtype=F64)
    return state.operator.matvec(eye).T.reshape(state.operator.shape)


def assert_same_null_space(posterior: nb.Posterior, rows: Tensor) -> None:
    """Rows equal and samples moved along none of them."""
    assert_close(fitted_rows(posterior), rows, rtol=1e-8, atol=1e-10)
    samples = posterior._samples()
    assert float((samples @ rows.T).abs().max()) < 1e-7 * float(samples.norm(dim=1).max())


X = normal(7, 4)
BATCHES = [X[:4], X[4:]]


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


def cut(batch: Any, *bounds: slice) -> list[Any]:
    """The same batch in pieces."""
    return [
        torch.utils._pytree.tree_map(lambda t, b=b: t[b] if isinstance(t, Tensor) else t, batch)
        for b in bounds
    ]


def squared(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().sum(1)


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


# -- randomness in the model -----------------------------------------------------------------------


class Vae(nn.Module):
    """Reconstruction, mean and log variance; the noise drawn in the forward pass, or given."""

    def __init__(self, drawn: bool = True) -> None:
        super().__init__()
        self.encode, self.mean, self.log_var = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 2)
        self.decode = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))
        self.gain = nn.Parameter(torch.ones(4))  # no rule: the generic path sees the noise too
        self.drawn = drawn

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Any:
        h = torch.tanh(self.encode(x))
        mean, log_var = self.mean(h), self.log_var(h)
        noise = torch.randn_like(mean) if noise is None else noise
        out = self.decode(mean + (0.5 * log_var).exp() * noise) * self.gain
        return {"out": out, "mean": mean, "log_var": log_var, "noise": noise.detach()}


def elbo(out: dict[str, Tensor], x: Tensor) -> Tensor:
    divergence = 0.5 * (out["mean"].square() + out["log_var"].exp() - 1 - out["log_var"]).sum(1)
    return (out["out"] - x).square().sum(1) + divergence


@pytest.mark.parametrize("draws", [1, 2])
def test_rows_with_frozen_noise(draws: int) -> None:
    """The noise that the posterior reports is the noise that its rows are made with."""
    model = seeded(Vae)
    state = torch.get_rng_state()
    posterior = nb.NullSpacePosterior(
        model, loss=elbo, preserve="loss", randomness="frozen", draws=draws, **EXACT
    )
    posterior.fit(BATCHES, 4, **QUIET)
    noise = [posterior.predict(X, draw=d).point["noise"] for d in range(draws)]
    assert torch.equal(torch.get_rng_state(), state)
    assert posterior.certificate.constraints == 7 * draws
    each = [loss_rows(model, lambda m, z=z: elbo(m(X, z), X)) for z in noise]
    assert_same_null_space(posterior, torch.stack(each, dim=1).flatten(0, 1))
    assert posterior.certificate.generic == ("gain",)
    assert_close(posterior.predict(X[[5, 1]]).point["noise"], noise[0][[5, 1]], rtol=0, atol=0)
    assert_close(posterior.predict(X).variance["noise"], torch.zeros(7, 2, dtype=F64))
    expected = torch.stack(
        [
            sum(v.flatten(1).sum(1) for v in posterior.predict(X, draw=d).variance.values())
            for d in range(draws)
        ]
    )
    assert_close(posterior.novelty(X, score="variance", exact=False), expected.mean(0))
    assert_close(
        posterior.novelty(X[3:5], score="variance", exact=True),
        posterior.novelty(X, score="variance", exact=True)[3:5],
    )
    if draws == 2:
        assert not torch.allclose(noise[0], noise[1])


def test_the_seed_of_the_noise() -> None:
    model = seeded(Vae)

    def noise(randomness: Any) -> Tensor:
        posterior = nb.NullSpacePosterior(
            model, loss=elbo, preserve="loss", randomness=randomness, **EXACT
        )
        return posterior.fit([X], 2, **QUIET).predict(X).point["noise"]

    assert torch.equal(noise("frozen"), noise(nb.FrozenRandomness(0)))
    assert not torch.allclose(noise("frozen"), noise(nb.FrozenRandomness(1)))


def test_save_and_load(tmp_path: Path) -> None:
    model = seeded(Vae)
    posterior = nb.NullSpacePosterior(
        model, loss=elbo, preserve="loss", randomness=nb.FrozenRandomness(5), draws=2, **EXACT
    )
    posterior.fit(BATCHES, 3, **QUIET)
    posterior.save(tmp_path / "p.safetensors")
    again = nb.load(tmp_path / "p.safetensors", model, loss=elbo)
    assert again.functional.randomness == nb.FrozenRandomness(5, draws=2)
    before, after = posterior.predict(X, draw=1), again.predict(X, draw=1)
    for name in before.outputs:
        assert torch.equal(before.outputs[name], after.outputs[name])
    assert_close(again.novelty(X), posterior.novelty(X, exact=False))
    assert "loss" in again.certificate.verdict
    with pytest.raises(nb.StorageError, match=r"elbo.*nb.load\(path, model, loss="):
        nb.load(tmp_path / "p.safetensors", model)


def test_the_guarantee_holds_for_the_loss() -> None:
    model = seeded(Vae)
    posterior = nb.NullSpacePosterior(
        model, loss=elbo, preserve="loss", randomness="frozen", prior_precision=1e6, delta=0
    )
    certificate = posterior.fit(BATCHES, 8, **QUIET).certificate
    assert certificate.held, certificate.verdict
    assert certificate.drift < 1e-8 and certificate.preserve == "each training example's loss"
    out = posterior.predict(X)
    losses = torch.stack([elbo({k: v[s] for k, v in out.outputs.items()}, X) for s in range(8)])
    assert certificate.posterior_score == pytest.approx(float(losses.mean()))
    posterior.prior_precision = 1e-2  # second order shows
    assert posterior.certificate.posterior_score > 1.01 * certificate.network_score
    assert not posterior.certificate.held


@pytest.mark.parametrize("prior", [4.0, "by name"])
def test_novelty_of_the_loss(prior: Any) -> None:
    """``g Σ gᵀ`` with the loss's gradient by all weights, and the projector from a singular value decomposition."""
    model = seeded(Vae)
    names = [n for n, _ in model.named_parameters()]
    precision = {n: 1.0 + i for i, n in enumerate(names)} if prior == "by name" else prior
    posterior = nb.NullSpacePosterior(
        model, loss=elbo, preserve="loss", randomness="frozen", delta=0, prior_precision=precision
    )
    posterior.fit(BATCHES, 4000, **QUIET)
    new = normal(5, 4, seed=11) * 2
    noise, known = posterior.predict(new).point["noise"], posterior.predict(X).point["noise"]
    each = {n: float(precision[n]) if prior == "by name" else 4.0 for n in names}
    scale = torch.cat([torch.full((p.numel(),), each[n], dtype=F64) for n, p in model.named_parameters()])  # fmt: skip
    rows = loss_rows(model, lambda m: elbo(m(X, known), X)) * scale**-0.5
    wanted = loss_rows(model, lambda m: elbo(m(new, noise), new)) * scale**-0.5
    wanted = wanted - wanted @ torch.linalg.pinv(rows) @ rows
    exact = posterior.novelty(new, score="loss")
    assert_close(exact, wanted.square().sum(1), rtol=1e-7, atol=0)
    assert_close(posterior.novelty(new, score="loss", exact=False), exact, rtol=0.15, atol=0)
    assert float(posterior.novelty(X, score="loss").max()) < 1e-9 * float(exact.min())
    assert_close(posterior.novelty(new[:2], score="loss", targets=new[:2]), exact[:2])


def test_novelty_of_a_built_in_loss_needs_targets() -> None:
    y = torch.arange(7) % 4
    posterior = nb.NullSpacePosterior(LINEAR, **EXACT).fit([(X, y)], 3, **QUIET)
    assert posterior.novelty(X, score="loss", targets=y).shape == (7,)
    with pytest.raises(nb.InputError, match="`targets=`"):
        posterior.novelty(X, score="loss")
    with pytest.raises(nb.InputError, match="`x`: "):
        posterior.novelty(X, score="loss", targets=y[:3])


# -- errors ----------------------------------------------------------------------------------------


def fit(model: nn.Module, loss: Any, batches: Any = None, **options: Any) -> nb.Posterior:
    posterior = nb.NullSpacePosterior(model, loss=loss, preserve="loss", **EXACT, **options)
    return posterior.fit(BATCHES if batches is None else batches, 2, **QUIET)


def test_randomness_that_is_not_frozen() -> None:
    with pytest.raises(nb.ModelError, match=r'two forward passes.*randomness="frozen"'):
        fit(seeded(Vae), elbo)


class NumpyNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) + self.calls


def test_randomness_that_cannot_be_frozen() -> None:
    with pytest.raises(nb.ModelError, match="keeps a state"):
        fit(seeded(NumpyNoise), squared, randomness="frozen")


LINEAR = seeded(lambda: nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda out, x: squared(out, x).mean(), r"shape \(\) for 4 examples: reduced over the batch"),
        (nn.MSELoss(), r'`MSELoss` returned shape \(\) .*reduction="none"'),
        (lambda out, x: (out - x).square(), r"shape \(4, 4\) .*not one value per example"),
        (lambda out, x: 3.0, "returned float, expected a tensor"),
        (lambda out, x: squared(out, x) / len(x), "mixes the examples"),
        (lambda out, x: squared(out - out.mean(0), x), "mixes the examples"),
        (lambda out, x: F.cross_entropy(out @ x.T, torch.arange(len(x)), reduction="none"), "mixes the examples"),
        (lambda out, x: squared(out, x + torch.randn_like(x)), 'draws random.*randomness="frozen"'),
        (lambda out, x: squared(out.detach(), x), r"cannot be differentiated.*\.detach\(\)"),
        (lambda out, x: out.argmax(1), "cannot be differentiated"),
        (lambda out, x: squared(out, x[:, :3]), "failed: RuntimeError.*outputs.*targets"),
        (lambda out, x: out["image"], "failed.*shape"),
    ],
)  # fmt: skip
def test_losses_that_cannot_be_used(loss: Any, words: str) -> None:
    with pytest.raises(nb.InputError, match=f"(?s)batch 0.*{words}|{words}"):
        fit(LINEAR, loss)


def test_losses_that_are_not_finite() -> None:
    with pytest.raises(nb.NonFiniteError, match="losses"):
        fit(LINEAR, lambda out, x: squared(out, x).log() * float("inf"))


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(4, 4), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.layer(x))


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda h: h.argmax(1), nb.InputError, "int64, which has no derivative"),
        (lambda h: {"label": h.argmax(1)}, nb.ModelError, "without a floating-point tensor.*label.*int64"),
        (lambda h: h.detach(), nb.ModelError, "no gradient path|does not depend"),
        (lambda h: (h.detach(), h), nb.ModelError, r"uses only outputs that do not depend.*\[0\]"),
        (lambda h: (h, h.square().mean()), nb.ModelError, r"\[1\].*shape \(\) for 4 examples"),
        (lambda h: (h, h[:2]), nb.ModelError, r"\[1\].*shape \(2, 4\) for 4 examples"),
        (lambda h: None, nb.ModelError, "returned NoneType"),
    ],
    ids=["integer", "integers", "detached", "one detached", "reduced", "cut", "nothing"],
)  # fmt: skip
def test_outputs_that_have_no_rows(make: Any, kind: type[Exception], words: str) -> None:
    def loss(out: Any, x: Tensor) -> Tensor:
        return squared(out[0] if isinstance(out, tuple) else out, x)

    with pytest.raises(kind, match=words):
        fit(seeded(lambda: Returns(make)), loss)


def test_arguments() -> None:
    model = LINEAR
    with pytest.raises(nb.InputError, match=r"both `likelihood`.*and `loss`"):
        nb.NullSpacePosterior(model, "regression", loss=squared)
    for value in (3, "mse", nn.MSELoss):
        with pytest.raises(nb.InputError, match=r"loss\(outputs, targets\)"):
            nb.NullSpacePosterior(model, loss=value)  # type: ignore[arg-type]
    posterior = fit(model, squared)
    for score in ("entropy", "mutual_information"):
        with pytest.raises(nb.InputError, match="callable loss does not have"):
            posterior.novelty(X, score=score)
    with pytest.raises(nb.InputError, match="`draw` is -1"):
        posterior.predict(X, draw=-1)
    laplace = nb.LaplacePosterior(model, loss=squared, prior_precision=1.0).fit(BATCHES, 2, **QUIET)
    assert laplace.certificate.constraints == 28
    with pytest.raises(nb.InputError, match=r"batch 0.*mapping with one of"):
        nb.NullSpacePosterior(model).fit([X], 2, **QUIET)
