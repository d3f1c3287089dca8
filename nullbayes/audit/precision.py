"""What rounding may explain, and what it may not: one table of tolerances for every check of the audit."""

from __future__ import annotations

import torch

# Relative difference that rounding explains in deep networks, in units of the working precision: sums in another
# order, another kernel for another batch size.
ROUNDING = 2e4
# Whatever the precision: a larger difference is never put down to rounding.
LARGEST = 1e-2
# A gradient that is zero in exact arithmetic (a key's bias under softmax) is rounding alone; it is held against the
# whole row, in units of the working precision.
FLOOR = 100.0
HALF = (torch.float16, torch.bfloat16)


def tolerance(dtype: torch.dtype, device: torch.device | None = None) -> float:
    """Relative difference that rounding may explain in ``dtype``, capped at :data:`LARGEST`.

    On a GPU float32 products may be computed with ten bits (TensorFloat-32), where PyTorch is allowed to.
    """
    if dtype == torch.float32 and device is not None and device.type == "cuda" and _ten_bits():
        return LARGEST
    return min(ROUNDING * torch.finfo(dtype).eps, LARGEST)


def _ten_bits() -> bool:
    return bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


def provable(dtype: torch.dtype) -> bool:
    """Whether rounding in ``dtype`` leaves room for a proof: not in half precision."""
    return dtype not in HALF


def on_precision(dtype: torch.dtype) -> str:
    """The sentence for messages where the precision does not allow a proof; empty where it does."""
    if provable(dtype):
        return ""
    return (
        f" In {dtype} a wrong row and a rounded one look alike, so nothing can be proved: convert the model "
        "(`model.float()`) and the inputs."
    )
