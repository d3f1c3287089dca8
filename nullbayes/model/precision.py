"""What a network computes with: half precision is replaced by float32 where the network takes it.

Rows in half precision prove nothing: a wrong one and a rounded one look alike. The same weights as float32 numbers
give the same network without its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nullbayes.model.parameters import HALF

# Distance of a network in half precision from the same in float32, relative: its rounding, and not another network.
ALIKE = 0.1
# Relative difference that rounding explains in deep networks, in units of the working precision: sums in another
# order, another kernel for another batch size.
ROUNDING = 2e4
# Operations that compute nothing: buffers are copied by them before they are widened.
COPIES = ("detach", "clone")
# Whatever the precision: a larger difference is never put down to rounding.
LARGEST = 1e-2


def in_half(model: nn.Module) -> torch.dtype | None:
    """The half precision that some of a model's tensors are in, the coarser where both occur; None: none is."""
    found = {t.dtype for t in (*model.parameters(), *model.buffers())} & set(HALF)
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def alike(wide: Tensor | None, deployed: Tensor | None) -> bool:
    """Whether float32 numbers give the network in half precision, as far as its rounding lets one see.

    A network that fails in half precision on this machine (None) has nothing else to be compared with.
    """
    if wide is None or deployed is None:
        return wide is not None
    if wide.shape != deployed.shape:
        return False
    return bool((wide - deployed).norm() <= ALIKE * deployed.norm())


class Watch(TorchFunctionMode):
    """Looks at all operations of a forward pass.

    Attributes:
        found: the least precise of floating-point results, as under autocast.
        used: whether one of ``originals`` took part: tensors that others should have stood for.
    """

    def __init__(self, least: torch.dtype, originals: Iterable[Tensor]) -> None:
        super().__init__()
        self.found, self.used = least, False
        self._originals = {id(t) for t in originals}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # A look at a shape or dtype is none at the numbers.
        if getattr(func, "__name__", "") != "__get__":
            self.used = self.used or any(map(self._is_original, (*args, *kwargs.values())))
        out = func(*args, **kwargs)
        if getattr(func, "__name__", "") in COPIES:
            return out
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.itemsize >= 2:
                self.found = max(self.found, value.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return out

    def _is_original(self, value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(self._is_original, value))
        return isinstance(value, Tensor) and id(value) in self._originals


# Methods that do nothing to a tensor but give it another precision (or place).
_CASTS = frozenset({"to", "half", "bfloat16", "type", "type_as"})


class Unrounded(TorchFunctionMode):
    """Within it, in this thread, nothing is rounded to half precision: neither by autocast nor by casts.

    Each operation runs without autocast, whatever the forward pass switches on around it. Casts to half precision
    leave their tensor as it is; what else comes out in half precision, such as new tensors, is made float32.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        kind = next((t.device.type for t in tensors), "cpu")
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        return _unrounded(func, args, out)


def _unrounded(func: Any, args: tuple[Any, ...], out: Any) -> Any:
    if isinstance(out, (tuple, list)) and any(isinstance(t, Tensor) for t in out):
        wide = [widened_to(t, torch.float32) for t in out]
        same = all(a is b for a, b in zip(wide, out, strict=True))
        return out if same or type(out) not in (tuple, list) else type(out)(wide)
    if not isinstance(out, Tensor) or out.dtype not in HALF:
        return out
    first = args[0] if args and isinstance(args[0], Tensor) else None
    cast = getattr(func, "__name__", "") in _CASTS
    if cast and first is not None and first.is_floating_point() and first.dtype not in HALF:
        return first.to(out.device)
    return out.float()


def widening(dtype: torch.dtype) -> Callable[[Any], Any]:
    """A function that makes tensors in half precision ``dtype``, and leaves everything else."""
    return lambda t: widened_to(t, dtype)


def widened_to(value: Any, dtype: torch.dtype) -> Any:
    """A tensor in half precision in ``dtype``, anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype in HALF else value


def tolerance(dtype: torch.dtype, device: torch.device | None = None) -> float:
    """Relative difference that rounding may explain in ``dtype``, capped at :data:`LARGEST`.

    On a GPU float32 products may be computed with ten bits (TensorFloat-32), where PyTorch is allowed to.
    """
    if dtype == torch.float32 and device is not None and device.type == "cuda" and _ten_bits():
        return LARGEST
    return min(ROUNDING * torch.finfo(dtype).eps, LARGEST)


def _ten_bits() -> bool:
    return bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
