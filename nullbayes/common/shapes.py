"""Shapes of outputs: of one number an example they have no axis of their own, ``(B,)``."""

from __future__ import annotations

from torch import Tensor


def merged(values: Tensor, lead: int) -> Tensor:
    """All axes after the first ``lead`` ones as one: with 2, ``(S, B, *out) -> (S, B, D)``; ``D`` is 1 for none."""
    return values.flatten(lead) if values.ndim > lead else values.unsqueeze(lead)
