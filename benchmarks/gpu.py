"""Fits, predictions and scores on an accelerator, with the share of the matrix-product peak that their stages reach.

    python -m benchmarks.gpu [--device cuda] [--seconds 300] [--small] [--only NAME ...]

Each row is written as soon as it is measured (`benchmarks/results/gpu.json`), so a run that is cut off keeps what it
has; then the table is. Networks are untrained but for LeNet: time and memory do not depend on what they know.
Operations are counted by PyTorch's own counter in a second fit that is not timed; only matrix products and
convolutions count.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import nullbayes as nb
from benchmarks import common, layer_costs
from benchmarks.networks import resnet18
from benchmarks.stages import stage_clock

Case = Callable[["Bench"], dict[str, Any]]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    """Register a row of the table."""

    def add(run: Case) -> Case:
        CASES[name] = run
        return run

    return add


class Bench:
    """The device, and how large the problems are."""

    def __init__(self, device: str, small: bool) -> None:
        self.device, self.small = torch.device(device), small

    def size(self, full: int, small: int) -> int:
        return small if self.small else full

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, run: Callable[[], Any], times: int = 3) -> float:
        """The least of several, after one that does not count."""
        run()
        best = float("inf")
        for _ in range(times):
            start = self.now()
            run()
            best = min(best, self.now() - start)
        return best

    @contextmanager
    def memory(self) -> Iterator[dict[str, float]]:
        """The peak of the device's memory in the block, in bytes."""
        found: dict[str, float] = {}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield found
        if self.device.type == "cuda":
            found["peak"] = torch.cuda.max_memory_allocated()

    # -- what every row measures ---------------------------------------------------------------

    def rows(self, make: Callable[[], Any], data: list[Any], count: bool = True, **fit: Any) -> Any:
        """A fit of Jacobian rows: seconds and counted operations of its stages; prediction and novelty."""
        few, first = data[: max(1, len(data) // 20)], data[0][0]
        make().fit(few, 2, progress=False)  # kernels and handles are loaded now
        with self.memory() as memory, stage_clock(self.now) as stages:
            start = self.now()
            posterior = make().fit(data, 10, progress=False, **fit)
            total = self.now() - start
        c = posterior.certificate
        out = {
            "fit": total, "stages": dict(stages), "memory": memory, "held": c.held,
            "residual": c.residual, "solver": c.solver, "iterations": c.iterations,
            "constraints": c.constraints, "parameters": c.parameters, "examples": c.examples,
        }  # fmt: skip
        out["use"] = self.use(posterior, first, ("predict", "novelty"))
        if count:
            with (
                FlopCounterMode(display=False) as counter,
                stage_clock(lambda: float(counter.get_total_flops())) as operations,
            ):
                make().fit(data, 10, progress=False, **fit)
            out["operations"] = dict(operations)
        return out

    def layers(self, model: nn.Module, data: list[Any]) -> Any:
        """A fit of layers' moments beside a plain pass over the same data."""
        nb.LayerNullSpacePosterior(model).fit(data[:1], 2, progress=False)

        @torch.no_grad()
        def plain() -> None:
            for x in data:
                if isinstance(x, dict):
                    model(**{k: v.to(self.device) for k, v in x.items()})
                else:
                    model(x[0].to(self.device))

        forward = self.seconds(plain, 2)
        with self.memory() as memory:
            start = self.now()
            posterior = nb.LayerNullSpacePosterior(model).fit(data, 10, progress=False)
            total = self.now() - start
        first = data[0] if isinstance(data[0], dict) else data[0][0]
        return {
            "fit": total, "plain": forward, "memory": memory, "held": posterior.certificate.held,
            "examples": sum(len(next(iter(x.values())) if isinstance(x, dict) else x[0]) for x in data),
            "use": self.use(posterior, first, ("leverage",)),
        }  # fmt: skip

    def use(self, posterior: Any, batch: Any, what: tuple[str, ...]) -> dict[str, Any]:
        """Seconds of a plain pass and of each use, for one input and for the batch."""
        runs = {
            "predict": posterior.predict,
            "novelty": posterior.novelty,
            "leverage": lambda x: posterior.novelty(x, "leverage"),
        }
        out: dict[str, Any] = {}
        batch = move(batch, self.device)
        sizes = (1, len(next(iter(batch.values())) if isinstance(batch, dict) else batch))
        for size in sizes:
            some = (
                {k: v[:size] for k, v in batch.items()} if isinstance(batch, dict) else batch[:size]
            )
            with torch.no_grad():
                forward = self.seconds(
                    lambda some=some: (
                        posterior.model(**some) if isinstance(some, dict) else posterior.model(some)
                    )
                )
            out[str(size)] = {"forward": forward} | {
                name: self.seconds(lambda run=runs[name], some=some: run(some)) for name in what
            }
        return out


def move(batch: Any, device: torch.device) -> Any:
    return (
        {k: v.to(device) for k, v in batch.items()} if isinstance(batch, dict) else batch.to(device)
    )


def images(count: int, shape: tuple[int, ...], batch: int, classes: int = 10) -> list[Any]:
    """Smooth random images with random labels, on the host."""
    generator = torch.Generator().manual_seed(0)
    return [
        (x, torch.randint(0, classes, (len(x),), generator=generator))
        for x in layer_costs.images(count, shape, batch)()
    ]


# -- cases ---------------------------------------------------------------------------------------


@case("peak")
def peak(bench: Bench) -> dict[str, Any]:
    """Operations a second of a large matrix product, which shares are of; and of a Cholesky factorisation."""
    out = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        n = bench.size(8192, 512)
        a = torch.randn(n, n, device=bench.device).to(dtype)
        out[str(dtype)[6:]] = 2 * n**3 / bench.seconds(lambda a=a: a @ a)
    a = torch.randn(n, n, device=bench.device, dtype=torch.float64)
    a = a @ a.T + n * torch.eye(n, device=bench.device, dtype=torch.float64)
    out["cholesky"] = n**3 / 3 / bench.seconds(lambda: torch.linalg.cholesky(a))
    return out


@case("nccl")
def nccl(bench: Bench) -> dict[str, Any]:
    """Exchanges of a process group over NCCL (one process has one card: they go through its memory)."""
    import torch.distributed as dist

    from nullbayes.common.processes import Processes

    if bench.device.type != "cuda":
        return {"skipped": "no GPU"}
    with torch.cuda.device(bench.device):
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
        try:
            processes = Processes(dist.group.WORLD, default=True)
            x = torch.randn(10_000, 1000, device=bench.device)
            before = x.clone()
            with processes.call("benchmark"):
                same = bool(torch.equal(processes.sum_(x), before))
                same &= bool(torch.equal(processes.give_(x), before))
                same &= bool(torch.equal(processes.joined(x, 0), before))
                seconds = bench.seconds(lambda: processes.sum_(x))
            return {"same": same, "sum of 40 MB": seconds, "backend": "nccl"}
        finally:
            dist.destroy_process_group()


def trained(bench: Bench, examples: int) -> tuple[nn.Module, list[Any]]:
    epochs = bench.size(3, 0)
    model, x, y = common.trained_lenet(examples, epochs, device=bench.device)
    size = 500 if examples >= 500 else 50
    return model, list(zip(x.split(size), y.split(size), strict=True))


def _lenet(bench: Bench, examples: int, **options: Any) -> dict[str, Any]:
    model, data = trained(bench, examples)
    found: dict[str, Any] = bench.rows(
        lambda: nb.NullSpacePosterior(model, **options), data, count=examples <= 1000
    )
    return found


@case("LeNet, 1,000 images")
def _(bench: Bench) -> dict[str, Any]:
    return _lenet(bench, bench.size(1000, 50))


@case("LeNet, 4,000 images")
def _(bench: Bench) -> dict[str, Any]:
    return _lenet(bench, bench.size(4000, 60))


@case("ResNet-18, 500 images")
def _(bench: Bench) -> dict[str, Any]:
    torch.manual_seed(0)
    model = resnet18().eval().to(bench.device)
    data = images(bench.size(500, 4), (3, 32, 32), bench.size(50, 2))
    found: dict[str, Any] = bench.rows(lambda: nb.NullSpacePosterior(model), data)
    return found


def swin(bench: Bench, classes: int) -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    config = SwinConfig(num_labels=classes, drop_path_rate=0.0)  # Swin-T at 224 × 224
    model: nn.Module = SwinForImageClassification(config).eval().to(bench.device)
    return model


@case("Swin-T, 224 × 224, 10 classes, losses of 300 images")
def _(bench: Bench) -> dict[str, Any]:
    model = swin(bench, 10)
    data = images(bench.size(300, 2), (3, 224, 224), bench.size(20, 1))
    found: dict[str, Any] = bench.rows(lambda: nb.NullSpacePosterior(model, preserve="loss"), data)
    return found


@case("Swin-T, 224 × 224, 1,000 classes, losses of 300 images")
def _(bench: Bench) -> dict[str, Any]:
    model = swin(bench, 1000)
    data = images(bench.size(300, 2), (3, 224, 224), bench.size(20, 1), 1000)
    found: dict[str, Any] = bench.rows(
        lambda: nb.NullSpacePosterior(model, preserve="loss"), data, count=False
    )
    return found


@case("Swin-T, 224 × 224, 10 classes, predictions of 60 images")
def _(bench: Bench) -> dict[str, Any]:
    model = swin(bench, 10)
    data = images(bench.size(60, 2), (3, 224, 224), bench.size(10, 1))
    found: dict[str, Any] = bench.rows(lambda: nb.NullSpacePosterior(model), data, count=False)
    return found


@case("layers of Swin-T, 224 × 224, 2,000 images")
def _(bench: Bench) -> dict[str, Any]:
    data = images(bench.size(2000, 2), (3, 224, 224), bench.size(50, 1))
    found: dict[str, Any] = bench.layers(swin(bench, 10), data)
    return found


@case("layers of LeNet, 60,000 images")
def _(bench: Bench) -> dict[str, Any]:
    model, data = trained(bench, bench.size(60_000, 100))
    found: dict[str, Any] = bench.layers(model, data)
    return found


@case("layers of ResNet-18, 20,000 images")
def _(bench: Bench) -> dict[str, Any]:
    torch.manual_seed(0)
    model = resnet18().eval().to(bench.device)
    data = images(bench.size(20_000, 4), (3, 32, 32), bench.size(250, 2))
    found: dict[str, Any] = bench.layers(model, data)
    return found


@case("language model of 0.6 billion weights, bfloat16, LoRA, 64 texts, four choices")
def _(bench: Bench) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = bench.small
    config = LlamaConfig(
        vocab_size=512 if small else 32000, hidden_size=32 if small else 1536,
        intermediate_size=64 if small else 4096, num_hidden_layers=2 if small else 20,
        num_attention_heads=4 if small else 16, num_key_value_heads=2 if small else 8,
    )  # fmt: skip
    with torch.device(bench.device):
        base = LlamaForCausalLM(config).to(torch.bfloat16)
    adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, adapter, autocast_adapter_dtype=True).to(bench.device).eval()
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(bench.size(8, 1)):
        ids = torch.randint(8, config.vocab_size, (bench.size(8, 2), 48), generator=generator)
        answer = torch.randint(0, 4, (len(ids),), generator=generator)
        data.append(({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, answer))
    found: dict[str, Any] = bench.rows(
        lambda: nb.NullSpacePosterior(model, nb.Choices([4, 5, 6, 7])), data, count=False
    )
    found["weights"] = sum(p.numel() for p in model.parameters())
    return found


@case("LeNet, all 60,000 images, iterating to 1 %")
def _(bench: Bench) -> dict[str, Any]:
    solver = nb.solvers.ConjugateGradient(tolerance=0.01, max_iterations=400)
    return _lenet(bench, bench.size(60_000, 100), solver=solver)


# -- table ---------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """Markdown of what was measured."""
    peaks = found["rows"].get("peak", {})
    lines = [
        "# On a GPU",
        "",
        f"`python -m benchmarks.gpu --device {found['device']}`; {found['card']}, PyTorch {found['torch']}, commit "
        f"{found['commit']}. Seconds are of the wall clock, with the device's queue empty at both ends. A large matrix "
        "product there reaches "
        + ", ".join(f"{v / 1e12:.0f} TFLOP/s in {k}" for k, v in peaks.items() if k != "cholesky")
        + f"; a Cholesky factorisation in float64 {peaks.get('cholesky', 0) / 1e12:.1f}.",
        "",
        "| rows | weights | constraints | fit, s | rows, s | Gram, s | factorisation, s | projection, s | "
        "certificate, s | solver | residual | held | peak GB | rows reach, TFLOP/s | Gram reaches |",
        "|---" * 15 + "|",
    ]
    for name, r in found["rows"].items():
        if "stages" not in r:
            continue
        stages, counted = r["stages"], r.get("operations", {})
        reach = [
            f"{counted[s] / stages[s] / 1e12:.1f}" if counted.get(s) and stages.get(s) else ""
            for s in ("rows", "Gram")
        ]
        cells = [
            f"{stages.get(s, 0):.1f}"
            for s in ("rows", "Gram", "factorisation", "projection", "certificate")
        ]
        lines.append(
            f"| {name} | {r['parameters']:,} | {r['constraints']:,} | {r['fit']:.1f} | {' | '.join(cells)} | "
            f"{r['solver']} | {r['residual']:.1e} | {'yes' if r['held'] else 'no'} | "
            f"{r['memory'].get('peak', 0) / 1e9:.1f} | {' | '.join(reach)} |"
        )
    lines += [
        "",
        "| layers | examples | plain pass, s | fit, s | passes | held | peak GB |",
        "|---" * 7 + "|",
    ]
    for name, r in found["rows"].items():
        if "plain" in r:
            lines.append(
                f"| {name} | {r['examples']:,} | {r['plain']:.2f} | {r['fit']:.2f} | {r['fit'] / r['plain']:.1f} | "
                f"{'yes' if r['held'] else 'no'} | {r['memory'].get('peak', 0) / 1e9:.1f} |"
            )
    lines += ["", "| use | inputs | plain pass, ms | what | ms | passes |", "|---" * 6 + "|"]
    for name, r in found["rows"].items():
        for size, each in r.get("use", {}).items():
            lines += [
                f"| {name} | {size} | {1e3 * each['forward']:.2f} | {what} | {1e3 * value:.1f} | "
                f"{value / each['forward']:.1f} |"
                for what, value in each.items()
                if what != "forward"
            ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "gpu.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    bench, started = Bench(options.device, options.small), time.perf_counter()
    card = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    found: dict[str, Any] = {
        "device": options.device,
        "card": card,
        **common.environment(),
        "rows": {},
    }
    wanted = options.only or [""]
    names = dict.fromkeys(name for part in wanted for name in CASES if part in name)
    for name, run in ((name, CASES[name]) for name in names):
        if time.perf_counter() - started > options.seconds:
            break
        begun = time.perf_counter()
        try:
            found["rows"][name] = run(bench)
        except Exception as error:  # one row that fails leaves the others
            found["rows"][name] = {"error": repr(error), "where": traceback.format_exc()[-3000:]}
        gc.collect()
        print(f"{time.perf_counter() - begun:6.1f} s  {name}: {found['rows'][name]}", flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
