"""The section "torture" of benchmarks/results/reliability.md, from what the parts left in their folder."""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path
from typing import Any

from tests.torture import running

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "reliability.md"
TITLE = "# Reliability"
NAME = "torture"


def replaced(text: str, name: str, body: str) -> str:
    """``text`` with the section ``## name`` replaced by ``body``, or added at the end; all others are left alone."""
    section = f"## {name}\n\n{body.strip()}\n"
    found = re.search(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", text, flags=re.M | re.S)
    if found is None:
        return f"{text.rstrip()}\n\n{section}"
    rest = text[found.end() :]
    return text[: found.start()] + section + ("\n" + rest if rest else "")


def write(folder: Path, results: Path = RESULTS) -> str:
    """Renew the section from ``folder``; what was not run is said to be missing."""
    text = results.read_text() if results.exists() else TITLE + "\n"
    body = "\n\n".join(
        [
            _how(),
            _networks(folder),
            _modules(folder),
            _kills(folder),
            _files(folder),
            _endurance(folder),
        ]
    )
    results.write_text(replaced(text, NAME, body))
    return body


def _how() -> str:
    return (
        "`make torture` (hours; goes on where it was stopped), or a part of it: `python -m tests.torture "
        "networks|files|kills|endurance|modules`. `python -m tests.torture report` writes this section. A part "
        "that takes a minute is in `make test`. The judge computes in float64, by plain automatic differentiation, "
        "one example alone, with derivatives of the losses by hand, and shares no code with the library."
    )


def _loaded(path: Path) -> Any:
    if not path.exists():
        return None
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


def _networks(folder: Path) -> str:
    lines = _loaded(folder / "networks.jsonl")
    if not lines:
        return "### Random networks\n\nNot run."
    counts = collections.Counter(line["verdict"] for line in lines)
    seeds = [line["seed"] for line in lines]
    table = "\n".join(f"| {v} | {n:,} |" for v, n in counts.most_common())
    kinds = running.summary(lines).splitlines()[1:]
    listed = "\n".join(line for line in kinds[:40])
    what = f"What is wrong as yet:\n\n```\n{listed}\n```" if kinds else "No disagreement is left."
    return (
        f"### Random networks\n\nSeeds {min(seeds)} to {max(seeds)}, {len(lines):,} networks, "
        f"{sum(line.get('seconds', 0) for line in lines) / 60:.0f} minutes of one core. *Refused*: with an error of "
        f"the library's, for a reason that lies in the network or the settings.\n\n| verdict | networks |\n"
        f"|---|---|\n{table}\n\n"
        f"{what}"
    )


def _modules(folder: Path) -> str:
    lines = _loaded(folder / "modules.json")
    if not lines:
        return "### PyTorch's module database\n\nNot run."
    counts = collections.Counter(line["verdict"] for line in lines)
    names = {line["name"].split()[0] for line in lines}
    told = ", ".join(f"{n} {v}" for v, n in counts.most_common())
    bad = collections.Counter(
        f"{line['name'].split()[0]}: {line['verdict']}: {line['error'][:100]}"
        for line in lines
        if line["verdict"] in running.BAD
    )
    listed = "".join(f"\n- {n} × {text}" for text, n in bad.most_common())
    return (
        f"### PyTorch's module database\n\n{len(lines)} modules and inputs of {len(names)} kinds of module: {told}."
        f"{listed}"
    )


def _kills(folder: Path) -> str:
    found = _loaded(folder / "kills.json")
    if not found:
        return "### Kills and a full disk\n\nNot run."
    fits, saves = found["fits"], found["saves"]
    faults = [f for part in found.values() for f in part["faults"]]
    listed = "".join(f"\n- {text}" for text in faults) or " None."
    return (
        f"### Kills and a full disk\n\n{fits['kills']} kills (SIGKILL) at random points of fits, of which "
        f"{fits['resumed']} left a checkpoint that the next fit went on from; {saves['kills']} during saves. One run "
        f"with files limited to 4 kB. Faults:{listed}"
    )


def _files(folder: Path) -> str:
    lines = _loaded(folder / "files.jsonl")
    if not lines:
        return "### Damaged files\n\nNot run."
    counts: collections.Counter[str] = collections.Counter()
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in lines:
        counts.update(line["counts"])
        for name, some in line["by_file"].items():
            for how, n in some.items():
                kinds[name][how.split(": ")[1]] += n
    verdicts = sorted(counts)
    rows = "\n".join(
        f"| {name} | " + " | ".join(f"{some[v]:,}" for v in verdicts) + " |"
        for name, some in sorted(kinds.items())
    )
    faults = [f for line in lines for f in line["faults"]]
    return (
        f"### Damaged files\n\n{sum(counts.values()):,} files: bits flipped, ends cut off, bytes dropped, inserted, "
        "zeroed or swapped, entries of the description edited. *Taken*: a description edited and its checksum put "
        f"right, which no reader can tell from a file that was written so.\n\n| file | {' | '.join(verdicts)} |\n"
        f"|---|{'---|' * len(verdicts)}\n{rows}\n\nFaults: {faults or 'none'}."
    )


def _endurance(folder: Path) -> str:
    found = _loaded(folder / "endurance.json")
    if not found:
        return "### Memory and two hundred fits\n\nNot run."
    many = found["fits"]
    early, late = many["after warming"], many["at the end"]
    rows = "\n".join(
        f"| {b['problem']} | {b['error']} | | | |"
        if "error" in b
        else f"| {b['problem']} | {b['rows']:,} × {b['weights']:,} | {b['solver']} | {b['budget']} | {b['taken']} "
        f"({100 * b['share'] - 100:+.0f} %) |"
        for b in found["budgets"]
    )
    return (
        "### Memory and two hundred fits\n\n"
        "The most that one fit took beside what the process held before it (the "
        "kernel's high-water mark, in a fresh process), against `memory=`.\n\n"
        f"| problem | rows × weights | solver | budget, MB | taken, MB |\n|---|---|---|---|---|\n{rows}\n\n"
        f"{many['fits']} fits in one process: resident memory "
        f"{early['resident'] / 2**20:.0f} MB after 20 of them and {late['resident'] / 2**20:.0f} MB at the end, "
        f"{early['descriptors']} and {late['descriptors']} open files, {early['tasks']} and {late['tasks']} threads, "
        f"{many['hooks']} hooks left on the model."
    )
