"""Adapters of the peft library: where their posterior is kept, and what still moves once they are merged.

Nothing here imports peft: a network with an adapter has it loaded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from nullbayes.errors import ModelError, StorageError
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


# Which task an example belongs to, an input of adapters for several.
_TASKS, _FOR_TASKS = "task_ids", ("MULTITASK_PROMPT_TUNING", "POLY")
# Adapters that put tokens of their own before those of the inputs.
_BEFORE = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")


def _kind(config: Any) -> str:
    return str(getattr(getattr(config, "peft_type", None), "value", ""))


def adapter_kind(model: Any) -> str:
    """The library's name for the kind of the active adapter, such as ``"LORA"``; empty where there is none."""
    return _kind(adapted(model))


def task_inputs(model: Any) -> tuple[str, ...]:
    """Names of the inputs that say which task an example belongs to, where the active adapter is for several."""
    return (_TASKS,) if adapter_kind(model) in _FOR_TASKS else ()


def tokens_before(config: Any) -> int:
    """How many tokens of its own the adapter of a configuration puts before those of the inputs."""
    return int(config.num_virtual_tokens) if _kind(config) in _BEFORE else 0


def _comes_from(model: Any, name: str, package: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith(package) for c in type(model).__mro__)


# The name of what is active among the digests of a model's tensors: no tensor can have it.
ACTIVE = "active adapters"


def active_adapters(model: Any) -> str | None:
    """Which adapters take part in a forward pass now, in words; None where ``model`` has none of peft.

    A network may have them without peft's model around it: by its own `add_adapter`, or `inject_adapter_in_model`.
    """
    wrapped = _comes_from(model, "PeftModel", "peft.")
    states = set()
    for module in _layers(model):
        own = module.__dict__
        names = own["_active_adapter"]
        names = [names] if isinstance(names, str) else names
        states.add((*names, "disabled") if own.get("_disable_adapters") else tuple(names))
    if not states and not wrapped:
        return None
    if not states:  # prompts and prefixes have no layers
        off = getattr(model, "_adapters_disabled", False)
        states.add((model.active_adapter, *(["disabled"] if off else [])))
    return "; ".join(sorted(", ".join(state) for state in states))


def inactive_adapters(model: Any) -> set[str]:
    """Names of adapters that a model holds beside those that are active, or all of them where these are disabled."""
    active = active_adapters(model)
    if active is None:
        return set()
    held = set(getattr(model, "peft_config", ()))
    for layer in _layers(model) if not held else ():
        held.update(getattr(layer, "_all_available_adapter_names", list)())
    return held - {n for state in active.split("; ") for n in state.split(", ")}


def _layers(model: Any) -> list[Any]:
    """Layers of a network that hold adapters of peft."""
    if "peft" not in sys.modules:
        return []
    return [m for m in model.modules() if "_active_adapter" in m.__dict__]


def beside_adapter(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The file of a posterior in the folder of a saved adapter; any other path as it is.

    Raises `StorageError` for a folder around such a folder.
    """
    folder = Path(path)
    if (folder / CONFIG).is_file():
        return folder / POSTERIOR
    # peft saves an adapter that is not called "default" in a folder of its name.
    inside = sorted(str(each.parent) for each in folder.glob(f"*/{CONFIG}"))
    if inside:
        raise StorageError(
            f"`path` is the folder {folder}, which holds no adapter ({CONFIG}); {inside[0]} does. Pass that folder."
        )
    return path


def check_unmerged(model: nn.Module, space: ParameterSpace) -> None:
    """Raise `ModelError` where chosen weights belong to an adapter that is merged: they move nothing."""
    if active_adapters(model) is None:
        return
    for path, module in model.named_modules():
        if getattr(module, "merged", False) is not True or not hasattr(module, "merged_adapters"):
            continue
        inside = [name for name in space.names if name.startswith(f"{path}.")]
        if inside:
            raise ModelError(
                f"the adapter is merged into the weights of {path!r}, so {inside[0]!r} and the like move no output. "
                "Call `unmerge_adapter()` of peft's model, or `unmerge()` of these layers, first."
            )


def has_fixed_norms(model: nn.Module) -> bool:
    """Whether layers of DoRA take part: these detach, on purpose, the norm that they divide by.

    Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, 2024, §4.3. Their gradient, in every mode of automatic
    differentiation, is that of the network with this norm fixed.
    """
    return any(_comes_from(module, "DoraLinearLayer", "peft.") for module in model.modules())


def check_there(model: nn.Module, space: ParameterSpace) -> None:
    """Raise `ModelError` where weights of a posterior are no longer part of the network."""
    gone = sorted(set(space.names) - set(dict(model.named_parameters())))
    if gone:
        raise ModelError(
            f"{len(gone)} parameter tensors of this posterior are no longer part of the network, first {gone[0]!r}. "
            + MERGED
        )


def remarks(model: nn.Module, space: ParameterSpace) -> list[str]:
    """What the adapter's gradient leaves out; what takes part, where most of a network of the transformers library is
    frozen and no adapter is in sight.
    """
    if has_fixed_norms(model):
        return [
            "DoRA detaches the norm that it divides by: the guarantee and linearised predictions are those of the "
            "network with this norm fixed, as its training was; re-weighted networks (`method='sampled'`) move by it."
        ]
    if pretrained(model) is None or active_adapters(model) is not None:
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
