"""A resumable loop over seeds: one line of JSON a seed, a summary, and plainer problems with the same fault."""

from __future__ import annotations

import collections
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.torture.choices import from_list, from_seed
from tests.torture.judge import RAW, RIGHT, UNEXPLAINED, WRONG, Verdict, judge
from tests.torture.problems import Problem, problem

#: what `make test` runs
PART = range(120)
KNOWN = Path(__file__).parent / "known.json"
OWN = "fault of the torture"
BAD = (WRONG, RAW, UNEXPLAINED, OWN)


def by_seed(seed: int) -> Problem:
    """The problem of an integer."""
    return problem(from_seed(seed), seed)


def verdict_of(seed: int) -> Verdict:
    """Draw and judge. An error of the torture's own is raised with the seed."""
    return judge(by_seed(seed))


def line_of(seed: int) -> dict[str, Any]:
    """What is kept of a seed."""
    start = time.perf_counter()
    try:
        chosen = by_seed(seed)
        found = judge(chosen)
    except Exception as error:  # hours of work do not stop for a fault of the torture's own
        return {
            "seed": seed,
            "verdict": OWN,
            "error": f"{type(error).__name__}: {error}",
            "faults": [],
        }
    line: dict[str, Any] = {"seed": seed, "verdict": found.verdict}
    line["seconds"] = round(time.perf_counter() - start, 3)
    if found.verdict != RIGHT:
        line |= {"error": found.error, "faults": found.faults, "problem": str(chosen)}
    if found.trace:
        line["where"] = _place(found.trace)
    return line


def _place(trace: str) -> str:
    """The innermost line of the library in a traceback: ``file:function``."""
    found = re.findall(r'File ".*?/(nullbayes/[^"]+)", line \d+, in (\w+)', trace)
    return ":".join(found[-1]) if found else ""


def run(
    seeds: Iterable[int], out: Path | None, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Judge ``seeds`` that ``out`` does not hold yet; append a line for each."""
    lines = (
        [json.loads(text) for text in out.read_text().splitlines()] if out and out.exists() else []
    )
    wanted = set(seeds)
    lines = [line for line in lines if line["seed"] in wanted]
    known = {line["seed"] for line in lines}
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    for seed in sorted(wanted - known):
        line = line_of(seed)
        lines.append(line)
        if out:
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if line["verdict"] in BAD:
            say(f"seed {seed}: {line['verdict']}: {signature(line)}")
    return lines


def known() -> dict[int, str]:
    """Seeds of ``PART`` that are wrong as yet, and how."""
    return {int(seed): how for seed, how in json.loads(KNOWN.read_text()).items()}


def write_known() -> dict[str, str]:
    """Find them anew."""
    lines = [line_of(seed) for seed in PART]
    found = {
        str(line["seed"]): f"{line['verdict']}: {signature(line)}"
        for line in lines
        if line["verdict"] in BAD
    }
    KNOWN.write_text(json.dumps(found, indent=1) + "\n")
    return found


def signature(line: dict[str, Any]) -> str:
    """What faults of one kind have in common."""
    text = line["error"] if line["verdict"] != WRONG else line["faults"][0]
    text = re.sub(r"\[[^\]]*\]|'[^']*'|`[^`]*`", "·", text)
    text = re.sub(r"-?\d[\d.e+-]*", "#", text)[:110]
    where = line.get("where", "") if line["verdict"] != WRONG else ""
    return f"{where} {text}".strip()


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """Verdicts counted; then the kinds of faults, most frequent first, each with seeds to look at."""
    counts = collections.Counter(line["verdict"] for line in lines)
    out = [f"{len(lines):,} networks: " + ", ".join(f"{n:,} {v}" for v, n in counts.most_common())]
    kinds: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for line in lines:
        if line["verdict"] in BAD:
            kinds[line["verdict"], signature(line)].append(line["seed"])
    for (verdict, kind), seeds in sorted(kinds.items(), key=lambda item: -len(item[1])):
        out.append(f"  {len(seeds):4d} {verdict}: {kind} (seeds {', '.join(map(str, seeds[:4]))})")
    return "\n".join(out)


# -- minimising ---------------------------------------------------------------------------------


def minimised(seed: int, limit: int = 400) -> tuple[Problem, Verdict]:
    """A plainer problem with the same fault: choices are lowered and left out while it stays."""
    choices = from_seed(seed)
    problem(choices, seed)
    made = choices.made
    wanted = _fault(judge(problem(from_list(made), seed)))
    tried: set[tuple[int, ...]] = set()

    def stays(some: list[int]) -> bool:
        if tuple(some) in tried or len(tried) >= limit:
            return False
        tried.add(tuple(some))
        try:
            return _fault(judge(problem(from_list(some), seed))) == wanted
        except Exception:
            return False

    before: list[int] = []
    while before != made and len(tried) < limit:
        before = made
        for size in (16, 8, 4, 2, 1):  # leave some out, from the end
            for at in range(len(made) - 1, -1, -1):
                made = _kept(made, [*made[:at], *made[at + size :]], stays)
        for at in range(len(made)):  # the plainest, or one plainer
            made = _kept(made, [*made[:at], 0, *made[at + 1 :]], stays)
            made = _kept(made, [*made[:at], max(made[at] - 1, 0), *made[at + 1 :]], stays)
    return problem(from_list(made), seed), judge(problem(from_list(made), seed))


def _kept(made: list[int], plainer: list[int], stays: Callable[[list[int]], bool]) -> list[int]:
    return plainer if plainer != made and stays(plainer) else made


def _fault(found: Verdict) -> tuple[str, str]:
    """Verdict and kind: what has to stay the same while a problem gets plainer."""
    if found.verdict == WRONG:
        first = found.faults[0]
        return WRONG, re.sub(r"\d.*", "", first)[:20]
    return found.verdict, signature(
        {"verdict": "", "error": found.error, "where": _place(found.trace)}
    )[:70]


def told(chosen: Problem, found: Verdict) -> str:
    """A minimised problem for people."""
    with torch.random.fork_rng(devices=[]):
        lines = [str(chosen), repr(chosen.model), found.verdict, found.error, *found.faults]
    return "\n".join(line for line in lines if line)
