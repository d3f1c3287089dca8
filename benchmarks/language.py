"""What a posterior of a fine-tuned encoder costs: 22.7 million weights, or a low-rank adapter on them.

    python -m benchmarks.language [--texts 8] [--more 0] [--many 0] [--samples 10] [--length 48] [--before CHECKOUT]
                                  [--only NAME ...]

The encoder has the sizes of a small sentence transformer (vocabulary 30,522, width 384, six layers, twelve heads),
random weights, four classes, texts of random tokens: time and memory do not depend on what it knows. Each fit is a
fresh process with one thread. Seconds are those of its processor, so that what else runs on the machine does not count.

``--before`` names a checkout of an earlier version, whose code then runs the same cases on ``--texts`` texts. As many
as ``--more`` says are fitted with all weights, as ``--many`` says with an adapter. ``--only``: these cases, beside
those that the results have already.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from benchmarks import common
from nullbayes.common.memory import peak_bytes

SIZES = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "num_labels": 4,
}
BATCH = 16
SHORTEST = 16
ALL, LORA, HALF_BASE = "all weights", "LoRA, r = 8", "LoRA, r = 8, bfloat16 base"
HALF_SAMPLES = "all weights, samples in bfloat16"
#: stages of a fit: those that make it, and those that judge it
MAKE = ("Jacobian rows", "Gram matrix, QR", "prior precision", "factorisation", "projection")
JUDGE = ("certificate", "audit")


def encoder() -> nn.Module:
    """Untrained, on the CPU. Exits where transformers is missing."""
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError as error:
        raise SystemExit(
            "benchmarks.language needs transformers: pip install transformers"
        ) from error
    model: nn.Module = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    return model


def with_lora(model: nn.Module, rank: int = 8) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SystemExit("benchmarks.language needs peft: pip install peft") from error
    options: dict[str, Any] = {
        "task_type": "SEQ_CLS",
        "r": rank,
        "target_modules": ["query", "value"],
        "init_lora_weights": False,
    }
    adapted: nn.Module = get_peft_model(model, LoraConfig(**options)).eval()
    return adapted


def texts(count: int, length: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (count, length), generator=generator)
    lengths = torch.randint(SHORTEST, length + 1, (count,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.arange(count) % 4}
    return [{k: v[i : i + BATCH] for k, v in batch.items()} for i in range(0, count, BATCH)]


@dataclass(frozen=True)
class Case:
    """One fit: what moves, of how many texts of how many tokens at most, and how many samples."""

    name: str
    texts: int
    samples: int
    length: int
    before: bool = False


def measured(case: Case) -> dict[str, Any]:
    """The fit in this process: seconds of each stage, and of a forward pass."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    time.perf_counter = time.process_time  # stages by the processor's clock, in this process
    model, data = encoder(), texts(case.texts, case.length)
    if "LoRA" in case.name:
        model = with_lora(model.bfloat16() if case.name == HALF_BASE else model)
    stored = {"sample_dtype": torch.bfloat16} if case.name == HALF_SAMPLES else {}
    started = time.process_time()
    with torch.no_grad():
        for batch in data:
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
    forward, started = time.process_time() - started, time.process_time()
    posterior = nb.NullSpacePosterior(model).fit(data, case.samples, progress=False, **stored)
    total, certificate = time.process_time() - started, posterior.certificate
    return {
        "weights": certificate.parameters,
        "rows": certificate.constraints,
        "solver": certificate.solver,
        "held": certificate.held,
        "forward": forward,
        "total": total,
        "stages": dict(certificate.stages),
        "peak_bytes": peak_bytes(torch.device("cpu")),
    }


def elsewhere(case: Case, checkout: Path) -> dict[str, Any]:
    """:func:`measured` in a new process, with the library of ``checkout``."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(asdict(case))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name} failed in its own process: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return asdict(case) | found


def table(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The results as a page."""
    names = [n for n in (*MAKE, *JUDGE) if any(r["stages"].get(n, 0) >= 0.05 for r in results)]
    lines = [
        "# Language models: what a fit costs",
        "",
        f"An encoder with the sizes of a small sentence transformer, texts of {SHORTEST} to {options.length} tokens "
        f"padded to {options.length}, four classes, {options.samples} samples. Processor seconds of one thread, each "
        "fit in a process of its own: on an idle machine no fit takes longer than that. Memory is the peak of the "
        'process, the encoder and its libraries included. "Before" is an earlier version of the library.',
        f"`python -m benchmarks.language --texts {options.texts} --more {options.more} --many {options.many} "
        f"--samples {options.samples} --length {options.length} --before CHECKOUT`",
        "",
        "| | texts | weights that move | rows | one forward pass | fit | "
        + " | ".join(names)
        + " | judged / made | peak GB |",
        "|" + "---|" * (len(names) + 8),
    ]
    for r in results:
        stages = r["stages"]
        made, judged = (sum(stages.get(n, 0.0) for n in part) for part in (MAKE, JUDGE))
        cells = [
            r["name"] + (", before" if r["before"] else ""),
            str(r["texts"]),
            f"{r['weights']:,}",
            str(r["rows"]),
            f"{r['forward']:.1f} s",
            f"{r['total']:.1f} s",
            *(f"{stages.get(n, 0.0):.1f}" for n in names),
            f"{judged / made:.2f}",
            f"{r['peak_bytes'] / 1e9:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cases(options: argparse.Namespace) -> list[Case]:
    size = (options.samples, options.length)
    out = []
    for name in (ALL, HALF_SAMPLES, LORA, HALF_BASE):
        if options.before is not None:
            out.append(Case(name, options.texts, *size, before=True))
        out.append(Case(name, options.texts, *size))
    out += [Case(LORA, options.many, *size)] if options.many else []
    out += [Case(ALL, options.more, *size)] if options.more else []
    return [c for c in out if options.only is None or c.name in options.only]


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("name", "texts", "samples", "length", "before"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--more", type=int, default=0)
    parser.add_argument("--many", type=int, default=0)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--only", nargs="+", choices=(ALL, HALF_SAMPLES, LORA, HALF_BASE))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(Case(**json.loads(options.one)))))
        return
    here, results = Path(__file__).resolve().parent.parent, []
    asked = {k: v for k, v in vars(options).items() if k not in ("before", "one")}
    known = common.RESULTS / "language.json"
    if options.only and known.exists():
        results = json.loads(known.read_text())["results"]
    for case in cases(options):
        found = elsewhere(case, options.before if case.before else here)
        print(found, flush=True)
        places = [i for i, r in enumerate(results) if _key(r) == _key(found)]
        if places:
            results[places[0]] = found
        else:
            results.append(found)
        page = {"results": results, "options": asked, "environment": common.environment()}
        written = common.write_results("language", page, table(results, options))
    print(written)


if __name__ == "__main__":
    main()
