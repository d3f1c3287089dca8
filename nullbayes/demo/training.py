"""Point estimates: plain Adam with a cosine schedule, in seeded order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nullbayes.datasets import Split

SMALL = 2**17  # numbers in a batch
Tick = Callable[[str], None]  # called once an epoch with a few words


@dataclass(frozen=True)
class Recipe:
    """How a point estimate is trained: AdamW with a cosine schedule over ``epochs``."""

    epochs: int
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.0


def train(
    model: nn.Module,
    split: Split,
    recipe: Recipe,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    seed: int = 0,
    tick: Tick = lambda words: None,
) -> nn.Module:
    """Train ``model`` in place and return it in evaluation mode."""
    epochs, batch_size = recipe.epochs, recipe.batch_size
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    order = torch.Generator().manual_seed(seed)
    model.train()
    with threads(1 if batch_size * split.inputs[0].numel() < SMALL else torch.get_num_threads()):
        for epoch in range(epochs):
            total = 0.0
            # Indexed, without a DataLoader: collating images one by one takes longer than the steps themselves.
            for index in torch.randperm(len(split), generator=order).split(batch_size):
                optimiser.zero_grad()
                value = loss(model(split.inputs[index]), split.targets[index])
                value.backward()
                optimiser.step()
                total += float(value.detach()) * len(index)
            schedule.step()
            tick(f"epoch {epoch + 1}/{epochs}, loss {total / len(split):.3f}")
    return model.eval()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``count`` threads: on small batches more only wait for each other, on a busy machine without end."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
