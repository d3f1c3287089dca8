"""Which lines of the library wait for a number from the device, found on any machine.

A loop that reads a number of a tensor (``.item()``, ``.tolist()``, ``bool(t)``, ``t.cpu()``, a mask as an index) makes
the processor wait until a GPU has done all that it was asked for, and the GPU wait for what the processor asks next. On
the CPU such a read costs nothing and shows nowhere; so tensors are followed instead: weights and inputs are said to be
on the device, and so is what is computed from them, until it is copied away, which counts as a read.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nullbayes.solvers import norms

LIBRARY = Path(__file__).parents[1] / "nullbayes"
aten = torch.ops.aten

#: operations whose result, or its shape, the processor has to know
WAITS = {
    aten._local_scalar_dense,  # item(), float(t), bool(t), int(t)
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.item,
    aten.unique_dim,
    aten.unique_consecutive,
    aten._unique2,
    aten.bincount,
    aten.repeat_interleave,
    aten._linalg_check_errors,  # a decomposition that raises where it fails; those named `_ex` do not
}
INDEXES = {aten.index, aten.index_put, aten.index_put_}
#: methods that give the processor a tensor's numbers, and are no operation of their own on the CPU
COPIES = {
    Tensor.cpu: "cpu()",
    Tensor.numpy: "numpy()",
    Tensor.tolist: "tolist()",
    Tensor.__array__: "numpy",
}

#: functions that return at once where tensors are not the processor's own
PROCESSOR_ONLY = {"flushed"}


def waits(func: Any, args: Any) -> str | None:
    """What the processor has to wait for before it can go on after an operation; None: for nothing."""
    packet = func.overloadpacket
    if packet in WAITS and not (packet is aten.repeat_interleave and "int" in str(func)):
        return str(packet.__name__)
    if packet in INDEXES and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
        return "a mask as an index"
    return None


class Reads:
    """What was read, by the line of the library that read it."""

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.lines.total()

    def note(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if str(LIBRARY) in f.filename]
        if frames and frames[-1].name not in PROCESSOR_ONLY:
            last = frames[-1]
            place = Path(last.filename).relative_to(LIBRARY)
            self.lines[f"{place}:{last.lineno} {what} `{last.line}`"] += 1

    def __str__(self) -> str:
        return "\n".join(f"{count:5d} {line}" for line, count in self.lines.most_common())


class _Device:
    """The storages that are said to be on the device."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}

    def add(self, values: Any) -> None:
        for t in tree_leaves(values):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self._known[storage._cdata] = StorageWeakRef(storage)

    def has(self, values: Any) -> bool:
        return any(isinstance(t, Tensor) and self._here(t) for t in tree_leaves(values))

    def _here(self, t: Tensor) -> bool:
        try:
            known = self._known.get(t.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # a wrapper without a storage of its own
            return False
        return known is not None and not known.expired()


class _Operations(TorchDispatchMode):
    def __init__(self, device: _Device, reads: Reads) -> None:
        super().__init__()
        self.device, self.reads = device, reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = self.device.has((args, kwargs))
        if here:
            what = waits(func, args)
            if what is not None:
                self.reads.note(what)
        out = func(*args, **kwargs)
        if here:
            self.device.add(out)
            if func._schema.is_mutable:
                self.device.add((args, kwargs))
        return out


class _Methods(TorchFunctionMode):
    def __init__(self, device: _Device, reads: Reads) -> None:
        super().__init__()
        self.device, self.reads = device, reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        what = COPIES.get(func)
        if func is Tensor.to and _to_cpu(args[1:], kwargs):
            what = "to('cpu')"
        if what is None or not self.device.has(args[0]):
            return func(*args, **kwargs)
        self.reads.note(what)
        # A copy on the other side: what is made of it is no longer on the device.
        copy = torch.utils._python_dispatch._disable_current_modes
        with copy():
            return func(args[0].clone(), *args[1:], **kwargs)


def _to_cpu(args: Any, kwargs: Any) -> bool:
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, (str, torch.device))]
    return any(torch.device(d).type == "cpu" and isinstance(d, str) for d in given)


@contextmanager
def followed(*on_device: Any) -> Iterator[Reads]:
    """The reads of what is computed within from ``on_device``: tensors, modules, or anything that holds tensors."""
    device, reads = _Device(), Reads()
    for value in on_device:
        device.add(list(tensors_in(value)))
    near, norms.at_hand = norms.at_hand, lambda values: False
    try:
        with _Operations(device, reads), _Methods(device, reads):
            yield reads
    finally:
        norms.at_hand = near


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterable[Tensor]:
    """All tensors that an object leads to."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type, type(None))):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item, seen)
    elif type(value).__module__.startswith("nullbayes"):
        for name in dir(type(value)) if not hasattr(value, "__dict__") else vars(value):
            if hasattr(type(value), "__dict__") and isinstance(
                getattr(type(value), name, None), property
            ):
                continue
            yield from tensors_in(getattr(value, name, None), seen)
