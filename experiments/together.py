"""Pieces of several experiments at a time, most telling first: for a machine with many cores that is there for minutes.

    python -m experiments.together --workers 12 --seconds 420 --pack pieces.tar.gz

Every piece is written as soon as it is measured, and one that is there already is not measured again, so that runs go
on where the last was stopped. The same pieces, one after the other: ``python -m experiments NAME --setting S``; tables
of what is there: the same with ``--report``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from experiments import devices, runner
from experiments.__main__ import load
from experiments.runner import Job, run, say
from experiments.store import OUT, Store, collected


@dataclass(frozen=True)
class Part:
    """Pieces of one experiment that stand together."""

    name: str
    experiment: str
    setting: str
    wanted: Callable[[Job], bool]
    device: bool = False  # trains or fits what an accelerator is for


def _family(*names: str) -> Callable[[Job], bool]:
    return lambda job: job.key.method.split(",")[0] in names


def _joint(job: Job) -> bool:
    return job.key.seed < 5


SLOW = ("swin", "texts")  # the longest pieces begin first, so that none is left alone at the end
#: In the order in which tables become whole.
PARTS = (
    Part("clothes", "detection", "full", _family("clothes"), device=True),
    Part("tables", "detection", "full", _family("tables", "gaps")),
    Part("layers, slow", "layers", "processor", _family(*SLOW)),
    Part("layers", "layers", "processor", lambda job: not _family(*SLOW)(job)),
    Part("joint", "joint", "full", _joint),
    Part("digits", "detection", "full", _family("digits")),
    Part("intervals", "intervals", "full", lambda job: True),
    Part("sets", "sets", "full", lambda job: True),
    Part("candidates", "candidates", "processor", lambda job: True),
    Part("joint, more seeds", "joint", "full", lambda job: not _joint(job)),
)


def jobs(names: Sequence[str]) -> list[Job]:
    """Of the parts named, in their order."""
    found: list[Job] = []
    for part in PARTS:
        if part.name in names:
            every: list[Job] = load(part.experiment).jobs(part.setting, None, None)
            mine = [job for job in every if part.wanted(job)]
            if part.device:  # of few and large ones a whole seed first
                mine.sort(key=lambda job: job.key.seed)
            found += mine
    return found


def pack(store: Store, path: Path) -> int:
    """All finished pieces as one archive, written whole or not at all; how many."""
    files = sorted(p for p in store.folder.rglob("*.json") if p.is_file())
    part = path.with_suffix(".part")
    with tarfile.open(part, "w:gz") as archive:
        for file in files:
            archive.add(file, file.relative_to(store.folder))
    part.replace(path)
    return len(files)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.together", description=__doc__)
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--seconds", type=float, help="end what is at work then")
    parser.add_argument("--most", type=int, help="so many pieces of those not there yet, no more")
    parser.add_argument("--device", help="where larger networks are trained and fitted, as cuda")
    parser.add_argument("--here", action="store_true", help="no processes")
    parser.add_argument("--pack", type=Path, help="an archive of all finished pieces, at the end")
    parser.add_argument("--unpack", type=Path, help="an archive of pieces to go on from")
    parser.add_argument(
        "--list", action="store_true", help="how many pieces of each part are there"
    )
    options = parser.parse_args(arguments)
    console, store = Console(stderr=True), Store(OUT)
    if options.unpack is not None:
        with tarfile.open(options.unpack) as archive:
            archive.extractall(store.folder, filter="data")
    if options.device:
        os.environ[devices.VARIABLE] = options.device
    for experiment, setting in {(part.experiment, part.setting) for part in PARTS}:
        store.adopt(collected(setting, experiment))  # what the committed tables are made of
    torch.set_num_threads(options.threads)
    runner.PRELOAD = runner.PRELOAD_ALL
    if options.list:
        for name in options.parts:
            every = jobs([name])
            there = sum(store.get(job.key, job.config) is not None for job in every)
            say(console, f"{name}: {there} of {len(every)}")
        return 0
    missing = [j for j in jobs(options.parts) if store.get(j.key, j.config) is None]
    say(console, f"{len(missing)} pieces to be measured")
    outcome = run(
        missing[: options.most],
        store,
        console=console,
        fresh=not options.here,
        workers=options.workers,
        seconds=options.seconds,
    )
    for key, why in outcome.failures.items():
        say(console, f"FAILED: {key}. {why.splitlines()[0]}")
    for why in dict.fromkeys(outcome.skipped.values()):
        say(console, f"left out: {why}")
    if options.pack is not None:
        say(console, f"{pack(store, options.pack)} pieces in {options.pack}")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
