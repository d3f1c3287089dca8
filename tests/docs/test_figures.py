"""Figures that sentences quote are figures of the tables: what is measured anew does not leave old ones behind."""

from __future__ import annotations

import bisect
import re
from pathlib import Path

import pytest

from experiments import page
from experiments.store import RESULTS, ROOT

NUMBER = re.compile(r"(?<![\w.])(?<!± )\d*\.\d+(?![\w.])(?: (?P<percent>%))?")
#: Results that a page quotes and takes no table from.
MORE = {
    "README.md": ("ablations", "intervals", "underfitting"),
    "evaluation/index.md": ("ablations", "detection", "digits_heldout", "swin", "underfitting"),
    "evaluation/method.md": ("ablations", "digits_heldout", "fashion_resnet", "swin", "tabular"),
    "evaluation/ablations.md": ("swin",),
    "concepts/novelty.md": ("ablations", "detection", "fashion_resnet"),
}
#: Figures of no table: sizes, versions, differences of two figures, and what was looked into once.
ELSEWHERE = {
    "README.md": {"27.5", ".006"},
    "evaluation/layers.md": {".0012"},
    "evaluation/language.md": {".016"},
    "evaluation/classification.md": {"11.5", "11.9", "8.2"},
}


def quoted(text: str) -> list[tuple[str, bool]]:
    """Decimal numbers of a page, no errors, outside of tables, code and links; whether each is a percentage."""
    text = page.MARKER.sub("", text)
    text = re.sub(r"```.*?```|`[^`]*`|\[[^\]]*\]\([^)]*\)", " ", text, flags=re.DOTALL)
    text = re.sub(r"^\|.*$", " ", text, flags=re.MULTILINE)
    return [(m[0].removesuffix(" %"), bool(m["percent"])) for m in NUMBER.finditer(text)]


def measured(names: set[str]) -> list[float]:
    """Numbers of those pages of results in every setting, but for standard errors."""
    found: set[float] = set()
    for setting in ("full", *page.OTHERS):
        for source in (RESULTS / setting / f"{name}.md" for name in sorted(names)):
            if source.is_file():
                text = re.sub(r"± [\d.e+-]+", "", source.read_text())
                found.update(float(n) for n in re.findall(r"(?<![\w.])\d*\.?\d+", text))
    return sorted(found)


def unknown(text: str, numbers: list[float]) -> list[str]:
    """What is quoted and is no rounding of any of the numbers; a percentage may be a share of one."""
    out = []
    for number, percent in quoted(text):
        half = 0.5 * 10.0 ** -len(number.split(".")[1]) * (1 + 1e-6)
        scales = (1, 100) if percent else (1,)
        lows = [(float(number) - half) / scale for scale in scales]
        found = [bisect.bisect_left(numbers, low) for low in lows]
        if not any(
            i < len(numbers) and numbers[i] * scale <= float(number) + half
            for i, scale in zip(found, scales, strict=True)
        ):
            out.append(number)
    return out


def test_a_figure_that_no_table_has_is_found() -> None:
    text = "It is .713 (± .05), 86.5 % and `.1`; [.2](x.md).\n| .3 |\n<!-- begin a: b -->\n.4\n<!-- end -->\n"
    assert quoted(text) == [(".713", False), ("86.5", True)]
    assert unknown(text, [0.7129, 0.8649]) == []
    assert unknown(text, [0.7136, 0.8656]) == [".713", "86.5"]
    assert unknown(text, [0.7124, 0.8644, 86.5]) == [".713"]


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="an sdist has no results")
@pytest.mark.parametrize(
    "document", [*page.PAGES, ROOT / "docs" / "concepts" / "novelty.md"], ids=lambda p: p.name
)
def test_sentences_quote_the_tables(document: Path) -> None:
    name = str(document.relative_to(ROOT)).removeprefix("docs/")
    text = document.read_text()
    taken = {m["what"].split(":")[0].rpartition("/")[2].strip() for m in page.MARKER.finditer(text)}
    numbers = measured(taken | set(MORE.get(name, ())))
    assert len(numbers) > 100
    left = set(unknown(text, numbers)) - ELSEWHERE.get(name, set())
    assert not left, (
        f"{name} quotes {sorted(left)}, which no table of {sorted(taken)} has (any more)"
    )
