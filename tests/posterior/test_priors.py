"""Priors: a mean, one precision for each layer by the evidence, and posteriors over single weights; against dense
float64 algebra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import QUIET, says, unchanged
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import dense_jacobian

import nullbayes as nb

SOLVERS = {"dual": nb.solvers.DualCholesky, "primal": nb.solvers.PrimalQR}


def network(outputs: int = 3, hidden: int = 9) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, outputs)
        return nn.Sequential(*layers).double().eval()


def data(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)).double()
    return x, torch.arange(count) % 3


def rows(model: nn.Module, x: Tensor) -> Tensor:
    """Rows ``(N·O, P)`` with the output Hessian's root from its eigenvalues: not the library's factor."""
    jacobian = dense_jacobian(model, x).reshape(len(x), 3, -1)
    p = model(x).detach().softmax(-1)
    values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None])
    root = vectors * torch.where(values > 1e-12, values, 0).sqrt()[:, None]
    return torch.einsum("noc,nop->ncp", root, jacobian).flatten(0, 1)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def members(model: nn.Module, groups: list[list[str]]) -> Tensor:
    """The number of each weight's group."""
    return torch.cat(
        [
            torch.full((p.numel(),), next(i for i, g in enumerate(groups) if n in g))
            for n, p in model.named_parameters()
        ]
    )


def dense_evidence(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    precision: Tensor,
    mean: Tensor | float = 0.0,
    a: Tensor | None = None,
) -> Tensor:
    """``log p(D, θ̂) - ½ log det(Λ + G) + ½ P log 2π`` from the (P, P) matrix, with a precision for each weight."""
    a, away = rows(model, x) if a is None else a, flat(model) - mean
    fit = -nn.functional.cross_entropy(model(x).detach(), y, reduction="sum")
    inside = torch.logdet(torch.diag(precision) + a.T @ a) - precision.log().sum()
    return fit - 0.5 * (precision * away.square()).sum() - 0.5 * inside


def best_by_newton(model: nn.Module, x: Tensor, y: Tensor, member: Tensor) -> Tensor:
    """The precisions of groups where the dense evidence is largest: Newton's method on its logarithms."""

    a = rows(model, x)

    def value(logs: Tensor) -> Tensor:
        return -dense_evidence(model, x, y, logs.exp()[member], a=a)

    logs = torch.zeros(int(member.max()) + 1, dtype=torch.float64)
    for _ in range(40):
        slope = torch.func.grad(value)(logs)
        curved = torch.func.hessian(value)(logs)
        values, vectors = torch.linalg.eigh(curved)
        step = vectors @ ((vectors.T @ slope) / values.abs().clamp_min(1e-3))
        logs = logs - step.clamp(-1, 1)
    assert float(torch.func.grad(value)(logs).abs().max()) < 1e-8
    return logs.exp()


LAYERS = [["0.weight", "0.bias"], ["2.weight", "2.bias"]]


@pytest.mark.parametrize("examples", [11, 60], ids=["fewer rows", "more rows than weights"])
@pytest.mark.parametrize("kind", [nb.NullSpacePosterior, nb.LaplacePosterior])
def test_one_precision_a_layer_is_where_the_dense_evidence_is_largest(
    kind: Any, examples: int
) -> None:
    model, (x, y) = network(), data(examples)
    with unchanged(model):
        posterior = kind(model, prior_precision="evidence-by-layer").fit((x, y), 3, **QUIET)
    wanted = best_by_newton(model, x, y, members(model, LAYERS))
    found = posterior.problem.layers
    for group, alpha in zip(LAYERS, wanted, strict=True):
        for name in group:
            assert_close(found[name], float(alpha), rtol=1e-5, atol=0)
    common = kind(model).fit((x, y), 3, **QUIET)
    ratio = float(wanted.max() / wanted.min())
    assert ratio > 1.2 and any("each layer" in note for note in posterior.certificate.notes)
    if kind is nb.LaplacePosterior:
        assert_close(posterior.prior_precision, 1.0, rtol=1e-4, atol=0)
        assert posterior.log_marginal_likelihood() > common.log_marginal_likelihood() + 0.05
        wanted_evidence = dense_evidence(model, x, y, wanted[members(model, LAYERS)])
        assert_close(posterior.log_marginal_likelihood(), wanted_evidence, rtol=1e-7, atol=1e-7)
    else:
        assert posterior.certificate.audit.passed


def test_its_samples_are_those_of_the_same_precisions_given() -> None:
    model, (x, y) = network(), data(11)
    found = nb.LaplacePosterior(model, prior_precision="evidence-by-layer").fit((x, y), 4, **QUIET)
    given = nb.LaplacePosterior(model, prior_precision=found.problem.layers).fit((x, y), 4, **QUIET)
    assert_close(found._fit.samples, given._fit.samples, rtol=1e-4, atol=1e-6)
    assert found.precision_by_name.keys() == dict(model.named_parameters()).keys()
    covariance = torch.linalg.inv(
        torch.diag(flat_precision(found, model)) + rows(model, x).T @ rows(model, x)
    )
    new = 2 * data(3, 5)[0]
    jacobian = dense_jacobian(model, new)
    joint = jacobian @ covariance @ jacobian.T
    assert_close(found.joint(new).covariance, joint, rtol=1e-5, atol=1e-7)


def flat_precision(posterior: Any, model: nn.Module) -> Tensor:
    each = posterior.precision_by_name
    return torch.cat(
        [torch.full((p.numel(),), each[n]).double() for n, p in model.named_parameters()]
    )


def test_rows_that_are_not_in_memory_are_rescaled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = network(hidden=30), data(11)
    batches = list(zip(x.split(4), y.split(4), strict=True))
    wanted = nb.LaplacePosterior(model, prior_precision="evidence-by-layer").fit(
        batches, 4, **QUIET
    )
    from nullbayes.jacobian import block_storage

    monkeypatch.setattr(block_storage.Keeper, "_fits", lambda self, nbytes: False)
    for able, where in ((True, "disk"), (False, "recomputed")):
        monkeypatch.setattr(block_storage, "fits_on_disk", lambda *_, able=able: able)
        found = nb.LaplacePosterior(model, prior_precision="evidence-by-layer")
        found.fit(batches, 4, **QUIET)
        assert set(found._fit.rows.operator.kept()) == {where}
        assert_close(found._fit.samples, wanted._fit.samples, rtol=1e-6, atol=1e-8)


def test_it_survives_a_file_and_an_update(tmp_path: Path) -> None:
    model, (x, y) = network(), data(11)
    posterior = nb.NullSpacePosterior(model, prior_precision="evidence-by-layer")
    posterior.fit((x[:8], y[:8]), 4, **QUIET)
    posterior.save(tmp_path / "p.safetensors")
    loaded = nb.load(tmp_path / "p.safetensors", model)
    assert loaded.precision_by_name == posterior.precision_by_name
    for score in ("information", "variance"):
        novelty = posterior.novelty(3 * x, score=score, exact=False)
        assert_close(loaded.novelty(3 * x, score=score), novelty)
    layers = posterior.problem.layers
    posterior.update((x[8:], y[8:]), **QUIET)
    assert posterior.problem.layers == layers and posterior.certificate.examples == 11


def test_a_layer_without_a_size_stays_within_reach() -> None:
    model, (x, y) = network(), data(11)
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[0].weight)
    model[0].weight.data[0, 0] = 1e-6
    posterior = nb.LaplacePosterior(model, prior_precision="evidence-by-layer")
    posterior.fit((x, y), 3, **QUIET)
    found = posterior.problem.layers
    assert 1e2 < found["0.weight"] / found["2.weight"] < 1e8


def test_what_by_layer_needs_is_said() -> None:
    model, (x, y) = network(), data(11)
    with says(nb.InputError, "evidence-by-layer", "preserve='loss'"):
        nb.NullSpacePosterior(model, preserve="loss", prior_precision="evidence-by-layer")
    with says(nb.InputError, "'evidence-by-layers'", "'evidence-by-layer'"):
        nb.NullSpacePosterior(model, prior_precision="evidence-by-layers")
    (x, y) = data(20)
    posterior = nb.NullSpacePosterior(model, prior_precision="evidence-by-layer", memory=55_000)
    with says(nb.MemoryBudgetError, "each of 2 layers", "max_examples"):
        posterior.fit((x, y), 3, **QUIET)


# -- the evidence by name --------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["evidence", "evidence-by-layer"])
@pytest.mark.parametrize("examples", [9, 60])
def test_evidence_of_one_precision_for_each_tensor_and_its_gradient(
    prior: str, examples: int
) -> None:
    model, (x, y) = network(), data(examples)
    posterior = nb.LaplacePosterior(model, prior_precision=prior).fit((x, y), 3, **QUIET)
    names = [n for n, _ in model.named_parameters()]
    values = [0.5, 2.0, 1.25, 0.75]
    ours = {
        n: torch.tensor(v, dtype=torch.float64, requires_grad=True)
        for n, v in zip(names, values, strict=True)
    }
    found = posterior.log_marginal_likelihood(ours)
    leaf = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    dense = dense_evidence(model, x, y, leaf[members(model, [[n] for n in names])])
    assert_close(found, dense, rtol=1e-8, atol=1e-8)
    slopes = torch.stack(torch.autograd.grad(found, list(ours.values())))
    assert_close(slopes, torch.autograd.grad(dense, leaf)[0], rtol=1e-6, atol=1e-8)
    with says(nb.InputError, "prior_precision", "2.bias"):
        posterior.log_marginal_likelihood({"0.weight": 1.0})


# -- a prior mean ----------------------------------------------------------------------------------


def forms(model: nn.Module, mean: Tensor) -> dict[str, Any]:
    sizes = [p.numel() for p in model.parameters()]
    parts = zip(model.named_parameters(), mean.split(sizes), strict=True)
    return {"vector": mean, "by name": {n: v.reshape(p.shape) for (n, p), v in parts}}


@pytest.mark.parametrize("form", ["vector", "by name"])
def test_a_prior_mean_enters_the_evidence_and_nothing_else(form: str, tmp_path: Path) -> None:
    model, (x, y) = network(), data(11)
    mean = flat(model) + 0.1 * torch.randn(len(flat(model)), generator=seeded(3)).double()
    value = forms(model, mean)[form]
    posterior = nb.LaplacePosterior(model, prior_mean=value).fit((x, y), 4, **QUIET)
    at = torch.tensor(posterior.prior_precision, dtype=torch.float64, requires_grad=True)
    dense = dense_evidence(model, x, y, at.expand(len(mean)), mean)
    assert_close(posterior.log_marginal_likelihood(), dense, rtol=1e-8, atol=1e-8)
    assert abs(float(torch.autograd.grad(dense, at)[0])) < 1e-5  # where that is largest
    plain = nb.LaplacePosterior(model).fit((x, y), 4, **QUIET)
    assert posterior.prior_precision > 2 * plain.prior_precision
    same = nb.LaplacePosterior(model, prior_precision=posterior.prior_precision)
    same.fit((x, y), 4, **QUIET)
    assert_close(same.predict(x).mean, posterior.predict(x).mean)
    posterior.save(tmp_path / "p.safetensors")
    loaded = nb.load(tmp_path / "p.safetensors", model)
    assert_close(loaded.problem.prior_mean, mean)
    assert_close(
        loaded.novelty(3 * x, score="information"),
        posterior.novelty(3 * x, score="information", exact=False),
    )


def test_the_null_space_posteriors_evidence_about_a_mean() -> None:
    model, (x, y) = network(), data(11)
    posterior = nb.NullSpacePosterior(model, prior_mean=0.25, delta=0).fit((x, y), 4, **QUIET)
    rank = int(torch.linalg.matrix_rank(rows(model, x)))
    wanted = rank / float((flat(model) - 0.25).square().sum())  # γ / ‖θ̂ - m‖²
    evidence = posterior.certificate.evidence or posterior.prior_precision
    assert_close(evidence, wanted, rtol=1e-6, atol=0)
    zero = nb.NullSpacePosterior(model, prior_mean="zero", delta=0).fit((x, y), 4, **QUIET)
    plain = nb.NullSpacePosterior(model, delta=0).fit((x, y), 4, **QUIET)
    assert zero.prior_precision == plain.prior_precision


def test_a_prior_mean_that_cannot_be_is_said() -> None:
    model, (x, y) = network(), data(6)
    for wrong in ("mean", torch.zeros(3), True, {"0.weight": torch.zeros(9, 4)}):
        with says(nb.InputError, "prior_mean"):
            nb.LaplacePosterior(model, prior_mean=wrong)
    with says(nb.InputError, "prior_mean", "NaN"):
        nb.LaplacePosterior(model, prior_mean=float("nan"))
    with says(nb.InputError, "prior_mean", "no maximum"):
        nb.LaplacePosterior(model, prior_mean=flat(model)).fit((x, y), 3, **QUIET)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- single weights --------------------------------------------------------------------------------


def masks(model: nn.Module) -> dict[str, Any]:
    chosen = {
        n: torch.rand(p.shape, generator=seeded(7)) < 0.5 for n, p in model.named_parameters()
    }
    return {"0.weight": chosen["0.weight"], "2.weight": chosen["2.weight"], "2.bias": True}


def chosen_weights(model: nn.Module) -> Tensor:
    given = masks(model)
    return torch.cat(
        [
            (
                m if isinstance(m := given.get(n, False), Tensor) else torch.full(p.shape, m)
            ).flatten()
            for n, p in model.named_parameters()
        ]
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", [nb.NullSpacePosterior, nb.LaplacePosterior])
def test_single_weights_against_dense(kind: Any, solver: str, tmp_path: Path) -> None:
    model, (x, y) = network(), data(7)
    options = {"delta": 0} if kind is nb.NullSpacePosterior else {}
    posterior = kind(
        model, parameters=masks(model), prior_precision=0.7, solver=SOLVERS[solver](), **options
    )
    with unchanged(model):
        posterior.fit((x, y), 4, **QUIET)
    some = chosen_weights(model)
    a = rows(model, x)[:, some]
    eye = torch.eye(a.shape[1]).double()
    if kind is nb.NullSpacePosterior:
        covariance = (eye - torch.linalg.pinv(a) @ a) / 0.7
        assert posterior.certificate.rank == int(torch.linalg.matrix_rank(a))
        assert posterior.certificate.null_dim == int(some.sum()) - posterior.certificate.rank
    else:
        covariance = torch.linalg.inv(0.7 * eye + a.T @ a)
    new = 2 * data(4, 5)[0]
    jacobian = dense_jacobian(model, new)[:, some]
    dense = jacobian @ covariance @ jacobian.T
    assert_close(posterior.joint(new).covariance, dense, rtol=1e-6, atol=1e-8)
    assert posterior.certificate.audit.passed
    before = dict(model.named_parameters())
    for state in posterior.sample(2):
        for name, mask in {**masks(model), "0.bias": False}.items():
            moved = (state[name] != before[name]).flatten()
            allowed = mask.flatten() if isinstance(mask, Tensor) else torch.full_like(moved, mask)
            assert not bool((moved & ~allowed).any())
    assert "single weights" in str(posterior.plan((x, y), num_samples=4))
    posterior.save(tmp_path / "p.safetensors")
    loaded = nb.load(tmp_path / "p.safetensors", model)
    for score in ("information", "share"):
        assert_close(
            loaded.novelty(new, score=score), posterior.novelty(new, score=score, exact=False)
        )
    assert_close(loaded.predict(new).mean, posterior.predict(new).mean)


def test_the_evidence_of_single_weights_counts_those_alone() -> None:
    model, (x, y) = network(), data(7)
    posterior = nb.LaplacePosterior(model, parameters=masks(model)).fit((x, y), 4, **QUIET)
    some = chosen_weights(model)
    a, theta = rows(model, x)[:, some], flat(model)[some]
    alpha = posterior.prior_precision
    values = torch.linalg.eigvalsh(a @ a.T).clamp_min(0)
    gamma = float((values / (values + alpha)).sum())
    assert_close(alpha, gamma / float(theta.square().sum()), rtol=1e-6, atol=0)


def test_other_layers_and_differentiable_predictions_of_single_weights() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.Tanh(), nn.Flatten(),
            nn.LayerNorm(27), nn.Linear(27, 3),
        ).double().eval()  # fmt: skip
    x, y = data(6)
    mask = {n: torch.rand(p.shape, generator=seeded(2)) < 0.4 for n, p in model.named_parameters()}
    mask = {n: m for n, m in mask.items() if bool(m.any())}
    posterior = nb.NullSpacePosterior(model, parameters=mask, delta=0, prior_precision=1.0)
    posterior.fit((x, y), 3, **QUIET)
    some = torch.cat(
        [mask.get(n, torch.zeros(p.shape).bool()).flatten() for n, p in model.named_parameters()]
    )
    a = rows(model, x)[:, some]
    jacobian = dense_jacobian(model, 2 * x)[:, some]
    covariance = jacobian @ (torch.eye(a.shape[1]).double() - torch.linalg.pinv(a) @ a) @ jacobian.T
    assert_close(posterior.joint(2 * x).covariance, covariance, rtol=1e-6, atol=1e-8)
    leaf = (2 * x).requires_grad_()
    posterior.predict(leaf, differentiable=True).variance.sum().backward()
    assert bool((leaf.grad != 0).any())


def test_masks_that_cannot_be_are_said() -> None:
    model = network()
    whole = torch.ones(9, 4, dtype=torch.bool)
    for mask, word in ((torch.ones(9, 4), "float32"), (whole.T, "(4, 9)"), (None, "None")):
        with says(nb.InputError, "parameters['0.weight']", word):
            nb.NullSpacePosterior(model, parameters={"0.weight": mask})
    with says(nb.InputError, "0.weight", "no weight"):
        nb.NullSpacePosterior(model, parameters={"0.weight": ~whole})
    with says(nb.InputError, "'1.weight'", "unknown"):
        nb.NullSpacePosterior(model, parameters={"1.weight": whole})
