"""Networks whose frozen parameters are spread over processes: FSDP2's ``fully_shard``, and distributed tensors.

Processes have different numbers of batches, so a forward pass must not wait for another process. Each frozen parameter
is gathered once instead, one after the other, where all processes come by: when a posterior is constructed. What the
posterior works with is a network of its own, which shares every plain tensor with the user's, and has full tensors, the
original classes and no hooks of FSDP in place of the rest. The user's network stays as it is.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nullbayes.errors import ModelError
from nullbayes.model.bits import digest
from nullbayes.model.private import Copier

MEND = (
    "Weights that a posterior is over must be plain tensors, the same in every process: "
    "`fully_shard(..., ignored_params={...})` leaves them whole, `parameters=` chooses among those that are, and the "
    "frozen rest may be sharded. Or load the full state dict into the plain module and pass that; examples are what "
    "is split over processes here."
)
# Where code comes from that makes a sharded network work, and that one with full tensors has to do without.
_HOME = tuple(f"torch.distributed.{room}" for room in ("fsdp", "tensor", "_tensor", "_composable"))
_MARKS = ("__composable_api_", "_is_fsdp_managed_module", "_fsdp_use_orig_params")
# What was gathered from what: by the network that has the full tensors.
_SOURCES: weakref.WeakKeyDictionary[nn.Module, _Source] = weakref.WeakKeyDictionary()


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is a distributed tensor."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


@torch.inference_mode(mode=False)
def gathered(model: nn.Module, *, frozen: bool = True) -> nn.Module:
    """The network with full tensors in place of distributed ones; ``model`` itself where there are none.

    A call of all processes that the tensors are spread over. It holds one full copy of what is sharded, and at most one
    tensor more while it is made. Modules that FSDP left unsharded after a forward pass are resharded, as by
    ``state_dict()``.

    Args:
        frozen: parameters that require a gradient may be sharded, too.

    Raises:
        ModelError: they may not, and are: before anything is gathered.
    """
    for module in model.modules():
        if _fsdp(type(module)) is not None:
            resharding: Any = module
            resharding.reshard()
    parameters = {n: p for n, p in model.named_parameters() if is_sharded(p)}
    buffers = {n: b for n, b in model.named_buffers() if is_sharded(b)}
    if not parameters and not buffers and all(_fsdp(type(m)) is None for m in model.modules()):
        return model
    if not frozen:
        _refuse([n for n, p in parameters.items() if p.requires_grad])
    full: dict[int, Tensor] = {}
    for p in parameters.values():
        full[id(p)] = nn.Parameter(_whole(p), requires_grad=p.requires_grad)
    full |= {id(b): _whole(b) for b in buffers.values()}
    copier = _Gathered(full, {}, None, padded=False)
    whole = copier.tree(model)
    copier.finish(model)
    nbytes = sum(t.nbytes for t in full.values())
    pairs = [(m, copier.made[id(m)]) for m in model.modules() if id(m) in copier.made]
    _SOURCES[whole] = _Source(model, frozenset(parameters), nbytes, pairs)
    return whole


def held_bytes(model: nn.Module) -> int:
    """What the full copy of sharded tensors takes in each process; 0 of a network that was never sharded."""
    source = _SOURCES.get(model)
    return 0 if source is None else source.nbytes


def follow_mode(model: nn.Module) -> None:
    """Put a network from :func:`gathered` into the mode, training or not, that the user's is in now."""
    source = _SOURCES.get(model)
    for theirs, ours in () if source is None else source.pairs:
        user, mine = theirs(), ours()
        if user is not None and mine is not None:
            mine.training = user.training


def check_whole(model: nn.Module, chosen: Iterable[str]) -> None:
    """Raise `ModelError` where chosen weights are those of a sharded tensor, of a network from :func:`gathered`."""
    source = _SOURCES.get(model)
    if source is not None:
        _refuse([name for name in chosen if name in source.names])


def _refuse(names: list[str]) -> None:
    if names:
        raise ModelError(
            f"{names[:5]} are chosen, and they are distributed tensors (fully sharded data parallel), of which each "
            f"process has a part or a copy of its own. {MEND}"
        )


def is_stale(model: nn.Module) -> bool:
    """Whether the sharded network that ``model`` was gathered from was written to since, as seen in this process."""
    source = _SOURCES.get(model)
    return source is not None and bool(source.changed())


def check_source(model: nn.Module) -> None:
    """Raise `ModelError` where :func:`is_stale` says so."""
    source = _SOURCES.get(model)
    changed = [] if source is None else source.changed()
    if changed:
        raise ModelError(
            f"the sharded model has changed since this posterior was constructed: {changed[:3]}. Restore the weights "
            "that it was constructed around; or construct it, and fit, anew."
        )


def _whole(tensor: Tensor) -> Tensor:
    """The full tensor, on the device that its mesh computes on."""
    part: Any = tensor.detach()
    kind = part.device_mesh.device_type
    if part.device.type != kind:  # offloaded to the CPU
        part = part.to(kind)
    with torch.no_grad():
        full: Tensor = part.full_tensor()
    return full.detach().contiguous()


class _Gathered(Copier):
    """The copy that stays: of the original classes, with the user's own plain buffers and without FSDP's hooks."""

    def kind(self, module: nn.Module) -> type[nn.Module]:
        return _fsdp(type(module)) or type(module)

    def finish(self, root: nn.Module) -> None:
        """What a copy that stays has in other ways than one for a single call."""
        for module in root.modules():
            new = self.made.get(id(module))
            if new is not None:
                for name, buffer in module._buffers.items():
                    new._buffers[name] = self.tensors.get(id(buffer), buffer)
                _unhook(module, new)
                self._restore_methods(module, new)

    def _restore_methods(self, module: nn.Module, new: nn.Module) -> None:
        """Undo ``register_fsdp_forward_method``."""
        for key, value in vars(module).items():
            if isinstance(value, types.MethodType) and _is_foreign(value):
                inner = getattr(value, "__wrapped__", None)
                of_class = getattr(type(new), key, None)
                if inner is None or getattr(inner, "__func__", inner) is of_class:
                    del vars(new)[key]
                else:
                    vars(new)[key] = self.rebound(inner)


def _unhook(module: nn.Module, new: nn.Module) -> None:
    """Leave out of ``new``, a copy of ``module``, the hooks and marks of FSDP."""
    tables = [v for k, v in vars(module).items() if k.endswith("_hooks") and isinstance(v, dict)]
    foreign = {number for table in tables for number, hook in table.items() if _is_foreign(hook)}
    state = vars(new)
    for key, table in list(state.items()):
        if key.startswith(_MARKS):
            del state[key]
        elif "_hooks" in key and isinstance(table, dict):  # also which of them take keywords
            state[key] = type(table)((n, hook) for n, hook in table.items() if n not in foreign)


def _fsdp(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class that a module had before ``fully_shard``; None: it has not been there."""
    names = [base.__name__ for base in kind.__mro__]
    return kind.__mro__[names.index("FSDPModule") + 1] if "FSDPModule" in names else None


def _is_foreign(hook: Any) -> bool:
    """Whether a hook is one of FSDP's or of distributed modules'."""
    while True:
        if isinstance(hook, functools.partial):
            hook = hook.func
        elif type(hook).__name__ == "_WrappedHook":
            hook = hook.hook
        elif isinstance(hook, types.MethodType):
            hook = hook.__func__
        else:
            break
    homes = getattr(hook, "__module__", None), getattr(hook, "__globals__", {}).get("__name__")
    return any(str(home).startswith(_HOME) for home in homes)


class _Source:
    """What a sharded network was when it was gathered, as far as this process has it."""

    def __init__(
        self,
        model: nn.Module,
        names: frozenset[str],
        nbytes: int,
        pairs: list[tuple[nn.Module, nn.Module]],
    ) -> None:
        self.names, self.nbytes = names, nbytes
        self.pairs = [(weakref.ref(theirs), weakref.ref(ours)) for theirs, ours in pairs]
        # The user's network may go; then nothing of it can change.
        self.plain: list[tuple[weakref.ref[nn.Module], str, str, int]] = []
        self.parts: list[tuple[weakref.ref[nn.Module], str, str, Tensor]] = []
        self.seen: dict[str, tuple[tuple[int, int, int], int]] = {}
        for path, module in model.named_modules():
            owner = weakref.ref(module)
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                name = f"{path}.{key}".lstrip(".")
                if is_sharded(tensor):
                    assert tensor is not None
                    self.parts.append((owner, key, name, tensor))
                    self.seen[name] = _stamp(tensor), digest(_local(tensor))
                elif tensor is not None:
                    self.plain.append((owner, key, name, id(tensor)))

    def changed(self) -> list[str]:
        """Names of tensors that are others now, or have other bits."""
        found = []
        for owner, key, name, known in self.plain:
            module = owner()
            if module is not None and id(_entry(module, key)) != known:
                found.append(name)
        for owner, key, name, tensor in self.parts:
            module = owner()
            if module is None:
                continue
            now: Any = _entry(module, key)
            then: Any = tensor
            # While FSDP has a module unsharded, the parts are where they were.
            same = is_sharded(now) and (now.device_mesh, now.placements) == (
                then.device_mesh,
                then.placements,
            )
            part = now if same else then
            stamp, bits = self.seen[name]
            if _stamp(part) != stamp:
                if digest(_local(part)) != bits:
                    found.append(name)
                else:
                    self.seen[name] = _stamp(part), bits
        return found


def _entry(module: nn.Module, key: str) -> Tensor | None:
    return module._parameters[key] if key in module._parameters else module._buffers.get(key)


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor._local_tensor
    return local


def _stamp(tensor: Tensor) -> tuple[int, int, int]:
    # Operations on the distributed tensor count there alone, those on the part of this process in the part.
    local = _local(tensor)
    return local.data_ptr(), local._version, tensor._version
