"""Where a random network's decisions come from: a seed, a recorded list, or hypothesis."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Choices:
    """Each decision is an index into a list of options, the first of which is the plainest.

    Args:
        source: number of options -> an index below it.

    What was decided is in ``made``: a list of small integers that tells the same network again, and that can be
    shortened and lowered to find a plainer network with the same fault (``minimise.py``).
    """

    def __init__(self, source: Callable[[int], int]) -> None:
        self._source = source
        self.made: list[int] = []
        #: the words for what was drawn, for people
        self.words: list[str] = []

    def pick(self, options: Sequence[T]) -> T:
        """One of ``options``, the first being the plainest."""
        index = self._source(len(options)) if len(options) > 1 else 0
        self.made.append(index)
        return options[index]

    def rarely(self, one_in: int) -> bool:
        """True once in ``one_in`` times."""
        return self.pick([False] * (one_in - 1) + [True])

    def say(self, text: str) -> None:
        """Note what was drawn."""
        self.words.append(text)


def from_seed(seed: int) -> Choices:
    """The same decisions for the same seed, on every machine."""
    stream = random.Random(seed)
    return Choices(lambda n: int(stream.random() * n))


def from_list(made: Sequence[int]) -> Choices:
    """Decisions told again; where the list ends, the plainest."""
    rest = iter(made)
    return Choices(lambda n: next(rest, 0) % n)


def from_hypothesis(data: Any) -> Choices:
    """Decisions that hypothesis draws and shrinks (``data`` of ``st.data()``)."""
    from hypothesis import strategies as st

    return Choices(lambda n: data.draw(st.integers(0, n - 1)))
