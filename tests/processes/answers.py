"""What is the same in one process and in several: fits by every solver, of all kinds of rows, and after more data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from processes.stage import BATCH, batches, certified, data, fitted, loader, network
from torch.utils.data import DataLoader, TensorDataset

import nullbayes as nb
from nullbayes import solvers

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
