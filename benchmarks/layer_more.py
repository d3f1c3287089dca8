"""The layer null space further: what an exported module costs, and rows of examples within it.

    python -m benchmarks.layer_more [--tuning] [--only export] [--small]

The edge of the layers within which rows are fitted was chosen on digits without 8 and 9 (``--tuning``): among 0.01, 0.1
and 1 the one with the highest AUROC. Its figures go into ``results/layers.json`` and ``layers.md`` beside the others.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from benchmarks import common
from benchmarks.networks import resnet18
from nullbayes import datasets
from nullbayes.demo.models import digits_net
from nullbayes.metrics import ood_metrics
from nullbayes.moments.convolution import middles
from nullbayes.moments.traced import Put
from nullbayes.moments.watched import WatchedConvolution

KEYS = ("export", "both")
EDGE = 0.01
SCORED, BATCH = 150, 250


def earlier() -> dict[str, Any]:
    """Figures of the last run, which another one of ``benchmarks.layers`` keeps."""
    path = common.RESULTS / "layers.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return {key: known[key] for key in KEYS if key in known}


# -- export --------------------------------------------------------------------------------------


def session(module: nn.Module, names: Any, arguments: dict[str, Any]) -> Any:
    """ONNX Runtime on one thread."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, dynamo=True, verbose=False, output_names=names, **arguments
        )
    file = io.BytesIO()
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(file.getvalue(), options)


def fastest(sessions: list[Any], x: Tensor, repeats: int) -> list[float]:
    """CPU seconds of one run of each, in turn, the least of many: other work on the machine only adds."""
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(repeats):
        for made, found in zip(sessions, times, strict=True):
            feed = {made.get_inputs()[0].name: x.numpy()}
            made.run(None, feed)
            start = time.process_time()
            made.run(None, feed)
            found.append(time.process_time() - start)
    return [min(found) for found in times]


class ProductsAlone(nn.Module):
    """The network with nothing of its leverages but the products, which no exact score can do without."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        module = self.module
        module.tape.taken()
        outputs = module._called(module.network, x)
        calls = [call for _, call in module.tape.taken()]
        return outputs, torch.cat([call.along.flatten(1) for call in calls], 1)


@contextmanager
def convolving() -> Iterator[None]:
    """While it lasts, convolutions leave their products alone."""

    def watch(self: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        layer = self.layer
        [(place, number)] = self.places.values()
        probe = self.probes[place]
        x, strides = self._cut(args[0], middles(out.shape[2:], self.positions))
        weight = probe.root[0].unflatten(1, (-1, *layer.kernel_size))
        along = nn.functional.conv2d(x, weight, probe.shift[0], strides, dilation=layer.dilation)
        self.tape.add(number, Put(probe, x, along, 1, shifted=True))

    before, WatchedConvolution.watch = WatchedConvolution.watch, watch  # type: ignore[method-assign]
    try:
        yield
    finally:
        WatchedConvolution.watch = before  # type: ignore[method-assign]


def exported(name: str, model: nn.Module, train: Any, x: Tensor) -> list[dict[str, Any]]:
    """Latency of the network alone and of the module with its leverage, and how far that is off."""
    posterior = nb.LayerNullSpacePosterior(model).fit(train, progress=False)
    axis = {0: torch.export.Dim("batch", min=1)}
    plain = session(model, None, {"args": (x[:4],), "kwargs": {}, "dynamic_shapes": (axis,)})
    wanted = posterior.novelty(x, "leverage")
    out = []
    for tolerance in (0.0, 0.2):
        module = posterior.export_module(x[:4], tolerance=tolerance)
        made = session(module, module.output_names, module.arguments(x[:4]))
        found = made.run(["novelty"], {made.get_inputs()[0].name: x.numpy()})[0]
        off = (torch.from_numpy(found) - wanted).abs().max() / wanted.std()
        row: dict[str, Any] = {"network": name, "tolerance": tolerance, "off": float(off)}
        with convolving():
            given = {"args": (x[:4],), "kwargs": {}, "dynamic_shapes": (axis,)}
            floor = session(ProductsAlone(module), ["outputs", "products"], given)
        few = 400 if len(x) == BATCH else 20
        row["plain 1"], row["products 1"] = fastest([plain, floor], x[:1], few)
        for size, repeats in ((1, 400), (64, 60), (BATCH, 20)):
            if size > len(x):
                continue
            few = max(3, repeats // 20) if len(x) < BATCH else repeats  # a large network
            both = fastest([plain, made], x[:size], few)
            row[f"alone {size}"], row[f"with {size}"] = both
        out.append(row)
    return out


def all_exports(*, large: bool = True) -> list[dict[str, Any]]:
    from benchmarks.layers import Encoder, perceptron, trained

    model, x, y = common.trained_lenet(5000, epochs=1)
    rows = exported(
        "LeNet, 5,000 images",
        model,
        list(zip(x.split(BATCH), y.split(BATCH), strict=True)),
        x[:BATCH],
    )
    data = datasets.digits().train
    torch.manual_seed(0)
    made = trained(perceptron(), data.inputs, data.targets, 10, 0)
    rows += exported("perceptron, 64-128-128-10", made, data.inputs, data.inputs[:BATCH])
    torch.manual_seed(0)
    # Vectors that vary in some directions more than in others, as features do.
    vectors = torch.randn(400, 8, 128) * torch.linspace(0, 1, 128) ** 2
    rows += exported("transformer encoder, untrained", Encoder().eval(), vectors, vectors[:BATCH])
    if not large:
        return rows
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32)
    return rows + exported("ResNet-18, untrained", resnet18().eval(), images, images)


def export_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Export: ONNX Runtime, one thread, CPU milliseconds",
        "",
        "The network alone, and outputs with novelty in one module (`posterior.export_module`); the least of many "
        "runs. Off: the largest difference from the posterior's own score, in standard deviations of that score. "
        "*Products alone*: one input of the network with the products of its leverages, and no norm, sum or logarithm "
        "of them, beside the network: below that no leverage of this accuracy can be.",
        "",
        "| network | tolerance | off | products alone | 1 input | 64 inputs | 250 inputs |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        floor = f"{r['products 1'] / r['plain 1']:.2f} ×" if "products 1" in r else ""
        cells = []
        for size in (1, 64, BATCH):
            if f"alone {size}" not in r:
                cells.append("")
                continue
            a, b = 1e3 * r[f"alone {size}"], 1e3 * r[f"with {size}"]
            cells.append(f"{a:.3f} → {b:.3f} ({b / a:.2f} ×)")
        lines.append(
            f"| {r['network']} | {r['tolerance']:g} | {r['off']:.3f} | {floor} | {' | '.join(cells)} |"
        )
    return lines


# -- rows within layers --------------------------------------------------------------------------


def clocked(make: Callable[[], Any]) -> tuple[Any, float]:
    """What ``make`` gives, and its CPU seconds."""
    start = time.process_time()
    return make(), time.process_time() - start


def judged(posterior: Any, data: dict[str, Any]) -> dict[str, float]:
    """Figures of a posterior as its fit left it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nb.NullBayesWarning)
        found = posterior.evaluate(data["test"], progress=False)
    key = list(found.figures)[-1]

    def score(x: Tensor) -> Tensor:
        return torch.cat([posterior.novelty(part, score="information") for part in x.split(50)])

    inside = score(data["test"][0])
    out = {n: ood_metrics(inside, score(x))["auroc"] for n, x in data["shifted"].items()}
    figures = {n: found.figures[key][n].value for n in ("nll", "joint_nll")}
    alone = {f"network {n}": found.figures["network"][n].value for n in figures}
    return out | figures | alone


def compared(data: dict[str, Any], count: int, edge: float = EDGE) -> list[dict[str, Any]]:
    """Layers of all data; rows of ``count`` examples within them; and rows alone for as many seconds."""
    model, x, y = data["model"], *data["train"]
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))

    def batches(examples: int) -> list[tuple[Tensor, Tensor]]:
        index = chosen[:examples]
        return list(zip(x[index].split(100), y[index].split(100), strict=True))

    def rows(examples: int, **options: Any) -> Any:
        posterior = nb.NullSpacePosterior(model, **options)
        return posterior.fit(batches(examples), progress=False)

    everything = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    rows(10)  # what is loaded and compiled once
    layers, taken = clocked(
        lambda: nb.LayerNullSpacePosterior(model, delta=edge).fit(everything, progress=False)
    )
    within, more = clocked(lambda: rows(count, within=layers))
    examples, seconds, alone = count, 0.0, None
    while seconds < taken + more and examples < len(x):
        examples = min(len(x), int(1.2 * examples))
        alone, seconds = clocked(lambda n=examples: rows(n))
    out = []
    for name, posterior, cost in (
        (f"layers of all {len(x):,} examples", layers, taken),
        (f"rows of {examples} examples", alone, seconds),
        (f"rows of {count} within the layers", within, taken + more),
    ):
        out.append({"posterior": name, "seconds": cost} | judged(posterior, data))
        print(out[-1], flush=True)
    return out


def digits(pair: tuple[int, int]) -> dict[str, Any]:
    """Digits without two classes."""
    from benchmarks.layers import trained

    data = datasets.digits(seed=0)
    train, _ = datasets.hold_out_classes(data.train, pair)
    test, held = datasets.hold_out_classes(data.test, pair)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = digits_net(8)
    inputs = test.inputs[:SCORED]
    return {
        "model": trained(model, train.inputs, train.targets, 30, 0),
        "train": (train.inputs, train.targets),
        "test": (inputs, test.targets[:SCORED]),
        "shifted": {
            "held-out classes": held.inputs[:SCORED],
            "rotated": datasets.rotated(inputs, 90),
        },
    }


def clothes() -> dict[str, Any]:
    """Fashion-MNIST, with digits among the clothes."""
    model, x, y = common.trained_lenet(5000, epochs=1)
    test = datasets.fashion_mnist(validation=0, test=SCORED).test
    figures = datasets.rescaled(datasets.digits().test.inputs, 28)[:SCORED]
    return {
        "model": model,
        "train": (x, y),
        "test": (test.inputs, test.targets),
        "shifted": {"digits": figures, "rotated": datasets.rotated(test.inputs, 90)},
    }


def both_table(tasks: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "",
        "## Rows within layers, at equal seconds",
        "",
        "`NullSpacePosterior(model, within=layers)`: all data through the moments of their layers (edge 0.01), some of "
        "them through their Jacobian rows as well. Rows alone are of as many examples as take as many CPU seconds, or "
        "a few more. AUROC is that of the score information; NLL and joint NLL (of ten inputs together) are those of "
        "test data, at the fit's own prior precision.",
    ]
    for name, rows in tasks.items():
        shifts = [k for k in rows[0] if k not in ("posterior", "seconds") and "nll" not in k]
        alone = rows[0]
        lines += [
            "",
            f"{name}; the network alone: NLL {alone['network nll']:.4f}, joint {alone['network joint_nll']:.3f}.",
            "",
            f"| posterior | seconds | {' | '.join(f'AUROC, {s}' for s in shifts)} | NLL | joint NLL |",
            "|---|---|" + "---|" * (len(shifts) + 2),
        ]
        for r in rows:
            cells = " | ".join(f"{r[s]:.3f}" for s in shifts)
            lines.append(
                f"| {r['posterior']} | {r['seconds']:.1f} | {cells} | {r['nll']:.4f} | {r['joint_nll']:.3f} |"
            )
    return lines


def sections(results: dict[str, Any]) -> list[str]:
    """Of the report, as far as there are figures."""
    lines: list[str] = []
    if "export" in results:
        lines += export_table(results["export"])
    if "both" in results:
        lines += both_table(results["both"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tuning", action="store_true", help="compare edges on the tuning digits")
    parser.add_argument("--only", choices=KEYS, help="measure one of the two anew")
    parser.add_argument("--small", action="store_true", help="keep figures of large exports")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.tuning:
        for edge in (0.01, 0.1, 1.0):
            print(edge, compared(digits((8, 9)), 100, edge))
        return
    path = common.RESULTS / "layers.json"
    fresh: dict[str, Any] = {}
    if options.only in (None, "export"):
        fresh["export"] = all_exports(large=not options.small)
        if options.small:
            measured = {r["network"] for r in fresh["export"]}
            rest = [r for r in earlier()["export"] if r["network"] not in measured]
            fresh["export"] += rest
    if options.only in (None, "both"):
        fresh["both"] = {
            "Digits without 0 and 4": compared(digits((0, 4)), 100),
            "Digits without 1 and 7": compared(digits((1, 7)), 100),
            "Fashion-MNIST, LeNet": compared(clothes(), 100),
        }
    results = json.loads(path.read_text()) | fresh
    text = path.with_suffix(".md").read_text()
    for title in ("\n## Export:", "\n## Rows within layers"):
        text = text.split(title)[0]
    lines = [text.rstrip(), *sections(results)]
    print(common.write_results("layers", results, "\n".join(lines) + "\n"))


if __name__ == "__main__":
    main()
