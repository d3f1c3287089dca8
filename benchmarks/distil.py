"""How closely distilled modules follow their posteriors, and what they cost beside the plain forward pass.

    python -m benchmarks.distil [--train 6000] [--fit 400] [--examples 1200] [--seeds 3]

LeNet and a residual network (two blocks, 16 and 32 channels), trained on Fashion-MNIST; and the pretrained sentence
encoder of `benchmarks.encoders` (22.7 million weights), fine-tuned by LoRA to tell topics of texts, with batches of
tokens and attention masks. Posteriors are fitted to the first training examples, modules distilled from others; they
are judged on the quarter of those that they were not fitted to, on built-in shifts, on handwritten digits and rotated
images, on another topic and on C++. Seconds are of one thread, each the median of many.

The head, its features and the ways of teaching were chosen on networks of seeds 10 and 11, by images upside down,
small, transposed, blurred, enlarged, of two values, of noise, of random strokes, and the two built-in shifts. Seeds 0
to 2 of this version were looked at once, when all had been chosen; `--before` adds the results of an earlier version,
whose figures were seen before.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import nullbayes as nb
from benchmarks import common, encoders
from benchmarks.networks import Residual
from nullbayes import datasets
from nullbayes.demo.models import lenet
from nullbayes.posterior.distilled import Distilled

REPEATS, ROUNDS = 60, 12
BATCHES = (1, 64)


def residual(classes: int = 10) -> nn.Module:
    """About 19,000 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 16, 1),
        Residual(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"LeNet": lenet, "residual network": residual}
ENCODER = "encoder, LoRA"
# Texts of a topic; of all, those trained on, and those of them that the posterior preserves; of each shift.
OF_A_TOPIC, TRAINED_TEXTS, CONSTRAINED, STRANGE, EPOCHS = 100, 200, 48, 48, 3
AT_ONCE, TEXTS_AT_ONCE = 16, (1, 16)


def trained(make: Callable[[int], nn.Module], x: Tensor, y: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make(10)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(3):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
    return model.eval()


def digits(count: int) -> Tensor:
    """Handwritten digits ``(count, 1, 28, 28)`` of scikit-learn, enlarged."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:count, None] / 16
    return nn.functional.interpolate(images, size=(28, 28), mode="bilinear")


def latency(run: Callable[[Tensor], Any], x: Tensor) -> float:
    """Median seconds of a call."""
    times = []
    with torch.no_grad():
        for n in range(REPEATS + 5):
            started = time.process_time()
            run(x)
            if n >= 5:
                times.append(time.process_time() - started)
    return statistics.median(times)


def in_turns(
    runs: dict[str, Callable[[Tensor], Any]], x: Tensor, rounds: int = 4
) -> dict[str, float]:
    """Seconds of each, the least of several medians that take turns: others may use the machine."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(latency(run, x))
    return {name: min(times) for name, times in found.items()}


def deployed(module: nn.Module, arguments: dict[str, Any]) -> Callable[[Tensor], Any]:
    """The module in onnxruntime, one thread."""
    import onnxruntime

    buffer, options = io.BytesIO(), onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    torch.onnx.export(
        module,
        arguments["args"],
        buffer,
        dynamo=True,
        dynamic_shapes=arguments["dynamic_shapes"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(buffer.getvalue(), options)
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def encoder(seed: int) -> dict[str, Any]:
    """One seed: what :func:`measured` gives of images."""
    found = encoders.texts(OF_A_TOPIC)
    generator = torch.Generator().manual_seed(seed)
    topics = found.pop("topics")
    order = torch.randperm(len(topics["labels"]), generator=generator)
    train, rest = order[:TRAINED_TEXTS], order[TRAINED_TEXTS:]
    model = encoders.fine_tuned(encoders.part(topics, train), seed, EPOCHS)
    batches = [encoders.part(topics, index) for index in train[:CONSTRAINED].split(AT_ONCE)]
    posterior = nb.NullSpacePosterior(model).fit(batches, progress=False)
    labels = topics.pop("labels")
    others = [encoders.part(topics, index) for index in rest.split(AT_ONCE)]
    shifted = {
        name: [encoders.part(some, slice(n, n + AT_ONCE)) for n in range(0, STRANGE, AT_ONCE)]
        for name, some in found.items()
    }
    result = distilled(posterior, others, shifted, len(rest), seed)
    module = result.pop("module")
    test = encoders.part(topics, rest)
    with torch.no_grad():
        right = [model(**x).logits.argmax(1) for x in others]
    result["accuracy"] = float((torch.cat(right) == labels[rest]).double().mean())
    if module is not None:
        result["latency"] = latencies(
            {"network": lambda x: model(**x), "module": lambda x: module(**x)},
            {str(n): encoders.part(test, slice(n)) for n in TEXTS_AT_ONCE},
            4,
        )
    return {"network": ENCODER, "seed": seed} | result


def distilled(
    posterior: Any, loader: Any, shifted: dict[str, Any], examples: int, seed: int
) -> dict[str, Any]:
    """A module, its fidelity, and the seconds that it took; ``module`` is None where it was refused."""
    module: Distilled | None = None
    started = time.process_time()
    try:
        module = posterior.distil(loader, shifted=shifted, max_examples=examples, seed=seed)
        fidelity = module.fidelity
    except nb.FidelityError as error:
        fidelity = error.fidelity
    return {
        "module": module,
        "refused": module is None,
        "seconds": time.process_time() - started,
        "correlation": fidelity.correlation,
        "variance_correlation": fidelity.variance_correlation,
        "auroc": fidelity.auroc,
        "latency": {},
    }


def latencies(
    runs: dict[str, Callable[[Any], Any]], batches: dict[str, Any], rounds: int
) -> dict[str, dict[str, float]]:
    return {size: in_turns(runs, x, rounds) for size, x in batches.items()}


def measured(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One network and seed."""
    torch.set_num_threads(1)
    if name == ENCODER:
        return encoder(seed)
    data = datasets.fashion_mnist()
    x, y = data.train.inputs[: options.train], data.train.targets[: options.train]
    model = trained(NETWORKS[name], x, y, seed)
    posterior = nb.NullSpacePosterior(model).fit(
        (x[: options.fit], y[: options.fit]), progress=False
    )
    others = slice(options.fit, options.fit + options.examples)
    test = data.test.inputs[:300]
    shifted = {"digits": digits(300), "rotated": test.rot90(1, (2, 3))}
    result = distilled(posterior, (x[others], y[others]), shifted, options.examples, seed)
    module = result.pop("module")
    if module is not None:
        asked = module.arguments(test[:2])
        alone = asked | {"dynamic_shapes": asked["dynamic_shapes"][0]}
        runs = {
            "network": model,
            "module": module,
            "ONNX network": deployed(model, alone),
            "ONNX module": deployed(module, asked),
        }
        result["latency"] = latencies(runs, {str(n): test[:n] for n in BATCHES}, ROUNDS)
    return {"network": name, "seed": seed} | result


def table(
    results: list[dict[str, Any]], before: list[dict[str, Any]], options: argparse.Namespace
) -> str:
    """The page; ``before`` are results of an earlier version, or none."""
    lines = [
        "# Distilled modules: fidelity and latency",
        "",
        f"Images: Fashion-MNIST, {options.train} training images, posteriors of {options.fit} of them, modules from "
        f"{options.examples} others. Texts: docstrings by topic, a pretrained encoder with 22.7 million weights "
        f"fine-tuned by LoRA, a posterior of {CONSTRAINED} texts, a module from "
        f"{4 * OF_A_TOPIC - TRAINED_TEXTS} others. Means over seeds. Rank correlation with the posterior's novelty on "
        "examples that the module was not fitted "
        "to; AUROC of novelty, of the posterior and of the module; latency in calls of the plain network (one "
        "thread, processor time). Of two figures, the first is of an earlier version, the second of this one; "
        "refused modules count in fidelity and not in latency.",
        f"`python -m benchmarks.distil --train {options.train} --fit {options.fit} --examples {options.examples} "
        f"--seeds {options.seeds}` with `--before RESULTS`",
        "",
    ]
    for name in dict.fromkeys(r["network"] for r in results):
        now, then = ([r for r in some if r["network"] == name] for some in (results, before))
        lines += [f"## {name}", "", *_summary(now, then), "", *_fidelity(now, then), ""]
        lines += [*_latency(now, then), ""]
    return "\n".join(lines)


def _summary(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> list[str]:
    def of(rows: list[dict[str, Any]]) -> str:
        refused = sum(r["refused"] for r in rows)
        return (
            f"{refused} of {len(rows)} seeds refused, {_mean(r['seconds'] for r in rows):.0f} s to distil, "
            f"correlation of the variance {_mean(r['variance_correlation'] for r in rows):.2f}"
        )

    return [f"Before: {of(then)}. Now: {of(now)}." if then else f"{of(now)}."]


def _fidelity(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> list[str]:
    versions = [some for some in (then, now) if some]
    lines = [
        "| | rank correlation | AUROC, posterior | AUROC, module | lost by the worst seed |",
        "|---|---|---|---|---|",
    ]
    for kind in now[0]["correlation"]:
        cells = [[f"{_mean(r['correlation'][kind] for r in rows):.2f}" for rows in versions]]
        if kind in now[0]["auroc"]:
            pairs = [[r["auroc"][kind] for r in rows] for rows in versions]
            cells += [[f"{_mean(p[i] for p in some):.3f}" for some in pairs] for i in (0, 1)]
            cells.append([f"{max(p[0] - p[1] for p in some):.3f}" for some in pairs])
        else:
            cells += [[], [], []]
        lines.append(f"| {kind} | " + " | ".join(" → ".join(c) for c in cells) + " |")
    return lines


def _latency(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| at a time | network | module | network in onnxruntime | module in onnxruntime |",
        "|---|---|---|---|---|",
    ]
    timed = [[r["latency"] for r in rows if r["latency"]] for rows in (then, now)]
    if not timed[1]:
        return []
    for size in timed[1][0]:
        cells = []
        for alone, module in (("network", "module"), ("ONNX network", "ONNX module")):
            if alone not in timed[1][0][size]:
                cells += ["", ""]
                continue
            cells.append(f"{1e3 * _mean(t[size][alone] for t in timed[1]):.3g} ms")
            ratios = [
                _mean(t[size][module] / t[size][alone] for t in some) for some in timed if some
            ]
            cells.append(" → ".join(f"{r:.2f}" for r in ratios) + " calls")
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return lines


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--fit", type=int, default=400)
    parser.add_argument("--examples", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="results of an earlier version, JSON")
    options = parser.parse_args()
    results = []
    for name in (*NETWORKS, ENCODER):
        for seed in range(options.seeds):
            results.append(measured(name, seed, options))
            print(results[-1], flush=True)
    before = [] if options.before is None else json.loads(options.before.read_text())["results"]
    found = {
        "results": results,
        "before": before,
        "options": {k: v for k, v in vars(options).items() if k != "before"},
        "environment": common.environment(),
    }
    print(common.write_results("distil", found, table(results, before, options)))


if __name__ == "__main__":
    main()
