"""What mkdocs does beside rendering: the page of changes is the repository's CHANGELOG.md, not a copy that ages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

CHANGELOG = Path(__file__).parent.parent / "CHANGELOG.md"


def changelog(text: str) -> str:
    """The file as a page: links to files of the repository become their words, comments go."""
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    return re.sub(r"\[([^\]]+)\]\((?![a-z]+:)[^)]*\)", r"\1", text)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return (
        changelog(CHANGELOG.read_text("utf-8")) if page.file.src_uri == "changelog.md" else markdown
    )
