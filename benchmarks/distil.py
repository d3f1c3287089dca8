"""How closely distilled modules follow their posteriors, and what they cost beside the plain forward pass.

    python -m benchmarks.distil [--train 6000] [--fit 400] [--examples 1200] [--seeds 3]

LeNet and a residual network (two blocks, 16 and 32 channels), trained on Fashion-MNIST; and the pretrained sentence
encoder of `benchmarks.encoders` (22.7 million weights), fine-tuned by LoRA to tell topics of texts, with batches of tokens
and attention masks. Posteriors are fitted to the first training examples, modules distilled from others; they are judged on
the quarter of those that they were not fitted to, on built-in shifts, on handwritten digits and rotated images, on another
topic and on C++. Seconds are of one thread, each the median of many.

The head, its features and the ways of teaching were chosen on networks of seeds 10 and 11, by images upside down, small,
transposed, blurred, enlarged, of two values, of noise and of random strokes. The figures of the page are of seeds 0 to 2,
which no choice has seen since; `--before` adds those of an earlier version from its results.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
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


def table(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        "# Distilled modules: fidelity and latency",
        "",
        f"Fashion-MNIST, {options.train} training images, posteriors of {options.fit} of them, modules from "
        f"{options.examples} others, {options.seeds} seeds; means. Rank correlation with the posterior's novelty on "
        "examples that the module was not fitted to; AUROC of novelty, posterior → module; latency in calls of the "
        "plain network (one thread).",
        f"`python -m benchmarks.distil --train {options.train} --fit {options.fit} --examples {options.examples} "
        f"--seeds {options.seeds}`",
        "",
    ]
    for name in NETWORKS:
        rows = [r for r in results if r["network"] == name]
        refused = sum(r["refused"] for r in rows)
        lines += [
            f"## {name}",
            "",
            f"{refused} of {len(rows)} refused; heads: {', '.join(str(r['head']) for r in rows)}; "
            f"{_mean(r['seconds'] for r in rows):.1f} s to distil; "
            f"variance: correlation {_mean(r['variance_correlation'] for r in rows):.2f}.",
            "",
            "| | rank correlation | AUROC, posterior | AUROC, module |",
            "|---|---|---|---|",
        ]
        for kind in rows[0]["correlation"]:
            cells = ["", ""]
            if kind in rows[0]["auroc"]:
                cells = [f"{_mean(r['auroc'][kind][i] for r in rows):.3f}" for i in (0, 1)]
            value = _mean(r["correlation"][kind] for r in rows)
            lines.append(f"| {kind} | {value:.2f} | {cells[0]} | {cells[1]} |")
        timed = [r["latency"] for r in rows if r["latency"]]
        if timed:
            lines += [
                "",
                "| images at a time | network | module | network in onnxruntime | module in onnxruntime |",
                "|---|---|---|---|---|",
            ]
            for size in BATCHES:
                each = {k: _mean(t[size][k] for t in timed) for k in timed[0][size]}
                eager, onnx = (
                    _mean(t[size][k] / t[size][n] for t in timed)
                    for k, n in (("module", "network"), ("ONNX module", "ONNX network"))
                )
                lines.append(
                    f"| {size} | {1e3 * each['network']:.2f} ms | {eager:.2f} calls | "
                    f"{1e3 * each['ONNX network']:.3f} ms | {onnx:.2f} calls |"
                )
        lines.append("")
    return "\n".join(lines)


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--fit", type=int, default=400)
    parser.add_argument("--examples", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    results = []
    for name in NETWORKS:
        for seed in range(options.seeds):
            results.append(measured(name, seed, options))
            print(results[-1], flush=True)
    found = {"results": results, "options": vars(options), "environment": common.environment()}
    print(common.write_results("distil", found, table(results, options)))


if __name__ == "__main__":
    main()
