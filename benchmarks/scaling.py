"""How cost grows: time and memory of a whole fit against weights P, outputs O, examples N and samples S.

    python -m benchmarks.scaling [--quick] [--repeats 2] [--laws P O N S]

Each run is a fresh process, warmed up by a tiny fit so that imports on first use do not count. Exponents are least
squares of log y on log x over the medians of the repeats, with 95 % confidence intervals (t-distribution).
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

import nullbayes as nb
from benchmarks import common
from benchmarks.scaling_page import QUANTITIES, draw, report
from benchmarks.stages import forget_peak, peak_resident, stage_clock
from nullbayes.demo.models import lenet, seeded

# Mean entropy, in nats, that the last layer of the O law is scaled to: LeNet after one pass over
# Fashion-MNIST has 0.4, published ImageNet classifiers between 0.4 and 1. Two classes reach 0.69 at most.
ENTROPY = 0.5
SLOW = 25.0  # seconds: a point that takes longer is measured once
SMALLEST_MEMORY = 2**20  # growth of the peak below this is not resolved


# -- what is measured ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One fit: a network of a family at a size, and what is kept of it."""

    family: str
    size: int  # width, or the number of classes in the O law
    examples: int
    samples: int
    preserve: str = "predictions"
    directions: str | None = None
    sharp: bool = False  # last layer scaled to the entropy of a trained classifier


@dataclass(frozen=True)
class Kind:
    """What a line keeps, and of which predictions."""

    name: str
    preserve: str = "predictions"
    directions: str | None = None
    sharp: bool = False


@dataclass(frozen=True)
class Series:
    """One line of a law: the same fit at growing ``x``."""

    name: str
    problems: tuple[Problem, ...]
    x: str  # the field of a run that grows
    target: float | None = None


@dataclass(frozen=True)
class Law:
    """A quantity and the fits that it is varied in."""

    letter: str
    words: str
    fixed: str
    series: tuple[Series, ...]


def mlp(width: int) -> nn.Module:
    """784 → w → w → w → 10: about ``2 w²`` weights where w is large, 1e5 at 100 and 2.9e7 at 3,600."""
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(),
        nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip


def cnn(width: int) -> nn.Module:
    """Four convolutions, channels doubling as sides halve: about ``378 w²`` weights."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, padding=1), nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, 2, padding=1), nn.ReLU(),
        nn.Conv2d(4 * width, 8 * width, 3, 2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 8 * width, 10),
    )  # fmt: skip


def head(classes: int) -> nn.Module:
    """A body of 697,000 weights under a head of 65 a class: P grows by 9 % between 2 and 1,000 classes.

    Tanh, which is odd: features of independent inputs stay independent, so examples differ in their class.
    """
    return nn.Sequential(
        nn.Linear(784, 512), nn.Tanh(),
        nn.Linear(512, 512), nn.Tanh(),
        nn.Linear(512, 64), nn.Tanh(),
        nn.Linear(64, classes),
    )  # fmt: skip


FAMILIES: dict[str, Callable[[int], nn.Module]] = {"mlp": mlp, "cnn": cnn, "head": head}


def mean_entropy(logits: Tensor) -> float:
    log_p = logits.double().log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean())


@torch.no_grad()
def sharpen(model: nn.Sequential, x: Tensor, entropy: float) -> None:
    """Scale the last layer until the mean entropy over ``x`` is that of a trained classifier, by bisection."""
    logits, low, high = model(x), -4.0, 12.0  # of the logarithm of the scale
    for _ in range(50):
        middle = (low + high) / 2
        if mean_entropy(logits * math.exp(middle)) > entropy:
            low = middle
        else:
            high = middle
    last = model[-1]
    assert isinstance(last, nn.Linear)
    last.weight.mul_(math.exp(low))
    last.bias.mul_(math.exp(low))


def built(problem: Problem, trained: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Model and batches; LeNet and its images come from the file ``trained``."""
    n = problem.examples
    if problem.family == "lenet":
        stored = torch.load(trained, weights_only=True)
        model = lenet(10)
        model.load_state_dict(stored["model"])
        x, y = stored["x"][:n], stored["y"][:n]
    else:
        model = seeded(FAMILIES[problem.family], problem.size, seed=0)
        generator = torch.Generator().manual_seed(1)
        shape = (3, 16, 16) if problem.family == "cnn" else (784,)
        x = torch.randn(n, *shape, generator=generator)
        classes = problem.size if problem.family == "head" else 10
        y = torch.randint(classes, (n,), generator=generator)
        if problem.sharp:
            assert isinstance(model, nn.Sequential)
            sharpen(model, x, ENTROPY)
    return model.eval(), list(zip(x.split(64), y.split(64), strict=True))


def fitted(problem: Problem, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Any:
    posterior = nb.NullSpacePosterior(
        model,
        preserve=problem.preserve,
        directions=problem.directions,
        delta=0,
        prior_precision=1.0,
    )
    return posterior.fit(batches, num_samples=problem.samples, progress=False)


def measure(problem: Problem, trained: str) -> dict[str, Any]:
    """One fit, in a process that has done nothing else but a tiny one."""
    tiny = Problem("mlp", 8, 4, 2, problem.preserve, problem.directions)
    fitted(tiny, *built(tiny, trained))
    model, batches = built(problem, trained)
    forget_peak()
    before = peak_resident()
    with stage_clock() as stages:
        started, cpu = time.perf_counter(), time.process_time()
        posterior = fitted(problem, model, batches)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    after = peak_resident()
    c = posterior.certificate
    return {
        **asdict(problem),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "memory": max(after - before, SMALLEST_MEMORY),
        "stages": stages,
        "parameters": c.parameters,
        "constraints": c.constraints,
        "rows_per_example": c.constraints / c.examples,
        "rank": c.rank,
        "residual": c.residual,
        "iterations": c.iterations,
        "solver": c.solver,
    }


# -- the laws ------------------------------------------------------------------------------------


def series(
    kind: Kind,
    problems: Sequence[tuple[str, int, int, int]],
    x: str,
    target: float | None = None,
    prefix: str = "",
) -> Series:
    made = tuple(Problem(*p, kind.preserve, kind.directions, kind.sharp) for p in problems)
    return Series(prefix + kind.name, made, x, target)


def laws(quick: bool) -> list[Law]:
    """All of them; ``quick``: the lower half of each range."""

    def grid(values: Sequence[int]) -> Sequence[int]:
        return values[: -(-len(values) // 2)] if quick else values

    widths = grid((100, 170, 290, 490, 820, 1350, 2200, 3600))
    channels = grid((16, 25, 40, 64, 100, 160))
    classes = grid((2, 4, 10, 25, 60, 150, 400, 1000))
    examples = grid((32, 64, 128, 256, 512, 1024, 2048))
    samples = grid((1, 3, 10, 30, 100))
    every = Kind("predictions")
    sharp = Kind("predictions, confident", sharp=True)
    auto = Kind("predictions, auto", directions="auto", sharp=True)
    loss = Kind("loss", preserve="loss")
    confident_loss = Kind("loss", preserve="loss", sharp=True)

    return [
        Law(
            "P",
            "weights",
            "MLP: N = 64, O = 10, S = 5; CNN: N = 16, O = 10, S = 5",
            (
                series(every, [("mlp", w, 64, 5) for w in widths], "parameters", 1.05, "MLP, "),
                series(loss, [("mlp", w, 64, 5) for w in widths], "parameters", 1.05, "MLP, "),
                series(every, [("cnn", w, 16, 5) for w in channels], "parameters", 1.05, "CNN, "),
            ),
        ),
        Law(
            "O",
            "outputs",
            "N = 16, S = 10, P = 697,000 to 762,000",
            (
                series(every, [("head", o, 16, 10) for o in classes], "size", 2.0),
                series(sharp, [("head", o, 16, 10) for o in classes if o <= 150], "size"),
                series(auto, [("head", o, 16, 10) for o in classes], "size", 0.3),
                series(confident_loss, [("head", o, 16, 10) for o in classes], "size", 0.3),
            ),
        ),
        Law(
            "N",
            "examples",
            "LeNet, P = 61,706, O = 10, S = 10",
            (
                series(every, [("lenet", 0, n, 10) for n in examples], "examples"),
                series(loss, [("lenet", 0, n, 10) for n in examples], "examples"),
            ),
        ),
        Law(
            "S",
            "samples",
            "LeNet, P = 61,706, N = 256, O = 10",
            (
                series(every, [("lenet", 0, 256, s) for s in samples], "samples"),
                series(loss, [("lenet", 0, 256, s) for s in samples], "samples"),
            ),
        ),
    ]


def exponent(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Slope of log y on log x and half the width of its 95 % confidence interval."""
    logs = [math.log(v) for v in x], [math.log(v) for v in y]
    fit = stats.linregress(*logs)
    half = float(stats.t.ppf(0.975, len(x) - 2) * fit.stderr) if len(x) > 2 else math.nan
    return {
        "slope": float(fit.slope),
        "half_width": half if math.isfinite(half) else None,
        "intercept": float(fit.intercept),
        "points": len(x),
    }


def fitted_law(points: Sequence[dict[str, Any]], quantity: str) -> dict[str, Any]:
    """The exponent over all points, and over the upper half of the range in log x (three points at least)."""
    x, y = [p["x"] for p in points], [p[quantity] for p in points]
    middle = math.sqrt(x[0] * x[-1])
    start = min(sum(v < middle for v in x), max(0, len(x) - 3))
    return {
        "whole": exponent(x, y),
        "upper": exponent(x[start:], y[start:]),
        "last": math.log(y[-1] / y[-2]) / math.log(x[-1] / x[-2]),
        "from": x[start],
    }


# -- running and reporting -----------------------------------------------------------------------


def run_series(chosen: Series, repeats: int, trained: str) -> dict[str, Any]:
    runs: list[list[dict[str, Any]]] = [[] for _ in chosen.problems]
    for _ in range(repeats):  # all points in turn: a disturbance does not fall on one of them
        for problem, done in zip(chosen.problems, runs, strict=True):
            if done and done[0]["seconds"] > SLOW:
                continue
            done.append(common.fresh_process(measure, problem, trained))
            last = done[-1]
            print(
                f"  {chosen.name}: {chosen.x} {last[chosen.x]:,}: {last['seconds']:.2f} s, "
                f"{last['memory'] / 2**20:.0f} MB",
                flush=True,
            )
    points = []
    for done in runs:
        # The lower median is a run that took place: its stages add up.
        medians = {key: statistics.median_low(r[key] for r in done) for key in QUANTITIES}
        middle = next(r for r in done if r["seconds"] == medians["seconds"])
        points.append({"x": done[0][chosen.x], "repeats": len(done), **middle, **medians})
    return {
        "name": chosen.name,
        "target": chosen.target,
        "points": points,
        "laws": {q: fitted_law(points, q) for q in QUANTITIES},
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--laws", nargs="+", default=list("PONS"), choices=list("PONS"))
    parser.add_argument("--quick", action="store_true", help="the lower half of each range, once")
    parser.add_argument("--name", default=None, help="of the files under benchmarks/results")
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    name = options.name or ("scaling_quick" if options.quick else "scaling")
    started = time.perf_counter()
    chosen = [law for law in laws(options.quick) if law.letter in options.laws]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        trained = str(Path(folder) / "lenet.pt")
        if any(p.family == "lenet" for law in chosen for s in law.series for p in s.problems):
            model, x, y = common.trained_lenet(2048, epochs=1)
            torch.save({"model": model.state_dict(), "x": x.clone(), "y": y.clone()}, trained)
        for law in chosen:
            print(f"{law.letter}, {law.words}: {law.fixed}", flush=True)
            runs = [run_series(s, repeats, trained) for s in law.series]
            results.append(
                {"letter": law.letter, "words": law.words, "fixed": law.fixed, "series": runs}
            )
    seconds = time.perf_counter() - started
    table = report(results, seconds, ENTROPY)
    print(table)
    record = {"laws": results, "seconds": seconds, "environment": common.environment()}
    written = common.write_results(name, record, table)
    draw(results, written.with_suffix(".png"))
    print(written)


if __name__ == "__main__":
    main()
