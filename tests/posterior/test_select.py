"""Which inputs to label: greedy choices against dense conditional covariances, and against labels really added."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import QUIET, inputs, says, unchanged
from support import perceptron as network
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import nullbayes as nb
from nullbayes.posterior.selection import Features, select

LIKELIHOODS: dict[str, tuple[Any, int]] = {
    "classification": ("classification", 3),
    "binary": ("binary", 2),
    "regression": (nb.Regression(torch.tensor([0.3, 0.1])), 2),
}


def fitted(kind: str, samples: int = 60) -> tuple[nn.Module, Any]:
    likelihood, outputs = LIKELIHOODS[kind]
    model, x = network(outputs), inputs(8)
    y = torch.arange(8) % 3 if kind == "classification" else (x[:, :2] > 0).double()
    return model, nb.NullSpacePosterior(model, likelihood, prior_precision=0.7).fit(
        (x, y), samples, **QUIET
    )


def information(kind: str, point: Tensor) -> Tensor:
    """Fisher information of one label ``(B, O, O)``, from the definitions."""
    if kind == "classification":
        p = point.softmax(1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None]
    if kind == "binary":
        return torch.diag_embed(point.sigmoid() * (1 - point.sigmoid()))
    return torch.diag_embed(1 / torch.tensor([0.3, 0.1]).double().expand_as(point))


def dense_choice(
    kind: str, model: nn.Module, posterior: Any, pool: Tensor, k: int, how: str
) -> Any:
    """Greedy, from the whole covariance of the pool's outputs, conditioned by Schur complements with root(H)."""
    point = model(pool).detach()
    values, vectors = torch.linalg.eigh(information(kind, point))
    roots = torch.block_diag(
        *((v * e.clamp(min=0).sqrt()) @ v.T for e, v in zip(values, vectors, strict=True))
    )
    change = (posterior.predict(pool).outputs - point).flatten(1)
    covariance = roots @ (change.T @ change / len(change)) @ roots
    width, chosen, gains = point.shape[1], [], []
    for _ in range(k):
        worth = []
        for n in range(len(pool)):
            at = slice(n * width, (n + 1) * width)
            inner = torch.eye(width).double() + covariance[at, at]
            if n in chosen:
                worth.append(-1.0)
            elif how == "weights":
                worth.append(0.5 * float(torch.logdet(inner)))
            else:
                after = covariance - covariance[:, at] @ torch.linalg.solve(inner, covariance[at])
                worth.append(float(covariance.trace() - after.trace()))
        best = max(range(len(pool)), key=worth.__getitem__)
        chosen.append(best)
        gains.append(worth[best])
        at = slice(best * width, (best + 1) * width)
        inner = torch.eye(width).double() + covariance[at, at]
        covariance = covariance - covariance[:, at] @ torch.linalg.solve(inner, covariance[at])
    return torch.tensor(chosen), torch.tensor(gains).double()


@pytest.mark.parametrize("criterion", ["pool", "weights"])
@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_choices_are_those_of_dense_conditioning(kind: str, criterion: str) -> None:
    model, posterior = fitted(kind)
    pool = 2 * inputs(12, 2)
    wanted, gains = dense_choice(kind, model, posterior, pool, 6, criterion)
    with unchanged(model):
        found = posterior.select(pool, 6, criterion=criterion)
    assert torch.equal(found, wanted)
    features = Features.of(posterior._fit, posterior._capture_plan, [pool])
    assert_close(select(features, 6, criterion)[1], gains, rtol=1e-7, atol=1e-9)
    assert torch.equal(posterior.select(pool, 3, criterion=criterion), wanted[:3])


def test_copies_of_one_input_are_not_chosen_twice() -> None:
    _, posterior = fitted("regression", 200)
    far = 5 * inputs(1, 3)
    pool = torch.cat([far.expand(5, 4), inputs(10, 4)])
    chosen = posterior.select(pool, 4, criterion="weights").tolist()
    assert sum(index < 5 for index in chosen) == 1
    novel = posterior.novelty(pool).argsort(descending=True)[:4].tolist()
    assert sum(index < 5 for index in novel) == 4  # what this is for


def test_the_first_choice_makes_the_pool_most_certain_once_it_is_labelled() -> None:
    """In regression the variance after a label does not depend on the label: fit again, and compare."""
    model, x = network(1), inputs(6)
    likelihood, pool = nb.Regression(0.2), 2 * inputs(7, 2)
    y = x[:, :1]
    posterior = nb.LaplacePosterior(model, likelihood, prior_precision=0.7).fit(
        (x, y), 2000, audit=1, **QUIET
    )
    left = []
    for n in range(len(pool)):
        more = (torch.cat([x, pool[n : n + 1]]), torch.cat([y, y[:1]]))
        after = nb.LaplacePosterior(model, likelihood, prior_precision=0.7).fit(more, 3, **QUIET)
        left.append(float(after.joint(pool).covariance.trace()))
    assert int(posterior.select(pool, 1)) == min(range(len(pool)), key=left.__getitem__)


def test_loaders_and_arrays() -> None:
    _, posterior = fitted("classification")
    pool = 2 * inputs(11, 2)
    wanted = posterior.select(pool, 5)
    for other in (
        pool.numpy(),
        DataLoader(TensorDataset(pool, torch.zeros(11)), 4),
        iter([pool[:3], pool[3:]]),
    ):
        assert torch.equal(posterior.select(other, 5), wanted)
    assert sorted(posterior.select(pool, 11).tolist()) == list(range(11))


def test_what_cannot_be_selected_is_said() -> None:
    _, posterior = fitted("classification")
    with says(nb.InputError, "`k` is 5", "3 inputs"):
        posterior.select(inputs(3), 5)
    with says(nb.InputError, "`k`", "whole number"):
        posterior.select(inputs(3), 0)
    with says(nb.InputError, "criterion", "'pool'"):
        posterior.select(inputs(3), 1, criterion="margin")
    with says(nb.InputError, "no batches"):
        posterior.select(iter(()), 1)
    with says(nb.NotFittedError, "fit"):
        nb.NullSpacePosterior(network()).select(inputs(3), 1)


def test_the_experiment_adds_labels_and_judges_every_method() -> None:
    from experiments import selection

    small = {"SAMPLES": 10, "STEPS": 20, "ROUNDS": 2, "BATCH": 3, "POOL": 60}
    before = {name: getattr(selection, name) for name in small}
    try:
        for name, value in small.items():
            setattr(selection, name, value)
        found = selection.measured(["breast cancer"], list(selection.METHODS), 2)
    finally:
        for name, value in before.items():
            setattr(selection, name, value)
    courses = found["breast cancer"]
    assert set(courses) == set(selection.METHODS)
    assert all(len(c) == 3 and min(c) > 0.3 for c in itertools.chain(*courses.values()))
    starts = {tuple(c[0] for c in courses[m]) for m in courses}
    assert len(starts) == 1  # all methods start from the same labels
    assert "| breast cancer | margin |" in selection.table(found)
