"""One fit on one process and on several: seconds, what of them is communication, memory of each process.

    python -m benchmarks.many [--quick] [--processes 1 2]

Strong scaling: the same images for any number of processes. Weak scaling: as many images for each. Processes have one
thread each and are told so; rows are counted, not estimated, and memory is the growth of the process's peak over the
fit. Products of rows alone are timed by themselves, since that is what is split.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import nullbayes as nb
from benchmarks import common
from nullbayes import solvers
from nullbayes.common.memory import peak_bytes
from nullbayes.common.processes import resolve

SOLVERS = {
    "block CG": lambda: solvers.ConjugateGradient(tolerance=0.1, equilibrate=0.5),
    "dual Cholesky": solvers.DualCholesky,
}
REPEATS = 3


def measured(images: int, samples: int, name: str) -> dict[str, Any]:
    """One fit, in each of the processes; and products with its rows."""
    model, x, y = common.trained_lenet(images, epochs=0)
    before = peak_bytes(torch.device("cpu"))
    posterior = nb.NullSpacePosterior(model, solver=SOLVERS[name](), preserve="predictions")
    started, worked = time.perf_counter(), time.process_time()
    posterior.fit((x, y), samples, progress=False)
    seconds, processor = time.perf_counter() - started, time.process_time() - worked
    certificate, state = posterior.certificate, posterior._fitted().state
    assert state is not None
    processes, took, talked = resolve(None), [], []
    vectors = posterior._fitted().unit
    for _ in range(REPEATS):
        spent = 0.0 if processes is None else processes.seconds
        once = time.perf_counter()
        state.operator.normal(vectors)
        took.append(time.perf_counter() - once)
        talked.append(0.0 if processes is None else processes.seconds - spent)
    rows = posterior._fitted().rows
    assert rows is not None
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "communication_seconds": certificate.stages.get("communication", 0.0),
        "sent_bytes": 0 if processes is None else processes.sent,
        "rows_bytes": rows.operator.nbytes,
        "peak_growth_bytes": peak_bytes(torch.device("cpu")) - before,
        "pass_seconds": statistics.median(took),
        "pass_communication_seconds": statistics.median(talked),
        "iterations": certificate.iterations,
        "residual": certificate.residual,
        "rows": certificate.constraints,
        "weights": certificate.parameters,
    }


def _process(rank: int, size: int, port: int, args: tuple[Any, ...], path: str) -> None:
    torch.set_num_threads(1)
    if size > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    torch.save(measured(*args), f"{path}-{rank}")
    if size > 1:
        dist.destroy_process_group()


def on(size: int, *args: Any) -> list[dict[str, Any]]:
    """What each of ``size`` fresh processes measured."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "found")
        mp.spawn(_process, (size, port, args, path), nprocs=size)
        return [torch.load(f"{path}-{rank}", weights_only=False) for rank in range(size)]


def table(runs: list[dict[str, Any]], load: float) -> str:
    """A row for each run; of several processes the slowest, and the one with most memory."""
    head = [
        "# Several processes",
        "",
        "LeNet (61,706 weights, untrained), Fashion-MNIST, every softmax direction, one thread a process, all "
        "processes on one machine (`python -m benchmarks.many`). `pass`: one product with "
        "all rows and their transpose, for all samples. Communication includes the wait for the slower process. Load "
        f"of the machine when this began: {load:.1f} on {os.cpu_count()} cores; above the number of cores, seconds are "
        "those of a shared machine, and processor seconds, bytes and ratios are what to read.",
        "",
        "| solver | scaling | processes | images | seconds | processor s | communication | pass, s | of it "
        "communication | rows, MB each | peak growth, MB | sent, MB | residual |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        of = run["of"]
        seconds = max(o["seconds"] for o in of)
        talk = statistics.mean(o["communication_seconds"] / o["seconds"] for o in of)
        once = max(o["pass_seconds"] for o in of)
        told = statistics.mean(o["pass_communication_seconds"] / o["pass_seconds"] for o in of)
        head.append(
            f"| {run['solver']} | {run['scaling']} | {run['processes']} | {run['images']} | {seconds:.1f} "
            f"| {max(o['processor_seconds'] for o in of):.1f} | {100 * talk:.0f} % | {once:.3f} | {100 * told:.0f} % "
            f"| {max(o['rows_bytes'] for o in of) / 2**20:.1f} "
            f"| {max(o['peak_growth_bytes'] for o in of) / 2**20:.0f} "
            f"| {max(o['sent_bytes'] for o in of) / 2**20:.0f} | {max(o['residual'] for o in of):.3f} |"
        )
    return "\n".join(head) + "\n"


def main() -> None:
    """Measures and writes ``results/many.json`` and ``many.md``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    asked = parser.parse_args()
    images, samples = (60, 4) if asked.quick else (400, 10)
    load, runs = os.getloadavg()[0], []
    for name in SOLVERS:
        for size in asked.processes:
            of = on(size, images, samples, name)
            run = {"solver": name, "scaling": "strong", "processes": size, "images": images}
            runs.append(run | {"of": of})
            if size > 1 and name == "block CG":
                of = on(size, size * images, samples, name)
                run = {
                    "solver": name,
                    "scaling": "weak",
                    "processes": size,
                    "images": size * images,
                }
                runs.append(run | {"of": of})
    text = table(runs, load)
    if not asked.quick:
        results = {"environment": common.environment(), "load": load, "runs": runs}
        common.write_results("many", results, text)
    print(text)


if __name__ == "__main__":
    main()
