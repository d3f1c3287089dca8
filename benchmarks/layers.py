"""The layer null space: exactness, cost, and data that come and go.

    python -m benchmarks.layers [--images 60000] [--before CHECKOUT]
    python -m benchmarks.layers --edges [--seeds 2]

``--edges``: AUROC of leverages at each edge on the tuning task (digits without 8 and 9, on three architectures), on
which the default edge and weighting were chosen. Beside its rivals it stands in ``experiments/layers``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from benchmarks import common, layer_costs, layer_exactness, layer_more
from nullbayes import datasets
from nullbayes.demo.models import digits_net
from nullbayes.metrics import ood_metrics
from nullbayes.posterior.layer_leverage import Leverages

DELTAS, DEFAULT = (1e-1, 1e-2, 1e-3), 1e-2
TUNING = (8, 9)
# Examples of each kind that are scored, and training examples of today's posterior.
SCORED, ROWS = 150, 100
BATCH = 250


class Encoder(nn.Module):
    """Two transformer layers over eight vectors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class Decoder(nn.Module):
    """Causal attention over tokens; the output layer is the table of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 96)
        self.mix = nn.MultiheadAttention(96, 4, batch_first=True)
        self.norm, self.out = nn.LayerNorm(96), nn.Linear(96, 60, bias=False)
        self.up, self.down = nn.Linear(96, 200), nn.Linear(200, 96)
        self.out.weight = self.table.weight

    def forward(self, t: Tensor) -> Tensor:
        h = self.table(t)
        n = self.norm(h)
        mask = torch.ones(t.shape[1], t.shape[1], dtype=torch.bool).triu(1)
        h = h + self.mix(n, n, n, attn_mask=mask, need_weights=False)[0]
        return self.out(h + self.down(torch.relu(self.up(h))))


class Reader(nn.Module):
    """Two LSTM layers over eight vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(80, 100, 2, batch_first=True), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def perceptron(inputs: int = 64, width: int = 128, classes: int = 10) -> nn.Module:
    layers = nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, classes))


def normed(inputs: int = 64, width: int = 128, classes: int = 10) -> nn.Module:
    first = nn.Linear(inputs, width), nn.LayerNorm(width), nn.GELU()
    second = nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()
    return nn.Sequential(nn.Flatten(), *first, *second, nn.Linear(width, classes))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, stride=2, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Conv2d(48, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "perceptron, 64-128-128-10": (perceptron, lambda: torch.randn(24, 64)),
    "perceptron, 64-1024-1024-10": (
        lambda: perceptron(width=1024),
        lambda: torch.randn(48, 64),
    ),
    "convolutions, batch norm": (conv_net, lambda: torch.randn(5, 3, 8, 8)),
    "transformer encoder": (Encoder, lambda: torch.randn(6, 8, 128)),
    "decoder, tied embedding": (Decoder, lambda: torch.randint(0, 40, (6, 8))),
    "LSTM": (Reader, lambda: torch.randn(8, 8, 80)),
}


def exactness(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Weights moved as far as the prior allows; training outputs and others, relative to their size."""
    torch.manual_seed(0)
    make, data = NETWORKS[name]
    model, x, other = make().to(dtype).eval(), data(), data()
    x, other = (
        t.to(dtype) if t.is_floating_point() else (t + 17 * i) % 60
        for i, t in enumerate((x, other))
    )
    likelihood = nb.Classification(class_axis=-1)
    posterior = nb.LayerNullSpacePosterior(model, likelihood, delta=0, prior_precision=1.0)
    posterior.fit(x, num_samples=4, progress=False)
    posterior.prior_precision = posterior._fitted().state.natural_precision
    certificate = posterior.certificate
    found = posterior.predict(other)
    off = (found.outputs - found.point).norm() / (4**0.5 * found.point.norm())
    return {
        "network": name,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": certificate.weight_change,
        "free": certificate.free_share,
        "training outputs": certificate.change,
        "other outputs": float(off),
        "held": certificate.held,
    }


# -- novelty -------------------------------------------------------------------------------------


def ours(model: nn.Module, train: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Scores of the layer posterior at each edge, plain leverages, and today's null-space posterior"""
    out: dict[str, Callable[[Tensor], Tensor]] = {}
    for delta in DELTAS:
        posterior = nb.LayerNullSpacePosterior(model, delta=delta)
        posterior.fit(train, progress=False)
        state = posterior._fitted().state
        plain = Leverages(state.functional, state.blocks, state.gathered, delta)

        def absolute(x: Tensor, scorer: Leverages = plain) -> Tensor:
            return scorer.means(x)[0].log().sum(1)

        def last(x: Tensor, scorer: Leverages = plain) -> Tensor:
            return scorer.means(x)[0][:, -1]

        out[f"plain leverage, last layer, δ={delta:g}"] = last
        out[f"plain leverage, δ={delta:g}"] = absolute
        out[f"leverage, δ={delta:g}"] = lambda x, p=posterior: p.novelty(x, "leverage")
        if delta == DEFAULT:
            out[f"information, δ={delta:g}"] = lambda x, p=posterior: p.novelty(x, "information")
    known = nb.NullSpacePosterior(model)
    labels = torch.zeros(ROWS, dtype=torch.long)
    known.fit(list(zip(train[:ROWS].split(50), labels.split(50), strict=True)), progress=False)
    out[f"NullSpacePosterior, {ROWS} examples"] = known.novelty
    return out


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        optimiser = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-4)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(64):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimiser.step()
    return model.eval()


def compare(
    model: nn.Module, train: Any, test: Tensor, shifted: dict[str, Tensor]
) -> dict[str, Any]:
    """AUROC of every score between ``test`` and each shifted set."""
    scores = ours(model, train.inputs)
    out: dict[str, Any] = {}
    for name, score in scores.items():
        inside = torch.cat([score(x) for x in test.split(BATCH)])
        for what, data in shifted.items():
            outside = torch.cat([score(x) for x in data.split(BATCH)])
            out.setdefault(name, {})[what] = ood_metrics(inside, outside)["auroc"]
    return out


def digits(pair: tuple[int, int], kind: str, seed: int) -> dict[str, Any]:
    data = datasets.digits(seed=seed)
    train, _ = datasets.hold_out_classes(data.train, pair)
    test, held = datasets.hold_out_classes(data.test, pair)
    makers = {
        "convolutions": digits_net,
        "perceptron": lambda c: perceptron(classes=c),
        "LayerNorm": lambda c: normed(classes=c),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = makers[kind](8)
    model = trained(model, train.inputs, train.targets, 30, seed)
    inputs = test.inputs[:SCORED]
    shifted = {
        "held-out classes": held.inputs[:SCORED],
        "rotated": datasets.rotated(inputs, 90),
        "noise": datasets.noise_like(inputs),
    }
    return compare(model, train, inputs, shifted)


# -- data come and go ----------------------------------------------------------------------------


def come_and_go() -> dict[str, float]:
    """Largest relative difference of samples and scores from a refit, float64."""
    torch.manual_seed(0)
    model, x = perceptron().double().eval(), torch.randn(500, 64, dtype=torch.float64)
    a, b = x[:300], x[300:]

    def fitted(data: Tensor) -> nb.LayerNullSpacePosterior:
        return nb.LayerNullSpacePosterior(model, prior_precision=100.0).fit(data, 4, progress=False)

    def gap(one: nb.LayerNullSpacePosterior, two: nb.LayerNullSpacePosterior) -> float:
        new = torch.randn(50, 64, dtype=torch.float64)
        pairs = [(one.novelty(new, s), two.novelty(new, s)) for s in ("leverage", "information")]
        pairs.append((one.predict(new).outputs, two.predict(new).outputs))
        return max(float((p - q).norm() / q.norm()) for p, q in pairs)

    return {
        "update": gap(fitted(a).update(b, progress=False), fitted(x)),
        "remove": gap(fitted(x).remove(b, progress=False), fitted(a)),
        "merged": gap(fitted(a).merged(fitted(b)), fitted(x)),
    }


# -- tables --------------------------------------------------------------------------------------


def mean_of(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        name: {what: sum(r[name][what] for r in runs) / len(runs) for what in runs[0][name]}
        for name in runs[0]
    }


def auroc_table(title: str, runs: list[dict[str, Any]]) -> list[str]:
    values = mean_of(runs)
    columns = list(next(iter(values.values())))
    lines = [
        "",
        f"## {title}",
        "",
        f"| score | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in values.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[c]:.3f}" for c in columns) + " |")
    return lines


QUALITY = [
    "",
    "## Quality",
    "",
    "Accuracy, NLL, ECE, joint NLL and AUROC beside rivals on every task of the evaluation and three new ones: "
    "`docs/evaluation/layers.md`, from `python -m experiments layers`.",
]


def report(results: dict[str, Any], command: str) -> str:
    lines = ["# The layer null space", "", f"`{command}`", "", "## Exactness, `delta=0`", ""]
    lines += [
        "Samples at the prior precision at which weights from the prior are as large as the trained ones. Changes are "
        "relative: of weights to their norm, of outputs to theirs, on training inputs and on others of the same kind.",
        "",
        "| network | dtype | directions free | weights change | training outputs | other outputs | held |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results["exactness"]:
        lines.append(
            f"| {r['network']} | {r['dtype']} | {100 * r['free']:.0f} % | {100 * r['weights']:.0f} % | "
            f"{r['training outputs']:.1e} | {r['other outputs']:.2g} | {'yes' if r['held'] else 'no'} |"
        )
    lines += layer_exactness.table(results["kinds"])
    lines += ["", "## Cost", "", *layer_costs.table(results["cost"])]
    lines += QUALITY
    lines += ["", "## Data come and go: relative difference from a refit, float64", ""]
    lines += [f"- {name}: {value:.1e}" for name, value in results["data"].items()]
    lines += layer_more.sections(results)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--before", type=Path, help="checkout of an earlier version")
    parser.add_argument("--edges", action="store_true", help="compare edges on the tuning digits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.edges:
        for kind in ("convolutions", "perceptron", "LayerNorm"):
            runs = [digits(TUNING, kind, seed) for seed in range(options.seeds)]
            print("\n".join(auroc_table(f"AUROC: {kind}", runs)), flush=True)
        return
    results: dict[str, Any] = {"environment": common.environment()}
    dtypes = (torch.float64, torch.float32)
    results["exactness"] = [exactness(name, dtype) for name in NETWORKS for dtype in dtypes]
    results["data"] = come_and_go()
    results["kinds"] = layer_exactness.by_kind()
    counts = layer_costs.DEFAULT | {"lenet": options.images}
    results["cost"] = layer_costs.all_costs(counts, options.before)
    results |= layer_more.earlier()
    command = f"python -m benchmarks.layers --images {options.images}"
    print(common.write_results("layers", results, report(results, command)))


if __name__ == "__main__":
    main()
