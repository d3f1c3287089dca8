"""Is a network with the same weights still the same function? Asked of it, on inputs that are made up.

A fingerprint (``fingerprint.py``) tells weights apart, and says nothing of the forward pass: another version of the
class, an exchanged activation, a hook or a setting leave every weight as it was, and a posterior around them would be
that of another network. So a fit remembers what the network says of a few random inputs: numbers of the shapes that
the training inputs have, with their mean and spread, drawn from a seed. No data are kept.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nullbayes.model.batch import Inputs, batch_size, plain, take
from nullbayes.model.precision import in_half

if TYPE_CHECKING:
    from nullbayes.model.functional import FunctionalModel

# Examples that are made up, and numbers of each one's outputs that are remembered, at most.
EXAMPLES, NUMBERS = 3, 32
# Larger tensors are not made up.
LARGEST = 2**22
# Differences of outputs, relative, that another device or precision explains; half precision.
ALLOWED, ALLOWED_HALF = 2e-2, 0.2
# How deep inputs may be nested.
DEPTH = 8


@dataclass(frozen=True)
class Probe:
    """What a network says of made-up inputs; JSON-able by :meth:`as_dict`.

    Attributes:
        inputs: how to make them: nested dictionaries of one entry each, by kind.
        outputs: by example, some numbers of its outputs.
    """

    inputs: dict[str, Any]
    outputs: list[list[float]]

    @classmethod
    def taken(cls, functional: FunctionalModel, inputs: Inputs) -> Probe | None:
        """Of the network as it is, on inputs like these; None where it does not take made-up ones."""
        few = plain(take(inputs, 0, min(EXAMPLES, batch_size(inputs))))
        described = _described(few)
        outputs = None if described is None else _outputs(functional, described)
        if described is None or outputs is None or not any(map(any, outputs)):
            return None
        return cls(described, outputs)

    def difference(self, functional: FunctionalModel) -> float:
        """Relative difference of outputs, the median of the examples; 0 where the network cannot be asked."""
        try:
            found = _outputs(functional, self.inputs)
            pairs = list(zip(found or (), self.outputs, strict=found is not None))
            away = sorted(_away(a, b) for a, b in pairs)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # of a file that others wrote
            return 0.0
        return away[len(away) // 2] if away else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Probe | None:
        """The inverse of :meth:`as_dict`; None of None and of what nobody wrote."""
        try:
            return cls(dict(values["inputs"]), [[float(v) for v in o] for o in values["outputs"]])
        except (KeyError, TypeError, ValueError):
            return None


def allowed(functional: FunctionalModel) -> float:
    """The difference that rounding and another device explain."""
    half = in_half(functional.model) or functional.rounds_to
    return ALLOWED if half is None else ALLOWED_HALF


def _away(found: list[float], known: list[float]) -> float:
    if len(found) != len(known):
        return math.inf
    size = math.sqrt(sum(v * v for v in known))
    apart = math.sqrt(sum((a - b) ** 2 for a, b in zip(found, known, strict=True)))
    return apart / size if size else float(apart > 0)


def _outputs(functional: FunctionalModel, described: dict[str, Any]) -> list[list[float]] | None:
    """Some numbers of the outputs of each made-up example; None: the network does not take them."""
    named = dict(functional.model.named_parameters())
    weight = named[functional.space.names[0]]
    for dtype in dict.fromkeys((functional.dtype, weight.dtype)):
        generator = torch.Generator().manual_seed(0)
        inputs = _made(described, generator, (functional.device, dtype))
        out = functional.model_output(inputs)
        if out is not None and out.ndim and out.is_floating_point():
            flat = out.detach().double().nan_to_num().cpu().reshape(len(out), -1)
            if not flat.shape[1]:
                return None
            some = torch.linspace(0, flat.shape[1] - 1, min(NUMBERS, flat.shape[1])).long()
            return [[float(v) for v in row] for row in flat[:, some]]
    return None


def _described(value: Any, depth: int = 0) -> dict[str, Any] | None:
    """How to make up inputs like ``value``; None where that cannot be said."""
    if isinstance(value, Tensor):
        return _described_tensor(value)
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    if depth > DEPTH:
        return None
    if type(value) in (list, tuple):
        parts = [_described(v, depth + 1) for v in value]
        kind = "tuple" if type(value) is tuple else "list"
        return None if any(p is None for p in parts) else {kind: parts}
    if type(value) is dict and all(isinstance(k, str) for k in value):
        inside = {k: _described(v, depth + 1) for k, v in value.items()}
        return None if any(p is None for p in inside.values()) else {"dict": inside}
    return None


def _described_tensor(tensor: Tensor) -> dict[str, Any] | None:
    strided = tensor.layout == torch.strided and not tensor.is_nested
    if type(tensor) is not Tensor or not strided or not 0 < tensor.numel() <= LARGEST:
        return None
    if tensor.is_complex():
        return None
    out: dict[str, Any] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype)[6:]}
    if tensor.is_floating_point():
        numbers = tensor.double()
        numbers = numbers[numbers.isfinite()]
        if not numbers.numel():
            return None
        out |= {"mean": float(numbers.mean()), "spread": float(numbers.std(correction=0))}
    else:
        out |= {"low": int(tensor.min()), "high": int(tensor.max())}
    return {"tensor": out}


def _made(
    described: dict[str, Any], generator: torch.Generator, place: tuple[torch.device, torch.dtype]
) -> Any:
    [(kind, inside)] = described.items()
    if kind == "value":
        return inside
    if kind == "dict":
        return {k: _made(v, generator, place) for k, v in inside.items()}
    if kind in ("list", "tuple"):
        parts = [_made(v, generator, place) for v in inside]
        return parts if kind == "list" else tuple(parts)
    device, working = place
    dtype = getattr(torch, inside["dtype"])
    shape = tuple(int(n) for n in inside["shape"])
    if math.prod(shape) > LARGEST:
        raise ValueError("larger than anything that is made up")
    if dtype.is_floating_point:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (inside["mean"] + inside["spread"] * drawn).to(device, working)
    low, high = int(inside["low"]), int(inside["high"])
    return torch.randint(low, high + 1, shape, generator=generator).to(device, dtype)
