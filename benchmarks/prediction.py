"""What a prediction costs: linearised, sampled and novelty against as many forward passes as there are samples.

    python -m benchmarks.prediction [--models lenet resnet18 swin_t] [--samples 30] [--batch 256] [--repeats 3]

Each network has a process of its own, in which forward passes and predictions take turns. The samples come from a
fit to eight examples: what a prediction costs does not depend on what the samples are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from benchmarks import common, networks
from nullbayes.demo.models import lenet

# Seconds of forward passes before each prediction: a single one of a small network is over too soon.
FORWARD_SECONDS = 0.5
# Repeats go on for so long: medians of a few runs of a tenth of a second are not worth much.
LEAST_SECONDS = 20.0
# Drawing takes several times the memory of the samples, predicting with them does not.
SAMPLES_AT_ONCE = 6
TARGETS = {"linearised": 1.3, "sampled": 1.1}
Make = Callable[[], tuple[nn.Module, tuple[int, ...]]]
MODELS: dict[str, Make] = {
    "lenet": lambda: (lenet(10), (1, 28, 28)),
    "resnet18": lambda: (networks.resnet18(), (3, 32, 32)),
    "swin_t": lambda: (networks.swin_t(), (3, 32, 32)),
}


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    out = model(inputs)
    return out if isinstance(out, Tensor) else out.logits


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(name: str, samples: int, batch: int, repeats: int) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, shape = MODELS[name]()
        x, y = torch.randn(batch, *shape), torch.randint(0, 10, (8,))
    model.eval()
    # Steps so small that an untrained network does not overflow; they cost what all others cost.
    posterior = nb.NullSpacePosterior(
        model, preserve="loss", prior_precision=1e6, forward=outputs_of
    )
    few = min(samples, SAMPLES_AT_ONCE)
    posterior.fit([(torch.randn(8, *shape), y)], num_samples=few, progress=False)
    while posterior.num_samples < samples:
        posterior.draw(min(few, samples - posterior.num_samples))

    def forward() -> None:
        with torch.no_grad():
            outputs_of(model, x)

    methods: dict[str, Callable[[], Any]] = {
        "linearised": lambda: posterior.predict(x),
        "sampled": lambda: posterior.predict(x, method="sampled"),
        # From the samples, as where many examples were fitted; from eight rows the exact one is cheaper.
        "novelty": lambda: posterior.novelty(x, exact=False),
    }
    passes = max(1, round(FORWARD_SECONDS / seconds(forward)))
    taken: dict[str, list[float]] = {key: [] for key in ("forward", *methods)}
    began = time.perf_counter()
    while len(taken["novelty"]) < repeats or time.perf_counter() - began < LEAST_SECONDS:
        for key, method in methods.items():
            taken["forward"].append(seconds(lambda: [forward() for _ in range(passes)]) / passes)
            taken[key].append(seconds(method))
    return {
        "weights": posterior.space.total,
        "generic": len(posterior.certificate.generic),
        "threads": torch.get_num_threads(),
        "seconds": taken,
    }


def ratios(result: dict[str, Any], samples: int) -> dict[str, float]:
    """Median seconds of each method over those of ``samples`` forward passes."""
    median = {key: statistics.median(values) for key, values in result["seconds"].items()}
    forward = median.pop("forward")
    return {key: value / (samples * forward) for key, value in median.items()}


def judged(cost: dict[str, float]) -> str:
    """Which targets were missed, if any."""
    missed = [kind for kind, most in TARGETS.items() if cost[kind] > most]
    if cost["novelty"] >= min(cost["linearised"], cost["sampled"]):
        missed.append("novelty")
    return f"missed: {', '.join(missed)}" if missed else "met"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    lines = [
        f"# Predictions: S = {options.samples} samples, {options.batch} examples, 10 outputs, CPU",
        "",
        f"Seconds of a prediction over those of {options.samples} plain forward passes `model(x)` without gradients, "
        f"medians of {options.repeats} or more. `python -m benchmarks.prediction`",
        f"Targets: linearised at most {TARGETS['linearised']}, sampled at most {TARGETS['sampled']}, "
        "novelty below both.",
        "",
        "| model | weights | forward s | linearised | sampled | novelty | peak MB | targets |",
        "|---|---|---|---|---|---|---|---|",
    ]
    runs: dict[str, dict[str, Any]] = {}
    for name in options.models:
        result = common.fresh_process(
            measure, name, options.samples, options.batch, options.repeats
        )
        cost = ratios(result, options.samples)
        runs[name] = result | {"ratios": cost}
        forward = statistics.median(result["seconds"]["forward"])
        lines.append(
            f"| {name} | {result['weights']:,} | {forward:.4g} | {cost['linearised']:.2f} | {cost['sampled']:.2f} "
            f"| {cost['novelty']:.2f} | {result['peak_bytes'] / 2**20:.0f} | {judged(cost)} |"
        )
        print(lines[-1], flush=True)
    results = {
        "samples": options.samples,
        "batch": options.batch,
        "targets": TARGETS,
        "runs": runs,
        "environment": common.environment(),
    }
    table = "\n".join(lines) + "\n"
    print(table)
    print(common.write_results("prediction", results, table))


if __name__ == "__main__":
    main()
