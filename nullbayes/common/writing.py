"""Text and JSON, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from nullbayes.common.files import atomic_file
from nullbayes.errors import InputError, StorageError

CHECKSUM = "checksum"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` under a temporary name beside ``path``, then rename: nobody, not even after Ctrl-C, sees half.

    Raises:
        StorageError: it cannot be written there; an earlier file stays.
    """
    make_folder(path.parent)
    try:
        with atomic_file(path) as part:
            part.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: Exception) -> StorageError:
    """What to say of a file that could not be written."""
    why = getattr(error, "strerror", None) or error
    return StorageError(
        f"{path} cannot be written: {why}. Give another place, or make room there; nothing was left half-written."
    )


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON: NaN and infinity, which JSON does not have, become null."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_signed_json(path: Path, value: dict[str, Any]) -> None:
    """Strict JSON with a ``checksum`` over all other entries, for :func:`read_signed_json`."""
    # Said twice, so that one damaged key cannot make it pass for a file of a version that signed nothing.
    written = {"signed": True, **{k: v for k, v in plain(value).items() if k != CHECKSUM}}
    write_json(path, {**written, CHECKSUM: json_digest(written)})


def read_signed_json(path: Path, again: str) -> dict[str, Any]:
    """What :func:`write_signed_json` wrote; a file without a checksum, of an earlier version, is taken as it is.

    Args:
        again: what to do about a damaged file, as a sentence.

    Raises:
        StorageError: missing, not whole, no mapping, or changed since it was written.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise StorageError(f"{path} is not whole JSON ({error}). {again}") from error
    if not isinstance(value, dict):
        return {}
    told = value.pop(CHECKSUM, None)
    if (told is not None or "signed" in value) and told != json_digest(value):
        raise StorageError(
            f"{path} is not what was written: damaged, or changed since (its checksum differs). {again}"
        )
    value.pop("signed", None)
    return value


def json_digest(value: dict[str, Any]) -> str:
    """SHA-256, in hexadecimal, of a mapping that JSON holds, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
