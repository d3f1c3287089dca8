"""What rounding may explain, and what it may not: one table of tolerances for every check of the audit."""

from __future__ import annotations

import torch

from nullbayes.model.precision import LARGEST as LARGEST
from nullbayes.model.precision import tolerance as tolerance

# A gradient that is zero in exact arithmetic (a key's bias under softmax) is rounding alone; it is held against the
# whole row, in units of the working precision.
FLOOR = 100.0


def eps(dtype: torch.dtype) -> float:
    """The relative distance between two numbers of ``dtype``."""
    return float(torch.finfo(dtype).eps)


def provable(dtype: torch.dtype) -> bool:
    """Whether rounding in ``dtype`` leaves room for a proof: not in half precision."""
    return dtype not in (torch.float16, torch.bfloat16)


def on_precision(dtype: torch.dtype) -> str:
    """The sentence for messages where the precision does not allow a proof; empty where it does."""
    if provable(dtype):
        return ""
    return (
        f" In {dtype} a wrong row and a rounded one look alike, so nothing can be proved: convert the model "
        "(`model.float()`) and the inputs."
    )
