"""Every Python line of the README and of the documentation runs, in order, as a newcomer would run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("extending", "generative", "layers"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="an sdist has no results")
def test_the_documents_name_no_figure_that_the_results_do_not_have() -> None:
    """The README's table is the benchmark's own, not a copy that ages."""
    table = (ROOT / "benchmarks" / "results" / "direct.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    readme = (ROOT / "README.md").read_text()
    assert len(rows) >= 4
    for row in rows:
        assert row in readme
