"""Beyond memory and exact solvers: rows kept elsewhere, iteration, checkpoints, interrupts."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import operator_for
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import ZOO, Case, dense_jacobian

import nullbayes as nb
from nullbayes import solvers
from nullbayes.common.memory import parse_bytes, peak_bytes
from nullbayes.constraints.memory_budget import FitMemory
from nullbayes.jacobian import block_storage as keeping
from nullbayes.jacobian.block import Block
from nullbayes.jacobian.block_storage import Keeper, OnDisk
from nullbayes.jacobian.operator import DenseOperator, JacobianOperator
from nullbayes.solvers import block_cg
from nullbayes.solvers.checkpoint import Watch
from nullbayes.solvers.kronecker import layer_curvatures

QUIET: dict[str, Any] = {"progress": False}


def network(dtype: torch.dtype = torch.float32, width: int = 24, outputs: int = 5) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        return nn.Sequential(*layers, nn.Linear(width, outputs)).to(dtype).eval()


def data(count: int = 60, outputs: int = 5, dtype: torch.dtype = torch.float32) -> Any:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, 8, generator=g).to(dtype)
    y = torch.randint(0, outputs, (count,), generator=g)
    return [(x[i : i + 16], y[i : i + 16]) for i in range(0, count, 16)]


# -- where rows are kept ---------------------------------------------------------------------------


def elsewhere(where: str, monkeypatch: pytest.MonkeyPatch, case: Case) -> tuple[Any, Tensor]:
    """The rows of all outputs of a zoo model, kept on disk or recomputed."""
    from types import SimpleNamespace

    from nullbayes.jacobian import ParameterSpace
    from nullbayes.jacobian.capture.batches import capture_batch
    from nullbayes.jacobian.capture.verify import prove
    from nullbayes.model.functional import FunctionalModel

    monkeypatch.setattr(keeping, "fits_on_disk", lambda nbytes, device: where == "disk")
    monkeypatch.setattr(keeping, "BLOCK_ROWS", 6)
    model, inputs = case.make()
    functional = FunctionalModel(model, ParameterSpace.from_model(model))
    plan = prove(functional, inputs)
    outputs = functional.outputs(inputs)
    size, width = len(outputs), outputs[0].numel()
    eye = torch.eye(width, dtype=outputs.dtype)[:, None].expand(width, size, width)
    eye = eye.reshape(width, *outputs.shape)
    # Inputs and cotangents of what is recomputed stay in memory: that much room there is.
    keeper = Keeper(functional, plan, None, 10**6)
    keeper._room = 0 if where == "disk" else 10**6
    if where == "recomputed":
        monkeypatch.setattr(Keeper, "_fits", lambda self, nbytes: False)
    made = capture_batch(
        functional, plan, inputs, lambda o, s: SimpleNamespace(values=eye[:, s]), width
    )
    for block, some, values in made:
        keeper.add(block, some, values.values)
    return JacobianOperator(functional.space, keeper.finish()), dense_jacobian(model, inputs)


@pytest.mark.parametrize("where", ["disk", "recomputed"])
@pytest.mark.parametrize("case", ZOO, ids=str)
def test_rows_kept_elsewhere_are_the_same(
    case: Case, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, dense = elsewhere(where, monkeypatch, case)
    assert set(operator.kept()) == {where}
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, dense.shape[1], dtype=torch.float64, generator=g)
    weights = torch.randn(3, dense.shape[0], dtype=torch.float64, generator=g)
    assert_close(operator.matvec(vectors), vectors @ dense.T)
    assert_close(operator.rmatvec(weights), weights @ dense)
    product, square = operator.normal(vectors)
    assert_close(product, vectors @ dense.T @ dense)
    assert_close(square, (vectors @ dense.T).square().sum(1))
    assert_close(operator.gram(), dense @ dense.T)
    assert_close(operator.squared_norms(), dense.square().sum(1))
    assert_close(torch.cat(list(operator.iter_rows(5))), dense)
    pieces = [piece.matvec(vectors) for piece in operator.pieces(2)]
    assert_close(torch.cat(pieces, dim=1), vectors @ dense.T)
    index = torch.tensor([0, dense.shape[0] - 1])
    assert_close(operator.rows(index), dense[index])


@given(rows=st.integers(1, 70), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_a_subset_holds_different_rows_of_the_matrix(rows: int, seed: int) -> None:
    model, inputs = next(c for c in ZOO if c.name == "conv2d").make()
    operator, _ = operator_for(model, inputs)
    dense = dense_jacobian(model, inputs)
    some = operator.subset(rows, torch.Generator().manual_seed(seed))
    written = torch.cat(list(some.iter_rows(3)))
    assert 1 <= len(written) <= max(dense.shape[0], rows)
    nearest = (torch.cdist(written, dense) < 1e-9).int()
    assert bool((nearest.sum(1) >= 1).all())
    assert len(nearest.argmax(1).unique()) == len(written)


def test_a_file_of_rows_has_no_name_and_frees_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, inputs = next(c for c in ZOO if c.name == "conv2d").make()
    operator, _ = operator_for(model, inputs)
    block = operator.blocks[0]
    assert isinstance(block, Block)
    kept = OnDisk(block)
    assert list(tmp_path.iterdir()) == []
    assert kept.resident == 0 and kept.nbytes == block.nbytes


@pytest.mark.parametrize("preserve", ["predictions", "loss"])
def test_a_small_budget_gives_the_same_posterior(preserve: str) -> None:
    train = data(200, dtype=torch.float64)
    kwargs = {"preserve": preserve, "delta": 0, "prior_precision": 1.0}
    ample = nb.NullSpacePosterior(network(torch.float64), **kwargs).fit(train, 4, **QUIET)
    solver = solvers.DualCholesky()
    model = network(torch.float64)
    tight = nb.NullSpacePosterior(model, solver=solver, memory="13MB", **kwargs)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as m:
        m.setattr(keeping, "BLOCK_ROWS", 64)
        m.setattr("nullbayes.fit.room.FitMemory.of", lambda *a: FitMemory(0, 10**5))
        tight.fit(train, 4, **QUIET)
    assert any("on disk" in note for note in tight.certificate.notes)
    assert not any("on disk" in note for note in ample.certificate.notes)
    assert_close(tight._samples(), ample._samples(), atol=1e-7, rtol=0)


def _peak_of_a_fit(queue: Any, memory: str | None) -> None:
    torch.set_num_threads(1)
    model = network(width=1024)
    x = torch.randn(1536, 8)
    train = [(x[i : i + 64], torch.zeros(64).long()) for i in range(0, len(x), 64)]
    nb.NullSpacePosterior(model, preserve="loss").fit(train[:1], 1, progress=False)
    before = peak_bytes(torch.device("cpu"))
    posterior = nb.NullSpacePosterior(model, preserve="outputs", memory=memory, tolerance=0.5)
    posterior.fit(train, 2, progress=False)
    after = peak_bytes(torch.device("cpu"))
    queue.put((after - before, posterior.certificate.notes))


@pytest.mark.parametrize("memory", ["160MB", "400MB"])
def test_peak_memory_stays_inside_the_budget(memory: str) -> None:
    """In a fresh process; the factors of these rows alone take 76 MB."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak_of_a_fit, args=(queue, memory))
    process.start()
    taken, notes = queue.get(timeout=300)
    process.join()
    assert taken <= parse_bytes(memory)
    assert memory != "160MB" or any("on disk" in note for note in notes)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("no"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_names_the_knob(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> Any:
        raise error

    monkeypatch.setattr("nullbayes.fit.pipeline.capture_training", fails)
    with pytest.raises(nb.MemoryBudgetError, match="lower `memory=`"):
        nb.NullSpacePosterior(network()).fit(data(), 2, **QUIET)


# -- directions="auto" ----------------------------------------------------------------------------


def test_auto_directions_hold_no_rows_in_vain() -> None:
    model = network(torch.float64, outputs=12)
    model[-1].weight.data.mul_(8)
    train = data(90, outputs=12, dtype=torch.float64)
    posterior = nb.NullSpacePosterior(model, directions="auto", delta=0, prior_precision=1.0)
    posterior.fit(train, 6, **QUIET)
    operator = posterior._fit.state.operator
    assert bool((operator.squared_norms() > 0).all())
    assert operator.shape[0] < 90 * 11 and len({b.cotangents for b in operator.blocks}) > 1
    # The rows kept span what all rows do, but for a thousandth of each example's trace.
    full = nb.NullSpacePosterior(model, delta=0, prior_precision=1.0).fit(train, 6, **QUIET)
    rows = torch.cat(list(full._fit.state.operator.iter_rows(64)))
    kept = torch.cat(list(operator.iter_rows(64)))
    assert kept.square().sum() <= rows.square().sum()
    assert 0 < posterior.certificate.discarded_trace <= 1e-3
    assert float((posterior._samples() @ kept.T).abs().max()) <= 1e-7


# -- iteration -----------------------------------------------------------------------------------


def smooth_matrix(m: int = 80, p: int = 120) -> Tensor:
    g = torch.Generator().manual_seed(3)
    a = torch.randn(m, p, generator=g, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(a, full_matrices=False)
    return (u * torch.logspace(2, -4, m).double()) @ vt


@pytest.mark.parametrize("preconditioner", ["none", "subset", "sketch", "pivoted"])
def test_numerical_null_space_of_conjugate_gradients(preconditioner: str) -> None:
    """Each pass is one Tikhonov filter, as with the exact solvers."""
    a, shift = smooth_matrix(), 0.1
    solver = solvers.ConjugateGradient(1e-11, 5000, preconditioner)
    state = solver.prepare(DenseOperator(a))
    state.factorise(shift, numerical=True)
    eye = torch.eye(120, dtype=torch.float64)
    found = state.project(eye).value
    assert state.passes is not None and state.passes >= 2
    _, s, vt = torch.linalg.svd(a, full_matrices=False)
    lost = 1 - (shift / (s**2 + shift)) ** state.passes
    assert_close(found, eye - (vt.T * lost) @ vt, atol=1e-6, rtol=0)


def test_all_samples_together_need_fewer_steps() -> None:
    """The point of the block: a shared space. Thirty samples converge before one of them does."""
    a = smooth_matrix(400, 600).float()
    solver = solvers.ConjugateGradient(0.02, 400, "none")
    v = torch.randn(30, 600, generator=torch.Generator().manual_seed(0))

    def iterations(vectors: Tensor) -> int:
        state = solver.prepare(DenseOperator(a))
        state.factorise()
        done = state.project(vectors)
        assert done.status is solvers.Status.CONVERGED
        after = (done.value.double() @ a.double().T).norm(dim=1)
        before = (vectors.double() @ a.double().T).norm(dim=1)
        assert_close(done.residual, after / before, rtol=1e-3, atol=1e-6)
        return done.iterations

    assert 2 * iterations(v) <= iterations(v[:1])


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_equilibrated_rows_have_the_same_null_space(power: float) -> None:
    g = torch.Generator().manual_seed(5)
    a = torch.randn(40, 90, generator=g).double() * torch.logspace(3, 0, 40).double()[:, None]
    state = solvers.ConjugateGradient(1e-11, 2000, equilibrate=power).prepare(DenseOperator(a))
    state.factorise()
    done = state.project(torch.eye(90, dtype=torch.float64))
    assert_close(done.value, torch.eye(90).double() - torch.linalg.pinv(a) @ a, atol=1e-6, rtol=0)
    image = (done.value @ a.T).norm(dim=1) / (a.norm(dim=0))
    assert_close(done.residual, image, atol=1e-12, rtol=0)


def test_equilibration_keeps_short_rows_better_in_as_many_steps() -> None:
    model, train = network(), data(120)
    model[-1].weight.data.mul_(12)  # confident of most examples: their rows are short
    moved = {}
    for power in (0.0, 1.0):
        solver = solvers.ConjugateGradient(1e-9, 10, equilibrate=power)
        posterior = nb.NullSpacePosterior(model, solver=solver, prior_precision=1.0)
        posterior.fit(train, 20, **QUIET)
        moved[power] = posterior.certificate.output_drift
    assert moved[1.0] < 0.7 * moved[0.0]


def test_kronecker_curvature_of_one_example_is_exact() -> None:
    model = nn.Linear(6, 4).double().eval()
    x = torch.randn(1, 6, dtype=torch.float64)
    operator, _ = operator_for(model, x)
    dense = dense_jacobian(model, x)
    (layer,) = layer_curvatures(operator)
    r = torch.randn(3, 28, dtype=torch.float64)
    out = torch.full_like(r, float("nan"))
    layer.damp(r, out, 0.3)
    wanted = 0.3 * torch.linalg.solve(dense.T @ dense + 0.3 * torch.eye(28).double(), r.T).T
    assert_close(out, wanted)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_kronecker_preconditioner_is_symmetric_and_positive(case: Case) -> None:
    model, inputs = case.make()
    operator, _ = operator_for(model, inputs)
    preconditioner = solvers.Kronecker()
    preconditioner.prepare(operator, 0.0)
    matrix = preconditioner.apply(torch.eye(operator.shape[1], dtype=torch.float64))
    assert_close(matrix, matrix.T)
    values = torch.linalg.eigvalsh(matrix)
    assert float(values.min()) > 0 and float(values.max()) <= 1 + 1e-9


def test_kronecker_is_refused_for_an_exact_projection() -> None:
    solver = solvers.ConjugateGradient(preconditioner="kronecker")
    with pytest.raises(nb.InputError, match="delta"):
        nb.NullSpacePosterior(network(), delta=0, solver=solver).fit(data(), 2, **QUIET)


def test_unknown_preconditioner() -> None:
    with pytest.raises(nb.InputError, match="'kronecker', 'pivoted', 'rows', 'sketch', 'subset'"):
        solvers.ConjugateGradient(preconditioner="ilu")


def test_acceleration_changes_the_path_and_not_the_end() -> None:
    a = torch.randn(30, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    v = torch.randn(4, 60, dtype=torch.float64)
    cycles = {}
    for accelerate in (False, True):
        solver = solvers.AlternatingProjections(1e-10, 5000, 6, accelerate=accelerate)
        state = solver.prepare(DenseOperator(a))
        state.factorise()
        done = state.project(v)
        cycles[accelerate] = done.iterations
        assert_close(done.value, v - v @ (torch.linalg.pinv(a) @ a), atol=1e-7, rtol=0)
    assert cycles[True] < cycles[False]


def test_drift_ends_the_work_early() -> None:
    solver = solvers.ConjugateGradient(1e-6, preconditioner="none")

    def fitted(drift: float | None) -> nb.Certificate:
        posterior = nb.NullSpacePosterior(
            network(), solver=solver, row_drift=drift, prior_precision=1.0, delta=0
        )
        return posterior.fit(data(100), 20, **QUIET).certificate

    loose, tight = fitted(0.05), fitted(None)
    assert loose.iterations < tight.iterations
    assert loose.row_drift <= 0.05 * 1.05 and tight.row_drift < 1e-3


# -- long runs -----------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands in for a signal that no code can catch."""


def long_fit(checkpoint: Path | None, **kwargs: Any) -> Any:
    solver = solvers.ConjugateGradient(1e-3, 400, "none")
    posterior = nb.NullSpacePosterior(network(), delta=1e-6, prior_precision=1.0, solver=solver)
    return posterior.fit(
        data(120), 6, checkpoint=checkpoint, checkpoint_every=1e-9, **QUIET, **kwargs
    )


def test_resuming_after_a_kill_gives_the_same_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = long_fit(None)
    path = tmp_path / "fit.ckpt"
    written: list[int] = []
    offer = Watch.offer

    def killing(self: Watch, state: dict[str, Tensor], *, now: bool = False) -> None:
        offer(self, state, now=now)
        written.append(int(state["done"]))
        if len(written) == 3:
            raise Killed

    with monkeypatch.context() as m:
        m.setattr(Watch, "offer", killing)
        with pytest.raises(Killed):
            long_fit(path)
    assert path.exists() and [p.name for p in tmp_path.iterdir()] == ["fit.ckpt"]
    found = long_fit(path)
    assert not path.exists()  # it has served
    assert found.certificate.residual == pytest.approx(wanted.certificate.residual, rel=1e-2)
    assert_close(found._samples(), wanted._samples(), atol=2e-4, rtol=0)


def test_a_checkpoint_of_other_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fit.ckpt"
    monkeypatch.setattr(Watch, "finish", lambda self: None)
    long_fit(path)
    with pytest.raises(nb.StorageError, match="another fit"):
        long_fit(path, seed=1)
    path.write_bytes(b"rubbish")
    with pytest.raises(nb.StorageError, match="cannot be read"):
        long_fit(path)


def test_an_interrupt_keeps_the_best_samples_with_an_honest_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, calls = block_cg._advance, iter(range(100))

    def interrupted(*args: Any) -> Any:
        if next(calls) == 12:
            raise KeyboardInterrupt
        return advance(*args)

    monkeypatch.setattr(block_cg, "_advance", interrupted)
    path = tmp_path / "fit.ckpt"
    posterior = long_fit(path)
    certificate = posterior.certificate
    assert certificate.status == solvers.Status.INTERRUPTED.value and not certificate.held
    assert "interrupted" in certificate.verdict
    operator = posterior._fit.state.operator
    after = operator.matvec(posterior._fit.unit).norm(dim=1)
    assert 1e-3 < certificate.residual < 1 and float(after.max()) > 0
    assert path.exists()  # the same call goes on from here
    monkeypatch.setattr(block_cg, "_advance", advance)
    assert long_fit(path).certificate.status != solvers.Status.INTERRUPTED.value


def test_an_interrupted_reference_method_keeps_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    a = smooth_matrix()
    state = solvers.AlternatingProjections(1e-12, batch_rows=10).prepare(DenseOperator(a))
    state.factorise()

    class Stop(Watch):
        def report(self, done: int, reached: float) -> None:
            if done == 3:
                raise KeyboardInterrupt

    done = state.project(torch.randn(3, 120, dtype=torch.float64), None, Stop())
    assert done.status is solvers.Status.INTERRUPTED and done.iterations == 3
    assert float(done.residual.max()) < 1


@pytest.fixture(autouse=True)
def _no_files_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("*.tmp"))
