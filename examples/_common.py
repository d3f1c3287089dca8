"""What the examples share: the command line, pictures, figures as JSON, and whether training losses stand."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes import metrics
from nullbayes.likelihood.helpers import mirrored

DOCS = Path(__file__).parent.parent / "docs" / "assets"
LARGEST_PICTURE = 300_000  # bytes of a PNG in the documentation
ALLOWED = 1e-3  # relative change of the mean training loss
Batches = Sequence[tuple[Any, Tensor]]

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def options(words: str | None) -> argparse.Namespace:
    """``small``, ``docs`` and ``out`` from the command line."""
    parser = argparse.ArgumentParser(
        description=words, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--docs", action="store_true", help=f"pictures to {DOCS} too")
    parser.add_argument("--out", type=Path, default=Path("out/examples"))
    return parser.parse_args()


def trained(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    *,
    examples: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """Train ``model`` in place: AdamW, one-cycle schedule. ``loss(index)``: mean loss of these examples."""
    optimiser = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    steps = epochs * math.ceil(examples / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(examples, generator=order).split(batch_size):
            optimiser.zero_grad()
            loss(index).backward()
            optimiser.step()
            schedule.step()
    return model.eval()


@contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Seconds of the block inside, as ``seconds[name]``."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


class Draws:
    """Linearised outputs of a posterior's samples, predicted once and good for any prior precision.

    Args:
        batches: ``(inputs, targets)`` pairs, or mappings with ``labels``.
    """

    def __init__(self, posterior: nb.NullSpacePosterior, batches: Iterable[Any]) -> None:
        self.posterior, self.likelihood = posterior, posterior.likelihood
        self.batches = [parted(batch) for batch in batches]
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for inputs, targets in self.batches:
            prediction = posterior.predict(inputs)
            unit = (prediction.outputs - prediction.point) * posterior.prior_precision**0.5
            self.parts.append((prediction.point, unit, targets))

    def at(self, alpha: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """``point (B, *out)``, ``f + J Δ (S, B, *out)`` and targets of each batch."""
        for point, unit, targets in self.parts:
            yield point, point + unit * alpha**-0.5, targets


class LossCheck:
    """Do the losses of these training examples stand? All changes are relative to their mean loss.

    ``first_order``: RMS over examples and samples of what ``preserve="loss"`` rules out, ``gᵀ J Δ``.
    ``samples``: mean change of ``ℓ(f + J Δ)``, so with the second order in the outputs.
    ``predictive``: change of the posterior predictive's own loss, ``-log mean_s exp(-ℓ_s)``.
    ``network``: mean change of ``ℓ(f(θ̂ + Δ))``, the sampled network.
    """

    def __init__(self, draws: Draws) -> None:
        self.draws, self.likelihood = draws, draws.likelihood
        self.losses = torch.cat([self.likelihood.loss(f, y) for f, _, y in draws.parts]).double()
        self.mean = float(self.losses.mean())

    def _changes(self, alpha: float) -> tuple[float, float]:
        """``samples`` and ``predictive``."""
        mean, predictive = 0.0, 0.0
        for point, moved, targets in self.draws.at(alpha):
            both = mirrored(moved, point)
            losses = torch.stack([self.likelihood.loss(draw, targets) for draw in both]).double()
            mean += float(losses.mean(0).sum())
            predictive += float((math.log(len(losses)) - (-losses).logsumexp(0)).sum())
        total = float(self.losses.sum())
        return mean / total - 1, predictive / total - 1

    def changes(self, network: int = 64) -> dict[str, float]:
        """At the posterior's prior precision; the network itself on its first ``network`` examples."""
        posterior = self.draws.posterior
        alpha = posterior.prior_precision
        square, count = 0.0, 0
        for point, unit, targets in self.draws.parts:
            gradient = self.likelihood.loss_gradient(point, targets)
            first = (unit * gradient).flatten(2).sum(2).double() * alpha**-0.5
            square, count = square + float(first.square().sum()), count + first.numel()
        samples, predictive = self._changes(alpha)
        before, after, seen = 0.0, 0.0, 0
        for inputs, targets in self.draws.batches:
            if seen >= network:
                break
            moved = posterior.predict(inputs, method="sampled")
            before += float(self.likelihood.loss(moved.point, targets).double().sum())
            losses = [self.likelihood.loss(draw, targets).double().sum() for draw in moved.outputs]
            after += float(torch.stack(losses).mean())
            seen += len(targets)
        return {
            "mean_loss": self.mean,
            "first_order": math.sqrt(square / count) / self.mean,
            "samples": samples,
            "predictive": predictive,
            "network": after / before - 1,
        }

    def least_precision(self, start: float, allowed: float = ALLOWED) -> float:
        """``start``, or the least larger prior precision at which the mean loss of samples stands."""

        def stands(alpha: float) -> bool:
            return abs(self._changes(alpha)[0]) <= allowed

        low = high = start
        while not stands(high):
            low, high = high, 4 * high
        while high / low > 1.05:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if stands(middle) else (middle, high)
        return high


def scales(
    posterior: nb.NullSpacePosterior, check: LossCheck, validation: Iterable[Any]
) -> dict[str, float]:
    """Prior precisions to look at: as fitted, where every training loss stands, best on validation data.

    The posterior is left at the last of them.
    """
    fitted = posterior.prior_precision
    kept = check.least_precision(fitted)
    posterior.calibrate(validation, progress=False)
    return {"fitted": fitted, "loss kept": kept, "calibrated": posterior.prior_precision}


def parted(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and targets of a batch: a pair, or a mapping with ``labels``."""
    if isinstance(batch, dict):
        return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    inputs, targets = batch
    return inputs, targets


def write_figures(name: str, figures: dict[str, Any], out: Path) -> Path:
    """``out/<name>.json``, written whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{name}.json"
    temporary = target.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(figures, indent=1) + "\n")
    temporary.replace(target)
    return target


def save_picture(figure: Any, name: str, out: Path, docs: bool = False, dpi: int = 110) -> Path:
    """``out/<name>.png``, and the same in the documentation where ``docs``."""
    from matplotlib import pyplot

    for folder in (out, DOCS) if docs else (out,):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{name}.tmp.png"
        figure.savefig(temporary, dpi=dpi)
        size = temporary.stat().st_size
        if folder is DOCS and size > LARGEST_PICTURE:
            temporary.unlink()
            raise ValueError(
                f"{name}.png takes {size} bytes, more than {LARGEST_PICTURE}: draw less."
            )
        temporary.replace(folder / f"{name}.png")
    pyplot.close(figure)
    return out / f"{name}.png"


@contextmanager
def drawing() -> Iterator[Any]:
    """Matplotlib's pyplot, without a screen and in the house style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        yield pyplot


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def auroc(known: dict[str, Tensor], unknown: dict[str, Tensor]) -> dict[str, float]:
    """How well each score ``(N,)`` tells unknown inputs from known ones."""
    return {name: metrics.ood_metrics(known[name], unknown[name])["auroc"] for name in known}


def quality_table(figures: dict[str, Any], names: dict[str, str]) -> str:
    """Training and test figures of the network alone and at each prior precision."""
    columns = [f"{part} {name}" for part in ("train", "test") for name in names.values()]
    changes = ("first_order", "samples", "predictive", "network")
    rows = [["", "prior precision", *columns, *(c.replace("_", " ") for c in changes)]]

    def cells(found: dict[str, Any]) -> list[str]:
        return [f"{found[part][key]:.4f}" for part in ("train", "test") for key in names]

    rows.append(["network alone", "", *cells(figures["point"]), *[""] * len(changes)])
    for scale, found in figures["scales"].items():
        moved = [f"{found['training_loss'][key]:.1e}" for key in changes]
        rows.append([scale, f"{found['prior_precision']:.3g}", *cells(found), *moved])
    return table(rows)


def auroc_table(figures: dict[str, dict[str, float]]) -> str:
    """One line a kind, one column a score."""
    scores = list(next(iter(figures.values())))
    rows = [[kind, *(f"{found[s]:.3f}" for s in scores)] for kind, found in figures.items()]
    return table([["AUROC", *scores], *rows])


def seconds_line(seconds: dict[str, float]) -> str:
    """What took how long."""
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return f"seconds: {parts}; {sum(seconds.values()):.0f} in all"
