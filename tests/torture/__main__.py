"""`python -m tests.torture`: hours of random networks, kills and damaged files; goes on where it was stopped."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.torture import damage, modules, report, running
from tests.torture.judge import RAW, UNEXPLAINED, WRONG

OUT = Path("out/torture")
CHUNK = 1000


def networks(asked: argparse.Namespace) -> int:
    """Random networks against dense float64 rows."""
    lines = running.run(asked.seeds, asked.out / "networks.jsonl")
    print(running.summary(lines))
    return int(any(line["verdict"] in running.BAD for line in lines))


def files(asked: argparse.Namespace) -> int:
    """Damaged files, a thousand at a time."""
    out = asked.out / "files.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    done = (
        {json.loads(line)["start"] for line in out.read_text().splitlines()}
        if out.exists()
        else set()
    )
    for start in range(0, asked.files, CHUNK):
        if start not in done:
            found = {"start": start, **damage.run(start, min(start + CHUNK, asked.files))}
            with out.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(
                f"files {start:,} to {start + found['files']:,}: {found['counts']}",
                *found["faults"],
            )
    return int(any(json.loads(line)["faults"] for line in out.read_text().splitlines()))


def database(asked: argparse.Namespace) -> int:
    """Every module of PyTorch's own database."""
    found = modules.run()
    lines = [
        {"name": n, "verdict": v.verdict, "error": v.error, "faults": v.faults} for n, v in found
    ]
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "modules.json").write_text(json.dumps(lines, indent=1) + "\n")
    bad = [line for line in lines if line["verdict"] in (WRONG, RAW, UNEXPLAINED)]
    for line in bad:
        print(line["name"], line["verdict"], line["error"], *line["faults"])
    return int(bool(bad))


def _process(name: str) -> Callable[[argparse.Namespace], int]:
    """Parts that need a process without threads, or a fresh one."""

    def run(asked: argparse.Namespace) -> int:
        out = str(asked.out / f"{name}.json")
        command = [sys.executable, "-m", f"tests.torture.{name}", "--out", out]
        return subprocess.run(command, check=False).returncode

    return run


PARTS: dict[str, Callable[[argparse.Namespace], int]] = {
    "kills": _process("kills"),
    "endurance": _process("endurance"),
    "modules": database,
    "networks": networks,
    "files": files,
}


def _seeds(text: str) -> range:
    start, _, stop = text.partition(":")
    return range(int(start), int(stop)) if stop else range(int(start), int(start) + 1)


def _looked_at(asked: argparse.Namespace) -> int:
    """What people ask about one seed."""
    if asked.part == "known":
        print(f"{len(running.write_known())} known to be wrong")
    elif asked.part == "one":
        chosen = running.by_seed(asked.seeds.start)
        found = running.judge(chosen)
        print(running.told(chosen, found), found.trace, found.checks, sep="\n")
    else:
        print(running.told(*running.minimised(asked.seeds.start)))
    return 0


def main() -> int:
    """Exit status 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    others: dict[str, Any] = {
        "all": "every part",
        "report": "write what was found into benchmarks/results/reliability.md",
        "one": "judge one seed and tell all of it",
        "minimise": "a plainer problem with the fault of a seed",
        "known": "find anew what is wrong as yet among the seeds of `make test`",
    }
    parser.add_argument("part", choices=[*PARTS, *others], help=str(others))
    parser.add_argument("--seeds", type=_seeds, default=range(10_000), help="A:B, or one seed")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.part == "report":
        print(report.write(asked.out))
        return 0
    if asked.part == "all":
        return max([part(asked) for part in PARTS.values()])
    return PARTS.get(asked.part, _looked_at)(asked)


if __name__ == "__main__":
    sys.exit(main())
