"""`python -m tests.torture`: hours of random networks, kills and damaged files; goes on where it was stopped."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tests.torture import running
from tests.torture.judge import RAW, WRONG


def _seeds(text: str) -> range:
    start, _, stop = text.partition(":")
    return range(int(start), int(stop)) if stop else range(int(start), int(start) + 1)


def main() -> int:
    """Exit status 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    networks = parts.add_parser("networks", help="random networks against dense float64 rows")
    networks.add_argument("--seeds", type=_seeds, default=range(10_000), help="A:B")
    networks.add_argument("--out", type=Path, default=Path("out/torture/networks.jsonl"))
    one = parts.add_parser("one", help="judge one seed and tell all of it")
    one.add_argument("seed", type=int)
    least = parts.add_parser("minimise", help="a plainer problem with the fault of a seed")
    least.add_argument("seed", type=int)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.part == "networks":
        lines = running.run(asked.seeds, asked.out)
        print(running.summary(lines))
        return int(any(line["verdict"] in (WRONG, RAW) for line in lines))
    if asked.part == "one":
        chosen = running.by_seed(asked.seed)
        found = running.judge(chosen)
        print(running.told(chosen, found), found.trace, found.checks, sep="\n")
        return 0
    print(running.told(*running.minimised(asked.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
