"""Exact projection in seconds: the direct solver beside the explicit Jacobian and the published method.

    python -m benchmarks.direct [--examples 1000] [--repeats 3] [--cycles 20]

LeNet on Fashion-MNIST, all softmax directions, S = 20. Each run is a fresh process; each residual is
computed the same way, from Jacobian-vector products that no contender computed itself.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

import nullbayes as nb
from benchmarks import common, published
from nullbayes.common.progress import GRAM, ROWS
from nullbayes.demo.models import lenet
from nullbayes.demo.running import Clock
from nullbayes.fit.prior_samples import standard_normal

SAMPLES = 20
TOLERANCE = 1e-4


def load(path: str) -> tuple[torch.nn.Module, Tensor, Tensor, Tensor]:
    stored = torch.load(path, weights_only=True)
    model = lenet(10)
    model.load_state_dict(stored["model"])
    parameters = sum(p.numel() for p in model.parameters())
    noise, _ = standard_normal(0, range(SAMPLES), parameters, 0, torch.empty(0))
    return model.eval(), stored["x"], stored["y"], noise


def independent_residual(
    model: torch.nn.Module, x: Tensor, samples: Tensor, noise: Tensor
) -> float:
    """Largest ``‖AΔ‖ / ‖Aε‖``, in float64, by forward-mode products over the whole network."""
    model = model.double()
    function, theta = published.flat_function(model, x)
    after, before = torch.zeros(len(samples)).double(), torch.zeros(len(samples)).double()
    for images in x.double().split(100):
        with torch.no_grad():
            root = published.softmax_root(model(images))
        product = vmap(
            lambda v, i=images: jvp(lambda t: function(t, i), (theta,), (v,))[1], chunk_size=5
        )
        for total, vectors in ((after, samples), (before, noise)):
            moved = product(vectors.double())
            total += (moved.unsqueeze(2) @ root).square().sum((1, 2, 3)).detach()
    return float((after / before).sqrt().max())


def ours(path: str) -> dict[str, Any]:
    model, x, y, noise = load(path)
    batches = [(x[i : i + 250], y[i : i + 250]) for i in range(0, len(x), 250)]
    clock = Clock()
    posterior = nb.NullSpacePosterior(model, delta=0, prior_precision=1.0, tolerance=TOLERANCE)
    posterior.fit(batches, num_samples=SAMPLES, progress=False)
    clock.lap("fit, certificate included")
    samples = posterior._samples()
    c = posterior.certificate
    before = c.stages[ROWS] + c.stages[GRAM]
    return record(clock, model, x, samples, noise) | {
        "solver": c.solver,
        "iterations": c.iterations,
        "own_residual": c.residual,
        "rows": c.constraints,
        "rows_and_gram": before,
    }


def explicit(path: str, vectorised: bool) -> dict[str, Any]:
    model, x, _, noise = load(path)
    samples, clock = published.jacrev_cholesky(model, x, noise, vectorised, refinements=3)
    stages = clock.seconds
    before = {"rows_and_gram": stages["rows"] + stages["gram"]}
    return record(clock, model, x, samples, noise) | before


def alternating(path: str, cycles: int) -> dict[str, Any]:
    model, x, _, noise = load(path)
    samples, clock = published.alternating_projections(model, x, noise, cycles)
    return record(clock, model, x, samples, noise)


def record(clock: Clock, model: Any, x: Tensor, samples: Tensor, noise: Tensor) -> dict[str, Any]:
    return {
        "seconds": sum(clock.seconds.values()),
        "stages": clock.seconds,
        "residual": independent_residual(model, x, samples, noise),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cycles", type=int, default=20)
    options = parser.parse_args()
    model, x, y = common.trained_lenet(options.examples)
    # name -> (what runs, its arguments, repeats): the slow ones run once.
    contenders: dict[str, tuple[Any, tuple[Any, ...], int]] = {
        "nullbayes, dual Cholesky": (ours, (), options.repeats),
        "jacrev row by row, same Cholesky": (explicit, (False,), 1),
        "vmap(jacrev), same Cholesky": (explicit, (True,), 1),
        f"alternating projections, {options.cycles} cycles": (alternating, (options.cycles,), 1),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "lenet.pt")
        torch.save({"model": model.state_dict(), "x": x, "y": y}, path)
        for turn in range(options.repeats):
            for name, (function, arguments, repeats) in contenders.items():
                if turn < repeats:
                    result = common.fresh_process(function, path, *arguments)
                    runs[name].append(result)
                    print(
                        f"{name}: {result['seconds']:.1f} s, residual {result['residual']:.1e}",
                        flush=True,
                    )
    report(runs, options)


def report(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    seconds = {name: statistics.median(r["seconds"] for r in rows) for name, rows in runs.items()}
    residual = {name: max(r["residual"] for r in rows) for name, rows in runs.items()}
    before = {
        name: statistics.median(r["rows_and_gram"] for r in rows)
        for name, rows in runs.items()
        if "rows_and_gram" in rows[0]
    }
    first = next(iter(runs))
    lines = [
        f"# Direct solver: LeNet, Fashion-MNIST, N = {options.examples}, all softmax directions, S = {SAMPLES}",
        "",
        "Median wall seconds of the whole fit, each run in a fresh process; residual recomputed in float64 by",
        "forward-mode products over the network. `python -m benchmarks.direct`",
        "The explicit Jacobians use our float64 Cholesky factorisation: `rows and Gram` is the part before it.",
        "",
        "| method | runs | seconds | times ours | rows and Gram | times ours | residual | times ours | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in runs.items():
        peak = max(r["peak_bytes"] for r in rows) / 2**20
        part = "– | –"
        if "rows_and_gram" in rows[0]:
            part = f"{before[name]:.1f} | {before[name] / before[first]:.1f}"
        lines.append(
            f"| {name} | {len(rows)} | {seconds[name]:.1f} | {seconds[name] / seconds[first]:.1f} | {part} "
            f"| {residual[name]:.1e} | {residual[name] / residual[first]:.2g} | {peak:.0f} |"
        )
    results = {
        "examples": options.examples,
        "samples": SAMPLES,
        "tolerance": TOLERANCE,
        "seconds": seconds,
        "residual": residual,
        "rows_and_gram": before,
        "time_ratio": {n: s / seconds[first] for n, s in seconds.items()},
        "residual_ratio": {n: r / residual[first] for n, r in residual.items()},
        "runs": runs,
        "environment": common.environment(),
    }
    table = "\n".join(lines) + "\n"
    print(table)
    print(common.write_results("direct", results, table))


if __name__ == "__main__":
    main()
