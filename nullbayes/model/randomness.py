"""Randomness inside a model, frozen for each example: the same draw whatever the batch, the order or the call.

Every random operation of a forward pass is answered from a counter-based generator: the numbers that an example
gets depend on (seed, its content, which of the stacked draws, which random operation of the pass, position) and on
nothing else. The hash is that of Steele, Lea & Flood, *Fast splittable pseudorandom number generators*, 2014.
The global random state is neither read nor moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from nullbayes.errors import InputError, ModelError
from nullbayes.model.batch import Keyed, flags_of, plain, repeated
from nullbayes.model.random_ops import RULES, UNTAGGED

# Of the splitmix64 generator, as signed 64-bit numbers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class FrozenRandomness:
    """What ``randomness="frozen"`` means, with a seed of its own.

    Attributes:
        seed: another seed, other noise.
        draws: how many draws of the noise each example is stacked with in ``fit``.
    """

    seed: int = 0
    draws: int = 1

    def config(self) -> dict[str, int]:
        """JSON-able; ``FrozenRandomness(**config)`` is its inverse."""
        return {"seed": self.seed, "draws": self.draws}


def resolve_randomness(value: Any, draws: int | None) -> FrozenRandomness | None:
    """``None``, ``"frozen"`` or an object, with ``draws``. Raises `InputError` for anything else."""
    if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 1):
        raise InputError(f"`draws` is {draws!r}; expected a whole number, 1 or more.")
    if value is None:
        if draws not in (None, 1):
            raise InputError(
                f"`draws` is {draws} but the model's randomness is not frozen: all draws would be the same. "
                'Pass `randomness="frozen"` with it.'
            )
        return None
    if value == "frozen":
        return FrozenRandomness(draws=draws or 1)
    if isinstance(value, FrozenRandomness):
        return FrozenRandomness(value.seed, draws or value.draws)
    raise InputError(
        f'`randomness` is {value!r}; expected None, "frozen", or nb.FrozenRandomness(seed=...).'
    )


def keyed(inputs: Any, size: int, seed: int, draws: Sequence[int]) -> Keyed:
    """``inputs`` of ``size`` examples, each repeated for every one of ``draws``, with its keys ``(B·k,)``."""
    content = content_hash(inputs, size)
    keys = torch.stack([_mix(_mix(content ^ _mixed(seed)) + _mixed(draw)) for draw in draws], dim=1)
    return Keyed(repeated(inputs, size, len(draws)), keys.flatten(), seed)


def content_hash(inputs: Any, size: int) -> Tensor:
    """One int64 ``(B,)`` per example from all tensors that have the batch axis.

    Floating-point numbers count in float32, so that a model agrees with its conversion to float64. Zeros
    do not count, so that padding with zeros does not change an example.
    """
    total: Tensor | None = None
    # What has length one counts for every example: alone, an example cannot say whether that is its own.
    flags = flags_of(inputs, size)
    leaves = [
        t for t, has in zip(tree_flatten(plain(inputs))[0], flags, strict=True) if has or _one(t)
    ]
    for place, leaf in enumerate(leaves):
        flat = (torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf).detach()
        flat = flat.reshape(len(flat), -1).expand(size, -1)
        if flat.is_floating_point():
            flat = flat.to(torch.float32).contiguous().view(torch.int32)
            flat = torch.where(flat == -(1 << 31), 0, flat)  # minus zero
        flat = flat.to(torch.int64)
        index = torch.arange(1, flat.shape[1] + 1, device=flat.device)
        # A sum of integers is the same in any order, so the same in any batch.
        words = _mix(_mix(flat + _mixed(place + 1)) + index * _GAMMA)
        part = torch.where(flat == 0, 0, words).sum(1)
        total = part if total is None else total + part.to(total.device)
    assert total is not None  # `batch_size` found a tensor with a batch axis
    return total


def _one(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == 1


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, on int64 with wrap-around."""
    x = (x ^ _shifted(x, 30)) * _MIX1
    x = (x ^ _shifted(x, 27)) * _MIX2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; that of int64 would copy the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(number: int) -> int:
    """A number of the user's, or a counter, spread over 64 bits."""
    x, whole = (number + 1) * _GAMMA, (1 << 64) - 1
    x &= whole
    x = ((x ^ (x >> 30)) * _MIX1) & whole
    x = ((x ^ (x >> 27)) * _MIX2) & whole
    x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x


class Replay(TorchDispatchMode):
    """Within it, random operations give the frozen numbers of the examples with ``keys (B,)``.

    An operation's result belongs to the examples by its first axis, which is ``B`` or a multiple of it, each
    example's share in one piece; a single number (shape ``()``) is the same for all, and depends on ``seed``.

    Raises:
        ModelError: a result that belongs to no example, or an operation that has no frozen form.
    """

    def __init__(self, keys: Tensor, seed: int) -> None:
        super().__init__()
        self.keys = keys.cpu() if keys.device.type == "mps" else keys  # which has no float64
        self.shared = self.keys.new_full((1,), _mixed(seed))
        self.calls = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = drawing(func, args, kwargs)
        if given is None:
            return func(*args, **kwargs)
        rule = RULES.get(func.overloadpacket.__name__)
        if rule is None or given.get("out") is not None:
            raise ModelError(
                f"the model's random operation `{func}` has no frozen form. Draw with torch.randn, rand, randint, "
                "bernoulli, multinomial, dropout or torch.distributions made of them (attention with dropout: "
                'the "eager" or "math" kernel), or pass the noise as an input.'
            )
        result = rule(self, given)
        self.calls += 1
        return result

    def uniform(self, shape: Sequence[int], inner: int | None = None) -> Tensor:
        """Float64 in (0, 1) of ``shape``, with ``inner`` numbers in a last axis of their own if given."""
        shape, size = tuple(shape), len(self.keys)
        full = shape if inner is None else (*shape, inner)
        if not shape:
            keys = self.shared
        elif shape[0] % size:
            raise ModelError(
                f"random operation {self.calls + 1} of the forward pass has shape {shape} for {size} examples: no axis "
                "of it belongs to the examples, so it cannot be frozen for each of them. Draw one per example, the "
                "batch on the first axis (e.g. `torch.randn_like(x)`, `torch.randint(..., (len(x),))`)."
            )
        else:
            keys = self.keys
        each = math.prod(full) // len(keys)
        index = torch.arange(1, each + 1, device=keys.device)
        bits = _mix(_mix(keys + _mixed(self.calls))[:, None] + index * _GAMMA)
        return ((_shifted(bits, 11).double() + 0.5) * 2.0**-53).reshape(full)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, float64."""
        return torch.special.ndtri(self.uniform(shape))


def drawing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments by name, defaults filled in, of an operation that draws random numbers; None: it draws none."""
    tagged = torch.Tag.nondeterministic_seeded in func.tags
    if not tagged and func.overloadpacket.__name__ not in UNTAGGED:
        return None
    given = _bound(func, args, kwargs)
    return given if _random(given) else None


def _random(given: dict[str, Any]) -> bool:
    """Whether an operation that may draw does: not with a dropout of zero, or outside training."""
    if given.get("train") is False or given.get("training") is False:
        return False
    return all(given.get(n) != 0.0 for n in ("dropout_p", "dropout"))


def _bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the operation's schema, defaults filled in."""
    arguments = func._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= {a.name: v for a, v in zip(arguments, args, strict=False)}
    return given | kwargs
