"""What serving a posterior costs, in forward passes of its network: one input and 32, exact and from samples, loading.

    python -m benchmarks.serving [--networks lenet residual swin encoder packed lora] [--samples 30] [--examples 8]

Each network has a process of its own with one thread; seconds are those of its processor, the least of several in
turns. Weights are random and examples few, so that fits are short: what a prediction costs does not depend on what the
samples are. Exact novelty costs more with more examples. ``layers`` is the score ``"leverage"`` of a layer null space.
``packed`` is the encoder with ``compact(dtype=torch.int8)``, ``lora`` the encoder with an adapter, whose weights alone
move. Rows of networks that are not asked for stay in the results as they are.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from benchmarks import common, networks
from benchmarks.distil import residual
from benchmarks.language import encoder, with_lora
from nullbayes.demo.models import lenet
from nullbayes.posterior.novelty import exact_pays

BATCHES = (1, 32)
LENGTHS = (24, 64)
# Weights from which memory can be told in sizes of the network.
LARGE = 1_000_000
# Samples are drawn so many at a time: drawing takes several times their memory.
AT_ONCE = 6
NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet": ("LeNet", lambda: lenet(10), (1, 28, 28)),
    "residual": ("residual network", residual, (1, 28, 28)),
    "swin": ("Swin-T, 32 × 32", networks.swin_t, (3, 32, 32)),
    "encoder": ("encoder", encoder, LENGTHS),
    "packed": ("encoder, samples in 8 bits", encoder, LENGTHS),
    "lora": ("encoder with LoRA, r = 8", lambda: with_lora(encoder()), LENGTHS),
}
Run = Callable[[], Any]


def outputs_of(model: nn.Module, x: Any) -> Tensor:
    found = model(**x) if isinstance(x, dict) else model(x)
    return found if isinstance(found, Tensor) else found.logits


def lengths_of(name: str) -> tuple[int, ...] | tuple[None]:
    """How long the texts are; None where inputs are images."""
    return LENGTHS if NETWORKS[name][2] is LENGTHS else (None,)


def inputs(name: str, count: int, length: int | None) -> Any:
    generator = torch.Generator().manual_seed(count)
    if length is None:
        return torch.rand(count, *NETWORKS[name][2], generator=generator)
    ids = torch.randint(1000, 30000, (count, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def in_turns(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    """The least processor seconds of each, for about so long."""
    found = dict.fromkeys(runs, float("inf"))
    began, rounds = time.process_time(), 0
    # The first calls may prove rows of inputs unlike those before.
    while rounds < 2 or time.process_time() - began < seconds:
        rounds += 1
        for name, run in runs.items():
            started = time.process_time()
            run()
            found[name] = min(found[name], time.process_time() - started)
    return found


def resident() -> int:
    """Bytes of memory of this process that are there."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("VmRSS:")[1].split()[0])


def fitted(model: nn.Module, x: Any, options: dict[str, Any]) -> nb.NullSpacePosterior:
    """Fitted to ``x``, or loaded where a folder holds one of an earlier run; in 8 bits if it shall be."""
    posterior = _fitted(model, x, options)
    return posterior.compact(dtype=torch.int8) if options["packed"] else posterior


def _fitted(model: nn.Module, x: Any, options: dict[str, Any]) -> nb.NullSpacePosterior:
    if options["loaded"]:
        model.load_state_dict(torch.load(options["file"] + ".pt"))
        found = nb.load(options["file"], model, forward=outputs_of, mmap=True)
        assert isinstance(found, nb.NullSpacePosterior)
        return found
    posterior = nb.NullSpacePosterior(model, prior_precision=1e4, forward=outputs_of)
    few, y = min(AT_ONCE, options["samples"]), torch.arange(options["examples"]) % 4
    posterior.fit([(x, y)], few, progress=False, audit=1)
    while posterior.num_samples < options["samples"]:
        posterior.draw(min(few, options["samples"] - posterior.num_samples))
    return posterior


def measure(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Fit, time, and save."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, lengths = NETWORKS[name][1]().eval(), lengths_of(name)
    x = inputs(name, options["examples"], lengths[0])
    posterior = fitted(model, x, options)
    layers = nb.LayerNullSpacePosterior(model, forward=outputs_of).fit([x], progress=False)
    state, rows = posterior._fit.state, []  # type: ignore[union-attr]
    outputs = outputs_of(model, x)[0].numel()
    for length in lengths:
        for size in BATCHES:
            some = inputs(name, size, length)

            def forward(some: Any = some) -> None:
                with torch.no_grad():
                    outputs_of(model, some)

            runs: dict[str, Run] = {
                "forward": forward,
                "predict": lambda some=some: posterior.predict(some),
                "sampled": lambda some=some: posterior.novelty(some, exact=False),
                "layers": lambda some=some: layers.novelty(some, "leverage"),
            }
            if state is not None:
                runs["exact"] = lambda some=some: posterior.novelty(some, exact=True)
            found = in_turns(runs, options["seconds"])
            rows.append({"length": length, "size": size, "seconds": found})
    if not options["loaded"] or options["packed"]:
        options["file"] = options["kept"]
        posterior.save(options["file"])
        torch.save(model.state_dict(), options["file"] + ".pt")
    pays = state is not None and exact_pays(state, outputs, options["samples"])
    return {
        "network": name,
        "weights": posterior.space.total,
        "samples": posterior.num_samples,
        "sample_bytes": posterior._fit.stored.nbytes,  # type: ignore[union-attr]
        "rows": posterior.certificate.constraints,
        "chosen": "exact" if pays else "sampled",
        "timed": rows,
    }


def loading(name: str, file: str, mmap: bool) -> dict[str, Any]:
    """Seconds and memory of loading, then of the first prediction and of later ones."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = NETWORKS[name][1]().eval()
    model.load_state_dict(torch.load(file + ".pt", mmap=True))
    x = inputs(name, 1, lengths_of(name)[0])
    outputs_of(model, x)
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    before, started = resident(), time.perf_counter()
    posterior = nb.load(file, model, forward=outputs_of, mmap=mmap)
    found = {"mmap": mmap, "model_bytes": size, "seconds": time.perf_counter() - started}
    found["loaded_bytes"] = resident() - before
    started = time.perf_counter()
    posterior.predict(x)
    found["first_seconds"] = time.perf_counter() - started
    found["used_bytes"] = resident() - before
    return found


def table(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        "# Serving: what a posterior costs beside its network",
        "",
        f"{options.samples} samples of fits to {options.examples} examples, random weights, one thread "
        '(rows "loaded": of a fit to 8 texts of up to 48 tokens, read from its file). '
        "Milliseconds of a plain forward pass, all else in such passes. *Layers* is the score `leverage` of a layer "
        "null space, which needs no rows and no samples. *Chosen* is what `novelty` takes by itself, and how many "
        "times as long as the other way that is.",
        f"`python -m benchmarks.serving --samples {options.samples} --examples {options.examples}`",
        "",
        "| network | weights | inputs | forward, ms | predict | novelty, samples | novelty, exact | chosen | layers |",
        "|---" * 9 + "|",
    ]
    for r in results:
        for row in r["timed"]:
            s = row["seconds"]
            passes = {k: v / s["forward"] for k, v in s.items()}
            kind = f", {row['length']} tokens" if row["length"] else ""
            other = "sampled" if r["chosen"] == "exact" else "exact"
            exact, choice = "", "sampled (loaded)"
            if "exact" in s:
                exact, choice = (
                    f"{passes['exact']:.1f}",
                    f"{r['chosen']}, {s[r['chosen']] / s[other]:.2f}",
                )
            lines.append(
                f"| {NETWORKS[r['network']][0]}{kind} | {r['weights']:,} | {row['size']} | "
                f"{1e3 * s['forward']:.2f} | {passes['predict']:.1f} | {passes['sampled']:.1f} | "
                f"{exact} | {choice} | {passes['layers']:.1f} |"
            )
    lines += [
        "",
        "Loading in a fresh process, one input after it: resident memory beside what the process held with the "
        "network, in sizes of the network.",
        "",
        "| network | samples, MB | `mmap=` | load, s | memory, loaded | first prediction, s | memory, used |",
        "|---" * 7 + "|",
    ]
    for r in results:
        size = r.get("sample_bytes", r["weights"] * r["samples"] * 4) / 1e6
        if r["weights"] < LARGE:
            continue  # what Python allocates is more than the network
        for found in r["loading"]:
            one = found["model_bytes"]
            lines.append(
                f"| {NETWORKS[r['network']][0]} | {size:.0f} | {found['mmap']} | {found['seconds']:.2f} | "
                f"{found['loaded_bytes'] / one:.2f} | {found['first_seconds']:.2f} | {found['used_bytes'] / one:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, help="keeps the posteriors, and loads those it has")
    options = parser.parse_args()
    asked = {k: v for k, v in vars(options).items() if k != "folder"}
    known = common.RESULTS / "serving.json"
    before = json.loads(known.read_text())["results"] if known.exists() else []
    results = [r for r in before if r["network"] in NETWORKS]
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            kept = options.folder or Path(folder)
            packed, file = name == "packed", str(kept / f"{name}.safetensors")
            path = kept / f"{'encoder' if packed else name}.safetensors"
            given = {**asked, "file": str(path), "loaded": path.exists(), "packed": packed}
            found = common.fresh_process(measure, name, {**given, "kept": file})
            found["loading"] = [
                common.fresh_process(loading, name, file, mmap) for mmap in (False, True)
            ]
        results = [r for r in results if r["network"] != name] + [found]
        results.sort(key=lambda r: list(NETWORKS).index(r["network"]))
        print(found, flush=True)
        page = {"results": results, "options": asked, "environment": common.environment()}
        notes = common.notes_of(common.RESULTS / "serving.md")
        text = table(results, options) + (f"\n{notes}\n" if notes else "")
        print(common.write_results("serving", page, text), flush=True)


if __name__ == "__main__":
    main()
