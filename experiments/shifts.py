"""Images that differ from the training data: by degrees, with their labels, or altogether.

All images are ``(N, 1, H, W)`` in [0, 1]; nothing draws from torch's global random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nullbayes import datasets

ANGLES = tuple(range(15, 181, 15))
NOISE = (0.1, 0.2, 0.3, 0.4, 0.5)  # standard deviation, of pixels in [0, 1]
BLUR = (0.5, 1.0, 1.5, 2.0, 3.0)  # standard deviation of the kernel in pixels of a 28-pixel image
CONTRAST = (0.75, 0.5, 0.3, 0.2, 0.1)  # what is left of it

Shift = Callable[[Tensor, float, int], Tensor]


def rotated(images: Tensor, degrees: float, seed: int) -> Tensor:
    """Turned counter-clockwise; what turns in from outside is black."""
    return datasets.rotated(images, degrees)


def noisy(images: Tensor, sd: float, seed: int) -> Tensor:
    """With Gaussian noise, clipped to [0, 1]."""
    return datasets.noisy(images, sd, seed=seed)


def blurred(images: Tensor, sd: float, seed: int) -> Tensor:
    """Convolved with a Gaussian of ``sd`` pixels for an image 28 pixels high, and in proportion for others.

    Edges are repeated, so that a constant image stays as it is.
    """
    sigma = sd * images.shape[-2] / 28
    reach = max(1, math.ceil(3 * sigma))
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(images)
    out = images
    for shape, pad in (
        ((1, 1, -1, 1), (0, 0, reach, reach)),
        ((1, 1, 1, -1), (reach, reach, 0, 0)),
    ):
        channels = out.shape[1]
        weight = kernel.reshape(shape).expand(channels, 1, *kernel.reshape(shape).shape[2:])
        out = F.conv2d(F.pad(out, pad, mode="replicate"), weight, groups=channels)
    return out.clamp(0, 1)


def low_contrast(images: Tensor, factor: float, seed: int) -> Tensor:
    """Pulled towards each image's own mean; ``factor`` of its contrast is left."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + factor * (images - mean)


SHIFTS: dict[str, tuple[Shift, Sequence[float]]] = {
    "rotation": (rotated, ANGLES),
    "noise": (noisy, NOISE),
    "blur": (blurred, BLUR),
    "contrast": (low_contrast, CONTRAST),
}


def graded(
    images: Tensor, seed: int, strengths: dict[str, Sequence[float]] | None = None
) -> dict[str, dict[str, Tensor]]:
    """The same images under each shift at each strength: ``{"rotation": {"15": (N, 1, H, W), …}, …}``.

    Args:
        strengths: which, by shift; None: all of ``SHIFTS``.
    """
    out: dict[str, dict[str, Tensor]] = {}
    for number, (name, (function, every)) in enumerate(SHIFTS.items()):
        chosen = every if strengths is None else strengths[name]
        out[name] = {
            f"{strength:g}": function(images, strength, 1000 * seed + number) for strength in chosen
        }
    return out


# -- images of something else --------------------------------------------------------------------


def inverted(images: Tensor) -> Tensor:
    """Black for white."""
    return 1 - images


def patch_shuffled(images: Tensor, grid: int = 4, *, seed: int = 0) -> Tensor:
    """Cut into ``grid`` × ``grid`` patches that change places, in an order of its own for each image.

    Local statistics stay, the whole is gone. Sides that ``grid`` does not divide are an error of the caller.
    """
    n, channels, height, width = images.shape
    if height % grid or width % grid:
        raise ValueError(
            f"`patch_shuffled` cuts {height} × {width} images into {grid} × {grid} patches: choose a `grid` that "
            "divides both sides."
        )
    h, w = height // grid, width // grid
    patches = images.reshape(n, channels, grid, h, grid, w).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(n, grid * grid, channels, h, w)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n, grid * grid, generator=generator).argsort(1).to(images.device)
    patches = patches[torch.arange(n, device=images.device)[:, None], order]
    patches = patches.reshape(n, grid, grid, channels, h, w).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(n, channels, height, width)


def altogether(images: Tensor, seed: int) -> dict[str, Tensor]:
    """What can be made of test images: turned by 90°, inverted, patch-shuffled; and uniform noise of their shape."""
    return {
        "rotated 90°": datasets.rotated(images, 90.0),
        "inverted": inverted(images),
        "shuffled": patch_shuffled(images, seed=seed),
        "noise": datasets.noise_like(images, seed=seed + 2),
    }
