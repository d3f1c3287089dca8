"""How often loops wait for a number from the device: never in products, a few times a step, batch or prediction.

See `host_reads.py` for how reads are found where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_reads import followed
from support import QUIET
from torch import Tensor, nn

import nullbayes as nb
from nullbayes import solvers
from nullbayes.common.progress import stages
from nullbayes.constraints.memory_budget import FitMemory
from nullbayes.constraints.training_rows import capture_training
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.posterior.layer_fit import Source, collect
from nullbayes.solvers import Solver

#: reads that a step of a search, a batch, a prediction may take
STEP, BATCH, PREDICTION = 4, 24, 6


def network(depth: int = 1) -> nn.Module:
    torch.manual_seed(0)
    inner = [m for _ in range(depth) for m in (nn.Linear(8, 8), nn.Tanh())]
    front = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.Tanh()]
    return nn.Sequential(*front, *inner, nn.LayerNorm(8), nn.Linear(8, 5)).eval()


def data(count: int) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    return list(zip(x.split(8), (torch.arange(count) % 5).split(8), strict=True))


def fit(solver: Solver, count: int = 32, samples: int = 4, depth: int = 1) -> Any:
    posterior = nb.NullSpacePosterior(network(depth), solver=solver, delta=1e-2)
    return posterior.fit(data(count), samples, **QUIET)


def operator_of(posterior: Any) -> JacobianOperator:
    found = posterior._fitted().rows.operator
    assert isinstance(found, JacobianOperator)
    return found


@pytest.fixture(scope="module")
def rows() -> JacobianOperator:
    """Of five batches."""
    model = network()
    return operator_of(
        nb.NullSpacePosterior(model, solver=solvers.PrimalQR()).fit(data(40), 2, **QUIET)
    )


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.sum() > 0),
        lambda t: float(t[0]),
        lambda t: int(t.argmax()),
        lambda t: f"{t.max():.3f}",
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.to("cpu"),
        lambda t: t.detach().numpy(),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: torch.equal(t, t + 1),
        lambda t: torch.linalg.solve(torch.diag(t + 1), t),
        lambda t: [v for v in t if v > 0],
    ],
)
def test_every_kind_of_read_is_found(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import host_reads

    monkeypatch.setattr(host_reads, "LIBRARY", host_reads.Path(__file__).parent)
    t = torch.arange(3.0)
    with followed(t) as reads:
        read(2 * t)
    assert reads.total >= 1
    with followed() as reads:
        read(2 * t)  # of a tensor that is not on the device
    assert reads.total == 0
    with followed(t) as reads:
        _ = (t @ t).exp() + t.cumsum(0).clamp(min=0).sort().values[torch.arange(2)].sum()
    assert reads.total == 0


def test_what_was_copied_away_is_read_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import host_reads

    monkeypatch.setattr(host_reads, "LIBRARY", host_reads.Path(__file__).parent)
    t = torch.arange(3.0)
    with followed(t) as reads:
        here = (2 * t).cpu()
        assert [float(v) for v in here] == [0.0, 2.0, 4.0]
        here += 1
        assert bool((here > 0).all())
    assert reads.total == 1, str(reads)


def test_products_with_rows_read_nothing(rows: JacobianOperator) -> None:
    operator, more = rows, operator_of(fit(solvers.PrimalQR(), 16))
    v = torch.randn(3, operator.shape[1])
    w = torch.randn(3, operator.shape[0])
    with followed(operator, more, v, w) as reads:
        operator.matvec(v)
        operator.rmatvec(w)
        operator.normal(v)
        operator.gram()
        operator.cross_gram(more)
        operator.squared_norms()
        operator.image_norms(v)
        for _ in operator.iter_rows(7):
            pass
    assert reads.total == 0, str(reads)


@pytest.mark.parametrize("samples", [3, 12])
@pytest.mark.parametrize("name", ["none", "kronecker", "subset", "rows", "sketch", "pivoted"])
def test_a_step_of_conjugate_gradients_reads_a_few_numbers(
    rows: JacobianOperator, name: str, samples: int
) -> None:
    counts = []
    for limit in (3, 9):
        chosen = solvers.preconditioners.Subset(12) if name == "subset" else name
        # Hopeless, so that the limit ends it.
        solver = solvers.ConjugateGradient(1e-12, max_iterations=limit, preconditioner=chosen)
        state = solver.prepare(rows)
        state.factorise(1e-3, numerical=True)
        v = torch.randn(samples, state.operator.shape[1])
        with followed(state, v) as reads:
            done = state.project(v)
        counts.append((reads.total, done.iterations))
    (first, before), (second, after) = counts
    assert after > before
    assert second - first <= STEP * (after - before), str(reads)


def test_a_cycle_of_projections_in_turn_reads_as_often_however_many_batches(
    rows: JacobianOperator,
) -> None:
    counts = []
    for size in (16, 160):
        solver = solvers.AlternatingProjections(1e-12, max_cycles=5, batch_rows=size)
        state = solver.prepare(rows)
        state.factorise(1e-3, numerical=True)
        v = torch.randn(4, state.operator.shape[1])
        with followed(state, v) as reads:
            state.project(v)
        counts.append(reads.total)
    assert counts[0] == counts[1] <= 5 * 2 * STEP, str(reads)


@pytest.mark.parametrize(
    "solver", [solvers.DualCholesky(), solvers.PrimalQR(), solvers.PrimalEigen()]
)
def test_a_direct_projection_reads_as_often_however_large(solver: Solver) -> None:
    counts = []
    for count, samples in ((16, 3), (40, 12)):
        state = fit(solver, count)._fitted().state
        v = torch.randn(samples, state.operator.shape[1])
        with followed(state, v) as reads:
            done = state.project(v)
        counts.append(reads.total / max(1, done.iterations))
    assert max(counts) <= 2 * STEP, str(reads)


def test_a_batch_is_captured_by_a_few_reads_however_deep_the_network() -> None:
    each = []
    for depth in (1, 4):
        problem = nb.NullSpacePosterior(network(depth)).problem
        memory = FitMemory.of(2**30, 4, problem.space.total, problem.dtype)
        totals = []
        for count in (16, 48):
            batches = data(count)
            with stages(show=False) as stage, followed(problem.functional.model, batches) as reads:
                capture_training(problem, batches, None, memory, stage, 4)
            totals.append(reads.total)
        each.append((totals[1] - totals[0]) / 4)
    assert max(each) <= BATCH, str(reads)
    assert each[0] == each[1]


def test_inputs_of_layers_are_added_up_by_a_few_reads_a_batch() -> None:
    each = []
    for depth in (1, 4):
        layers, totals = nb.LayerNullSpacePosterior(network(depth)), []
        for count in (16, 48):
            batches = data(count)
            source = Source(batches, "train", 0, torch.float64)
            with stages(show=False) as stage, followed(layers.model, batches) as reads:
                collect(layers.functional, None, source, stage, 2**30)
            totals.append(reads.total)
        each.append((totals[1] - totals[0]) / 4)
    assert each[0] == each[1] <= STEP, str(reads)


@pytest.mark.parametrize("depth", [1, 4])
def test_a_prediction_waits_a_few_times(depth: int) -> None:
    posterior = fit(solvers.DualCholesky(), depth=depth)
    layers = nb.LayerNullSpacePosterior(network(depth)).fit(data(32), 3, **QUIET)
    new = data(40)[-1][0]
    asked = {
        "predict": lambda: posterior.predict(new),
        "sampled": lambda: posterior.predict(new, method="sampled"),
        "layers": lambda: layers.predict(new),
        "leverage": lambda: layers.novelty(new),
    }
    for score in ("information", "variance", "share"):
        for exact in (True, False):
            asked[f"{score}, {exact}"] = lambda score=score, exact=exact: posterior.novelty(
                new, score=score, exact=exact
            )
    for name, ask in asked.items():
        ask()
        with followed(posterior, layers, new) as reads:
            ask()
        assert reads.total <= PREDICTION, f"{name}: {reads.total}\n{reads}"
