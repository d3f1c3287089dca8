"""Pages of the documentation hold what the committed results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import (
    page,
)
from experiments.store import RESULTS

# -- the page --------------------------------------------------------------------------------------


def test_markers_are_filled_from_the_results_and_shortened(tmp_path: Path) -> None:
    rows = [f"| method {k} | {k} |" for k in range(20)] + [
        "| **ours** | 1 |",
        "| null-space, by evidence | 2 |",
    ]
    table = ["| | x |", "|---|---|", *rows]
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thing.md").write_text(
        "\n".join(["# T", "", "## One", "", *table, "", "## Two", "", "text"])
    )
    text = "a\n<!-- begin thing: One -->\nold\n<!-- end -->\nb\n"
    filled = page.filled(text, tmp_path)
    assert "old" not in filled and "| **ours** | 1 |" in filled and "method 3" not in filled
    assert "| null-space, by evidence | 2 |" in filled and "small" in filled
    assert "**One**\n\n| | x |" in filled  # a reader of the page sees what the table is of
    assert page.filled(filled, tmp_path) == filled
    assert "*Setting: small; `experiments" in filled
    counted = "\n".join(["# T", "", "Seeds: a 4, b 1. † two.", "", "## One", "", *table])
    (tmp_path / "small" / "seeds.md").write_text(counted)
    assert "*Setting: small; seeds: a 4, b 1; `" in page.filled(
        text.replace("thing", "seeds"), tmp_path
    )
    own = [counted, "", "## Three", "", "Seeds: a 1.", "", *table]  # a table with seeds of its own
    (tmp_path / "small" / "own.md").write_text("\n".join(own))
    for title, seeds in (("One", "a 4, b 1"), ("Three", "a 1")):
        assert f"*Setting: small; seeds: {seeds}; `" in page.filled(
            text.replace("thing", "own").replace("One", title), tmp_path
        )
    rows = [f"| row {k} | {k} |" for k in range(20)]  # none stands for a method: all are shown
    (tmp_path / "small" / "other.md").write_text(
        "\n".join(["# T", "", "## One", *table[:2], *rows])
    )
    assert all(row in page.filled(text.replace("thing", "other"), tmp_path) for row in rows)
    with pytest.raises(ValueError, match="no section 'Three'"):
        page.filled(text.replace("One", "Three"), tmp_path)


@pytest.mark.skipif(
    not (Path(__file__).parents[2] / ".github").exists(), reason="an sdist has no results"
)
@pytest.mark.parametrize("name", list(page.BRIEFS))
def test_the_brief_table_has_the_cells_of_the_tables_that_it_is_made_of(name: str) -> None:
    folders = [RESULTS / setting for setting in ("full", "processor", "small")]
    source = next(f / f"{name}.md" for f in folders if (f / f"{name}.md").is_file())
    wanted = page.BRIEFS[name]
    lines = source.read_text().splitlines()
    rows = [row.split(" | ") for row in page.brief(lines, source).splitlines()[2:]]
    assert len(rows) == len(wanted.measures) * len(wanted.methods)
    for measure, method, *cells in rows:
        _, under = page.section(lines, wanted.measures[measure.strip("| ")], source)
        table = page.table_of(under)
        (found,) = (r for r in table if r.split("|")[1].replace("**", "").strip() == method)
        assert found.endswith(" | ".join(cells))
    lost = wanted.methods[-1]
    with pytest.raises(ValueError, match="has no row"):
        page.brief([line for line in lines if lost not in line], source)


@pytest.mark.skipif(
    not (Path(__file__).parents[2] / ".github").exists(), reason="an sdist has no results"
)
def test_the_pages_have_every_marker_that_they_had_on_one() -> None:
    """Five pages of the evaluation: none of what is measured is lost between them."""
    found = [m["what"] for p in page.PAGES for m in page.MARKER.finditer(p.read_text())]
    assert len(found) == len(set(found))
    tables = {what.split(":")[0].rpartition("/")[2] for what in found}  # without their setting
    written = {p.stem for s in ("full", *page.OTHERS) for p in (RESULTS / s).glob("*.md")}
    assert tables == written


@pytest.mark.skipif(
    not (Path(__file__).parents[2] / ".github").exists(), reason="an sdist has no results"
)
@pytest.mark.parametrize("document", page.PAGES, ids=lambda p: p.name)
def test_a_page_says_what_the_committed_results_say(document: Path) -> None:
    text = document.read_text()
    assert page.MARKER.search(text)
    assert page.filled(text, RESULTS) == text, "run `python -m experiments --docs`"
