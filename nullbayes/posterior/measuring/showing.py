"""Single inputs as pictures or text that fit into a results file."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nullbayes.errors import InputError
from nullbayes.model.batch import take, tensor_leaves

Show = Callable[[Any], Any]
#: text of one input, and sides of its picture, at most
MOST_CHARACTERS, MOST_PIXELS = 400, 96
_NUMBERS = 12


def shown(inputs: Any, show: Show | None) -> dict[str, str]:
    """One input as ``{"text": ...}`` or ``{"png": base64}``.

    Args:
        inputs: a batch of one.
        show: ``show(input)`` with the batch axis gone, to a string, or an array or tensor ``(H, W)``, ``(C, H, W)`` or
            ``(H, W, C)`` to be drawn. None: tensors that look like pictures are drawn, others written.

    Raises:
        InputError: ``show`` fails, or returns something else.
    """
    first = _unbatched(inputs)
    if show is None:
        leaves = tensor_leaves(inputs)
        picture = _picture(leaves[0][0]) if len(leaves) == 1 else None
        return {"text": _text(first)} if picture is None else {"png": picture}
    try:
        value = show(first)
        if not isinstance(value, str):
            value = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except Exception as error:
        raise InputError(
            f"`show` failed on an input: {type(error).__name__}: {error}. It is called with one input, without the "
            "batch axis, and returns a string or an array to draw."
        ) from error
    if isinstance(value, str):
        return {"text": value[:MOST_CHARACTERS]}
    picture = _picture(value, sure=True)
    if picture is None:
        raise InputError(
            f"`show` returned an array of shape {tuple(value.shape)}; expected (H, W), (C, H, W) or (H, W, C) with one "
            "or three channels, or a string."
        )
    return {"png": picture}


def _unbatched(inputs: Any) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(
        lambda t: t[0].detach().cpu() if isinstance(t, Tensor) and t.ndim else t, inputs
    )


def _text(value: Any) -> str:
    """A few numbers of each tensor."""
    lines = []
    for leaf in tensor_leaves(value):
        flat = leaf.flatten()
        numbers = [
            f"{v:.3g}" if leaf.is_floating_point() else str(v) for v in flat[:_NUMBERS].tolist()
        ]
        more = f" … ({len(flat)} in all)" if len(flat) > _NUMBERS else ""
        lines.append(" ".join(numbers) + more)
    return "\n".join(lines)[:MOST_CHARACTERS] or type(value).__name__


def _picture(value: Tensor, *, sure: bool = False) -> str | None:
    """A PNG of what looks like a picture: one or three channels, both sides at least 4 (any, where that is sure)."""
    value = value.detach().cpu()
    if value.ndim == 3 and value.shape[0] in (1, 3):
        value = value.movedim(0, -1)
    if value.ndim == 2 and sure:
        value = value[..., None]
    if value.ndim != 3 or value.shape[-1] not in (1, 3):
        return None
    least = 1 if sure else 4
    if min(value.shape[:2]) < least or not (sure or value.is_floating_point()):
        return None
    step = -(-max(value.shape[:2]) // MOST_PIXELS)
    value = value[::step, ::step].double().nan_to_num()
    low, high = float(value.min()), float(value.max())
    grey = (value - low) / (high - low) if high > low else torch.zeros_like(value)
    return base64.b64encode(png((255 * grey).round().to(torch.uint8))).decode()


def png(pixels: Tensor) -> bytes:
    """``(H, W, 1 or 3)`` uint8 as a PNG file."""
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels).numpy()
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@dataclass
class Keeper:
    """The ``most`` inputs with the largest scores so far, and a caption for each; ``unit``: of the scores."""

    most: int
    unit: str = "novelty"
    kept: list[tuple[float, Any, str]] = field(default_factory=list)

    def offer(self, values: Tensor, inputs: Any, caption: Callable[[int], str]) -> None:
        """A batch with its scores ``(B,)``; those that are NaN or -inf are not meant."""
        least = self.kept[-1][0] if len(self.kept) >= self.most else -float("inf")
        for number in values.argsort(descending=True, stable=True)[: self.most].tolist():
            value = float(values[number])
            if value > least:
                one = take(inputs, number, number + 1, len(values))
                self.kept.append((value, _copied(one), caption(number)))
        self.kept.sort(key=lambda entry: -entry[0])
        del self.kept[self.most :]

    def merge(self, lists: list[list[tuple[float, Any, str]]]) -> None:
        """Of those of several processes, in the order of the data."""
        self.kept = sorted((e for part in lists for e in part), key=lambda entry: -entry[0])
        del self.kept[self.most :]

    def shown(self, show: Show | None) -> list[dict[str, Any]]:
        """As entries of a results file."""
        return [
            {"value": value, "caption": caption, **shown(inputs, show)}
            for value, inputs, caption in self.kept
        ]


def _copied(inputs: Any) -> Any:
    """Without the batch that it was cut from."""
    from torch.utils._pytree import tree_map

    return tree_map(lambda t: t.detach().cpu().clone() if isinstance(t, Tensor) else t, inputs)
