"""Measure in finished pieces what has been entered since: scores of `detection`, methods of `joint`.

    python -m experiments.supplement detection --setting full --only tables gaps

A new rival then costs only itself. A piece whose network, trained again, is not the one it was measured on is left as
it is (rounding differs between machines). With ``--begin`` pieces of `detection` that are not there are begun;
``--without`` leaves scores to a later run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import nullbayes as nb
from benchmarks.common import environment
from experiments import joint
from experiments.detection import running
from experiments.detection.base import SCORES
from experiments.detection.families import FAMILIES, Problem
from experiments.networks import identity
from experiments.runner import Job, Unavailable, say
from experiments.store import OUT, Store, collected
from nullbayes.common.writing import write_json

LATER = "process"  # of joint: what pieces may lack


def lacking(record: dict[str, Any] | None, kind: str, without: Sequence[str]) -> list[str]:
    """Names of scores that apply and that a piece does not have."""
    there = {} if record is None else record["result"]["scores"]
    every = [n for n, cls in SCORES.items() if cls.applies(kind)]
    return [n for n in every if n not in there and n not in without]


def of_detection(job: Job, record: dict[str, Any] | None, without: Sequence[str]) -> Any:
    """The result with the scores it lacked; None: it lacks none, or is of another network."""
    family, member, role, seed, size = job.args
    kind = "regression" if family == "gaps" else "classification"
    names = lacking(record, kind, without)
    if not names:
        return None
    problem: Problem = FAMILIES[family].make(member, seed, size)
    about = {"member": member, "role": role}
    found = running.measured_scores(problem, names, about, family)
    if record is None:
        return found
    old = record["result"]
    if old["network"] != found["network"]:
        return None
    return {**old, "scores": {**old["scores"], **found["scores"]}}


def of_joint(job: Job, record: dict[str, Any] | None, without: Sequence[str]) -> Any:
    """The same for methods."""
    if record is None or LATER in record["result"]["methods"]:
        return None
    name, seed = job.args
    data = joint.make(name, seed)
    network = joint.trained(data, seed)
    if record["result"]["network"] != identity(network):
        return None
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nb.errors.NullBayesWarning)
        draws = joint.of_process(network, data, seed)
        found = joint.measured(draws, 1.0, time.perf_counter() - started, data, seed)
    old = record["result"]
    return {**old, "methods": {**old["methods"], LATER: found}}


EXPERIMENTS: dict[str, tuple[Any, Any]] = {
    "detection": (running, of_detection),
    "joint": (joint, of_joint),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.supplement", description=__doc__)
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--setting", default="full", choices=("small", "processor", "full"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families, or tasks")
    parser.add_argument("--without", nargs="+", default=[], choices=list(SCORES), metavar="SCORE")
    parser.add_argument("--begin", action="store_true", help="pieces that are not there as well")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after that")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    console, store, started = Console(stderr=True), Store(options.out), time.perf_counter()
    module, make = EXPERIMENTS[options.experiment]
    store.adopt(collected(options.setting, options.experiment))
    for job in module.jobs(options.setting):
        if options.only and job.args[0] not in options.only:
            continue
        if time.perf_counter() - started > options.seconds:
            break
        record = store.get(job.key, job.config)
        if record is None and not options.begin:
            continue
        begun = time.perf_counter()
        try:
            result = make(job, record, options.without)
        except Unavailable as error:
            say(console, f"left out: {job.key}. {error}")
            continue
        if result is None:
            continue
        seconds = time.perf_counter() - begun
        if record is None:
            store.put(job.key, job.config, result, seconds)
        else:  # when and where the rest was measured stands as it was
            added = [*record.get("added", []), {"seconds": seconds, "environment": environment()}]
            write_json(store.path(job.key), {**record, "result": result, "added": added})
        say(console, f"{job.key}: {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
