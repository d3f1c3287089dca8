"""Every Python block of the README and of the documentation runs, in order, as a newcomer would run it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_setup import SETUPS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
SETUP = re.compile(r"<!-- setup: (\w+) -->")
# Tags of blocks that are no Python to run: commands, output and signatures.
OTHER = {"bash", "text", "bibtex"}


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """Line, language tag and text of each fenced block."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in FENCE.finditer(text)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


WITH_CODE = [page for page in PAGES if any(tag == "python" for _, tag, _ in blocks(page))]


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for setup in SETUP.findall(page.read_text()):
        names.update(SETUPS[setup]())
    for line, tag, block in blocks(page):
        if tag == "python":
            # Line numbers of a failure are those of the page.
            exec(compile("\n" * line + block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_block_hides_from_the_test_above(page: Path) -> None:
    """No other tag for Python, no indented fence, and no fence without a tag."""
    text = page.read_text()
    assert {tag for _, tag, _ in blocks(page)} <= {"python", *OTHER}
    assert not re.search(r"^[ >]+```", text, re.MULTILINE)
    assert text.count("```") == 2 * len(blocks(page))


def test_blocks_that_do_not_run_are_rare() -> None:
    tags = [tag for page in PAGES for _, tag, _ in blocks(page)]
    assert tags.count("text") * 5 <= tags.count("python")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    """Files and headings that a page points to exist, also in the README, which mkdocs does not see."""
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name(page)} points to {target}"
        if heading:
            assert heading in headings(found), f"{name(page)} points to {target}"


def headings(page: Path) -> set[str]:
    """Anchors of a page, as mkdocs makes them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", title.lower(), flags=re.ASCII).strip() for title in titles)
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


def test_the_navigation_names_every_page() -> None:
    named = re.findall(r"[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def script(file: str) -> Any:
    """A Python file beside the pages, as a module."""
    spec = importlib.util.spec_from_file_location(file, DOCS / f"{file}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_changes_is_the_changelog() -> None:
    hooks = script("hooks")
    text = (
        "## 1.0\n<!-- a note -->\n- one ([why](CONTRIBUTING.md#why), [what](https://example.org))\n"
    )
    assert hooks.changelog(text) == "## 1.0\n- one (why, [what](https://example.org))\n"
    page = hooks.changelog((ROOT / "CHANGELOG.md").read_text())
    assert page.startswith("# Changelog") and "NullSpacePosterior" in page


def test_the_picture_shows_what_its_titles_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = script("make_figures")
    monkeypatch.setattr(figures, "STEPS", 300)
    monkeypatch.setattr(figures, "SAMPLES", 30)
    laplace, null_space = figures.draw(tmp_path / "picture.png").values()
    assert null_space.shape == laplace.shape == (30, 16, 1)
    assert null_space.std(0).max() < 0.01 * laplace.std(0).min()
    torch.testing.assert_close(null_space.mean(0), null_space[0], rtol=0, atol=1e-2)
    for file in (tmp_path / "picture.png", figures.FILE):
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size < 150_000


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_a_setup_is_new_each_time_and_used(setup: Callable[[], dict[str, Any]]) -> None:
    first, second = setup(), setup()
    assert first["model"] is not second["model"]
    assert not first["model"].training
    used = {found for page in PAGES for found in SETUP.findall(page.read_text())}
    assert setup.__name__ in used


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="an sdist has no results")
def test_the_documents_name_no_figure_that_the_results_do_not_have() -> None:
    """Tables of the benchmarks are their own, not copies that age."""
    results = ROOT / "benchmarks" / "results"
    for file, place in (("direct.md", "benchmarks.md"), ("edge.md", "concepts/null-space.md")):
        page = (DOCS / place).read_text()
        rows = [r for r in (results / file).read_text().splitlines() if r.startswith("| ")]
        assert len(rows) >= 4
        for row in rows:
            assert row in page
    readme = (ROOT / "README.md").read_text()
    for file, figures in {
        "whole.md": ("0.0404", "335.7", "6.994"),
        "swin.md": ("1,603", "| 5.2 |", "| 7.7 |"),
        "direct.md": ("| 7.8 |", "2127"),
    }.items():
        assert all(figure in (results / file).read_text() for figure in figures)
    for figure in ("336 s", "7.0 GB", "5.2 min", "7.7 GB", "7.8 s", "2.1 GB"):
        assert figure in readme
