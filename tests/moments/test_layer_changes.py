"""Data that come and go, files, bad input, and training inside the null space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes.errors import InputError, ModelError, NonFiniteError, NotFittedError, StorageError
from tests.moments.layer_networks import network, quiet, same_posterior


@pytest.mark.parametrize("delta", [0.0, 1e-2])
@pytest.mark.parametrize("name", ["mlp", "convnet", "decoder", "lstm"])
def test_update_remove_and_merge_equal_refits(name: str, delta: float) -> None:
    model, x, likelihood = network(name)
    a, b = x[: len(x) // 2], x[len(x) // 2 :]
    whole = quiet(model, x, likelihood, delta=delta, prior_precision=5.0)
    first = quiet(model, a, likelihood, delta=delta, prior_precision=5.0)
    second = quiet(model, b, likelihood, delta=delta, prior_precision=5.0)
    merged = first.merged(second)
    same_posterior(merged, whole)
    assert first.certificate.examples == len(a)
    same_posterior(first.update([b], progress=False), whole)
    same_posterior(first.remove([b], progress=False), quiet(model, a, likelihood, delta=delta))
    same_posterior(first.update(b, progress=False).remove(a, progress=False), second)


def test_removing_what_was_never_there() -> None:
    model, x, _ = network("mlp")
    posterior = quiet(model, x, delta=1e-2)
    before = posterior._fit
    stranger = torch.randn(3, 60, dtype=torch.float64)
    with pytest.raises(InputError, match="2 of 3 examples are not in this posterior"):
        posterior.remove(torch.cat([x[:1], stranger[:2]]), progress=False)
    with pytest.raises(InputError, match="2 of 2 examples"):  # once added, twice removed
        posterior.remove(torch.cat([x[:1], x[:1]]), progress=False)
    with pytest.raises(InputError, match="all examples"):
        posterior.remove(x, progress=False)
    # Where the filter of hashes says yes by chance, the sums say no.
    posterior._fit.gathered.members.add(10 * stranger)
    with pytest.raises(InputError, match="would not be positive"):
        posterior.remove(10 * stranger, progress=False)
    assert posterior._fit is before
    assert before.gathered.examples == 20


def test_bad_input_is_named_and_loses_nothing() -> None:
    model, x, _ = network("mlp", torch.float32)
    posterior = nb.LayerNullSpacePosterior(model)
    with pytest.raises(NotFittedError, match="fit"):
        posterior.predict(x)
    with pytest.raises(InputError, match="no batches"):
        posterior.fit([], progress=False)
    with pytest.raises(InputError, match="no examples"):
        posterior.fit([x[:0]], progress=False)
    with pytest.raises(NonFiniteError, match="batch 1"):
        posterior.fit([x, x / 0], progress=False)
    posterior.fit(x, 2, progress=False)
    before = posterior._fit
    overflow = nn.Sequential(
        nn.Linear(60, 80), nn.Threshold(-1e30, torch.inf), nn.Linear(80, 4)
    ).eval()
    overflow[0].weight.data.mul_(1e35)
    with pytest.raises(NonFiniteError, match=r"layer with '2\.weight' hold NaN or infinity"):
        nb.LayerNullSpacePosterior(overflow).fit(x, progress=False)
    with pytest.raises(NonFiniteError):
        posterior.update(x * torch.nan, progress=False)
    with pytest.raises(InputError, match="forward pass failed"):
        posterior.update(x[:, :5], progress=False)
    assert posterior._fit is before
    for wrong in (-1.0, "much", None, True, float("nan")):
        with pytest.raises(InputError, match="delta"):
            nb.LayerNullSpacePosterior(model, delta=wrong)
    with pytest.raises(InputError, match="prior_precision"):
        nb.LayerNullSpacePosterior(model, prior_precision="evidence")
    with pytest.raises(InputError, match="method"):
        posterior.predict(x, "exact")
    with pytest.raises(InputError, match="score"):
        posterior.novelty(x, "newness")
    noisy = nn.Sequential(nn.Linear(60, 4), nn.Dropout(0.5))
    with pytest.raises(ModelError, match="training mode"):
        nb.LayerNullSpacePosterior(noisy).fit(x, progress=False)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(ModelError, match="changed since"):
        posterior.predict(x)


def test_regression_without_labels_or_noise_says_what_it_needs() -> None:
    model, x, _ = network("mlp")
    with pytest.raises(InputError, match="no targets"):
        quiet(model, x, "regression")
    posterior = quiet(model, x, nb.Regression(noise_variance=0.1), delta=0)
    assert posterior.certificate.held
    y = model(x).detach() + 0.1
    fitted = quiet(model, (x, y), "regression", delta=1e-2)
    assert fitted.certificate.held
    assert fitted.predict(x[:2]).aleatoric[0, 0] == pytest.approx(0.01, rel=1e-3)


def test_seeds_batches_and_forms_of_data() -> None:
    model, x, _ = network("mlp")
    whole = quiet(model, x, delta=1e-2, prior_precision=1.0)
    forms: list[Any] = [
        [x[:7], x[7:]],
        ((x[i : i + 3],) for i in range(0, 20, 3)),
        [{"input": x}],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(20).long()), 6),
    ]
    for form in forms:
        same_posterior(quiet(model, form, delta=1e-2, prior_precision=1.0), whole)
    other = quiet(model, x, delta=1e-2, prior_precision=1.0, seed=1)
    assert not torch.equal(
        other._fit.state.change(0)["0.weight"], whole._fit.state.change(0)["0.weight"]
    )
    few = next(iter(whole.sample(1)))
    many = next(iter(whole.sample(9)))
    assert all(torch.equal(few[n], many[n]) for n in few)


@pytest.mark.parametrize("name", ["mlp", "decoder", "lstm"])
def test_files(name: str, tmp_path: Path) -> None:
    model, x, likelihood = network(name)
    posterior = quiet(model, x, likelihood, delta=1e-2)
    path = tmp_path / "layers.safetensors"
    posterior.save(path)
    loaded = nb.load(path, model)
    assert isinstance(loaded, nb.LayerNullSpacePosterior)
    same_posterior(loaded, posterior, 0.0)
    assert loaded.certificate == posterior.certificate
    torch.testing.assert_close(loaded.predict(x).mean, posterior.predict(x).mean, rtol=0, atol=0)
    for score in ("leverage",) if name == "decoder" else ("leverage", "information"):
        mine, other = loaded.novelty(x, score), posterior.novelty(x, score)
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    loaded.prior_precision = 2 * posterior.prior_precision
    assert loaded.certificate.divergence == pytest.approx(posterior.certificate.divergence / 2)
    loaded.remove(x[:1], progress=False)
    assert loaded.certificate.examples == len(x) - 1
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StorageError):
        nb.load(damaged, model)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(StorageError, match="other weights"):
        nb.load(path, model)


def test_fine_tuning_inside_the_null_space() -> None:
    model, x, _ = network("mlp")
    posterior = quiet(model, x, delta=0)
    projector = posterior.projector()
    with torch.no_grad():
        point = model(x)
    torch.manual_seed(0)
    new, labels = torch.randn(10, 60, dtype=torch.float64), torch.arange(10) % 4
    optimiser = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=0.1)
    stop = projector.attach(optimiser)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(new), labels)
        loss.backward()
        losses.append(float(loss.detach()))
        optimiser.step()
    with torch.no_grad():
        assert (model(x) - point).abs().max() < 1e-9 * point.abs().max()
    assert losses[-1] < 0.1 * losses[0]
    stop()
    with pytest.raises(ModelError, match="changed since"):
        posterior.update(new, progress=False)
    # The sums of the old data stand: none are needed.
    posterior.follow().update(new, progress=False)
    same_posterior(posterior, quiet(model, torch.cat([x, new]), delta=0, prior_precision=1.0))
    optimiser.step()
    with pytest.raises(ModelError, match="moved by"):
        posterior.follow()
    with torch.no_grad():
        assert (model(x) - point).abs().max() > 1e-3 * point.abs().max()
    gradients = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    once = projector.project(gradients)
    twice = projector.project(once)
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value)
    with pytest.raises(InputError, match="no parameter"):
        projector.project({"nothing": torch.zeros(1)})


def test_sketched_layers_are_narrower_never_wider() -> None:
    model, x, _ = network("mlp")
    torch.manual_seed(0)
    many = torch.randn(100, 60, dtype=torch.float64) * torch.logspace(
        0, -2, 60, dtype=torch.float64
    )
    exact = quiet(model, many, delta=1e-2, prior_precision=1.0)
    sketched = quiet(model, many, delta=1e-2, prior_precision=1.0, memory=60_000)
    reports = {r.name: r for r in sketched.certificate.layers}
    assert reports["0.weight"].sketch_error is not None
    assert "sketched" in sketched.certificate.verdict
    for mine, true in zip(sketched._fit.state.factors, exact._fit.state.factors, strict=True):
        eye = torch.eye(true.root.shape[1], dtype=torch.float64)[None]
        gap = true.project(eye)[0] - mine.project(eye)[0]
        assert torch.linalg.eigvalsh((gap + gap.T) / 2).min() > -1e-9
    with pytest.raises(InputError, match="sketched"):
        sketched.remove(many[:3], progress=False)
    # Few inputs: nothing is cut off, and the null space is exact.
    few = quiet(model, x[:6], delta=0, prior_precision=1.0, memory=60_000)
    assert few.certificate.held
    assert few.certificate.free_share > 0.5
    assert {r.sketch_error for r in few.certificate.layers} <= {None, 0.0}


def test_memory_does_not_grow_with_the_data() -> None:
    model, x, _ = network("mlp")
    small = quiet(model, x, prior_precision=1.0)._fit.gathered
    large = quiet(model, [x] * 20, prior_precision=1.0)._fit.gathered
    assert sum(s.nbytes for s in small.sums) == sum(s.nbytes for s in large.sums)
    assert sum(len(group[0]) for group in large.kept) <= 128


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(60, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + torch.randn(len(x), 4)

    with pytest.raises(ModelError, match="draw random numbers"):
        nb.LayerNullSpacePosterior(Noisy().eval()).fit(torch.randn(9, 60), progress=False)


def test_plan_says_what_a_fit_takes() -> None:
    model, x, _ = network("mlp")
    plan = nb.LayerNullSpacePosterior(model).plan([x])
    assert plan.layers == {"0.weight": (1, 80, 61), "2.weight": (1, 80, 81), "4.weight": (1, 4, 81)}
    assert plan.memory == 3 * 8 * (61**2 + 2 * 81**2)
    assert plan.seconds(1000) > 0
    assert "fixed" in str(plan)
