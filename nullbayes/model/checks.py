"""Models that no per-example guarantee can be given for, refused before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from nullbayes.errors import ModelError
from nullbayes.model.sharded import MEND, follow_mode


def check_kind(model: nn.Module) -> None:
    """Refuse models whose weights cannot be replaced for one call: not there, sharded, or packed away.

    Raises:
        ModelError: names the modules or parameters, and what to pass instead.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, t in tensors if is_lazy(t)]
    if lazy:
        raise ModelError(
            f"{lazy[:5]} have no values yet: a lazy module learns its shape from its first input. Run the model once "
            "(`model(x)`), train it, and come back."
        )
    empty = [name for name, t in tensors if t.device.type == "meta"]
    if empty:
        raise ModelError(
            f"{empty[:5]} are on the meta device, where tensors have shapes and no values (built under "
            "`torch.device('meta')`, or offloaded). Load the weights, `model.load_state_dict(state, assign=True)`; "
            "or build the model on a device."
        )
    sharded = [
        path or type(module).__name__
        for path, module in model.named_modules()
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__)
    ]
    sharded += [
        name
        for name, parameter in model.named_parameters()
        if any(kind.__name__ == "FlatParameter" for kind in type(parameter).__mro__)
    ]
    if sharded:
        raise ModelError(
            f"{sharded[:5]} hold a part of the weights only, in `FullyShardedDataParallel`'s flat form. {MEND}"
        )
    if quantised(model) and not any(p.is_floating_point() for p in model.parameters()):
        raise ModelError(
            f"all weights are quantised ({quantised(model)[:5]}), and a quantised layer has no derivative. Pass the "
            "network in floating point; or leave some layers unquantised and choose those with `parameters=`."
        )
    dynamic = [path for path in quantised(model) if ".dynamic" in kind_of(model, path)]
    if dynamic:
        raise ModelError(
            f"{dynamic[:5]} are quantised dynamically: they pass no gradient to the weights before them, and scale "
            f"their inputs by the whole batch, so that an example depends on its company. {QUANTISED_MEND}"
        )


def check_scripted(model: nn.Module, chosen: Iterable[str]) -> None:
    """Refuse compiled TorchScript that owns a chosen parameter: its layers and their weights cannot be reached."""
    names = {id(p): n for n, p in model.named_parameters()}
    wanted = set(chosen)
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            found = sorted(wanted & {names[id(p)] for p in module.parameters()})
            if found:
                raise ModelError(
                    f"{path or 'the model'} is TorchScript (`torch.jit.script` or `trace`), whose weights "
                    f"{found[:3]} cannot be replaced for one call. Pass the Python module that it was made from "
                    "(load its `state_dict` into it), or leave these weights out with `parameters=`."
                )


QUANTISED_MEND = (
    "For adapters on a frozen base, quantise its weights alone (torchao's `Int8WeightOnlyConfig`, bitsandbytes' "
    "`Linear8bitLt`), or keep the base in bfloat16."
)


def kind_of(model: nn.Module, path: str) -> str:
    """The Python module in which the class of a submodule is."""
    return type(model.get_submodule(path)).__module__


def quantised(model: nn.Module) -> list[str]:
    """Paths of quantised modules."""
    return [
        path
        for path, module in model.named_modules()
        if ".quantized" in type(module).__module__ and type(module).__module__.startswith("torch.")
    ]


def check_mode(model: nn.Module, *, frozen: bool = False) -> None:
    """Refuse modules whose training mode ties examples together or, unless ``frozen``, makes outputs random."""
    follow_mode(model)

    def random(module: nn.Module) -> bool:
        if isinstance(module, nn.modules.dropout._DropoutNd):
            return module.p > 0
        return isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and module.dropout > 0

    noisy = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if module.training
        and (isinstance(module, nn.modules.batchnorm._BatchNorm) or (random(module) and not frozen))
    ]
    if noisy:
        raise ModelError(
            f"the model is in training mode: {noisy[:5]} would make its outputs random or tie the "
            "examples of a batch together. Call `model.eval()` first (dropout that is meant to stay: "
            '`randomness="frozen"`).'
        )
    batch_tied = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
        and module.running_mean is None
    ]
    if batch_tied:
        raise ModelError(
            f"{batch_tied[:5]} keep no running statistics (`track_running_stats=False`), so each "
            "output depends on the whole batch and no per-example guarantee exists. Use running "
            "statistics, GroupNorm or LayerNorm."
        )
    renormed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    ]
    if renormed:
        raise ModelError(
            f"{renormed} rewrite their own weights during a forward pass (`max_norm`). Renormalise "
            "once, then set `max_norm=None`."
        )
