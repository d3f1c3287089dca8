"""Cost of a fit against the size of the output, 16 to 65,536 values an example, at fixed weights.

    python -m benchmarks.outputs [--quick] [--repeats 3]

Two networks whose weights do not depend on the output's size. `upsampled`: the body works at 16 × 16 and its picture is
resized without weights, so that the network itself costs nearly the same at every size. `coordinates`: one small
decoder is asked for every pixel, so that the network's own cost is proportional to the size. What a fit costs beyond
the network's own passes is the excess: its CPU seconds less those spent inside the network's forward (plain, recorded,
and in forward mode for the certificate; measured by hooks during the fit) and less one ordinary backward pass, timed
beforehand, for every example that the fit differentiates.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import nullbayes as nb
from benchmarks import common
from benchmarks.scaling import exponent
from benchmarks.scaling_page import COLOURS, plain_tick, slope_text
from benchmarks.stages import forget_peak
from nullbayes.common.memory import peak_bytes
from nullbayes.demo.models import seeded

EXAMPLES, SAMPLES = 16, 5
TARGET = 0.1
MEGABYTE = 2**20
PASSES = ("forward", "backward", "tangent")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Problem:
    """One fit: a network, the side of its square output, and what is kept."""

    network: str
    side: int
    preserve: str = "loss"


@dataclass(frozen=True)
class Series:
    """One line: the same fit at growing sides."""

    network: str
    preserve: str
    sides: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.network}, {self.preserve}"


# -- networks ------------------------------------------------------------------------------------


class Upsampled(nn.Module):
    """784 values to a 16 × 16 picture, resized to side × side: 1,330,000 weights, whatever the side."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.body = nn.Sequential(
            nn.Linear(784, 512), nn.SiLU(),
            nn.Linear(512, 512), nn.SiLU(),
            nn.Linear(512, 2048), nn.Unflatten(1, (32, 8, 8)), nn.SiLU(),
            nn.ConvTranspose2d(32, 32, 2, stride=2), nn.SiLU(),
            nn.Conv2d(32, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        picture = self.body(x)
        return F.interpolate(
            picture, size=(self.side, self.side), mode="bilinear", align_corners=False
        )


class Coordinates(nn.Module):
    """784 values to a code of 64; a decoder of 7,000 weights turns it and a place into one pixel."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.encoder = nn.Sequential(
            nn.Linear(784, 512), nn.SiLU(),
            nn.Linear(512, 512), nn.SiLU(),
            nn.Linear(512, 64),
        )  # fmt: skip
        self.place, self.code = nn.Linear(16, 48), nn.Linear(64, 48)
        self.decoder = nn.Sequential(nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1))
        line = torch.linspace(0, 1, side)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
        waves = grid.unsqueeze(-1) * torch.tensor([1.0, 2.0, 4.0, 8.0]) * torch.pi
        self.register_buffer("places", torch.cat([waves.sin(), waves.cos()], -1).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        code = self.code(self.encoder(x)).unsqueeze(1)  # (B, 1, 48)
        places = self.get_buffer("places").expand(len(x), -1, -1)  # (B, side², 16)
        return self.decoder(self.place(places) + code).reshape(-1, 1, self.side, self.side)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "upsampled": Upsampled,
    "coordinates": Coordinates,
}


def built(problem: Problem) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Network and one batch; targets are pictures of random smooth functions."""
    model = seeded(NETWORKS[problem.network], problem.side, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 784, generator=generator)
    coarse = torch.randn(EXAMPLES, 1, 4, 4, generator=generator)
    y = F.interpolate(coarse, size=(problem.side, problem.side), mode="bilinear")
    return model, [(x, y)]


# -- what is measured ----------------------------------------------------------------------------


@dataclass
class Passes:
    """CPU seconds inside the network's forward, and example-passes through it by kind."""

    seconds: float = 0.0
    count: Counter[str] = field(default_factory=Counter)


@contextmanager
def watched(model: nn.Module) -> Iterator[Passes]:
    """What happens in ``model`` inside."""
    passes, started = Passes(), [0.0]

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tangent = forward_ad._current_level >= 0
        kind = "tangent" if tangent else "backward" if torch.is_grad_enabled() else "forward"
        passes.count[kind] += len(args[0])
        started[0] = time.process_time()

    def after(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        passes.seconds += time.process_time() - started[0]

    handles = (model.register_forward_pre_hook(before), model.register_forward_hook(after))
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def backward_once(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """CPU seconds of an ordinary backward pass over the training set, as anyone would write it."""
    loss = (model(x) - y).square().sum()
    started = time.process_time()
    torch.autograd.grad(loss, list(model.parameters()))
    return time.process_time() - started


def growth(run: Callable[[], Any]) -> tuple[int, Any]:
    """How far the peak of this process rises above what it holds, and what ``run`` returned."""
    forget_peak()
    before = peak_bytes(CPU)
    result = run()
    return peak_bytes(CPU) - before, result


def fitted(problem: Problem, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Any:
    posterior = nb.NullSpacePosterior(
        model,
        likelihood=nb.Regression(noise_variance=1.0),
        preserve=problem.preserve,
        prior_precision=1.0,
        delta=0,
    )
    return posterior.fit(batches, num_samples=SAMPLES, progress=False)


def measure(problem: Problem) -> dict[str, Any]:
    """One fit after a tiny one, with the network's own passes, in a process of its own."""
    tiny = Problem(problem.network, 4, problem.preserve)
    fitted(tiny, *built(tiny))
    model, batches = built(problem)
    once = [backward_once(model, *batches[0]) for _ in range(6)][1:]
    own_memory, _ = growth(lambda: backward_once(model, *batches[0]))
    with watched(model) as passes:
        wall, cpu = time.perf_counter(), time.process_time()
        memory, posterior = growth(lambda: fitted(problem, model, batches))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    backwards = passes.count["backward"] / EXAMPLES * statistics.median(once)
    certificate = posterior.certificate
    return {
        **asdict(problem),
        "outputs": problem.side**2,
        "wall_seconds": wall,
        "seconds": cpu,
        "own_seconds": passes.seconds + backwards,
        "passes": {kind: passes.count[kind] / EXAMPLES for kind in PASSES},
        "memory": memory,
        "own_memory": own_memory,
        "parameters": certificate.parameters,
        "constraints": certificate.constraints,
        "residual": certificate.residual,
        "solver": certificate.solver,
    }


# -- running and reporting -----------------------------------------------------------------------


def run_series(series: Series, repeats: int) -> dict[str, Any]:
    runs: list[list[dict[str, Any]]] = [[] for _ in series.sides]
    for _ in range(repeats):  # all sizes in turn: a disturbance does not fall on one of them
        for side, done in zip(series.sides, runs, strict=True):
            problem = Problem(series.network, side, series.preserve)
            done.append(common.fresh_process(measure, problem))
            last = done[-1]
            print(
                f"  {series.name}: {last['outputs']:,} outputs, {last['seconds']:.2f} s, own passes "
                f"{last['own_seconds']:.2f} s, {last['memory'] / MEGABYTE:.0f} MB",
                flush=True,
            )
    points = [summarised(done) for done in runs]
    return {**asdict(series), "name": series.name, "points": points, "laws": laws(points)}


def summarised(done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the repeats; the excess is taken within each run."""

    def median(values: Sequence[float]) -> float:
        return float(statistics.median(values))

    point = dict(done[0])
    for key in ("wall_seconds", "seconds", "own_seconds", "memory", "own_memory"):
        point[key] = median([run[key] for run in done])
    point["excess_seconds"] = median([run["seconds"] - run["own_seconds"] for run in done])
    point["excess_memory"] = median([run["memory"] - run["own_memory"] for run in done])
    return point | {"repeats": len(done), "runs": list(done)}


LAWS = {
    "seconds": "CPU seconds of the fit",
    "own_seconds": "the network's own passes in it",
    "excess_seconds": "CPU seconds beyond them",
    "memory": "memory of the fit",
    "own_memory": "memory of one forward and backward pass",
    "excess_memory": "memory beyond it",
}


def laws(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Exponents in the number of outputs, over the sizes at which there is anything to have one."""
    out = {}
    for key in LAWS:
        left = [(p["outputs"], p[key]) for p in points if p[key] > 0]
        out[key] = exponent(*zip(*left, strict=True))
    return out


WORDS = """\
`y ∝ O^k`, k by least squares of log y on log O over all sizes, ± 95 %; {examples} examples, {samples} samples,
regression, exact projection (`delta=0`), certificate included. Every run is a fresh process after a tiny fit. Own
passes: CPU seconds inside the network's forward during the fit, and an ordinary backward pass for each example that
it differentiates. Memory is the growth of the process's peak; the network's own is that of one forward and backward
pass over all {examples} examples. A fit takes large passes in pieces, so of its memory nothing may be left beyond
(such sizes do not enter k). `upsampled` costs the network about the same at every size, `coordinates` in proportion."""


def law_text(law: dict[str, Any], series: dict[str, Any]) -> str:
    every = law["points"] == len(series["points"])
    return slope_text(law) + ("" if every else f" ({law['points']} sizes)")


def report(results: Sequence[dict[str, Any]], seconds: float) -> str:
    lines = [
        "# Cost of a fit against the size of the output",
        "",
        WORDS.format(examples=EXAMPLES, samples=SAMPLES),
        f"{seconds / 60:.0f} minutes in all, {torch.get_num_threads()} thread(s). `python -m benchmarks.outputs`",
        "",
        "| network | preserves | quantity | k | target | |",
        "|---|---|---|---|---|---|",
    ]
    for series in results:
        for key, words in LAWS.items():
            law = series["laws"][key]
            target, met = "–", "–"
            if key.startswith("excess") and series["preserve"] == "loss":
                target = f"≤ {TARGET}"
                met = "met" if law["slope"] <= TARGET else "missed"
            lines.append(
                f"| {series['network']} | {series['preserve']} | {words} | {law_text(law, series)} | {target} | {met} |"
            )
    for series in results:
        lines += ["", f"## {series['name']}", ""]
        lines += [
            "| outputs | runs | wall | CPU | own passes | beyond | memory MB | own | beyond | M | P | residual |",
            "|" + "---|" * 12,
        ]
        for p in series["points"]:
            mb = [f"{p[key] / MEGABYTE:.0f}" for key in list(LAWS)[3:]]
            times = [f"{p[key]:.3f}" for key in ("wall_seconds", *list(LAWS)[:3])]
            lines.append(
                f"| {p['outputs']:,} | {p['repeats']} | {' | '.join([*times, *mb])} | {p['constraints']:,} "
                f"| {p['parameters']:,} | {p['residual']:.0e} |"
            )
    return "\n".join(lines) + "\n"


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds and memory: the fit (points, solid), and what of it is beyond the network's own (dashed)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.grid": True, "grid.color": "#e3e3e3", "legend.frameon": False}
    panels = (("seconds", "CPU seconds", 1.0), ("memory", "memory, MB", float(MEGABYTE)))
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
        for axis, (key, label, unit) in zip(axes, panels, strict=True):
            for series, colour in zip(results, COLOURS, strict=False):
                for kind, line, words in (
                    (key, "o-", ""),
                    (f"excess_{key}", "s--", ", beyond its own passes"),
                ):
                    law = series["laws"][kind]
                    if kind != key and series["preserve"] != "loss":
                        continue
                    left = [(p["outputs"], p[kind] / unit) for p in series["points"] if p[kind] > 0]
                    name = f"{series['name']}{words}: {slope_text(law)}"
                    axis.plot(
                        *zip(*left, strict=True),
                        line,
                        color=colour,
                        markersize=4,
                        linewidth=1.3,
                        label=name,
                    )
            axis.set(xscale="log", yscale="log", xlabel="outputs of an example", ylabel=label)
            axis.xaxis.set_major_formatter(plain_tick)
            axis.yaxis.set_major_formatter(plain_tick)
            low, high = axis.get_ylim()
            axis.set_ylim(low, high * (high / low) ** 0.5)  # room for the legend
            axis.legend(fontsize=7.5, loc="upper left")
        common.save_figure(figure, path, 110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="up to 1,024 outputs, once")
    parser.add_argument("--name", default=None, help="of the files under benchmarks/results")
    options = parser.parse_args()
    largest = 32 if options.quick else 256
    sides = tuple(side for side in (4, 8, 16, 32, 64, 128, 256) if side <= largest)
    started = time.perf_counter()
    results = [
        run_series(series, 1 if options.quick else options.repeats)
        for series in (
            Series("upsampled", "loss", sides),
            Series("coordinates", "loss", sides),
            Series("upsampled", "predictions", (4, 6, 8, 11, 16)),
        )
    ]
    seconds = time.perf_counter() - started
    text = report(results, seconds)
    print(text)
    record = {"series": results, "seconds": seconds, "environment": common.environment()}
    name = options.name or ("outputs_quick" if options.quick else "outputs")
    written = common.write_results(name, record, text)
    draw(results, written.with_suffix(".png"))
    print(written)


if __name__ == "__main__":
    main()
