"""Networks as compiling, or training on several processes, leaves them: wrapped in another module."""

from __future__ import annotations

from torch import nn


def without_wrapper(model: nn.Module) -> nn.Module:
    """The network in the wrappers of ``torch.compile`` and `torch.nn.parallel.DistributedDataParallel`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model
