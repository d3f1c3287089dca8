"""What is done on two devices and compared: a fit of each kind, and each use of a posterior.

A scene takes ``place``, which moves a module or a tensor to the device, and gives named tensors and numbers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes import solvers
from nullbayes.solvers.preconditioners import Kronecker, Pivoted, Rows, Sketch, Subset

Place = Callable[[Any], Any]
Found = dict[str, Any]
QUIET: dict[str, Any] = {"progress": False}


class Attention(nn.Module):
    """One head, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        out: Tensor = self.out(weights @ v)
        return out


class Classes(nn.Module):
    """Tokens with a class token and a table of positions, one encoder layer, and an answer."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.first = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(6, 8))
        self.layer = (
            nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
            if packed
            else nn.Sequential(Attention(8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.first.expand(len(x), -1, -1), self.embedding(x)], 1) + self.positions
        out: Tensor = self.head(self.layer(h)[:, 0])
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, stride=2, groups=1), nn.GELU(), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)),
        lambda n: torch.randn(n, 4).double(),
    ),
    "convolutions": (_convolutions, lambda n: torch.randn(n, 1, 8, 8).double()),
    "classes": (lambda: Classes(False), lambda n: torch.randint(0, 11, (n, 5))),
    "packed": (lambda: Classes(True), lambda n: torch.randint(0, 11, (n, 5))),
    "recurrent": (Recurrent, lambda n: torch.randn(n, 6, 3).double()),
}


@dataclass
class Problem:
    """A network on the device, its training batches, and other inputs (of the host, as loaders give them)."""

    model: nn.Module
    train: list[tuple[Tensor, Tensor]]
    more: list[tuple[Tensor, Tensor]]
    x: Tensor


def problem(name: str, place: Place, dtype: torch.dtype = torch.float64) -> Problem:
    make, inputs = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().to(dtype).eval()
        x, y = inputs(20), torch.arange(20) % 3
    x = x.to(dtype) if x.is_floating_point() else x
    pairs = list(zip(x.split(5), y.split(5), strict=True))
    return Problem(place(model), pairs[:2], pairs[2:3], x[15:])


def _results(posterior: Any, x: Tensor) -> Found:
    c = posterior.certificate
    return {
        "held": c.held,
        "probabilities": posterior.predict(x).mean,
        "novelty": posterior.novelty(x),
    }


def fitted(name: str, place: Place, dtype: torch.dtype = torch.float64, **options: Any) -> Found:
    """One fit of rows, and what it predicts."""
    given = problem(name, place, dtype)
    posterior = nb.NullSpacePosterior(given.model, **options)
    posterior.fit(given.train, 4, **QUIET)
    return _results(posterior, given.x) | {"samples": torch.cat(_flat(posterior.sample(2)))}


def _flat(samples: Any) -> list[Tensor]:
    return [torch.cat([v.flatten() for v in s.values()]) for s in samples]


SOLVERS: dict[str, Callable[[], Any]] = {
    "dual": lambda: solvers.DualCholesky(),
    "primal": lambda: solvers.PrimalQR(),
    "eigen": lambda: solvers.PrimalEigen(),
    "cg": lambda: solvers.ConjugateGradient(),
    "cg-subset": lambda: solvers.ConjugateGradient(preconditioner=Subset()),
    "cg-rows": lambda: solvers.ConjugateGradient(preconditioner=Rows()),
    "cg-kronecker": lambda: solvers.ConjugateGradient(preconditioner=Kronecker()),
    "cg-sketch": lambda: solvers.ConjugateGradient(preconditioner=Sketch()),
    "cg-pivoted": lambda: solvers.ConjugateGradient(preconditioner=Pivoted()),
    "alternating": lambda: solvers.AlternatingProjections(),
}


def layers(name: str, place: Place, dtype: torch.dtype = torch.float64) -> Found:
    """A layer posterior, each way to predict, each score, and data that come and go."""
    given = problem(name, place, dtype)
    posterior = nb.LayerNullSpacePosterior(given.model).fit(given.train, 4, **QUIET)
    found: Found = {
        "held": posterior.certificate.held,
        "divergence": posterior.certificate.divergence,
    }
    for method in ("sampled", "linearised"):
        found[method] = posterior.predict(given.x, method).mean
    for score in ("leverage", "information", "combined"):
        found[score] = posterior.novelty(given.x, score)
    found["covariance"] = posterior.covariance(given.x)
    posterior.calibrate([(given.x, torch.arange(5) % 3)], **QUIET)
    posterior.update(given.more, **QUIET)
    found["updated"] = posterior.novelty(given.x, "leverage")
    posterior.remove(given.more, **QUIET)
    found["removed"] = posterior.novelty(given.x, "leverage")
    posterior.projector()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layers.safetensors"
        posterior.save(path)
        again = nb.load(path, given.model)
    found["loaded"] = again.novelty(given.x, "leverage")
    return found


def exported(place: Place) -> Found:
    """A layer posterior's module, on its device."""
    given = problem("convolutions", place)
    posterior = nb.LayerNullSpacePosterior(given.model).fit(given.train, 4, **QUIET)
    module = posterior.export_module(place(given.x))
    outputs, score = module(place(given.x))[:2]
    return {"outputs": outputs, "score": score}


def uses(name: str, place: Place) -> Found:
    """Each use of a posterior over rows."""
    given = problem(name, place)
    posterior = nb.NullSpacePosterior(given.model).fit(given.train, 4, **QUIET)
    found: Found = {}
    for method in ("linearised", "sampled"):
        found[method] = posterior.predict(given.x, method=method).mean
    found["moments"] = posterior.predict(given.x, link="probit").mean
    for exact in (True, False):
        found[f"novelty {exact}"] = posterior.novelty(given.x, exact=exact)
    loader = [(given.x, torch.arange(5) % 3)]
    found["joint"] = posterior.joint(given.x).covariance
    found["evidence"] = posterior.log_marginal_likelihood()
    found["selected"] = posterior.select(given.x, 2)
    found["calibrated"] = posterior.calibrate(loader, **QUIET).chosen
    result = posterior.evaluate(loader, shifted={"other": loader}, train=given.train, **QUIET)
    found["evaluated"] = len(result.table())
    x = place(given.x)
    if x.is_floating_point():
        x = x.clone().requires_grad_(True)
        posterior.predict(x, differentiable=True).mean.sum().backward()
        found["gradient"] = x.grad
    posterior.update(given.more, **QUIET)
    found["updated"] = posterior.novelty(given.x)
    posterior.compact(3, dtype=torch.bfloat16)
    found["compact"] = posterior.predict(given.x).mean
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.safetensors"
        posterior.save(path)
        again = nb.load(path, given.model)
    found["loaded"] = again.predict(given.x).mean
    return found


def planned(place: Place) -> Found:
    given = problem("convolutions", place)
    plan = nb.NullSpacePosterior(given.model).plan(given.train, num_samples=4)
    layer = nb.LayerNullSpacePosterior(given.model).plan(given.train)
    return {"rows": plan.rows, "layers": layer.fits}


def within(place: Place) -> Found:
    """Rows within the null space of layers."""
    given = problem("convolutions", place)
    prior = nb.LayerNullSpacePosterior(given.model).fit(given.train, 4, **QUIET)
    posterior = nb.NullSpacePosterior(given.model, within=prior).fit(given.train, 4, **QUIET)
    return _results(posterior, given.x)


def laplace(place: Place) -> Found:
    given = problem("perceptron", place)
    posterior = nb.LaplacePosterior(given.model).fit(given.train, 4, **QUIET)
    return _results(posterior, given.x)


def scenes(fused: bool = True) -> dict[str, Callable[[Place], Found]]:
    """All of them by name.

    Args:
        fused: networks with fused attention or cells too, which a device needs kernels of its own for.
    """
    out: dict[str, Callable[[Place], Found]] = {}
    for name in NETWORKS:
        if name in ("packed", "recurrent") and not fused:
            continue
        out[f"fit {name}"] = lambda place, name=name: fitted(name, place)
        out[f"fit {name} float32"] = lambda place, name=name: fitted(name, place, torch.float32)
        out[f"layers {name}"] = lambda place, name=name: layers(name, place)
        out[f"uses {name}"] = lambda place, name=name: uses(name, place)
    for solver, make in SOLVERS.items():
        out[f"solver {solver}"] = lambda place, make=make: fitted(
            "convolutions", place, torch.float32, solver=make()
        )
    for preserve in ("outputs", "loss"):
        out[f"preserve {preserve}"] = lambda place, p=preserve: fitted("classes", place, preserve=p)
    out["small memory"] = lambda place: fitted("convolutions", place, memory="40MB")
    out["some directions"] = lambda place: fitted("convolutions", place, directions=1)
    out["last layer"] = lambda place: fitted(
        "convolutions", place, parameters=["7.weight", "7.bias"]
    )
    out["layers float32"] = lambda place: layers("convolutions", place, torch.float32)
    out |= {"exported": exported, "planned": planned, "within": within, "laplace": laplace}
    return out


def compare(here: Found, there: Found, allowed: float) -> None:
    """Raise AssertionError where a relative difference is not less than ``allowed``."""
    for name, value in here.items():
        one, other = (torch.as_tensor(v).detach().cpu().double() for v in (value, there[name]))
        assert one.shape == other.shape, name
        size = one.abs().max().clamp_min(1e-12)
        assert float((one - other).abs().max() / size) < allowed, name
