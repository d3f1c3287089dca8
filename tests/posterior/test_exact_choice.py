"""Whether novelty is exact by itself: where that costs at most twice what samples cost, by what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from zoo import dense_jacobian

import nullbayes as nb
from nullbayes.common.work import ENDLESS, Work
from nullbayes.jacobian.capture.verify import prove
from nullbayes.jacobian.linearise import output_rows
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace
from nullbayes.posterior.novelty import exact_pays
from nullbayes.solvers import State


def fitted(examples: int, width: int = 16, solver: str = "dual") -> nb.NullSpacePosterior:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4)).eval()
    x, y = torch.randn(examples, 6), torch.arange(examples) % 4
    kinds = {"dual": nb.solvers.DualCholesky(), "primal": nb.solvers.PrimalQR()}
    posterior = nb.NullSpacePosterior(model, solver=kinds.get(solver, solver))
    return posterior.fit([(x, y)], num_samples=5, progress=False, audit=1)


def state_of(posterior: nb.NullSpacePosterior) -> State:
    state = posterior._fitted().state
    assert state is not None
    return state


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_few_examples_are_exact_and_many_are_not() -> None:
    few, many = fitted(3), fitted(400)
    x = torch.randn(5, 6)
    assert exact_pays(state_of(few), 4, 5)
    assert not exact_pays(state_of(many), 4, 5)
    for posterior, exact in ((few, True), (many, False)):
        assert_close(posterior.novelty(x), posterior.novelty(x, exact=exact), rtol=0, atol=0)
        assert not torch.equal(posterior.novelty(x), posterior.novelty(x, exact=not exact))


def test_the_choice_does_not_depend_on_the_company() -> None:
    for examples in (3, 30, 400):
        posterior = fitted(examples)
        x = torch.randn(40, 6)
        alone = torch.cat([posterior.novelty(one) for one in x.split(1)])
        assert_close(alone, posterior.novelty(x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [1, 32])
@pytest.mark.parametrize("examples", [2, 5, 10, 20, 50, 100, 200])
def test_what_is_chosen_costs_at_most_twice_as_many_operations(examples: int, size: int) -> None:
    posterior = fitted(examples, 48)
    x = torch.randn(size, 6)
    cost = {
        exact: counted(lambda exact=exact: posterior.novelty(x, exact=exact))
        for exact in (True, False)
    }
    state = state_of(posterior)
    # Triangular solves are not counted by PyTorch.
    halves = 2 * (state.passes or 1)
    cost[True] += halves * state.operator.shape[0] ** 2 * 4 * size
    chosen = cost[exact_pays(state, 4, 5)]
    # Operations are not seconds: calls cost as much as a few million of them.
    assert chosen <= 2 * cost[False] + 3e8


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("examples", [20, 200])
def test_operations_of_the_dual_are_counted(examples: int, size: int) -> None:
    posterior = fitted(examples, 48)
    state, x = state_of(posterior), torch.randn(size, 6)
    functional, fit = posterior.functional, posterior._fitted()
    assert fit.plan is not None
    ((_, rows),) = output_rows(functional, fit.plan, x, 4, fit.stored)
    work = state.explained_work(4 * size)
    cross = counted(lambda: state.operator.cross_gram(rows))
    assert 0.5 * cross <= work.flops <= 2 * cross
    m, halves = state.operator.shape[0], 2 * (state.passes or 1)
    assert work.double_flops == m**2 * 4 * size * halves
    assert work.nbytes >= 4 * m**2 * halves


def test_operations_of_the_primal_are_counted() -> None:
    posterior = fitted(400, 4, "primal")
    state, x = state_of(posterior), torch.randn(8, 6)
    functional, fit = posterior.functional, posterior._fitted()
    assert fit.plan is not None
    ((_, rows),) = output_rows(functional, fit.plan, x, 4, fit.stored)
    work = state.explained_work(32)
    basis: Tensor = state.basis  # type: ignore[attr-defined]
    product = counted(lambda: rows.matvec(basis.to(rows.dtype)))
    assert 0.5 * product <= work.flops <= 2 * product
    assert work.nbytes >= basis.nbytes


def test_a_solver_that_iterates_is_never_exact_by_itself() -> None:
    posterior = fitted(40, solver="conjugate gradients")
    state = state_of(posterior)
    assert state.explained_work(1) == ENDLESS
    assert not exact_pays(state, 4, 10**9)


def test_rows_that_are_not_in_memory_are_not_read_for_one_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = state_of(fitted(3))
    assert exact_pays(state, 4, 5)
    monkeypatch.setattr(type(state.operator.blocks[0]), "where", "disk")  # type: ignore[attr-defined]
    assert not exact_pays(state, 4, 5)


def test_work_adds_up() -> None:
    one, two = Work(1e9, 2e9, 3e9), Work(4e9, 5e9, 6e9)
    assert one + two == Work(5e9, 7e9, 9e9)
    assert (one + two).seconds == pytest.approx(one.seconds + two.seconds)
    assert ENDLESS.seconds == float("inf")


@pytest.mark.parametrize(
    "layer", ["linear", "tokens", "convolution", "groups", "embedding", "norm"]
)
def test_products_of_an_examples_own_rows(layer: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6).double()
    layers: dict[str, list[nn.Module]] = {
        "linear": [nn.Flatten(), nn.Linear(24, 5)],
        "tokens": [nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 40)],
        "convolution": [nn.Conv1d(4, 3, 3)],
        "groups": [nn.Conv1d(4, 8, 3, groups=2)],
        "embedding": [nn.Embedding(5, 3)],
        "norm": [nn.LayerNorm(6)],
    }
    if layer == "embedding":
        x = torch.randint(0, 5, (3, 4))
    model = nn.Sequential(*layers[layer], nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    model(x)
    functional = FunctionalModel(model, ParameterSpace.from_model(model))
    plan = prove(functional, x)
    none = torch.empty(0, functional.space.total)
    ((_, operator),) = output_rows(functional, plan, x, 3, none)
    dense = dense_jacobian(model, x).reshape(3, 3, -1)
    assert_close(operator.own_products(), dense @ dense.mT)
