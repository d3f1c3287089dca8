"""Adapters of the peft library: where their posterior is kept, and what still moves once they are merged.

Nothing here imports peft: a network with an adapter has it loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from nullbayes.errors import ModelError
from nullbayes.model.parameters import ParameterSpace

CONFIG, POSTERIOR = "adapter_config.json", "adapter_posterior.safetensors"
MERGED = (
    "If an adapter was merged into the network (`merge_and_unload`), the posterior's weights are gone with it: use it "
    "around the network with the adapter, unmerged."
)


def pretrained(model: Any) -> nn.Module | None:
    """The network of the transformers library that ``model`` is, or that an adapter of peft wraps."""
    base = model.get_base_model() if _comes_from(model, "PeftModel", "peft.") else model
    return base if _comes_from(base, "PreTrainedModel", "transformers.") else None


def adapted(model: Any) -> Any:
    """The configuration of the active adapter of peft; None where ``model`` has none."""
    if not _comes_from(model, "PeftModel", "peft."):
        return None
    return model.peft_config.get(model.active_adapter)


def _comes_from(model: Any, name: str, package: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith(package) for c in type(model).__mro__)


def beside_adapter(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The file of a posterior in the folder of a saved adapter; any other path as it is."""
    folder = Path(path)
    return folder / POSTERIOR if (folder / CONFIG).is_file() else path


def check_unmerged(model: nn.Module, space: ParameterSpace) -> None:
    """Raise `ModelError` where chosen weights belong to an adapter that is merged: they move nothing."""
    if adapted(model) is None:
        return
    for path, module in model.named_modules():
        if getattr(module, "merged", False) is not True or not hasattr(module, "merged_adapters"):
            continue
        inside = [name for name in space.names if name.startswith(f"{path}.")]
        if inside:
            raise ModelError(
                f"the adapter is merged into the weights of {path!r}, so {inside[0]!r} and the like move no output. "
                "Call `model.unmerge_adapter()` first."
            )


def check_there(model: nn.Module, space: ParameterSpace) -> None:
    """Raise `ModelError` where weights of a posterior are no longer part of the network."""
    gone = sorted(set(space.names) - set(dict(model.named_parameters())))
    if gone:
        raise ModelError(
            f"{len(gone)} parameter tensors of this posterior are no longer part of the network, first {gone[0]!r}. "
            + MERGED
        )


def remarks(model: nn.Module, space: ParameterSpace) -> list[str]:
    """What takes part, where most of a network of the transformers library is frozen and no adapter is in sight."""
    if pretrained(model) is None or adapted(model) is not None:
        return []
    named = dict(model.named_parameters())
    free = [n for n, p in named.items() if p.requires_grad]
    total = sum(p.numel() for p in named.values())
    if not free or set(free) != set(space.names) or len(free) == len(named):
        return []
    shown = ", ".join(free[:3]) + (", ..." if len(free) > 3 else "")
    return [
        f"{space.total:,} of {total:,} weights require a gradient and move ({shown}); the others are frozen. Of an "
        "adapter that was merged into them (`merge_and_unload`) nothing moves any more: fit before merging for its "
        "uncertainty."
    ]
