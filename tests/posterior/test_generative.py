"""Networks that draw random numbers, frozen for each example; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import nullbayes as nb
from tests.posterior.generative_setup import (
    BATCHES,
    EXACT,
    F64,
    QUIET,
    X,
    assert_same_null_space,
    fit,
    loss_rows,
    normal,
    seeded,
    squared,
)

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
