"""The command: run what is missing, then write tables, figures and the check of the claims."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from experiments import claims, devices, overview, page, runner
from experiments.methods import METHODS
from experiments.reports import MixedNetworks
from experiments.runner import Job, Outcome, run, say, words
from experiments.store import OUT, RESULTS, Store, collected

# In the order in which they are run.
EXPERIMENTS = (
    "digits_heldout", "fashion_lenet", "underfitting", "tabular", "toy", "ablations", "fashion_resnet", "swin",
    "detection", "joint", "language", "intervals", "sets", "layers", "candidates",
)  # fmt: skip
SETTINGS = ("small", "full")
#: Settings that some experiments alone have: what one processor does in hours where the full one asks for more.
SOME = {"processor": ("detection", "layers", "candidates", "sets", "language")}


def load(name: str) -> ModuleType:
    return importlib.import_module(f"experiments.{name}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="The empirical evaluation; see docs/evaluation/index.md.",
    )
    parser.add_argument("names", nargs="*", metavar="experiment", help="all, if none is named")
    parser.add_argument("--setting", choices=(*SETTINGS, *SOME), default="small")
    parser.add_argument("--seeds", type=int, help="how many; each experiment has its own default")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only-method", nargs="+", choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--no-resume", action="store_true", help="measure everything again")
    parser.add_argument("--report", action="store_true", help="tables only, from what is there")
    parser.add_argument(
        "--adopt",
        action="store_true",
        help="what was not measured here is taken from the tables' own runs, if settings still agree",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--threads", type=int, help="of each process")
    parser.add_argument("--device", default="cpu", help="of the larger networks: cpu, cuda")
    parser.add_argument("--seconds", type=float, help="stop then; the next run goes on from there")
    parser.add_argument(
        "--here", action="store_true", help="in this process; peaks then mean little"
    )
    parser.add_argument(
        "--docs", action="store_true", help="fill the tables of the documentation, no more"
    )
    parser.add_argument("--list", action="store_true", help="name experiments and methods")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of finished pieces")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of tables")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    if options.list:
        for name in EXPERIMENTS:
            say(console, f"{name}: {(load(name).__doc__ or '').splitlines()[0]}")
        say(console, f"methods: {', '.join(METHODS)}")
        return 0
    if options.docs:
        for document in page.PAGES:
            page.update(document)
        return 0
    there = SOME.get(options.setting, EXPERIMENTS)
    if unknown := [name for name in options.names if name not in there]:
        parser.error(
            f"unknown experiments {unknown}; with --setting {options.setting} there are {', '.join(there)}"
        )
    options.names = options.names or list(there)
    if len(options.names) > 1:
        runner.PRELOAD = runner.PRELOAD_ALL
    if options.device != "cpu":  # every process of the run reads it from there
        os.environ[devices.VARIABLE] = options.device
    signal.signal(signal.SIGTERM, _stop)  # a kill ends the process at work too
    if options.threads:
        torch.set_num_threads(options.threads)
    return evaluate(options, console)


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def evaluate(options: argparse.Namespace, console: Console) -> int:
    """Run all experiments, report each when its last piece is there; the exit status is 1 if anything failed."""
    store = Store(options.out)
    started = time.perf_counter()
    planned = {name: planned_jobs(name, options, store, console) for name in options.names}
    pieces = [job for jobs in planned.values() for job in jobs]
    missing = Counter(job.key.experiment for job in pieces)
    outcome, mixed = Outcome(), dict[str, str]()

    def tell(name: str) -> None:
        try:
            report(load(name), options, store)
        except MixedNetworks as error:
            mixed[f"the tables of {name}"] = str(error)

    def ended(job: Job) -> None:
        missing[job.key.experiment] -= 1
        if not missing[job.key.experiment]:
            tell(job.key.experiment)

    if not options.report:
        # Together, so that no processor waits for the last piece of one experiment.
        outcome = run(
            pieces,
            store,
            console=console,
            fresh=not options.here,
            resume=not options.no_resume,
            workers=options.workers,
            seconds=options.seconds,
            ended=ended,
        )
    for name, jobs in planned.items():
        if options.report or not jobs:
            tell(name)
    folder = options.results / options.setting
    if options.setting in SETTINGS:  # claims are about experiments that the others lack
        claims.write(options.setting, folder)
        overview.write(options.setting, claims.CLASSIFICATION, folder)
    say(console, f"{words(time.perf_counter() - started)}. Tables and figures: {folder}")
    skipped, failures = outcome.skipped, outcome.failures | mixed
    for why in dict.fromkeys(skipped.values()):  # one want may stop many methods
        say(console, f"Left out: {', '.join(m for m in skipped if skipped[m] == why)}. {why}")
    for key, why in failures.items():
        say(console, f"FAILED: {key}. {why.splitlines()[0]}")
    return 1 if failures else 0


def planned_jobs(
    name: str, options: argparse.Namespace, store: Store, console: Console
) -> list[Job]:
    """The pieces of an experiment that were asked for, once what the tables hold is taken over, if that is to be."""
    seeds = None
    if options.seeds is not None:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
    if options.adopt:
        count = store.adopt(collected(options.setting, name, options.results))
        say(console, f"{name}: {count} pieces taken from {options.results / options.setting}")
    jobs: list[Job] = load(name).jobs(options.setting, seeds, options.only_method)
    return jobs


def report(module: Any, options: argparse.Namespace, store: Store) -> None:
    """Tables from every finished piece of the experiment, whatever part of it was asked for now."""
    kept = [job for job in module.jobs(options.setting, range(100), None) if job.keep]
    found = [store.get(job.key, job.config) for job in kept]
    runs = [record for record in found if record is not None]
    module.report(options.setting, runs, options.results / options.setting)


if __name__ == "__main__":
    sys.exit(main())
