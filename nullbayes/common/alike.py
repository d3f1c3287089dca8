"""What is to be the same in every process: told apart, and named shortly where it is not."""

from __future__ import annotations

import math
from typing import Any


class Rounded(tuple[float, ...]):
    """Numbers that are the same in two processes where they differ by rounding alone."""

    __slots__ = ()

    def like(self, other: object) -> bool:
        """Whether they are."""
        return (
            isinstance(other, Rounded)
            and len(self) == len(other)
            and all(
                a == b or math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6) or a != a != b
                for a, b in zip(self, other, strict=True)
            )
        )


def told_apart(values: list[Any]) -> list[str]:
    """Each value as text; numbers that are the same but for rounding in the words of the first of them."""
    out: list[str] = []
    for i, value in enumerate(values):
        alike = (j for j in range(i) if isinstance(value, Rounded) and value.like(values[j]))
        first = next(alike, i)
        out.append(out[first] if first < i else repr(value))
    return out


def shortened(text: str) -> str:
    """At most 80 characters of it."""
    return text if len(text) <= 80 else f"{text[:77]}..."
