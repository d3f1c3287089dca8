"""Many small images as one picture: an axis for each would take longer to lay out than to compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples import _common as common

GAP = 0.12  # between tiles, as a share of their size


def grey(images: Tensor) -> Tensor:
    """``(N, H, W)`` in [0, 1] as ``(N, H, W, 3)``."""
    return images.clamp(0, 1).unsqueeze(-1).expand(*images.shape, 3)


def heat(values: Tensor, brightest: float) -> Tensor:
    """``(N, H, W)`` in the colours of magma, from 0 to ``brightest``: ``(N, H, W, 3)``."""
    from matplotlib import colormaps

    coloured = colormaps["magma"]((values / brightest).clamp(0, 1).numpy())
    return torch.from_numpy(coloured[..., :3]).float()


def mosaic(
    rows: Sequence[Tensor],
    labels: Sequence[str],
    heads: Sequence[str],
    name: str,
    out: Path,
    docs: bool,
    size: float = 0.75,
) -> Path:
    """Rows of tiles ``(N, H, W, 3)``, the same N in each, with labels beside the rows and above the columns."""
    count, height, width = rows[0].shape[:3]
    down, right = round(height * (1 + GAP)), round(width * (1 + GAP))
    canvas = torch.ones(len(rows) * down, count * right, 3)
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            canvas[r * down : r * down + height, c * right : c * right + width] = tile
    with common.drawing() as plt:
        figure, axis = plt.subplots(
            figsize=(size * count + 1, size * len(rows) + 0.4), layout="constrained"
        )
        axis.imshow(canvas.numpy(), interpolation="nearest")
        axis.set_yticks([r * down + height / 2 for r in range(len(rows))], labels)
        axis.set_xticks([c * right + width / 2 for c in range(len(heads))], heads)
        axis.xaxis.tick_top()
        axis.tick_params(length=0, labelsize=8)
        axis.spines[:].set_visible(False)
        return common.save_picture(figure, name, out, docs, dpi=100)
