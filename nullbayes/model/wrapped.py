"""Networks as training on several processes leaves them: wrapped, or with their parameters cut into shards."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from nullbayes.errors import ModelError

_MEND = (
    "Gather them first: in every process `state = get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True, broadcast_from_rank0=True))` (torch.distributed.checkpoint.state_dict), loaded into the "
    "network as it was before it was sharded. Rows and samples are spread over the processes in any case."
)


def without_wrapper(model: nn.Module) -> nn.Module:
    """The network in the wrappers of ``torch.compile`` and of data parallelism.

    Raises:
        ModelError: `FullyShardedDataParallel`, whose parameters are parts of others.
    """
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = cast(nn.Module, model._modules["_orig_mod"])
        else:
            break
    # Where nobody has imported it, nothing is wrapped in it.
    known = sys.modules.get("torch.distributed.fsdp")
    if known is not None and any(
        isinstance(m, known.FullyShardedDataParallel) for m in model.modules()
    ):
        raise ModelError(
            f"the parameters of the model are sharded by FullyShardedDataParallel, so no process has a weight whole. "
            f"{_MEND}"
        )
    return model


def check_whole(model: nn.Module, chosen: Iterable[str]) -> None:
    """Raise `ModelError` where one of the ``chosen`` parameters is a shard of a tensor (`DTensor`)."""
    kind: Any = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if kind is None or not isinstance(kind, type) or not torch.distributed.is_available():
        return
    named = dict(model.named_parameters())
    cut = [name for name in chosen if isinstance(named.get(name), kind)]
    if cut:
        raise ModelError(
            f"{len(cut)} of the chosen parameters are sharded over processes (DTensor), first {cut[:3]}: a weight that "
            f"takes part has to be whole in each. Leave them out with `parameters=`, or train them unsharded. {_MEND}"
        )
