"""Networks of which one pass is dear, so that what judges a fit looks at fewer examples."""

from __future__ import annotations

from torch import nn

# From so many weights, whether they move or not.
LARGE = 2**22


def is_large(model: nn.Module) -> bool:
    """Whether a pass of the network costs much beside what a fit does with its outputs."""
    return sum(p.numel() for p in model.parameters()) >= LARGE
