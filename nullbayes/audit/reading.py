"""Whether a loader gives the same examples each time it is read: the guarantee is about those that were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from nullbayes.model.bits import bits_of
from nullbayes.model.own_loss import IGNORED

# Samplers of which a part of the data is another part each time.
_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
# From this share of unknown examples on, the data are said to be changed, and not only chosen anew.
CHANGED = 0.5


class Rereading:
    """A loader that remembers, by a number each, the examples that it gave when it was last read.

    The number comes from every bit of an example's tensors, targets included, so the order of examples and the way they
    are cut into batches make no difference.

    Attributes:
        known: numbers of the last reading; ``fresh``: how many examples of it were not in the one before, of how many;
            None before a second reading.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.known: set[int] = set()
        self.fresh: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        before, self.known = self.known, set()
        new, seen = 0, 0
        for batch in self.loader:
            numbers = numbers_of(batch)
            self.known.update(numbers)
            if before:
                new, seen = new + sum(n not in before for n in numbers), seen + len(numbers)
                self.fresh = (new, seen)
            yield batch

    def note(self, limit: int | None) -> tuple[str, bool] | None:
        """What to say where the data are others each time, and whether that needs a warning; None: they are not.

        Reads the first batch once more, unless all was read twice already.

        Args:
            limit: examples that were read at most: of a shuffled loader, the next reading begins with others.
        """
        if limit is not None and isinstance(getattr(self.loader, "sampler", None), _RANDOM):
            return None
        if self.fresh is None and self.known:
            # One that cannot be read again gives no other data either.
            with suppress(Exception):
                numbers = numbers_of(next(iter(self.loader)))
                self.fresh = (sum(n not in self.known for n in numbers), len(numbers))
        new, seen = self.fresh or (0, 0)
        if not new:
            return None
        found = f"read again, `train_loader` gave {new:,} examples in {seen:,} that were not there before"
        if limit is not None:
            return (
                f"{found}: which ones `max_examples={limit}` preserves is a matter of chance.",
                False,
            )
        if new < CHANGED * seen:
            return (
                f"{found}: it leaves some out each time (`drop_last=True`, sampling). What it left out is not "
                "preserved.",
                False,
            )
        return (
            f"{found}: it changes them each time (random augmentation, sampling without end). Preserved is what the "
            "network says of the versions that this fit read, and of no others. Pass a loader without random "
            "transforms, or fix the versions first (`train_loader=list(loader)`).",
            True,
        )


def numbers_of(batch: Any) -> list[int]:
    """One 64-bit number for each example of a batch; none where no tensor has one entry for each.

    Padding of texts does not count: a collator that pads to the longest text of a batch pads others in another order.
    """
    padding = _padding(batch) if isinstance(batch, Mapping) else None
    batch = _without_doubles(batch) if isinstance(batch, Mapping) else batch
    leaves = [
        t
        for t in tree_flatten(batch)[0]
        if isinstance(t, Tensor) and t.ndim and not t.is_nested and t.layout == torch.strided
    ]
    if not leaves:
        return []
    size = len(leaves[0])
    total = torch.zeros(size, dtype=torch.int64)
    for place, leaf in enumerate(leaves, 1):
        if len(leaf) != size or not leaf.numel():
            continue
        if place > 1 and leaf.shape == (size, size) and padding is None:
            continue  # perhaps a mask that all examples share
        total += place * _mixed(leaf.detach(), padding).cpu()
    return [int(n) for n in total]


def _mixed(leaf: Tensor, padding: Tensor | None) -> Tensor:
    """A number for each example ``(B,)`` of one tensor."""
    bits = bits_of(leaf).reshape(len(leaf), -1).to(torch.int64)
    # Sums of integers wrap around; odd multipliers tell places apart.
    at = torch.arange(1, bits.shape[1] + 1, device=bits.device).expand_as(bits)
    real = torch.ones_like(bits, dtype=torch.bool)
    if padding is not None and leaf.shape == padding.shape:
        real = padding.to(bits.device) != 0
        at = real.cumsum(1)  # padded on the left or on the right
    elif padding is not None and leaf.ndim == 2 and not leaf.is_floating_point():
        real = leaf != IGNORED
    return ((bits * (2 * at + 1) * 0x9E3779B97F4A7C1 + at) * real).sum(1)


def _padding(batch: Mapping[Any, Any]) -> Tensor | None:
    """``(B, T)``, zero where a text is padded; None where the batch does not say."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_nested:
        return None
    return mask if mask.layout == torch.strided else None


def _without_doubles(batch: Mapping[Any, Any]) -> dict[Any, Any]:
    """Without what collators make of the labels, padding and all."""
    made = "labels" in batch
    return {k: v for k, v in batch.items() if not (made and str(k).startswith("decoder_"))}
