"""What a posterior of a fine-tuned encoder costs: 22.7 million weights, or a low-rank adapter on them.

    python -m benchmarks.language [--texts 8] [--samples 10] [--length 48]

The encoder has the sizes of a small sentence transformer (vocabulary 30,522, width 384, six layers, twelve heads),
random weights, four classes, texts of random tokens: time and memory do not depend on what it knows. Each fit is a
fresh process with one thread. Seconds are those of its processor, so that what else runs on the machine does not count.
Rows "as before" repeat products of the rows with the same vectors, sum squares in large pieces, capture the rows of the
examples that the certificate looks at once more, multiply those of one example at a time, and look at as many
examples as for small networks.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from benchmarks import common
from nullbayes.certificate import measure, row_changes
from nullbayes.jacobian import images
from nullbayes.jacobian.capture import checking
from nullbayes.jacobian.factors import outer
from nullbayes.solvers import norms

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
CASES = (
    "all weights, as before",
    "all weights",
    "LoRA, r = 8, as before",
    "LoRA, r = 8",
    "LoRA, r = 8, bfloat16 base",
)
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


def measured(case: str, count: int, samples: int, length: int) -> dict[str, Any]:
    """One fit in this process: seconds of each stage, and of a forward pass."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if case.endswith("before"):
        images.FROM, norms._COLUMNS = 1 << 62, 1 << 20
        row_changes.FROM, outer.ALONE = 1 << 62, 0
        measure.LARGE = checking.LARGE = 1 << 62
    time.perf_counter = time.process_time  # stages by the processor's clock, in this process
    model, data = encoder(), texts(count, length)
    if "LoRA" in case:
        model = with_lora(model.bfloat16() if "bfloat16" in case else model)
    started = time.process_time()
    with torch.no_grad():
        for batch in data:
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
    forward, started = time.process_time() - started, time.process_time()
    posterior = nb.NullSpacePosterior(model).fit(data, samples, progress=False)
    total, certificate = time.process_time() - started, posterior.certificate
    return {
        "case": case,
        "weights": certificate.parameters,
        "rows": certificate.constraints,
        "solver": certificate.solver,
        "held": certificate.held,
        "forward": forward,
        "total": total,
        "stages": dict(certificate.stages),
    }


def table(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The results as a page."""
    names = [n for n in (*MAKE, *JUDGE) if any(r["stages"].get(n, 0) >= 0.05 for r in results)]
    lines = [
        "# Language models: what a fit costs",
        "",
        f"An encoder with the sizes of a small sentence transformer, {options.texts} texts of {SHORTEST} to "
        f"{options.length} tokens, four classes, {options.samples} samples. Processor seconds of one thread, each fit "
        "in a process of its own; memory is the peak of the process, the encoder and its libraries included.",
        f"`python -m benchmarks.language --texts {options.texts} --samples {options.samples} "
        f"--length {options.length}`",
        "",
        "| | weights that move | rows | one forward pass | fit | "
        + " | ".join(names)
        + " | judged / made | peak GB |",
        "|" + "---|" * (len(names) + 7),
    ]
    for r in results:
        stages = r["stages"]
        made, judged = (sum(stages.get(n, 0.0) for n in part) for part in (MAKE, JUDGE))
        cells = [
            r["case"],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=48)
    options = parser.parse_args()
    results = []
    for case in CASES:
        size = (options.texts, options.samples, options.length)
        results.append(common.fresh_process(measured, case, *size))
        print(results[-1], flush=True)
    found = {"results": results, "options": vars(options), "environment": common.environment()}
    print(common.write_results("language", found, table(results, options)))


if __name__ == "__main__":
    main()
