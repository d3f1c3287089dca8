"""What all posterior files share: one safetensors file with a description as JSON and a checksum over all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nullbayes.common.files import atomic_file, checksum
from nullbayes.errors import StorageError
from nullbayes.model.parameters import ParameterSpace

FORMAT = "nullbayes-posterior"
# 1: without a checksum. 3: with a prior mean, masks or one prior precision a layer; what has none of these stays at 2.
# 4: with samples in 8 bits.
VERSION, SPECIAL, PLAIN = 4, 3, 2

# Writes tensors and metadata to a path, as `safetensors.torch.save_file` does.
Save = Callable[[dict[str, Tensor], Path, dict[str, str]], None]


def description(
    prints: dict[str, str],
    space: ParameterSpace,
    dtype: torch.dtype,
    version: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What a file says of itself, and of the network that it belongs to.

    Args:
        prints: fingerprint of the network that was fitted, whatever has become of it since.
    """
    return {
        "format": FORMAT,
        "version": version,
        "names": list(space.names),
        "shapes": [list(slot.shape) for slot in space.slots],
        "dtype": str(dtype),
        "fingerprint": prints,
        "settings": settings,
    }


def signed(text: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The metadata of a file with this description and these tensors."""
    return {"nullbayes": text, "checksum": checksum(text, tensors)}


def write_file(
    target: Path, meta: dict[str, Any], tensors: dict[str, Tensor], save: Save = save_file
) -> None:
    """Write under a temporary name in the same folder, then rename: never half a file.

    Raises:
        StorageError: ``meta`` holds what JSON has no form for, or the path cannot be written.
    """
    try:
        text = json.dumps(meta)
    except TypeError as error:
        raise StorageError(
            f"the posterior's settings cannot be written as JSON ({error}); a custom likelihood's "
            "`config()` must return plain numbers, strings and lists."
        ) from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as part:
            save(tensors, part, signed(text, tensors))
    except (OSError, ValueError, SafetensorError) as error:  # a name with a NUL is a ValueError
        raise StorageError(f"could not write {target}: {error}.") from error


def check_format(source: Path, meta: dict[str, Any]) -> None:
    """Raise `StorageError` for a format or a version that this version does not read."""
    if meta["format"] != FORMAT or meta["version"] > VERSION:
        raise StorageError(
            f"{source} has format {meta['format']!r} version {meta['version']}; this "
            f"nullbayes reads {FORMAT!r} up to version {VERSION}. Upgrade nullbayes."
        )


def check_whole(source: Path, told: str | None, text: str, tensors: dict[str, Tensor]) -> None:
    """Raise `StorageError` where the checksum ``told`` is not that of the description and the tensors."""
    if told != checksum(text, tensors):
        raise StorageError(
            f"{source} cannot be read: it is not what was written (its checksum differs). It was damaged or changed "
            "since; save it again."
        )
