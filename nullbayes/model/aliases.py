"""Weights that lie in memory a second time: under a buffer, an attribute, a NumPy array, or another parameter.

`load_state_dict`, an optimiser and every other write in place move such a tensor together with the weight. Calls with
weights put in place of others (``private.py``) leave it where it was, and so does `copy.deepcopy`: rows, samples and
certificates would be those of a network that nobody deploys. Whether outputs depend on it is asked of the network.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nullbayes.errors import ModelError
from nullbayes.model.batch import Inputs
from nullbayes.model.packed import is_packed
from nullbayes.model.precision import tolerance
from nullbayes.model.private import DEPTH, Copier

if TYPE_CHECKING:
    from nullbayes.model.functional import FunctionalModel

# By how much weights are moved, relative to their root mean square.
STEP = 0.25
# Of what the weights do to outputs, the share from which their second place in memory counts.
SHARE = 1e-3


@dataclass(frozen=True)
class Extent:
    """Bytes of memory: from the first to the one after the last, on a device."""

    device: torch.device
    start: int
    stop: int

    @classmethod
    def of(cls, value: Any) -> Extent | None:
        """Of a tensor or an array; None where it has no memory of its own that could be looked at."""
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject or not value.size:
                return None
            low = high = int(value.__array_interface__["data"][0])
            for count, step in zip(value.shape, value.strides, strict=True):
                low, high = low + min(0, (count - 1) * step), high + max(0, (count - 1) * step)
            return cls(torch.device("cpu"), low, high + value.itemsize)
        if value.layout != torch.strided or is_packed(value) or value.device.type == "meta":
            return None
        try:
            start, size = value.data_ptr(), value.element_size()
            value.untyped_storage().data_ptr()  # some have an address, and no memory to look at
        except (RuntimeError, NotImplementedError):
            return None
        if not start or not value.numel():
            return None
        last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
        return cls(value.device, start, start + (last + 1) * size)

    def meets(self, other: Extent) -> bool:
        """Whether both share a byte, perhaps."""
        here = self.start < other.stop and other.start < self.stop
        return here and self.device == other.device


class _Seen(Copier):
    """A walk over a tree that notes every tensor and array."""

    def __init__(self) -> None:
        super().__init__({}, {}, None, padded=False)
        self.found: dict[int, Any] = {}
        self.objects: dict[int, Any] = {}

    def rebound(self, value: Any, depth: int = DEPTH) -> Any:
        if isinstance(value, (Tensor, np.ndarray)):
            self.found[id(value)] = value
        elif not _is_object(value):
            return super().rebound(value, depth)
        elif depth > 0 and id(value) not in self.objects:
            self.objects[id(value)] = value
            for inside in list(vars(value).values()):
                self._inside(inside, depth - 1)
        return value


class _InPlace(Copier):
    """A private copy in which arrays, buffers and what objects hold are exchanged as well, by their identity."""

    def tree(self, root: nn.Module) -> nn.Module:
        new = super().tree(root)
        originals = {id(m): m for m in root.modules()}
        for key, module in originals.items():
            for name, buffer in module._buffers.items():
                if id(buffer) in self.tensors:
                    self.made[key]._buffers[name] = self.tensors[id(buffer)]
        return new

    def rebound(self, value: Any, depth: int = DEPTH) -> Any:
        if isinstance(value, np.ndarray):
            return self.tensors.get(id(value), value)
        if not _is_object(value) or depth <= 0:
            return super().rebound(value, depth)
        held = vars(value)
        new = {k: self._inside(v, depth - 1) for k, v in held.items()}
        if not self._moved(new, held):
            return value
        other = copy.copy(value)
        vars(other).update(new)
        return other


def _is_object(value: Any) -> bool:
    """Whether it is nothing that a private copy knows, and keeps things in attributes."""
    known = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType)
    return not isinstance(value, (*known, functools.partial)) and hasattr(value, "__dict__")


def check_aliases(functional: FunctionalModel, inputs: Inputs) -> None:
    """Raise `ModelError` where writing weights in place gives another network than putting them in place of the old.

    Costs a walk over the modules; two forward passes where a weight's memory has a second name.
    """
    found = aliases_of(functional)
    if not found:
        return
    if not functional.modules.shared and not _counts(functional, inputs, list(found.values())):
        return
    names = _names(functional.model)
    others = sorted({names.get(k, _described(v[1])) for k, v in found.items()})
    weights = sorted({name for name, _ in found.values()})
    raise ModelError(
        f"{others[:4]} lie in the memory of the weights {weights[:4]}: writing other weights into the network "
        "(`load_state_dict`, a step of an optimiser) moves them as well, and outputs with them, so a posterior around "
        "the weights alone would be that of another network. Take views in the forward pass "
        "(`self.layer.weight.view(...)`), copy what is to stay (`.clone()`), let two layers share one parameter "
        "object (`b.weight = a.weight`); or leave these weights out with `parameters=`."
    )


def aliases_of(functional: FunctionalModel) -> dict[int, tuple[str, Any]]:
    """By identity: the weight in whose memory a tensor or array of the model lies, and this."""
    model = functional.model
    walk = _Seen()
    walk.tree(model)
    if functional.user_forward is not None:
        walk.rebound(functional.user_forward)
    named = dict(model.named_parameters())
    every = walk.found | {id(t): t for t in (*named.values(), *model.buffers())}
    places: dict[tuple[torch.device, int], list[tuple[str, Extent]]] = {}
    for name in functional.space.names:
        weight, extent = named[name], Extent.of(named[name])
        if extent is not None:
            places.setdefault(_room(weight), []).append((name, extent))
    first = {id(named[n]): place for place, n in enumerate(functional.space.names)}
    out: dict[int, tuple[str, Any]] = {}
    for key, value in every.items():
        extent = Extent.of(value)
        if extent is None:
            continue
        everywhere = isinstance(value, np.ndarray)
        near = [p for ps in places.values() for p in ps] if everywhere else places.get(_room(value))
        for name, other in near or []:
            itself = named[name] is value
            # Of two weights, the second is the other name of the first.
            earlier = key in first and first[key] < first[id(named[name])]
            if not itself and not earlier and extent.meets(other):
                out[key] = (name, value)
                break
    return out


def _room(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _counts(functional: FunctionalModel, inputs: Inputs, found: list[tuple[str, Any]]) -> bool:
    """Whether outputs of ``inputs`` tell the two ways of writing weights apart."""
    weights = functional.weights()
    moved = {n: w + _step(w, place) for place, (n, w) in enumerate(weights.items())}
    keyed = functional.keyed(inputs)
    try:
        with torch.no_grad():
            with _same_draws():
                point = functional(weights, keyed)
            with _same_draws():
                exchanged = functional(moved, keyed)
            with _same_draws():
                written = _written(functional, moved, keyed, found)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # what a network says to inputs that it does not take is told elsewhere
        return False
    if written.shape != exchanged.shape:
        return True
    point, exchanged, written = (t.double().nan_to_num() for t in (point, exchanged, written))
    allowed = tolerance(functional.rounding) * exchanged.norm() + SHARE * (exchanged - point).norm()
    return bool((written - exchanged).norm() > allowed)


def _written(
    functional: FunctionalModel,
    moved: Mapping[str, Tensor],
    inputs: Inputs,
    found: list[tuple[str, Any]],
) -> Tensor:
    """Outputs of a private copy whose weights lie in memory as the model's do, once ``moved`` is written there."""
    named = dict(functional.model.named_parameters())
    placed = functional._placed(moved)
    memory = {_room(named[n]): named[n].untyped_storage() for n, _ in found}
    memory = {room: storage.clone() for room, storage in memory.items()}
    tensors: dict[int, Any] = dict(placed)
    for name in functional.space.names:
        weight = named[name]
        if _room(weight) in memory:
            tensors[id(weight)] = _view(memory[_room(weight)], weight)
            tensors[id(weight)].copy_(placed[id(weight)])
    for name, value in found:
        if id(value) not in placed:
            tensors[id(value)] = _other(memory[_room(named[name])], named[name], value)
    copier = _InPlace(
        tensors,
        {},
        functional.widened,
        padded=functional.padded,
        whole=functional.widened_whole,
    )
    private = copier.tree(functional.model)
    forward = functional.user_forward and copier.rebound(functional.user_forward)
    with functional.drawing(inputs):
        return functional._flat(
            functional._run(private, forward, functional._given(inputs)), inputs
        )


def _view(memory: torch.UntypedStorage, like: Tensor) -> Tensor:
    """A tensor in ``memory`` where ``like`` lies in its own."""
    new = torch.empty(0, dtype=like.dtype, device=like.device)
    return new.set_(memory, like.storage_offset(), like.shape, like.stride())


def _other(memory: torch.UntypedStorage, weight: Tensor, value: Any) -> Any:
    """A tensor or an array in ``memory`` where ``value`` lies in that of ``weight``."""
    if isinstance(value, Tensor):
        return _view(memory, value)
    whole = torch.empty(0, dtype=torch.uint8).set_(memory).numpy()
    start = value.__array_interface__["data"][0] - weight.untyped_storage().data_ptr()
    return np.ndarray(value.shape, value.dtype, whole, start, value.strides)


def _step(weight: Tensor, seed: int) -> Tensor:
    noise = torch.empty(weight.shape, dtype=torch.float32)
    noise.normal_(generator=torch.Generator().manual_seed(seed))
    size = float(weight.double().square().mean().sqrt()) or 1.0
    return STEP * size * noise.to(weight)


@contextlib.contextmanager
def _same_draws() -> Iterator[None]:
    """Random numbers are the same in each such block."""
    with torch.random.fork_rng(devices=[]):
        yield


def _names(model: nn.Module) -> dict[int, str]:
    """Paths of tensors and arrays by identity, those in lists and dictionaries by the attribute that holds them."""
    out: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            inside = value.values() if isinstance(value, dict) else value
            several = inside if isinstance(value, (dict, list, tuple)) else [value]
            own = name not in ("_parameters", "_buffers", "_modules")
            for key, one in value.items() if not own else ((name, v) for v in several):
                if isinstance(one, (Tensor, np.ndarray)):
                    out.setdefault(id(one), f"{path}.{key}".lstrip("."))
    return out


def _described(value: Any) -> str:
    kind = "an array" if isinstance(value, np.ndarray) else "a tensor"
    return f"{kind} of shape {tuple(value.shape)}"
