"""The documentation: tables and figures between a page's markers are copied from the results, never typed.

    python -m experiments --docs

A marker ``<!-- begin digits_heldout: Under shift -->`` takes that section's table from the full results, or from the
small ones where there are no full ones; ``<!-- begin digits_heldout: figure auroc -->`` the picture. Of long tables the
page shows the variant that stands for each method and ours by the evidence. ``<!-- begin claims -->``: the whole page.
``<!-- begin small/language: Free text -->`` takes the small one, ``processor/language`` that of this setting.
``<!-- begin overview: in brief -->``: of some of the overview's tables the rows of a few methods, as one table.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from experiments.store import RESULTS, ROOT
from nullbayes.common.writing import make_folder, write_text

FOLDER = ROOT / "docs" / "evaluation"
PAGES = (
    ROOT / "README.md",
    *(
        FOLDER / f"{name}.md"
        for name in (
            "index",
            "classification",
            "regression",
            "detection",
            "layers",
            "joint",
            "language",
            "ablations",
            "method",
        )
    ),
)
SEEDS = re.compile(r"S(eeds?\b[^.]*)\.")  # how many, where a page of results says it in a line
PICTURES = "pictures"  # folder of copied figures, beside the page
MARKER = re.compile(r"(<!-- begin (?P<what>[^\n]*?) -->\n)(?P<old>.*?)(<!-- end -->)", re.DOTALL)
#: Pages whose long tables are shown whole: ours and all rivals.
WHOLE = ("detection", "layers", "candidates", "sets", "language")
ALSO_SHOWN = "null-space, by evidence"
OTHERS = (
    "small",
    "processor",
)  # settings that a marker may name: where the full results lack the table
LONG = 16  # rows of a table from which on it is shortened


@dataclass(frozen=True)
class Brief:
    """A table of the README: sections of a page of results by the name of the measure, and which of their rows."""

    measures: dict[str, str]
    methods: tuple[str, ...]


BRIEFS = {
    "overview": Brief(
        {"NLL": "NLL", "NLL under shift": "NLL under shift"},
        (
            "point estimate",
            "temperature scaling",
            "last-layer Laplace",
            "Kronecker Laplace",
            "full Laplace",
            "ensemble of 5, tuned temperature",
            "null-space",
            ALSO_SHOWN,
        ),
    ),
    "detection": Brief(
        {"AUROC": "Overview"},
        (
            "null space",
            "layer null space",
            "layer null space, neighbours",
            "max-softmax",
            "energy",
            "Mahalanobis",
            "relative Mahalanobis",
            "MDS++",
            "KNN",
            "ViM",
            "DDU",
            "GAPA",
            "nearest input",
        ),
    ),
    "joint": Brief(
        {"clean": "Joint NLL by a label", "shifted": "Joint NLL by a label, shifted"},
        (
            "functions that guess (no network)",
            "network",
            "network, temperature",
            "Laplace, all weights",
            "null space, by evidence",
            "null space, prior tuned by joint NLL",
            "Gaussian process around the network (FMGP)",
            "five networks",
        ),
    ),
}


def update(page: Path, results: Path = RESULTS) -> None:
    """Fill the page's markers and copy its figures."""
    write_text(page, filled(page.read_text(), results, page.parent / PICTURES))


def filled(text: str, results: Path, pictures: Path | None = None) -> str:
    """The page with every marker filled anew; figures are copied to ``pictures`` unless that is None."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{content(match['what'], results, pictures)}\n\n{match[4]}"

    return MARKER.sub(fill, text)


def content(what: str, results: Path, pictures: Path | None) -> str:
    name, _, title = (part.strip() for part in what.partition(":"))
    settings: tuple[str, ...] = ("full", "processor", "small")
    own, slash, rest = name.partition("/")
    if slash and own in OTHERS:
        name, settings = rest, (own,)
    for setting in settings:
        source = results / setting / f"{name}.md"
        if source.is_file():
            break
    else:
        return f"*No results yet: `python -m experiments {name} --setting full`.*"
    lines = source.read_text().splitlines()

    def provenance(*parts: list[str]) -> str:
        """With the seeds that the first of ``parts`` names that names any."""
        named = (found[1] for part in parts for line in part if (found := SEEDS.match(line)))
        seeds = next((f"s{words}; " for words in named), "")
        return f"*Setting: {setting}; {seeds}`experiments/results/{setting}/{name}.md`.*"

    where = provenance(lines)
    if not title:
        body = "\n".join(line.replace("## ", "#### ", 1) for line in lines[1:]).strip()
        return f"{body}\n\n{where}"
    if title.startswith("figure"):
        suffix = title.removeprefix("figure").strip()
        file = f"{name}-{suffix}.png" if suffix else f"{name}.png"
        words = next(
            (w for w in re.findall(r"!\[(.*?)\]\((.*?)\)", "\n".join(lines)) if w[1] == file), None
        )
        if words is None:
            raise ValueError(f"{source} shows no figure {file!r}: mend the marker {what!r}.")
        if pictures is not None:
            make_folder(pictures)
            shutil.copyfile(source.parent / file, pictures / file)
        return f"![{words[0]}]({PICTURES}/{file})\n\n{where}"
    if title == "in brief":
        return f"{brief(lines, source)}\n\n{where}"
    heading, under = section(lines, title, source)
    table = table_of(under)
    # What stands above a table of the overview is the page's own.
    above = "" if name == "overview" else f"**{heading}**\n\n"
    shown = "\n".join(table) if name in WHOLE else shortened(table)
    return f"{above}{shown}\n\n{provenance(under, lines)}"


def section(lines: list[str], title: str, source: Path) -> tuple[str, list[str]]:
    """The first heading that begins with ``title``, and the lines under it."""
    starts = [i for i, line in enumerate(lines) if line.startswith(f"## {title}")]
    if not starts:
        raise ValueError(f"{source} has no section {title!r}: mend the marker.")
    rest = lines[starts[0] + 1 :]
    stop = next((i for i, line in enumerate(rest) if line.startswith("## ")), len(rest))
    return lines[starts[0]].removeprefix("## "), rest[:stop]


def table_of(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("|")]


def brief(lines: list[str], source: Path) -> str:
    """Several tables of one page as one: a column for the question, and the rows of a few methods.

    The cells are the source's, bold face included: the best of all methods, shown here or not.
    """
    out: list[str] = []
    wanted = BRIEFS[source.stem]
    for measure, title in wanted.measures.items():
        table = table_of(section(lines, title, source)[1])
        out = out or [f"| measure {table[0]}", f"|---{table[1]}"]
        rows = {row.split("|")[1].strip(" *†‡"): row for row in table[2:]}
        for method in wanted.methods:
            if method not in rows:
                raise ValueError(f"{source}, {title!r}, has no row {method!r}.")
            cells = rows[method].split("|")
            cells[1] = cells[1].replace("**", "")
            out.append(f"| {measure} {'|'.join(cells)}")
    return "\n".join(out)


def shortened(table: list[str]) -> str:
    """Of a long table the rows that stand for a method, and ours by the evidence."""
    shown = [row for row in table[2:] if row.startswith(("| **", f"| {ALSO_SHOWN} |"))]
    if len(table) - 2 >= LONG and shown:  # where no row stands for a method, all of them do
        table = table[:2] + shown
    return "\n".join(table)
