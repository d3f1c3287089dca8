"""Leave-one-out against data that were held back: how far samples move predictions that no row preserves.

    python -m experiments.unseen [--seeds 2] [--cases ...]

Networks of the evaluation's small setting. The divergence of left-out training examples is the certificate's; beside it
that of test images, both at the prior precision of the evidence alone and at the one that a fit ends with.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import nullbayes as nb
from benchmarks import common
from nullbayes.certificate.measure import GuaranteeCheck
from nullbayes.solvers.registry import EQUILIBRATE

DIRECT, ITERATIVE = "direct", "iterative"
#: name -> (experiment, training images whose predictions are kept, of those the network was trained on, solver)
CASES: dict[str, tuple[str, int | None, str]] = {
    "digits, all 500": ("digits_heldout", None, DIRECT),
    "digits, 100 of 500": ("digits_heldout", 100, DIRECT),
    "LeNet, 1,000 of 3,000": ("fashion_lenet", 1000, DIRECT),
    "LeNet, 250 of 3,000": ("fashion_lenet", 250, DIRECT),
    "LeNet, all 3,000": ("fashion_lenet", None, ITERATIVE),
    "LeNet, 1,000 of 3,000, iterative": ("fashion_lenet", 1000, ITERATIVE),
    "ResNet, 250 of 1,000": ("fashion_resnet", 250, DIRECT),
    "ResNet, 50 of 1,000": ("fashion_resnet", 50, DIRECT),
    "ResNet, all 1,000": ("fashion_resnet", None, ITERATIVE),
    "ResNet, 250 of 1,000, iterative": ("fashion_resnet", 250, ITERATIVE),
}
SOLVERS = {
    DIRECT: lambda: nb.solvers.DualCholesky(),
    ITERATIVE: lambda: nb.solvers.ConjugateGradient(equilibrate=EQUILIBRATE),
}


def measure(name: str, seed: int) -> dict[str, Any]:
    import importlib

    from experiments import networks, tasks

    experiment, constrained, solver = CASES[name]
    scale = importlib.import_module(f"experiments.{experiment}").SMALL
    task = tasks.make(experiment, seed, replace(scale, constrained=constrained))
    network = networks.trained(task)
    data = task.constrained
    batches = list(zip(data.inputs.split(250), data.targets.split(250), strict=True))
    posterior = nb.NullSpacePosterior(network, solver=SOLVERS[solver]())
    evidence: list[float] = []
    bounded = GuaranteeCheck.bounded_precision

    def noted(self: GuaranteeCheck, alpha: float, *rest: float) -> float:
        evidence.append(alpha)
        return bounded(self, alpha, *rest)

    with mock.patch.object(GuaranteeCheck, "bounded_precision", noted):
        posterior.fit(batches, num_samples=30, seed=seed, progress=False)
    out: dict[str, Any] = {
        "solver": posterior.certificate.solver,
        "seconds": posterior.certificate.seconds,
        "constraints": posterior.certificate.constraints,
        "weights": posterior.certificate.parameters,
    }
    test = task.data.test
    for kind, alpha in (("bounded", posterior.prior_precision), ("evidence", evidence[0])):
        posterior.prior_precision = alpha
        out[kind] = {
            "alpha": alpha,
            "left out": posterior.certificate.left_out_divergence,
            **figures(posterior, test.inputs, test.targets),
        }
    with torch.no_grad():
        log_p = network(test.inputs).log_softmax(1)
    out["point"] = scores(log_p, test.targets)
    return out


def figures(posterior: Any, x: Tensor, y: Tensor) -> dict[str, float]:
    total, log_p = 0.0, []
    for some, labels in zip(x.split(250), y.split(250), strict=True):
        p = posterior.predict(some)
        total += float(posterior.likelihood.divergence(p.point, p.outputs, labels).mean(0).sum())
        log_p.append(p.mean.clamp_min(torch.finfo(p.mean.dtype).tiny).log())
    return {"test": total / len(y), **scores(torch.cat(log_p), y)}


def scores(log_p: Tensor, y: Tensor) -> dict[str, float]:
    return {
        "NLL": float(-log_p.gather(1, y[:, None]).mean()),
        "accuracy": float((log_p.argmax(1) == y).double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in options.cases:
        runs[name] = [measure(name, seed) for seed in range(options.seeds)]
        print(name, runs[name], flush=True)
    lines = [
        "# Predictions that no row preserves: leave-one-out against test data",
        "",
        f"Means of {options.seeds} networks each. Divergence: mean over samples and examples, nats, of left-out",
        "training examples (the certificate's `left_out_divergence`) and of test data. `bounded`: the prior precision",
        "that a fit ends with; `evidence`: what the evidence alone asks for. Iterative solvers (where all images are",
        "preserved, or where it says so) leave some out at first. `python -m experiments.unseen`",
        "",
        "| network, images preserved | M / P | evidence: left out | test | bounded: left out | test "
        "| NLL: network | evidence | bounded | accuracy: network | evidence | bounded |",
        "|---" * 12 + "|",
    ]
    for name, some in runs.items():

        def mean(kind: str, key: str, some: list[dict[str, Any]] = some) -> float:
            return statistics.fmean(r[kind][key] for r in some)

        cells = [f"{some[0]['constraints'] / some[0]['weights']:.2f}"]
        cells += [
            f"{mean(kind, key):.4f}"
            for kind in ("evidence", "bounded")
            for key in ("left out", "test")
        ]
        cells += [
            f"{mean(kind, key):.4f}"
            for key in ("NLL", "accuracy")
            for kind in ("point", "evidence", "bounded")
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    table = "\n".join(lines) + "\n"
    print(table)
    print(
        common.write_results("unseen", {"runs": runs, "environment": common.environment()}, table)
    )


if __name__ == "__main__":
    main()
