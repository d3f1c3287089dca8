"""What the audit costs beside the fit that it judges: the section "audit" of `results/reliability.md`.

python -m benchmarks.reliability [--repeats 3] [--cases ...]
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from benchmarks import common
from benchmarks.networks import Residual, swin_t
from nullbayes.common.files import atomic_file
from nullbayes.demo.models import lenet, seeded

PAGE = common.RESULTS / "reliability.md"
CLASSES = 10


def resnet() -> nn.Module:
    blocks = [Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 32, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)]
    return nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), *blocks, *head)


class Transformer(nn.Module):
    """Two encoder layers over sixteen tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(100, 48), nn.Embedding(16, 48)
        layer = nn.TransformerEncoderLayer(48, 4, 96, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.encoder(h).mean(1))


def images(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda count, generator: torch.randn(count, *shape, generator=generator)


def words(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(100, (count, 16), generator=generator)


#: name -> (network, its inputs, examples, samples)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, int, int]] = {
    "LeNet": (lambda: lenet(CLASSES), images(1, 28, 28), 1000, 30),
    "ResNet with BatchNorm": (resnet, images(1, 28, 28), 300, 30),
    "transformer": (Transformer, words, 500, 30),
    "Swin-T": (lambda: swin_t(CLASSES), images(3, 32, 32), 64, 8),
}
# Minutes each.
ONCE = ("Swin-T",)


def one(name: str) -> dict[str, Any]:
    """One fit in this process, after a first one that imports and compiles."""
    build, make, examples, samples = CASES[name]
    model = seeded(build, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    x = make(examples, generator)
    y = torch.randint(CLASSES, (examples,), generator=generator)
    batches = list(zip(x.split(100), y.split(100), strict=True))
    nb.NullSpacePosterior(model).fit(batches, 2, max_examples=4, progress=False)
    c = nb.NullSpacePosterior(model).fit(batches, samples, progress=False).certificate
    assert c.audit is not None
    assert c.audit.passed, c.audit
    return {
        "rows": c.constraints,
        "parameters": c.parameters,
        "examples": examples,
        "audited": c.audit.examples,
        "methods": list(c.audit.methods),
        "worst": c.audit.worst,
        "allowed": c.audit.allowed,
        "seconds": c.seconds,
        "audit": c.stages["audit"],
    }


def table(results: dict[str, list[dict[str, Any]]], environment: dict[str, Any]) -> str:
    lines = [
        f"`python -m benchmarks.reliability`; {environment['cores']} cores, {environment['threads']} thread, torch "
        f'{environment["torch"]}, commit {environment["commit"]}. Random data; `preserve="predictions"`, everything '
        "else as it comes. The audit's seconds are those of comparing every batch and of moving single examples; both "
        "are in `certificate.stages`. Medians of "
        f"{max(map(len, results.values()))} fits (Swin-T: one), each in a fresh process; *apart*: the largest "
        "difference between rows and single examples, as a share of what the prior would do to the example.",
        "",
        "| network | rows × weights | examples audited | apart | fit, s | audit, s | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        run = runs[0]
        seconds, audit = (statistics.median(r[key] for r in runs) for key in ("seconds", "audit"))
        share = statistics.median(r["audit"] / r["seconds"] for r in runs)
        lines.append(
            f"| {name} | {run['rows']:,} × {run['parameters']:,} | {run['audited']} of {run['examples']:,} by "
            f"{' and '.join(run['methods'])} | {max(r['worst'] for r in runs):.0e} | {seconds:.1f} | {audit:.2f} | "
            f"{100 * share:.1f} % |"
        )
    return "\n".join(lines)


def write_section(name: str, body: str) -> None:
    """Put ``body`` in the place of the page's section ``## name``, or at its end; all others stay."""
    text = PAGE.read_text() if PAGE.exists() else "# Reliability\n"
    section = f"## {name}\n\n{body.strip()}\n"
    found = re.search(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", text, flags=re.M | re.S)
    if found is None:
        text = f"{text.rstrip()}\n\n{section}"
    else:
        rest = text[found.end() :]
        text = text[: found.start()] + section + ("\n" + rest if rest else "")
    with atomic_file(PAGE) as part:
        part.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    results = {}
    for name in options.cases:
        repeats = 1 if name in ONCE else options.repeats
        results[name] = [common.fresh_process(one, name) for _ in range(repeats)]
        print(name, results[name], flush=True)
    write_section("audit", table(results, common.environment()))


if __name__ == "__main__":
    main()
