"""What a layer posterior costs: fit and novelty in plain forward passes of the same run, memory at N and 4N.

    python benchmarks/layer_costs.py NAME EXAMPLES      one network, as JSON
    python -m benchmarks.layer_costs [--write] [--latency] [--before CHECKOUT] [NAME=EXAMPLES ...]

Each measurement is a process of its own with one thread; seconds are of the CPU, the best of several. ``--before`` runs
an earlier version of the library in the same way, network by network, from its checkout. ``--write`` puts what was
measured into ``results/layers.json`` and ``layers.md``, in place of the same networks' figures. ``--latency`` measures
novelty alone, of a fit on so few examples as are named, and leaves the other figures of the largest fit as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batches = Callable[[], Iterator[Any]]


class Residual(nn.Module):
    """Two convolutions of a ResNet and what goes around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around = nn.Sequential()
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.around = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


def resnet18(width: int = 64) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    ]  # fmt: skip
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Residual(inputs, outputs, stride), Residual(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)
    ).eval()


def images(count: int, shape: tuple[int, ...], batch: int) -> Batches:
    """Smooth random images, made anew at each pass, so that the data take no memory."""

    def batches() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1)
        small = (shape[0], max(2, shape[1] // 4), max(2, shape[2] // 4))
        for start in range(0, count, batch):
            size = min(batch, count - start)
            coarse = torch.randn(size, *small, generator=generator)
            noise = 0.1 * torch.randn(size, *shape, generator=generator)
            yield nn.functional.interpolate(coarse, shape[1:], mode="bilinear") + noise

    return batches


def texts(count: int, batch: int = 32) -> Batches:
    """Random tokens; lengths like those of short texts, padded to the longest of a batch of similar ones."""

    def batches() -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        lengths = (28 + 12 * torch.randn(count, generator=generator)).clamp(6, 64).long()
        for part in lengths.sort().values.split(batch):
            size = int(part.max())
            ids = torch.randint(1000, 30000, (len(part), size), generator=generator)
            mask = (torch.arange(size) < part[:, None]).long()
            yield {"input_ids": ids * mask, "attention_mask": mask}

    return batches


def network(name: str, count: int) -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    if name == "lenet":
        from nullbayes.demo.models import lenet

        return lenet(10).eval(), images(count, (1, 28, 28), 250)
    if name == "resnet18":
        return resnet18(), images(count, (3, 32, 32), 64)
    if name == "swin-t":
        from transformers import SwinConfig, SwinForImageClassification

        model = SwinForImageClassification(SwinConfig(num_labels=10))
        return model.eval(), images(count, (3, 224, 224), 16)
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=1536, num_labels=4,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval(), texts(count)


class Again:
    """An iterable that can be read several times."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self.batches()


def seconds(run: Callable[[], Any], times: int = 1) -> float:
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times


def measured(name: str, count: int, *, latency: bool = False) -> dict[str, Any]:
    """Figures of one network; of its novelty alone, if that is asked for."""
    import nullbayes as nb

    torch.set_num_threads(1)
    model, batches = network(name, count)

    def call(batch: Any) -> None:
        with torch.no_grad():
            model(**batch) if isinstance(batch, dict) else model(batch)

    def plain() -> float:
        total = 0.0
        for batch in batches():  # making the data does not count
            start = time.process_time()
            call(batch)
            total += time.process_time() - start
        return total

    some = next(batches())
    call(some)
    if latency:
        posterior = nb.LayerNullSpacePosterior(model).fit(Again(batches), progress=False)
        # Texts are ordered by length: those of the whole fit.
        some = next(network(name, DEFAULT[name])[1]())
        return {"name": name} | novelty_costs(posterior, call, some)
    loading = seconds(lambda: [None for _ in batches()])
    forward = plain()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    posterior = nb.LayerNullSpacePosterior(model)
    fit = seconds(lambda: posterior.fit(Again(batches), progress=False)) - loading
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward = min(forward, plain())
    state: Any = posterior._fit.state  # type: ignore[union-attr]
    sums = sum(s.nbytes for s in state.gathered.sums)
    del state.factors
    factors = seconds(lambda: state.factors)
    out: dict[str, Any] = {
        "name": name, "examples": count, "forward": forward, "fit": fit, "factors": factors,
        "weights": sum(p.numel() for p in model.parameters()),
        "sums_bytes": sums, "peak_bytes": 1024 * peak, "before_bytes": 1024 * before,
        "divergence": posterior.certificate.divergence, "held": posterior.certificate.held,
    }  # fmt: skip
    return out | novelty_costs(posterior, call, some)


def novelty_costs(posterior: Any, call: Callable[[Any], None], some: Any) -> dict[str, Any]:
    """What a forward pass and a score take, and what a pass with products alone does."""
    return {
        "novelty": latencies(posterior, call, some),
        "least": least(posterior, call, _cut(some, 1)),
    }


def _cut(batch: Any, size: int) -> Any:
    return {k: v[:size] for k, v in batch.items()} if isinstance(batch, dict) else batch[:size]


def least(posterior: Any, call: Callable[[Any], None], one: Any) -> float:
    """Seconds of a forward pass with a hook a layer that does no more than one product of a leverage's size.

    What no score by hooks can be faster than; the products are of other numbers, which are ready.
    """
    scorer = posterior._of_layers()
    calls = scorer._pass(one)[0]
    products = [
        (torch.randn(len(c.roots), scorer.layers[c.block].root.shape[2]), scorer.layers[c.block].root[0].mT)
        for c in calls
        if scorer.layers[c.block].root is not None
    ]  # fmt: skip
    turns = itertools.cycle(products)

    def hook(*_: Any) -> None:
        torch.mm(*next(turns))

    handles = [
        site.module.register_forward_hook(hook)
        for site in scorer.blocks.sites
        if any(number in scorer.counted for number, _ in site.places.values())
    ]
    try:
        return min(seconds(lambda: call(one), 20) for _ in range(10))
    finally:
        for handle in handles:
            handle.remove()


def latencies(
    posterior: Any, call: Callable[[Any], None], batch: Any
) -> dict[str, tuple[float, float]]:
    """By number of inputs: seconds of a forward pass and of the leverage score, the least of several in turns."""
    out = {}
    whole = len(next(iter(batch.values())) if isinstance(batch, dict) else batch)
    for size in (1, whole):
        some = _cut(batch, size)
        posterior.novelty(some, "leverage")
        pairs = [
            (
                seconds(lambda some=some: call(some), 3),
                seconds(lambda some=some: posterior.novelty(some, "leverage"), 3),
            )
            for _ in range(20 if size == 1 else 6)
        ]
        out[str(size)] = (min(p for p, _ in pairs), min(p for _, p in pairs))
    return out


# -- table ---------------------------------------------------------------------------------------

DEFAULT = {"lenet": 60_000, "resnet18": 4000, "swin-t": 1000, "encoder": 2000}
TITLES = {
    "lenet": "LeNet, 28 × 28",
    "resnet18": "ResNet-18, width 64, 32 × 32",
    "swin-t": "Swin-T, 224 × 224",
    "encoder": "encoder, 12 layers of 384, texts",
}


def run(name: str, count: int, checkout: Path, *, latency: bool = False) -> dict[str, Any]:
    """In a new process, with the library of ``checkout``."""
    environment = dict(os.environ, PYTHONPATH=str(checkout), OMP_NUM_THREADS="1")
    command = [sys.executable, str(Path(__file__).resolve()), name, str(count)]
    command += ["--latency"] if latency else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} with {count} examples failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def all_costs(
    counts: dict[str, int], before: Path | None, old: tuple[str, ...] = ("lenet",)
) -> list[dict[str, Any]]:
    """Each network with its examples and a quarter of them; those in ``old`` with the earlier version as well."""
    here = Path(__file__).resolve().parents[1]
    rows = []
    for name, count in counts.items():
        if before is not None and name in old:
            rows.append(run(name, count, before) | {"version": "before"})
            print(rows[-1], flush=True)
        for examples in (count // 4, count):
            rows.append(run(name, examples, here) | {"version": "now"})
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of markdown."""
    lines = [
        "One thread, float32, CPU seconds, beside a plain forward pass of the same process. *Fit* is all of `fit`: "
        "proof of the rules, the pass with sums, factors, prior precision and certificate. *Passes* are plain passes "
        "that the fit takes without its factorisations, one a layer; *an example* is what each example adds to that, "
        "from the fit on a quarter of them. What a fit costs whatever the data (proof, certificate) is most of it "
        "where images are few and large. *Peak* is the process's, the library and the network included.",
        "",
        "| network | version | examples | plain pass, s | fit, s | factors, s | passes | an example | sums, MB | "
        "peak, GB | held |",
        "|---" * 11 + "|",
    ]
    for r in rows:
        passes = (r["fit"] - r["factors"]) / r["forward"]
        lines.append(
            f"| {TITLES[r['name']]} | {r['version']} | {r['examples']:,} | {r['forward']:.1f} | {r['fit']:.1f} | "
            f"{r['factors']:.1f} | {passes:.1f} | {_more(r, rows)} | {r['sums_bytes'] / 1e6:.0f} | "
            f"{r['peak_bytes'] / 1e9:.2f} | {'yes' if r['held'] else 'no'} |"
        )
    lines += [
        "",
        'Novelty, score `"leverage"`. *Least*: a forward pass with a hook a layer that does no more than one product '
        "of the size of that layer's leverage, of numbers that are ready. One and a half passes of LeNet leave an "
        "eighth of a millisecond for everything: fetching what layers receive, products, norms, means, and the check "
        "that the model is the one that was fitted are some fifty operations of two to ten microseconds each.",
        "",
        "| network | version | inputs | forward, ms | novelty, ms | passes | least, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["examples"] < max(x["examples"] for x in rows if x["name"] == r["name"]):
            continue
        for size, (forward, score) in r["novelty"].items():
            floor = f"{1e3 * r['least']:.2f}" if size == "1" and "least" in r else ""
            lines.append(
                f"| {TITLES[r['name']]} | {r['version']} | {size} | {1e3 * forward:.2f} | {1e3 * score:.2f} | "
                f"{score / forward:.2f} | {floor} |"
            )
    return lines


def _more(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Plain passes over the examples that ``row`` has beyond a run with fewer of them."""
    fewer = [
        r
        for r in rows
        if (r["name"], r["version"]) == (row["name"], row["version"])
        and r["examples"] < row["examples"]
    ]
    if not fewer:
        return ""
    both = [(r["fit"] - r["factors"], r["forward"]) for r in (row, fewer[0])]
    return f"{(both[0][0] - both[1][0]) / (both[0][1] - both[1][1]):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("networks", nargs="*", default=[f"{n}={c}" for n, c in DEFAULT.items()])
    options = parser.parse_args()
    if len(options.networks) == 2 and options.networks[0] in DEFAULT:
        name, count = options.networks[0], int(options.networks[1])
        print(json.dumps(measured(name, count, latency=options.latency)))
        return
    counts = {n: int(c) for n, _, c in (text.partition("=") for text in options.networks)}
    if options.latency:
        here = Path(__file__).resolve().parents[1]
        for name, count in counts.items():
            row = run(name, count, here, latency=True)
            print(row, flush=True)
            if options.write:
                written_latency(row)
        return
    rows = all_costs(counts, options.before)
    print("\n".join(table(rows)))
    if options.write:
        written(rows)


def written(rows: list[dict[str, Any]]) -> None:
    """Put ``rows`` in place of those of the same networks and versions in the results, and write its page anew."""
    from benchmarks import common  # not where this file runs by itself, with an earlier library

    results = json.loads((common.RESULTS / "layers.json").read_text())
    measured_now = {(r["name"], r["version"]) for r in rows}
    old = [r for r in results["cost"] if (r["name"], r["version"]) not in measured_now]
    order = list(DEFAULT)
    results["cost"] = sorted(
        old + rows, key=lambda r: (order.index(r["name"]), r["version"] == "now", r["examples"])
    )
    paged(results)


def written_latency(row: dict[str, Any]) -> None:
    """Put what was measured of novelty in place of the same network's figures from its largest fit."""
    from benchmarks import common

    results = json.loads((common.RESULTS / "layers.json").read_text())
    same = [r for r in results["cost"] if (r["name"], r["version"]) == (row["name"], "now")]
    max(same, key=lambda r: int(r["examples"])).update(row)
    paged(results)


def paged(results: dict[str, Any]) -> None:
    """Write the results and their page anew."""
    from benchmarks import common

    path = common.RESULTS / "layers.md"
    before, _, rest = path.read_text().partition("## Cost\n")
    after = rest[rest.index("\n## Quality") :]
    text = before + "## Cost\n\n" + "\n".join(table(results["cost"])) + "\n" + after
    common.write_results("layers", results, text)


if __name__ == "__main__":
    main()
