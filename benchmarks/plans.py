"""`nb.plan` against the fit that it foretells: seconds of every stage and bytes, each case in a fresh process.

python -m benchmarks.plans [--repeats 3] [--cases ...]
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

import nullbayes as nb
from benchmarks import common
from benchmarks.networks import resnet18
from benchmarks.scaling import cnn, mlp
from benchmarks.stages import forget_peak, peak_resident
from nullbayes.common.memory import format_bytes
from nullbayes.demo.models import lenet, seeded

#: name -> (network, its arguments, shape of an input, examples, options of the fit)
CASES: dict[str, tuple[Any, tuple[Any, ...], tuple[int, ...], int, dict[str, Any]]] = {
    "LeNet, N = 300": (lenet, (10,), (1, 28, 28), 300, {}),
    "LeNet, N = 600": (lenet, (10,), (1, 28, 28), 600, {}),
    "LeNet, N = 2,000, directions": (lenet, (10,), (1, 28, 28), 2000, {"directions": 3}),
    "LeNet, N = 4,000, loss": (lenet, (10,), (1, 28, 28), 4000, {"preserve": "loss"}),
    "LeNet, N = 4,000": (lenet, (10,), (1, 28, 28), 4000, {}),
    "MLP, 0.8 M weights, N = 500": (mlp, (490,), (784,), 500, {}),
    "MLP, 7.0 M weights, loss, N = 1,000": (mlp, (1700,), (784,), 1000, {"preserve": "loss"}),
    "CNN, 1.0 M weights, N = 400": (cnn, (50,), (3, 16, 16), 400, {}),
    "ResNet-18, 11 M weights, loss, N = 100": (
        resnet18, (10, 3), (3, 32, 32), 100, {"preserve": "loss"},
    ),
}  # fmt: skip


def one(name: str, samples: int) -> dict[str, Any]:
    """Plan, then fit, in this process."""
    build, arguments, shape, examples, options = CASES[name]
    model = seeded(build, *arguments, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, *shape, generator=generator)
    y = torch.randint(10, (examples,), generator=generator)
    batches = list(zip(x.split(100), y.split(100), strict=True))
    # The first use of anything imports and compiles; a plan pays for that, and a fit after it does not.
    nb.NullSpacePosterior(model, **options).fit(batches, 2, max_examples=4, progress=False)
    plan = nb.plan(model, batches, num_samples=samples, **options)
    forget_peak()
    before = peak_resident()
    posterior = nb.NullSpacePosterior(model, **options)
    posterior.fit(batches, num_samples=samples, progress=False)
    c = posterior.certificate
    return {
        "planned": plan.seconds,
        "stages": c.stages,
        "seconds": c.seconds,
        "planned_bytes": sum(plan.bytes.values()),
        "bytes": peak_resident() - before,
        "solver": plan.solver,
        "solver_of_fit": c.solver,
        "iterations": c.iterations,
        "rows": c.constraints,
        "parameters": c.parameters,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    results = {}
    for name in options.cases:
        results[name] = [
            common.fresh_process(one, name, options.samples) for _ in range(options.repeats)
        ]
        print(name, results[name], flush=True)
    report(results, options)


def report(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    stages = list(dict.fromkeys(s for runs in results.values() for s in runs[0]["stages"]))
    lines = [
        "# `nb.plan` against the fit",
        "",
        f"Planned / measured, medians of {options.repeats} fresh processes, S = {options.samples}; seconds, and the",
        "growth of the process's peak memory.",
        "Stages below a tenth of the fit are in brackets. `python -m benchmarks.plans`",
        "",
        "| fit | M × P | solver | " + " | ".join(stages) + " | all | ratio | memory | ratio |",
        "|---" * (len(stages) + 7) + "|",
    ]
    for name, runs in results.items():
        whole = statistics.median(r["seconds"] for r in runs)
        planned = statistics.median(sum(r["planned"].values()) for r in runs)
        cells = []
        for stage in stages:
            foretold = statistics.median(r["planned"].get(stage, 0.0) for r in runs)
            took = statistics.median(r["stages"].get(stage, 0.0) for r in runs)
            text = f"{foretold:.2f} / {took:.2f}"
            cells.append(text if took >= 0.1 * whole else f"({text})")
        expected, held = (statistics.median(r[k] for r in runs) for k in ("planned_bytes", "bytes"))
        first = runs[0]
        lines.append(
            f"| {name} | {first['rows']:,} × {first['parameters']:,} | {first['solver_of_fit']} | "
            + " | ".join(cells)
            + f" | {planned:.2f} / {whole:.2f} | {planned / whole:.2f} | "
            f"{format_bytes(int(expected))} / {format_bytes(int(held))} | {expected / held:.2f} |"
        )
    table = "\n".join(lines) + "\n"
    print(table)
    print(
        common.write_results(
            "plans", {"results": results, "environment": common.environment()}, table
        )
    )


if __name__ == "__main__":
    main()
