"""What one of several processes does in these tests: ``python scenes.py scenes rank size folder``.

Each scene returns what is compared with one process that does the same, or with the other processes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from host_reads import followed
from processes.stage import BATCH, batches, certified, data, fitted, loader, network, told
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
)

import nullbayes as nb
from nullbayes import solvers
from nullbayes.common import pulse
from nullbayes.common.processes import Processes, resolve
from nullbayes.distributed import Shard
from nullbayes.fit import pipeline
from nullbayes.solvers.checkpoint import Watch

CG = solvers.ConjugateGradient
#: every road to a projection
SOLVERS: dict[str, Callable[[float], Any]] = {
    "plain": CG,
    "equilibrated": lambda t: CG(t, equilibrate=0.5),
    "kronecker": lambda t: CG(t, preconditioner="kronecker"),
    "subset": lambda t: CG(t, preconditioner=solvers.preconditioners.Subset(12)),
    "scaled subset": lambda t: CG(t, 300, solvers.preconditioners.Subset(12), 0.5),
    "scaled rows": lambda t: CG(t, 300, solvers.preconditioners.Rows(12), 0.5),
    "scaled kronecker": lambda t: CG(t, 300, "kronecker", 0.5),
    "sketch": lambda t: CG(t, preconditioner="sketch"),
    "pivoted": lambda t: CG(t, preconditioner="pivoted"),
    "alternating": lambda t: solvers.AlternatingProjections(t, max_cycles=30, batch_rows=2 * BATCH),
    "dual": lambda t: solvers.DualCholesky(),
    "primal": lambda t: solvers.PrimalQR(),
    "eigen": lambda t: solvers.PrimalEigen(),
}
DIRECT = ("dual", "primal", "sketch")
SINGLE = ("eigen",)  # rows in single precision alone


def same_by_solver() -> dict[str, Any]:
    """Every solver in float64; those that do not search in float32 and for Laplace as well."""
    out: dict[str, Any] = {}
    for name, make in SOLVERS.items():
        # Solved well, so that what is compared is the answer and not where rounding has ended a search.
        if name not in SINGLE:
            posterior = nb.NullSpacePosterior(network(), solver=make(1e-9), delta=1e-2)
            out[f"{name}, float64"] = fitted(posterior, batches(4 * BATCH))
        if name in DIRECT + SINGLE:
            single = nb.NullSpacePosterior(network(torch.float32), solver=make(1e-5), delta=1e-2)
            out[f"{name}, float32"] = fitted(single, loader(5 * BATCH, torch.float32))
        if name in DIRECT:
            laplace = nb.LaplacePosterior(network(), solver=make(1e-10))
            out[f"{name}, Laplace"] = fitted(laplace, loader(5 * BATCH))
    return out


def same_by_rows() -> dict[str, Any]:
    """What is preserved, which directions, which data: all decide the rows."""
    out: dict[str, Any] = {}
    for keep in ("outputs", "loss", "sampled-fisher"):
        out[keep] = fitted(nb.NullSpacePosterior(network(), preserve=keep), loader(23))
    auto = nb.NullSpacePosterior(network(), directions="auto", solver="dual Cholesky")
    out["auto"] = fitted(auto, loader(23))
    regression = nb.NullSpacePosterior(network(), "regression", solver="primal QR")
    out["regression"] = fitted(regression, (data(23)[0], data(23)[0].sin()))
    out["noise"] = {"unit": torch.as_tensor(regression.likelihood.with_noise(1.0).noise_variance)}
    out["uneven"] = fitted(nb.NullSpacePosterior(network()), data(7))
    out["empty"] = fitted(nb.NullSpacePosterior(network()), batches(BATCH + 1), 2)
    searched = nb.NullSpacePosterior(network(), solver=CG(1e-8), delta=1e-2)
    out["empty, searched"] = fitted(searched, batches(BATCH + 1), 2)
    out["first"] = fitted(nb.NullSpacePosterior(network()), loader(23), max_examples=11)
    dropped = DataLoader(TensorDataset(*data(23)), batch_size=BATCH, drop_last=True)
    out["dropped"] = fitted(nb.NullSpacePosterior(network()), dropped)
    return out


def same_after_updates() -> dict[str, Any]:
    """More data, twice: less than there are processes, and more."""
    out: dict[str, Any] = {}
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "dual": (nb.NullSpacePosterior, solvers.DualCholesky(1e-13), {}),
        "primal": (nb.NullSpacePosterior, solvers.PrimalQR(), {}),
        "searched": (nb.NullSpacePosterior, CG(1e-10), {"delta": 1e-2}),
        "alternating": (nb.NullSpacePosterior, SOLVERS["alternating"](1e-10), {"delta": 1e-2}),
        "Laplace": (nb.LaplacePosterior, solvers.DualCholesky(1e-13), {}),
        "layers": (
            nb.NullSpacePosterior,
            solvers.DualCholesky(1e-13),
            {"prior_precision": "evidence-by-layer"},
        ),
        "sampled": (
            nb.NullSpacePosterior,
            solvers.DualCholesky(1e-13),
            {"preserve": "sampled-fisher"},
        ),
    }
    for name, (make, solver, options) in kinds.items():
        p = make(network(), solver=solver, **options)
        # (Projections in turn: whole batches, for no other process splits those of the loader where one does.)
        make_data = batches if name == "alternating" else loader
        fitted(p, make_data(13))
        p.update(make_data(2, seed=2), progress=False)
        p.update(make_data(14, seed=3), progress=False)
        out[name] = certified(p)
        x = data(5, seed=7)[0]
        exact = name not in ("searched", "alternating")
        out[name] |= {"novelty": p.novelty(x, exact=exact), "mean": p.predict(x).mean}
        if name == "dual":
            p.draw(2)
            out[name]["drawn"] = p._fitted().unit
    single = nb.NullSpacePosterior(network(torch.float32), solver=solvers.PrimalEigen(), delta=1e-2)
    single.fit(loader(13, torch.float32), 4, progress=False)
    single.update(loader(9, torch.float32, 2), progress=False)
    out["eigen, float32"] = certified(single)
    regression = nb.NullSpacePosterior(network(), "regression", solver="primal QR")
    x = data(23)[0]
    regression.fit((x, x.sin()), 4, progress=False).update((-x[:9], -x[:9].sin()), progress=False)
    out["regression"] = certified(regression)
    out["noise"] = {"unit": torch.as_tensor(regression.likelihood.with_noise(1.0).noise_variance)}
    return out


def same_by_layer() -> dict[str, Any]:
    """The layer posterior: sums, examples that are kept, certificate, scores, more data and less."""
    out: dict[str, Any] = {}
    wide: dict[str, Any] = {"memory": 10_000}  # layers are sketched
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "loader": (loader(23), {}),
        "exact": (loader(23), {"delta": 0}),
        "arrays": (data(301), {"prior_precision": 2.0}),
        "many": (loader(301), {}),
        "list": (batches(23), {}),
        "empty": (batches(BATCH + 1), {}),
        "sketched": (loader(23), wide),
        "float32": (loader(301, torch.float32), {}),
    }
    for name, (train, options) in cases.items():
        dtype = torch.float32 if name == "float32" else torch.float64
        p = nb.LayerNullSpacePosterior(network(dtype), **options).fit(train, 3, progress=False)
        out[name] = _of_layers(p, dtype)
    noisy = nb.LayerNullSpacePosterior(network(), nb.Regression())
    x = data(23)[0]
    noisy.fit((x, x.sin()), 3, progress=False)
    out["regression"] = _of_layers(noisy, torch.float64)
    out["regression"]["noise"] = torch.as_tensor(noisy.likelihood.noise_variance)  # type: ignore[attr-defined]
    p = nb.LayerNullSpacePosterior(network()).fit(loader(23), 3, progress=False)
    out["more"] = _of_layers(p.update(loader(9, seed=3), progress=False), torch.float64)
    out["less"] = _of_layers(p.remove(loader(9, seed=3), progress=False), torch.float64)
    fitted_on = batches(23)
    p.remove([tuple(t[:1] for t in fitted_on[0])], progress=False)  # less than there are processes
    out["one less"] = _of_layers(p, torch.float64)
    # Once too often, and that in another process than the first time.
    kind, text = told(lambda: p.remove(fitted_on[2:3] * 2, progress=False))
    assert (kind, "not in this posterior" in text) == ("InputError", True)
    some = loader(31, seed=5)
    path = p.calibrate(some, ood_loader=[(3 * x, y) for x, y in batches(9)], progress=False)
    assert path.auroc is not None
    found = {"path": torch.tensor([path.nll, path.accuracy, path.auroc])}
    evaluation = p.evaluate(some, shifted={"far": batches(9, 7)}, progress=False).as_dict()
    found |= {key: evaluation[key] for key in ("figures", "detection", "thresholds")}
    out["asked"] = found | {"divergence": p.divergence(some), "precision": p.prior_precision}
    return out


def _of_layers(p: nb.LayerNullSpacePosterior, dtype: torch.dtype) -> dict[str, Any]:
    c, gathered = p.certificate, p._fitted().gathered
    names = "divergence change left_out_divergence network_score posterior_score weight_change free_share"
    kept = torch.cat([inputs for inputs, _ in gathered.kept])
    some = data(5, dtype, 8)[0]
    return {
        **{name: getattr(c, name) for name in (*names.split(), "prior_precision")},
        "counts": (c.examples, c.checked_examples, [sums.count for sums in gathered.sums]),
        "kept": (kept, [len(inputs) for inputs, _ in gathered.kept]),
        "sample": torch.cat([t.flatten() for t in next(p.sample(1)).values()]),
        "mean": p.predict(some).mean,
        "scores": p.novelty(some),
        "members": gathered.members.counts.sum(),
    }


def same_of_a_posterior() -> dict[str, Any]:
    """Everything that a posterior can be asked about data."""
    out: dict[str, Any] = {}
    for name in ("dual", "primal"):
        p = nb.NullSpacePosterior(network(), solver=SOLVERS[name](1e-10), delta=1e-2)
        p.fit(loader(23), 4, progress=False)
        some = loader(31, seed=5)
        prediction = p.predict(some)
        found = {"mean": prediction.mean, "outputs": prediction.outputs}
        found |= {score: p.novelty(some, score=score) for score in ("information", "share")}
        found["one batch"] = p.novelty(data(5)[0])
        out[name] = found
        if name == "primal":
            continue
        found |= asked_of_data(p)
        p.draw(2)
        found["drawn"] = p._fitted().unit
        p.prior_precision = 3.0
        found["drift"] = torch.tensor([p.certificate.drift, p.certificate.posterior_score])
    return out


def asked_of_data(p: Any, exact: bool | None = None) -> dict[str, Any]:
    """What a posterior says of loaders: novelty, a choice, a calibration and an evaluation."""
    some, far = loader(31, seed=5), [(3 * x, y) for x, y in batches(9)]
    found: dict[str, Any] = {s: p.novelty(some, score=s, exact=exact) for s in ("share", "entropy")}
    found = {f"{score} of a loader": values for score, values in found.items()}
    for criterion in ("pool", "weights"):
        found[criterion] = p.select(some, 6, criterion=criterion)
    found["one to choose from"] = p.select(loader(1), 1)
    path = p.calibrate(some, ood_loader=far, progress=False)
    assert path.ece is not None
    assert path.auroc is not None
    found["path"] = torch.tensor([path.nll, path.accuracy, path.ece, path.auroc])
    evaluation = p.evaluate(
        some,
        shifted={"far": far},
        train=loader(23),
        validation=loader(9, seed=6),
        slices={"class 0": lambda inputs, targets: targets == 0},
        progress=False,
    )
    table = evaluation.as_dict()
    parts = ("figures", "differences", "train", "detection", "slices", "thresholds")
    return found | {key: table[key] for key in parts}


def same_on_a_mesh() -> dict[str, Any]:
    """Samples spread over the second dimension of a mesh; in one process, all of them there."""
    mesh = None
    if dist.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "samples"))
    out: dict[str, Any] = {}
    cases: dict[str, dict[str, Any]] = {
        "dual": {"solver": solvers.DualCholesky(1e-13)},
        "exact": {"solver": solvers.DualCholesky(1e-13), "delta": 0},
        "primal": {"solver": solvers.PrimalQR()},
        "searched": {"solver": CG(1e-11), "delta": 1e-2},
        "Laplace": {"solver": solvers.DualCholesky(1e-13)},
    }
    for name, options in cases.items():
        make = nb.LaplacePosterior if name == "Laplace" else nb.NullSpacePosterior
        p = make(network(), device_mesh=mesh, **options)
        found = fitted(p, loader(23), 5)
        held = found.pop("unit")
        out[name] = found | {"samples": p.num_samples}
        out[name]["residual"] = max(p.certificate.residual, 1e-7)
        some, x = loader(9, seed=5), data(5, seed=7)[0]
        prediction = p.predict(some)
        out[name] |= {"mean": prediction.mean, "outputs": prediction.outputs}
        out[name]["sampled"] = p.predict(x, method="sampled").outputs
        # Without a shift what the factorisation tells of an input is a difference that rounding reaches.
        exact = None if name in ("dual", "primal", "Laplace") else False
        for score in ("information", "variance", "share", "entropy"):
            out[name][score] = p.novelty(x, score=score, exact=exact)
            out[name][score + ", sampled"] = p.novelty(x, score=score, exact=False)
        out[name]["joint"] = p.joint(x, exact=False).covariance
        if name in ("searched", "Laplace"):
            out[name] |= asked_of_data(p, exact)
        if name in ("dual", "Laplace"):
            p.prior_precision = 3.0
            out[name]["drift"] = torch.tensor([p.certificate.drift, p.certificate.sampled_drift])
            p.update(loader(7, seed=9), progress=False)
            held = p._fitted().unit
            out[name]["updated"] = certified(p) | {"mean": p.predict(some).mean}
            out[name]["updated"].pop("unit")
            out[name]["updated"].pop("audit")
        if mesh is not None:
            assert len(held) == 2 + mesh.get_local_rank("samples")
            for refused in (lambda p=p: p.draw(1), lambda p=p: p.sample()):  # type: ignore[misc]
                kind, text = told(refused)
                assert (kind, "device_mesh" in text) == ("InputError", True)
    return out


def same_on_flat_meshes() -> dict[str, Any]:
    """All processes along one of the two dimensions; both posteriors."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    out: dict[str, Any] = {}
    for shape in ((1, -1), (-1, 1)):
        mesh = None
        if dist.is_initialized():
            from torch.distributed.device_mesh import init_device_mesh

            sides = tuple(size if side < 0 else side for side in shape)
            mesh = init_device_mesh("cpu", sides, mesh_dim_names=("data", "samples"))
        for name, make in {
            "null space": nb.NullSpacePosterior,
            "Laplace": nb.LaplacePosterior,
        }.items():
            p = make(network(), solver=solvers.DualCholesky(1e-13), device_mesh=mesh)
            found = fitted(p, loader(23), 5)
            found.pop("unit")
            # By how much: each process moves the examples by samples of its own.
            found["audit"] = found["audit"][:3]
            x = data(5, seed=7)[0]
            found |= {"mean": p.predict(x).mean, "novelty": p.novelty(x)}
            out[f"{name}, {shape}"] = found
    if mesh is not None:
        kind, text = told(
            lambda: nb.LaplacePosterior(network(), process_group=False, device_mesh=mesh)
        )
        assert (kind, "process_group" in text) == ("InputError", True)
    return out


class Numbered(Dataset[Any]):
    """Remembers which examples were read."""

    def __init__(self, count: int) -> None:
        self.x, self.y = data(count)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, number: int) -> Any:
        self.read.append(number)
        return self.x[number], self.y[number]


class Streamed(IterableDataset[Any]):
    def __init__(self, start: int, stop: int) -> None:
        self.part = slice(start, stop)

    def __iter__(self) -> Any:
        x, y = data(20)
        yield from zip(x[self.part], y[self.part], strict=True)


def posterior() -> nb.NullSpacePosterior:
    return nb.NullSpacePosterior(network(), solver="dual Cholesky")


def layers(count: int, seed: int = 1) -> nb.LayerNullSpacePosterior:
    return nb.LayerNullSpacePosterior(network(), process_group=False, delta=0.1).fit(
        data(count, seed=seed), progress=False
    )


def inside(prior: nb.LayerNullSpacePosterior, **options: Any) -> nb.NullSpacePosterior:
    return nb.NullSpacePosterior(prior.model, within=prior, delta=1e-2, **options)


def same_within_layers() -> dict[str, Any]:
    """The layer null space of all the data in every process, and rows that they share."""
    out: dict[str, Any] = {}
    for name in ("dual", "primal", "plain"):
        made = inside(layers(40), solver=SOLVERS[name](1e-10))
        out[name] = fitted(made, loader(7))
        x = data(9, seed=5)[0]
        out[f"{name}, answers"] = {"novelty": made.novelty(x), "mean": made.predict(x).mean}
    return out


def split_and_refused() -> dict[str, Any]:
    """How data are split, and what is refused."""
    rank, size = dist.get_rank(), dist.get_world_size()
    out: dict[str, Any] = {"number": rank}
    numbered = Numbered(20)
    shuffled = DataLoader(numbered, batch_size=BATCH, shuffle=True)
    posterior().fit(shuffled, 2, progress=False)
    out["read"] = [n for n in numbered.read if numbered.read.count(n) == 1]
    padded = DataLoader(
        TensorDataset(*data(20)), batch_size=BATCH, sampler=DistributedSampler(numbered)
    )
    out["padded"] = fitted(posterior(), padded)["unit"]
    whole = DataLoader(Streamed(0, 20), batch_size=BATCH)
    edges = [20 * r // size for r in range(size + 1)]
    part = DataLoader(Streamed(edges[rank], edges[rank + 1]), batch_size=BATCH)
    out["shards"] = fitted(posterior(), Shard(part))["unit"]
    by_layer = nb.LayerNullSpacePosterior(network(), prior_precision=1.0)
    by_layer.fit(Shard(part), 2, progress=False)
    out["layer shards"] = _of_layers(by_layer, torch.float64)
    by_layer.fit(loader(20), 2, progress=False)
    out["layer whole"] = _of_layers(by_layer, torch.float64)
    plain = posterior()
    out["whole"] = fitted(plain, loader(20))["unit"]
    rows = plain._fitted().rows
    assert rows is not None
    out["rows"] = rows.operator.nbytes
    plain.process_group = False
    out["update alone"] = told(lambda: plain.update(loader(4, seed=9), progress=False))
    alone = nb.NullSpacePosterior(network(), solver="dual Cholesky", process_group=False)
    out["alone"] = fitted(alone, loader(20))["unit"]
    rows = alone._fitted().rows
    assert rows is not None
    out["rows whole"] = rows.operator.nbytes
    wrapped = nn.parallel.DistributedDataParallel(network())
    assert isinstance(wrapped, nn.Module)
    out["wrapped"] = fitted(nb.NullSpacePosterior(wrapped, solver="dual Cholesky"), loader(20))[
        "unit"
    ]
    out["streamed"] = told(lambda: posterior().fit(whole, 2, progress=False))
    out["other data"] = told(lambda: posterior().fit(data(20, seed=rank), 2, progress=False))
    out["other seed"] = told(lambda: posterior().fit(loader(20), 2, rank // 2, progress=False))
    own_part = layers(20 + 10 * rank)
    out["other layers"] = told(lambda: inside(own_part).fit(loader(7), 2, progress=False))
    moved = network()
    with torch.no_grad():
        next(moved.parameters()).add_(float(rank == size - 1))
    other = nb.NullSpacePosterior(moved, solver="dual Cholesky")
    out["other weights"] = told(lambda: other.fit(loader(20), 2, progress=False))
    out["failed"] = told(lambda: posterior().fit(_Late(rank), 2, progress=False))
    out["differences"] = _differences(rank == size - 1)
    out["data"] = _kinds_of_data(rank, size)
    out["after"] = fitted(posterior(), loader(20))["unit"]
    out["host reads"] = reads()
    plan = posterior().plan(loader(20), num_samples=4)
    out["plan"] = (plan.processes, plan.rows, plan.sent > 0, sorted(plan.seconds))
    return out


class _Moved(DataLoader[Any]):
    """Reads something else than its data set holds."""

    def __iter__(self) -> Any:
        return ((2 * x, y) for x, y in super().__iter__())


def _kinds_of_data(rank: int, size: int) -> dict[str, Any]:
    """Which examples a fit is of, by how they are given; what is refused."""
    (x, y), some = data(20), [3, 1, 2, 7, 8, 11, 19]
    everything = TensorDataset(x, y)
    of_batches = BatchSampler(SubsetSampler(some), 2, drop_last=False)
    nowhere = x[:0], y[:0]
    all_here = (x[some], y[some]) if rank == size - 1 else nowhere
    ways = {
        "plain": loader_of(x[some], y[some]),
        "batch sampler": DataLoader(everything, batch_sampler=of_batches),
        "subset": DataLoader(Subset(everything, some), batch_size=BATCH),
        "one shard has all": Shard(all_here),
    }
    out: dict[str, Any] = {}
    for name, train in ways.items():
        p = posterior().fit(train, 2, progress=False)
        out[name] = (p._fitted().unit, p.certificate.examples, p.plan(train).examples)
    out["of a shard"] = p.predict(Shard(all_here)).mean - p.predict(ways["plain"]).mean
    refused = {
        "moved": _Moved(everything),
        "shuffled in one": DataLoader(everything, shuffle=rank == size - 1),
        "another choice": Subset(everything, [0, *([4, 5] if rank == size - 1 else [5, 4]), 9]),
        "a label": TensorDataset(x, torch.where(torch.arange(20) == 7, rank % 3, y)),
        "nobody has any": Shard(nowhere),
    }
    for name, train in refused.items():
        out[name] = told(lambda train=train: posterior().fit(train, 2, progress=False))
    return out


class SubsetSampler(Sampler[int]):
    def __init__(self, some: list[int]) -> None:
        self.some = some

    def __iter__(self) -> Any:
        return iter(self.some)

    def __len__(self) -> int:
        return len(self.some)


def loader_of(x: Tensor, y: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


def _differences(odd: bool) -> dict[str, tuple[str, str]]:
    """Errors of calls that are other ones in one process: ``odd`` there."""
    train, names = loader(8), ["0.weight"] if odd else ["4.weight", "4.bias"]  # 15 weights each
    alone = nb.NullSpacePosterior(network(), solver="dual Cholesky", process_group=False)
    alone.fit(train, 2, int(odd), progress=False).process_group = None
    same = posterior().fit(train, 2, progress=False)
    makes: dict[str, Callable[[], Any]] = {
        "prior": lambda: make(prior_precision=1.0 + odd).fit(train, 2, progress=False),
        "prior_mean": lambda: make(prior_mean=1.0 + odd).fit(train, 2, progress=False),
        "parameters": lambda: make(parameters=names).fit(train, 2, progress=False),
        "sample_dtype": lambda: posterior().fit(
            train, 2, progress=False, sample_dtype=torch.bfloat16 if odd else None
        ),
        "call": lambda: same.predict(train) if odd else same.novelty(train),
        "samples": lambda: alone.predict(train),
        "how": lambda: same.predict(train, method="sampled" if odd else "linearised"),
        "metric": lambda: same.calibrate(train, metric="ece" if odd else "nll", progress=False),
        "shifted": lambda: same.evaluate(train, shifted={"ab"[odd]: train}, progress=False),
        "count": lambda: same.draw(1 + odd),
        "exchange": lambda: _other_exchange(odd),
        "memory": lambda: _out_of_memory(odd),
    }
    return {name: told(make) for name, make in makes.items()}


def make(**options: Any) -> nb.NullSpacePosterior:
    return nb.NullSpacePosterior(network(), solver="dual Cholesky", **options)


def _other_exchange(odd: bool) -> None:
    """One process adds where the others give."""
    processes = resolve(None)
    assert processes is not None
    with processes.call("fit", {}):
        if odd:
            processes.total(1.0)
        else:
            processes.gather(1.0)


def _out_of_memory(odd: bool) -> None:
    """In one process, in the middle of a fit."""
    project = pipeline.Fitting.project

    def failing(self: pipeline.Fitting) -> None:
        if odd:
            raise MemoryError
        project(self)

    pipeline.Fitting.project = failing  # type: ignore[method-assign]
    try:
        posterior().fit(loader(8), 2, progress=False)
    finally:
        pipeline.Fitting.project = project  # type: ignore[method-assign]


def reads() -> list[int]:
    """From the device: in products with all rows, and in each step of a search (see `host_reads.py`)."""
    counts = []
    for limit in (3, 9):
        solver = CG(1e-14, max_iterations=limit)
        p = nb.NullSpacePosterior(network(), solver=solver, delta=1e-3)
        p.fit(loader(23), 4, progress=False)
        state = p._fitted().state
        assert state is not None
        operator, v = state.operator, torch.randn(4, p.space.total, dtype=torch.float64)
        with followed(operator, v) as products:
            operator.rmatvec(operator.matvec(v))
            operator.normal(v)
        with followed(operator, v) as steps:
            done = state.project(v)
        counts.append((steps.total, done.iterations))
    (first, before), (second, after) = counts
    return [products.total, (second - first) // (after - before)]


class _Late(Dataset[Any]):
    """Breaks in process 1 alone, at an example that nobody looks at before."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.x, self.y = data(60)

    def __len__(self) -> int:
        return 60

    def __getitem__(self, number: int) -> Any:
        if self.rank == 1 and number % 30 > 20:
            raise OSError("the disk is gone")
        return self.x[number], self.y[number]


# -- long searches -----------------------------------------------------------------------------------


def _search(path: Path, stop_at: int | None, who: int) -> dict[str, Any]:
    """A search with a checkpoint; Ctrl-C comes at iteration ``stop_at`` in process ``who`` alone."""
    count, report = [0], Watch.report
    # Where the tests run in the background of a shell, Ctrl-C is ignored from the start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def counting(self: Watch, done: int, reached: float) -> None:
        count[0] += 1
        mine = not dist.is_initialized() or dist.get_rank() == who
        if stop_at is not None and count[0] == stop_at and mine:
            os.kill(os.getpid(), signal.SIGINT)
        report(self, done, reached)

    Watch.report = counting  # type: ignore[method-assign]
    try:
        p = nb.NullSpacePosterior(network(), solver=CG(1e-9), delta=1e-2)
        found = fitted(p, loader(23), checkpoint=path, checkpoint_every=1e-9)
    finally:
        Watch.report = report  # type: ignore[method-assign]
    return found | {"status": p.certificate.status, "iterations": p.certificate.iterations}


def interrupted(folder: Path) -> dict[str, Any]:
    """Goes on from what more processes have left, as far as Ctrl-C in one of them."""
    size = dist.get_world_size()
    return _search(folder / "search.safetensors", 18 if size == 3 else 6, size - 1)


def finished(folder: Path | None) -> dict[str, Any]:
    """To the end, from a checkpoint or without one."""
    if folder is None:
        p = nb.NullSpacePosterior(network(), solver=CG(1e-9), delta=1e-2)
        return fitted(p, loader(23)) | {"iterations": p.certificate.iterations}
    return _search(folder / "search.safetensors", None, 0)


# -- ends ----------------------------------------------------------------------------------------------


class _Broken(_Late):
    """Kills or stalls its process in the middle of the data."""

    def __init__(self, how: str) -> None:
        super().__init__(0)
        self.how = how

    def __getitem__(self, number: int) -> Any:
        if number % 20 > 10:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "stalled":
                time.sleep(300)
        return self.x[number], self.y[number]


def lost() -> dict[str, Any]:
    """Process 1 of three stalls; then, of the two others, the last is killed."""
    rank, out = dist.get_rank(), {}
    pair = dist.new_group([0, 2])
    pulse.BEAT, pulse.SILENT = 0.2, 3.0
    for how, who, group in (("stalled", 1, None), ("killed", 2, pair)):
        processes = resolve(group)
        assert isinstance(processes, Processes)
        processes.pulse.stalled = 3.0
        dual = nb.NullSpacePosterior(network(), solver="dual Cholesky", process_group=group)
        started = time.monotonic()
        broken = _Broken(how if rank == who else "")
        error = told(lambda dual=dual, broken=broken: dual.fit(broken, 2, progress=False))
        out[how] = (error, time.monotonic() - started)
    return out


# -- two machines, see tests_hosts ---------------------------------------------------------------------


def on_two_hosts() -> dict[str, Any]:
    """A direct solver, a search and a layer posterior."""
    out = {}
    for name in ("dual", "plain"):
        p = nb.NullSpacePosterior(network(), solver=SOLVERS[name](1e-9), delta=1e-2)
        out[name] = fitted(p, loader(23))
    layers = nb.LayerNullSpacePosterior(network()).fit(loader(23), 3, progress=False)
    return out | {"layer": _of_layers(layers, torch.float64)}


class _Cut(_Late):
    """Waits in process 1 until the link between the two is gone."""

    def __init__(self, folder: Path) -> None:
        super().__init__(0)
        self.folder = folder

    def __getitem__(self, number: int) -> Any:
        if dist.get_rank() == 1 and number % 30 > 10:
            (self.folder / "cut now").touch()
            while not (self.folder / "is cut").exists():
                time.sleep(0.05)
        return self.x[number], self.y[number]


def cut(folder: Path) -> dict[str, Any]:
    """The link is cut while both read data."""
    started = time.monotonic()
    error = told(lambda: posterior().fit(_Cut(folder), 2, progress=False))
    return {"error": error, "seconds": time.monotonic() - started}


def sharded() -> dict[str, Any]:
    """A network of which each process has a part."""
    from processes import sharded as room  # FSDP takes long to import

    return room.sharded()


def main(scenes: str, rank: int, size: int, folder: Path) -> None:
    """Plays the scenes one after the other; what they return goes to files."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Which examples there was time to audit is no property of a fit.
    pipeline.LEAST_AUDIT = 1e9
    store = os.environ.get("NULLBAYES_TEST_STORE", f"file://{folder}/store-{size}-{scenes[:4]}")
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    every: dict[str, Callable[[], dict[str, Any]]] = {
        "solver": same_by_solver,
        "rows": same_by_rows,
        "updates": same_after_updates,
        "flat": same_on_flat_meshes,
        "within": same_within_layers,
        "posterior": same_of_a_posterior,
        "layer": same_by_layer,
        "split": split_and_refused,
        "sharded": sharded,
        "interrupted": lambda: interrupted(folder),
        "lost": lost,
        "hosts": on_two_hosts,
        "mesh": same_on_a_mesh,
        "cut": lambda: cut(folder),
    }
    for scene in scenes.split(","):
        torch.save(every[scene](), folder / f"{scene}-{size}-{rank}.pt")
    if "cut" in scenes:
        os._exit(0)  # nothing is left to be taken down together
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
