"""Scores of a single network against dense references; choices from the tuning problems alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from experiments import page
from experiments.detection import families, rivals, running, tables, tabular
from experiments.detection.base import Given
from experiments.tasks import digits_network, mlp, small_resnet
from nullbayes.datasets import Split


def given(classes: int = 3, count: int = 60, preserved: int = 20) -> Given:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator)
    y = torch.arange(count) % classes
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, classes)).eval()
    return Given(network, Split(x, y, "train"), x[:10] + 0.1, preserved)


def features(g: Given, x: Tensor) -> np.ndarray[Any, Any]:
    return g.network[:2](x).detach().double().numpy()  # type: ignore[index]


def rows(g: Given, x: Tensor) -> Tensor:
    """One example and one output at a time, float64."""
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    network.load_state_dict(g.network.state_dict())
    out = []
    for one in x.double():
        outputs = network(one[None])[0]
        each = [
            torch.autograd.grad(o, list(network.parameters()), retain_graph=True) for o in outputs
        ]
        out.append(torch.stack([torch.cat([p.flatten() for p in parts]) for parts in each]))
    return torch.stack(out)


def test_ddu_is_the_density_of_a_mixture() -> None:
    g = given()
    z, y = features(g, g.train.inputs), g.train.targets.numpy()
    query = torch.randn(7, 4, generator=torch.Generator().manual_seed(3))
    density = np.zeros(7)
    for c in range(3):
        part = z[y == c]
        ridge = 1e-6 * np.trace(np.cov(part.T)) / 5
        covariance = np.cov(part.T) + (ridge + 1e-12) * np.eye(5)
        found = multivariate_normal(part.mean(0), covariance).pdf(features(g, query))
        density += len(part) / len(z) * found
    score = rivals.DDU()
    score.fit(g)
    constant = 2.5 * np.log(2 * np.pi)  # which ranks nothing
    np.testing.assert_allclose(score(query).numpy(), -np.log(density) - constant, rtol=1e-5)


@pytest.mark.parametrize("kind", [rivals.MahalanobisNormalised, rivals.RelativeNormalised])
def test_mahalanobis_of_normalised_features(kind: Any) -> None:
    g = given()
    z = features(g, g.train.inputs)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    y = g.train.targets.numpy()
    means = np.stack([z[y == c].mean(0) for c in range(3)])
    within = z - means[y]
    shared = within.T @ within / (len(z) - 1)
    shared += (1e-6 * np.trace(shared) / 5 + 1e-12) * np.eye(5)
    around = np.cov(z.T)
    around += (1e-6 * np.trace(around) / 5 + 1e-12) * np.eye(5)
    query = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    q = features(g, query)
    q = q / np.linalg.norm(q, axis=1, keepdims=True)
    distance = [np.einsum("ni,ij,nj->n", q - m, np.linalg.inv(shared), q - m) for m in means]
    expected = np.min(distance, 0)
    if kind is rivals.RelativeNormalised:
        from_all = q - z.mean(0)
        expected = expected - np.einsum("ni,ij,nj->n", from_all, np.linalg.inv(around), from_all)
    score = kind()
    score.fit(g)
    # Features are float32, and normalised ones lie close to a sphere, on which the covariance has little width.
    np.testing.assert_allclose(score(query).numpy(), expected, rtol=2e-3, atol=1e-2)


def test_rows_against_one_example_at_a_time() -> None:
    g = given()
    query = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    train = rows(g, g.train.inputs[: g.preserved])
    weighted = []
    for one, x in zip(train, g.train.inputs, strict=False):
        p = g.network(x[None]).double().softmax(1)[0].detach()
        hessian = torch.diag(p) - p[:, None] * p
        values, vectors = torch.linalg.eigh(hessian)
        weighted.append((vectors * values.clamp_min(0).sqrt()).T @ one)
    _, s, v = torch.linalg.svd(torch.cat(weighted), full_matrices=False)
    kept = s.square() > 1e-6 * s[0].square()
    s, v = s[kept], v[kept]
    mine = rows(g, query)
    lanczos = rivals.SketchedLanczos()
    lanczos.fit(g)
    assert lanczos.basis.shape[1] == len(s)
    expected = mine.square().sum((1, 2)) - (mine @ v.T).square().sum((1, 2))
    torch.testing.assert_close(lanczos(query).double(), expected, rtol=1e-3, atol=1e-4)
    scod = rivals.SCOD()
    scod.fit(g)
    each = []
    for one, x in zip(mine, query, strict=True):
        p = g.network(x[None]).double().softmax(1)[0].detach()
        fisher = one.T @ (torch.diag(p) - p[:, None] * p) @ one
        shrunk = torch.einsum("ki,ij,kj->k", v, fisher, v) * s.square() / (s.square() + 1)
        each.append(fisher.trace() - shrunk.sum())
    torch.testing.assert_close(scod(query).double(), torch.stack(each), rtol=1e-3, atol=1e-4)


def test_nearest_input_is_zero_on_the_training_data() -> None:
    g = given()
    score = rivals.InputNeighbour()
    score.fit(g)
    assert score(g.train.inputs[:5]).max() < 1e-3
    assert score(g.train.inputs[:5] + 10).min() > 1


# -- tables --------------------------------------------------------------------------------------


def test_a_table_is_split_by_its_column() -> None:
    parts = tabular.shifted("breast cancer", 0)
    column = 0  # mean radius
    top = parts.train.inputs[:, column].max()
    assert (parts.near["next tenth"][:, column] >= top - 1e-6).all()
    assert parts.far["last tenth"][:, column].min() >= parts.near["next tenth"][:, column].max()
    torch.testing.assert_close(parts.train.inputs.mean(0), torch.zeros(30), atol=1e-4, rtol=0)
    gap = tabular.with_gap("diabetes", 0)
    held_out, rest = gap.near["gap"][:, 2], gap.train.inputs[:, 2]
    assert not ((rest > held_out.min()) & (rest < held_out.max())).any()
    assert gap.train.targets.is_floating_point()


def result(role: str, values: dict[str, float], family: str = "digits") -> dict[str, Any]:
    def figures(value: float) -> dict[str, Any]:
        sets = {"one": {"auroc": value, "fpr95": 0.5}}
        return {"near": sets, "far": sets, "fit_seconds": 1.0, "seconds_per_1000": 1.0}

    return {
        "family": family, "member": role, "role": role, "accuracy": 0.9,
        "scores": {name: figures(value) for name, value in values.items()},
    }  # fmt: skip


def test_settings_are_chosen_on_tuning_problems_alone() -> None:
    found = [
        result("tuning", {"KNN, k=1": 0.7, "KNN, k=10": 0.8, "KNN, k=50": 0.6}),
        result("judging", {"KNN, k=1": 0.99, "KNN, k=10": 0.5, "KNN, k=50": 0.5}),
    ]
    assert running.representatives(found)["KNN"] == "KNN, k=10"


def test_a_set_solved_by_the_inputs_counts_for_nothing() -> None:
    name = rivals.InputNeighbour.name
    easy = [result("judging", {name: 0.99, "energy": 0.7})]
    assert tables.counted(easy)(easy[0]["scores"]["energy"]) is None
    hard = [result("judging", {name: 0.9, "energy": 0.7})]
    assert tables.counted(hard)(hard[0]["scores"]["energy"]) == pytest.approx(0.7)


def test_a_score_on_some_networks_only_is_named_with_its_seeds() -> None:
    found = [result("judging", {"energy": 0.7, "GAPA": 0.8}), result("judging", {"energy": 0.7})]
    chosen = {"energy": "energy", "GAPA": "GAPA", "FMGP": "FMGP"}
    assert tables.fewer("clothes", found, chosen) == [
        "On fewer networks of clothes: GAPA, 1 seed of one problem."
    ]
    assert not tables.fewer("clothes", found[:1], chosen)


def test_tuning_problems_stand_with_seeds_of_their_own(tmp_path: Path) -> None:
    scores = {"nearest input": 0.9, "energy": 0.7}
    results = [result("judging", scores), result("judging", scores), result("tuning", scores)]
    results = [{**r, "train": 10, "parameters": 5} for r in results]
    where = {"torch": "2", "cores": 1, "commit": "c"}
    tables.write("small", [{"result": r, "environment": where} for r in results], tmp_path)
    lines = (tmp_path / "detection.md").read_text().splitlines()
    _, under = page.section(lines, "Every setting", tmp_path)
    assert "Seeds: digits, 1 seed of one problem." in under
    assert "Seeds: digits, 2 seeds of one problem." in lines
    assert "Seeds: digits, 2 seeds of one problem." not in under


def test_a_score_that_fails_ranks_last() -> None:
    failed = result("tuning", {"energy": 0.7})
    failed["scores"]["energy"] = {"error": "RuntimeError: no"}
    assert running.both(failed, "energy") == 0.5


def test_pairs_and_roles() -> None:
    digits = families.FAMILIES["digits"].members
    assert len(digits) == 45
    assert digits["2 and 1"] == families.TUNING
    assert digits["1 and 0"] == families.JUDGING
    for family in families.FAMILIES.values():
        assert {families.TUNING, families.JUDGING} == set(family.members.values())
        for setting in family.sizes:
            chosen = dict(family.chosen(setting))
            assert {families.TUNING, families.JUDGING} == set(chosen.values())
        assert all(set(some) <= set(family.members) for some in family.some.values())


@pytest.mark.parametrize("kind", ["residual", "convolutions", "perceptron"])
def test_rows_by_layers_against_one_backward_pass_each(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    network: nn.Module = {
        "residual": lambda: small_resnet(5, widths=(3, 4)),
        "convolutions": lambda: digits_network(4),
        "perceptron": lambda: mlp(5, 3),
    }[kind]()
    shape = {"residual": (1, 12, 12), "convolutions": (1, 8, 8), "perceptron": (5,)}[kind]
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(generator=g)
            module.running_var.uniform_(0.5, 2.0, generator=g)
    network.double().eval()
    x = torch.rand(4, *shape, generator=g, dtype=torch.float64)
    assert rivals.by_layers(network)
    rows = rivals.rows_by_layers(network, x)
    assert not rows.requires_grad
    weights = list(network.parameters())
    for n in range(4):
        outputs = network(x[n : n + 1])[0]
        for k, output in enumerate(outputs):
            by = torch.autograd.grad(output, weights, retain_graph=True)
            wanted = torch.cat([d.flatten() for d in by])
            assert torch.allclose(rows[n, k], wanted, rtol=1e-9, atol=1e-12)
            assert wanted.abs().max() > 1e-3
    assert not any(m._forward_hooks for m in network.modules())


def test_rows_by_layers_only_where_every_weight_has_its_rule() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

    assert not rivals.by_layers(Scaled())
    assert not rivals.by_layers(nn.Sequential(nn.Conv2d(2, 4, 3, groups=2)))
    assert not rivals.by_layers(nn.Sequential(nn.Conv2d(2, 4, 3, padding_mode="reflect")))
    assert rivals.by_layers(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten()))
