"""Text and JSON, written whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from nullbayes.common.files import atomic_file
from nullbayes.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Write ``text`` under a temporary name beside ``path``, then rename: nobody, not even after Ctrl-C, sees half."""
    make_folder(path.parent)
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON: NaN and infinity, which JSON does not have, become null."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:
    """``value`` in types that JSON has."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return plain(value.tolist())
    return str(value)


def make_folder(folder: Path) -> None:
    """Make ``folder``; if that is impossible say so in a sentence."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"The output folder {folder} cannot be made: {error.strerror or error}."
        ) from error
