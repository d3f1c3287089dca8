"""Which tensors of the inputs have the examples on their first axis: found out, never read off a length.

A mask ``(L, L)`` that all examples share is as long as the batch whenever ``L`` examples come together. Two kinds of
evidence decide: a tensor that is longer or shorter than its batch is shared; and where lengths agree, the model is
asked: cut with the batch, or left whole, the outputs of some of the examples must be those that they have in it.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from nullbayes.model.batch import Batch, Flags, Inputs, batch_size, flags_of, take

# Ways to cut that are tried where several tensors are as long as the batch.
WAYS = 64
# Relative difference of outputs that rounding explains; by that of the outputs' own numbers first, since a wrongly cut
# input may move them by a thousandth alone.
CLOSE = 1e-2
ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4}
# By how much less another way has to move the outputs to come before one that moves them by less than `CLOSE`.
CLEARLY = 0.1

Evaluate = Callable[[Inputs], Tensor]
Key = tuple[str, int]


class Axes:
    """What is known of each tensor of a model's inputs, by its place among them.

    Args:
        evaluate: inputs (a :class:`Batch`) to the model's outputs ``(B, ...)``; whatever it raises says that the
            inputs were cut in a way that the model cannot take.
    """

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self._known: dict[Key, bool] = {}
        self._lock = threading.Lock()

    def batch(self, inputs: Any, size: int | None = None) -> Batch:
        """``inputs`` with the knowledge which of them have the batch.

        Args:
            size: how many examples these are, where something else tells (targets); None: the model's outputs do.
        """
        if isinstance(inputs, Batch):
            return inputs
        places, leaves = _placed(inputs)
        able = [isinstance(t, Tensor) and t.ndim > 0 for t in leaves]
        lengths = {len(t) for t, has in zip(leaves, able, strict=True) if has}
        if len(lengths) == 0 or sum(able) == 1:
            return Batch(inputs, tuple(able))  # the only one there is
        size = self._size(inputs, places, leaves, lengths, size)
        flags = tuple(has and len(t) == size for t, has in zip(leaves, able, strict=True))
        with self._lock:
            for place, t, has in zip(places, leaves, able, strict=True):
                if has and len(t) not in (1, size):
                    self._known[place] = False
        return Batch(inputs, self._settled(inputs, places, flags, size))

    def again(self, batch: Batch) -> Batch | None:
        """Another way to have the batch, where this one turned out wrong; None: there is no better one."""
        places, leaves = _placed(batch.inputs)
        size = batch_size(batch)
        flags = tuple(isinstance(t, Tensor) and t.ndim > 0 and len(t) == size for t in leaves)
        found = self._tried(batch.inputs, flags, [i for i, has in enumerate(flags) if has])
        if found is None or found == batch.flags:
            return None
        with self._lock:
            for i, place in enumerate(places):
                if flags[i]:
                    self._known.pop(place, None)
        return Batch(batch.inputs, found)

    def _size(
        self, inputs: Any, places: list[Key], leaves: list[Any], lengths: set[int], size: int | None
    ) -> int:
        if len(lengths) == 1:
            return next(iter(lengths))
        if size is not None and size in lengths:
            return size
        for place, t in zip(places, leaves, strict=True):
            if self._known.get(place):
                return len(t)
        try:
            count = len(self._evaluate(Batch(inputs, flags_of(inputs))))
        except Exception:  # whatever is wrong with the inputs is said where they are used
            return batch_size(inputs)
        return count if count in lengths else batch_size(inputs)

    def _settled(self, inputs: Any, places: list[Key], flags: Flags, size: int) -> Flags:
        """``flags`` less those that are known, or found, to belong to all examples."""
        open_ = [i for i, has in enumerate(flags) if has and places[i] not in self._known]
        flags = tuple(
            has and self._known.get(place, True) for has, place in zip(flags, places, strict=True)
        )
        if not open_ or size == 1 or sum(flags) == 1:
            return flags  # cut or left whole, a batch of one is the same
        found = self._tried(inputs, flags, open_)
        if found is None:
            return flags
        with self._lock:
            for i in open_:
                other = tuple(not has if i == j else has for j, has in enumerate(found))
                # Where both serve, the model does not say; the next batch may.
                if any(other) and self._moved(inputs, other) > 1:
                    self._known[places[i]] = found[i]
        return found

    def _tried(self, inputs: Any, flags: Flags, open_: list[int]) -> Flags | None:
        """The first way whose outputs agree to rounding; else one of those that are close."""
        best, least = None, CLOSE / min(ROUNDING.values())
        for shared in itertools.islice(_subsets(open_), WAYS):
            way = tuple(has and i not in shared for i, has in enumerate(flags))
            moved = self._moved(inputs, way) if any(way) else math.inf
            if moved <= 1:
                return way
            if moved < (least if best is None else CLEARLY * least):
                best, least = way, moved
        return best

    def _moved(self, inputs: Any, flags: Flags) -> float:
        """How far the outputs of some of the examples, cut like that, are from those that they have in the whole batch.

        In what rounding explains; infinite where they are not even close.
        """
        batch = Batch(inputs, flags)
        size, moved = batch_size(batch), 0.0
        try:
            whole = self._evaluate(batch)
            scale = float(whole.abs().max())
            for start, stop in {(0, size - 1), (size // 2, size)}:
                part = self._evaluate(take(batch, start, stop))
                if part.shape != whole[start:stop].shape:
                    return math.inf
                apart = float((part - whole[start:stop]).abs().max())
                if not apart <= CLOSE * scale:
                    return math.inf
                moved = max(moved, apart / scale if scale else 0.0)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # anything a model may say to inputs that do not fit together
            return math.inf
        return moved / ROUNDING.get(whole.dtype, CLOSE) if len(whole) == size else math.inf


def _placed(inputs: Any) -> tuple[list[Key], list[Any]]:
    """Place (and number of axes) and value of each leaf."""
    paths = [(str(path), leaf) for path, leaf in tree_flatten_with_path(inputs)[0]]
    keys = [(path, leaf.ndim if isinstance(leaf, Tensor) else 0) for path, leaf in paths]
    return keys, [leaf for _, leaf in paths]


def _subsets(items: list[int]) -> Iterator[tuple[int, ...]]:
    """Of growing size, the empty one first."""
    for count in range(len(items) + 1):
        yield from itertools.combinations(items, count)
