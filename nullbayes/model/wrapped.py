"""Networks as compiling, or training on several processes or devices, leaves them: wrapped in another module."""

from __future__ import annotations

from typing import cast

from torch import nn


def without_wrapper(model: nn.Module) -> nn.Module:
    """The network in the wrappers of ``torch.compile`` and of data parallelism."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = cast(nn.Module, model._modules["_orig_mod"])
        else:
            return model
