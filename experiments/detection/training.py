"""Networks of the problems, trained once and kept as safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.networks import FOLDER, kept
from nullbayes.datasets import Split
from nullbayes.demo.models import seeded
from nullbayes.demo.training import Recipe, train

Build = Callable[..., nn.Module]


def trained(
    name: tuple[str, str],
    build: Build,
    split: Split,
    recipe: Recipe,
    seed: int,
    *,
    kind: str = "classification",
    augmented: bool = False,
) -> nn.Module:
    """The network of one problem, in evaluation mode."""
    settings = {
        "name": name, "recipe": asdict(recipe), "seed": seed, "examples": len(split), "augmented": augmented,
        "data": float(split.inputs.double().sum()),
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = FOLDER / f"detection-{name[0]}-{key}.safetensors"
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    if kind == "regression":
        loss = F.mse_loss

    def trained_as_asked(network: nn.Module) -> None:
        model = _Augmented(network, seed) if augmented else network
        train(model, split, recipe, loss=loss, seed=seed)

    return kept(path, seeded(build, 0.0, seed=seed), trained_as_asked)  # type: ignore[arg-type]


class _Augmented(nn.Module):
    """In training, each batch is mirrored or not and moved by up to two pixels, by a generator of its own."""

    def __init__(self, network: nn.Module, seed: int) -> None:
        super().__init__()
        self.network = network
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self._moved(x)
        found: Tensor = self.network(x)
        return found

    def _moved(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        mirror = torch.rand(n, generator=self.generator) < 0.5
        x = torch.where(mirror[:, None, None, None], x.flip(3), x)
        padded = F.pad(x, (2, 2, 2, 2))
        down, right = torch.randint(0, 5, (2, n), generator=self.generator)
        rows = down[:, None] + torch.arange(height)
        columns = right[:, None] + torch.arange(width)
        which = torch.arange(n)[:, None, None]
        return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
