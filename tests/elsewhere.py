"""A second device on a machine that has none: tensors of the CPU that are told apart as those of an accelerator are.

Within ``Elsewhere()`` the device ``elsewhere`` exists. Its tensors hold
real numbers, in memory of the CPU. An operation on tensors of two devices is refused where an accelerator refuses it,
a generator of the wrong device too, and each transfer of values to the host is counted, by the line that asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.host_reads import Reads, waits


class _Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("elsewhere", _Module())
HERE = torch.device("cpu")
THERE = torch.device("elsewhere", 0)

aten = torch.ops.aten
# Where a tensor of the host may stand beside one of the device.
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index"}
_COPYING = {"aten::_to_copy", "aten::copy_", "aten::copy", "aten::_copy_from"}

_library = torch.library.Library("aten", "IMPL")


class There(Tensor):
    """A tensor of the second device around one of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        out: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype,
            device=THERE,
        )  # fmt: skip
        out.inner = inner
        return out

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"There({self.inner!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec and self.ndim == 0 else repr(self)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy: Tensor = There(self.inner.detach().clone())
            parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copy, self.requires_grad) if parameter else copy
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {}, None)


class Elsewhere(TorchDispatchMode):
    """The second device, with the transfers of the library's lines in :attr:`reads`."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = Reads()
        self.watching = False
        #: operations on the device so far; each is a launch, or several
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {}, self)

    @contextmanager
    def watch(self) -> Iterator[Reads]:
        """Count, in the block, the transfers to the host."""
        self.watching, self.reads = True, Reads()
        try:
            yield self.reads
        finally:
            self.watching = False


def dispatched(func: Any, args: Any, kwargs: dict[str, Any], mode: Elsewhere | None) -> Any:
    """One operation, on the inner tensors; its result is of the device that an accelerator's would be of."""
    name = func._schema.name
    given = _tensors(args) + _tensors(kwargs.values())
    there = [x for x in given if isinstance(x, There)]
    if name == "prim::device":
        return THERE if there else HERE
    asked = kwargs.get("device")
    if asked is not None:
        asked = torch.device(asked)
        if asked.type == THERE.type:
            kwargs = dict(kwargs, device=HERE)
        elif not there:
            return func(*args, **kwargs)
    elif not there:
        return func(*args, **kwargs)
    # Zeros without memory, which the inner operation would read.
    if name == "aten::_efficientzerotensor":
        func = aten.zeros.default
    result = THERE if (asked is None and there) or (asked and asked.type == THERE.type) else HERE
    if there and name not in _COPYING:
        _together(name, given, there)
    generator = kwargs.get("generator")
    if generator is not None and there and generator.device.type != THERE.type:
        raise RuntimeError(
            f"{name}: expected a '{THERE.type}' generator but found '{generator.device}'"
        )
    if mode is not None and there:
        mode.launches += 1
        _count(func, name, args, result, mode)
    out = func(*_mapped(_inner, args), **{k: _mapped(_inner, v) for k, v in kwargs.items()})
    if asked is not None and asked.type != THERE.type:
        return out
    if name == "aten::copy_" and not isinstance(args[0], There):
        return args[0]
    if there and torch.Tag.inplace_view in func.tags:
        _reshaped(func, args, kwargs)
    known = {id(x.inner): x for x in there}
    return _mapped(lambda x: _wrapped(x, known), out)


# An operator's arguments are values, or lists of them: torch's own walk over nested containers takes ten times as long.
def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among them, and in lists among them."""
    out: list[Tensor] = []
    for x in values:
        if isinstance(x, Tensor):
            out.append(x)
        elif isinstance(x, (list, tuple)):
            out += [y for y in x if isinstance(y, Tensor)]
    return out


def _mapped(change: Callable[[Any], Any], x: Any) -> Any:
    if isinstance(x, list):
        return [_mapped(change, y) for y in x]
    return tuple(_mapped(change, y) for y in x) if isinstance(x, tuple) else change(x)


# Some of torch's own code (`torch.tensor`) passes modes and subclasses by and asks the backend itself.
for _name in ("empty.memory_format", "empty_strided", "copy_", "_copy_from"):
    _packet, _, _overload = _name.partition(".")
    _op = getattr(getattr(aten, _packet), _overload or "default")
    _library.impl(
        _name, lambda *args, _op=_op, **kwargs: dispatched(_op, args, kwargs, None), "PrivateUse1"
    )


def _count(func: Any, name: str, args: Any, result: torch.device, mode: Elsewhere) -> None:
    away = name == "aten::_to_copy" and isinstance(args[0], There) and result == HERE
    copied = name == "aten::copy_" and isinstance(args[1], There)
    what = waits(func, args)
    if away or (copied and not isinstance(args[0], There)):
        what = "copied to the host"
    if what is not None and mode.watching:
        mode.reads.note(what)


def _together(name: str, given: list[Tensor], there: list[There]) -> None:
    """Refuse what an accelerator refuses: tensors of two devices, but for numbers and indices of the host."""
    others = [x for x in given if not isinstance(x, There)]
    if name in _INDEXING and isinstance(given[0], There):
        others = [
            x for x in others if x.dtype not in (torch.int64, torch.int32, torch.bool, torch.uint8)
        ]
    if any(x.ndim for x in others) or (
        others and all(x.ndim == 0 for x in there) and name in ("aten::cat",)
    ):
        raise RuntimeError(
            f"{name}: expected all tensors on the same device, found {THERE} and {HERE} "
            f"({[tuple(x.shape) for x in there]}, {[tuple(x.shape) for x in others]})"
        )


def _reshaped(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """The outer tensor takes the shape that its inner one has been given in place."""
    before = torch._C._meta_in_tls_dispatch_include()
    with no_dispatch():
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, There) else x


def _wrapped(x: Any, known: dict[int, There]) -> Any:
    if not isinstance(x, Tensor) or isinstance(x, There):
        return x
    return known[id(x)] if id(x) in known else There(x)


def moved(module: nn.Module) -> nn.Module:
    """``module`` itself, its parameters and buffers on the second device."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(
                    There(value.detach().clone()), value.requires_grad
                )
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = There(value.detach().clone())
    return module


def back(x: Tensor) -> Tensor:
    """The values on the CPU."""
    return x.inner if isinstance(x, There) else x
