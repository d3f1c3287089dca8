"""How many passes over the rows an iterative fit takes to which residual, and how long: one road beside the other.

    python -m benchmarks.passes [--examples 10000] [--samples 10] [--to 0.01] [--roads none,subset] [--device cpu]
        [--seconds 600] [--name passes]

LeNet (61,706 weights), Fashion-MNIST, all softmax directions, rows captured once. Each road is conjugate gradients with
one preconditioner, rows as they are or brought closer to one length (`equilibrate=0.5`: those named ``scaled ...``).
The residual ``‖AΔ‖ / ‖Aε‖`` is that of the rows themselves, measured every ten passes outside of the clock. Results are
written after each road, so what was cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import time
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import common
from nullbayes import NullSpacePosterior, datasets
from nullbayes.common.progress import stages
from nullbayes.constraints.memory_budget import FitMemory
from nullbayes.constraints.training_rows import capture_training
from nullbayes.demo.models import lenet
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.solvers import ConjugateGradient
from nullbayes.solvers.checkpoint import Watch
from nullbayes.solvers.preconditioners import Kronecker, Preconditioner, Rows, Subset

# Edge of the null space: the default `delta` at a prior precision of about that of the evidence.
SHIFT = 1e-4 * 20.0
ROADS = (
    *("none", "scaled none", "subset", "scaled subset", "rows", "scaled rows"),
    *("kronecker", "scaled kronecker"),
)


def captured(options: argparse.Namespace) -> JacobianOperator:
    """The rows of the first examples, on the device."""
    model, data = lenet(10), datasets.fashion_mnist().train
    model.load_state_dict(common.trained_lenet(1, epochs=options.epochs)[0].state_dict())
    model = model.eval().to(options.device)
    x, y = data.inputs[: options.examples], data.targets[: options.examples]
    problem = NullSpacePosterior(model).problem
    memory = FitMemory.of(2**36, options.samples, problem.space.total, problem.dtype)
    batches = list(zip(x.split(500), y.split(500), strict=True))
    with stages(show=False) as stage:
        return capture_training(problem, batches, None, memory, stage).operator


def preconditioner(name: str, rows: int | None) -> str | Preconditioner:
    kind = name.removeprefix("scaled ")
    made: dict[str, Preconditioner] = {
        "subset": Subset(rows),
        "rows": Rows(rows),
        "kronecker": Kronecker(0.05),
    }
    return made.get(kind, "none")


class _Clock:
    """Wall and processor seconds, but for what is measured in between."""

    def __init__(self, device: str) -> None:
        self.device, self.paused = device, 0.0
        self._begun = self._now()

    def _now(self) -> tuple[float, float]:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> tuple[float, float]:
        now = self._now()
        return now[0] - self._begun[0], now[1] - self._begun[1]

    def shift(self, since: tuple[float, float]) -> None:
        """Leave out what passed since."""
        wall, own = self.seconds
        self._begun = (self._begun[0] + wall - since[0], self._begun[1] + own - since[1])


def walked(operator: JacobianOperator, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One road: a row for every measurement."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(options.samples, operator.shape[1], generator=generator).to(operator.device)
    first = operator.image_norms(v)
    rows: list[dict[str, float]] = []
    clock = _Clock(options.device)

    def offer(self: Watch, state: dict[str, Tensor], *, now: bool = False) -> None:
        since = clock.seconds
        residual = float((operator.image_norms(state["x"].to(v)) / first).max())
        rows.append(
            {
                "passes": int(state["done"]),
                "seconds": since[0],
                "processor seconds": since[1],
                "residual": residual,
                "prior kept": float(state["x"].double().square().sum() / v.double().square().sum()),
            }
        )
        clock.shift(since)
        print(name, rows[-1], flush=True)
        if residual <= options.to or since[0] > options.seconds:
            raise KeyboardInterrupt  # which ends a search

    scaled = 0.5 if name.startswith("scaled") else 0.0
    chosen = preconditioner(name, options.rows)
    solver = ConjugateGradient(1e-9, options.passes, chosen, scaled)
    state = solver.prepare(operator)
    with mock.patch.object(Watch, "offer", offer):
        state.factorise(SHIFT, numerical=True)
        state.project(v, watch=Watch(None))
    return {"road": name, "notes": list(state.notes), "rows": rows}


def table(found: list[dict[str, Any]], about: dict[str, Any]) -> str:
    targets = [r for r in (0.1, 0.05, 0.03, 0.02, 0.01) if r >= about["to"]]
    heads = [f"{r:g}" for r in targets]
    lines = [
        f"# Passes of an iterative fit: Fashion-MNIST, N = {about['examples']:,}, S = {about['samples']}",
        "",
        f"LeNet, 61,706 weights, {about['constraints']:,} rows, {about['device']}. Passes / seconds / processor",
        "seconds until the residual of all rows is that of the column's head (measured every ten passes), the work",
        "for the preconditioner included, capturing the rows not; and the share of the prior's variance that is left.",
        "`python -m benchmarks.passes`",
        "",
        "| road | " + " | ".join(heads) + " | last residual | prior preserved |",
        "|" + "---|" * (len(heads) + 3),
    ]
    for road in found:
        rows, cells = road["rows"], []
        for target in targets:
            at = next((r for r in rows if r["residual"] <= target), None)
            told = ("passes", "seconds", "processor seconds")
            cells.append("–" if at is None else " / ".join(f"{at[k]:.0f}" for k in told))
        end = rows[-1] if rows else {"residual": float("nan"), "prior kept": float("nan")}
        ends = f"{end['residual']:.4f} | {end['prior kept']:.4f}"
        lines.append(f"| {road['road']} | " + " | ".join(cells) + f" | {ends} |")
    notes = [f"- {road['road']}: {' '.join(road['notes'])}" for road in found if road["notes"]]
    return "\n".join([*lines, "", *notes]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--to", type=float, default=0.01)
    parser.add_argument("--passes", type=int, default=400)
    parser.add_argument("--rows", type=int, default=None, help="of the subset")
    parser.add_argument("--roads", default=",".join(ROADS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=600.0, help="of each road at most")
    parser.add_argument("--name", default="passes", help="of the results' files")
    options = parser.parse_args()
    operator = captured(options)
    about = vars(options) | {"constraints": operator.shape[0]}
    found: list[dict[str, Any]] = []
    for name in options.roads.split(","):
        found.append(walked(operator, name, options))
        results = {"options": about, "roads": found, "environment": common.environment()}
        print(common.write_results(options.name, results, table(found, about)), flush=True)


if __name__ == "__main__":
    main()
