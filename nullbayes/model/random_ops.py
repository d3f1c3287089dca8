"""Random operations answered from given uniform numbers: one rule for each, under the operation's name in ``aten``.

A rule takes the source of numbers and the operation's arguments by name, and returns what the operation would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Source(Protocol):
    """Where the numbers come from: float64, the same for each example whatever its batch."""

    def uniform(self, shape: Sequence[int], inner: int | None = None) -> Tensor: ...

    def normal(self, shape: Sequence[int]) -> Tensor: ...


Given = dict[str, Any]
Rule = Callable[[Source, Given], Any]
RULES: dict[str, Rule] = {}
# Random operations that PyTorch does not tag as such.
UNTAGGED = frozenset({"binomial", "_sample_dirichlet", "random", "random_"})


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def decorate(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return decorate


def _filling(name: str) -> Callable[[Rule], Rule]:
    """Rules ``name_``, which fills ``self``, and ``name``, which makes a tensor like it."""

    def decorate(values: Rule) -> Rule:
        RULES[f"{name}_"] = lambda source, given: given["self"].copy_(values(source, given))
        RULES[name] = lambda source, given: _made(values(source, given), given)
        return values

    return decorate


def _shape(given: Given) -> tuple[int, ...]:
    like = given.get("self")
    return tuple(like.shape if isinstance(like, Tensor) else given["size"])


def _made(values: Tensor, given: Given, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` in the dtype and on the device asked for, or else those of ``self``, or the default."""
    like, asked, device = given.get("self"), given.get("dtype"), given.get("device")
    if isinstance(asked, torch.dtype):  # a schema's own default is a number
        dtype = asked
    if isinstance(like, Tensor):
        dtype, device = dtype or like.dtype, device or like.device
    return values.to(dtype=dtype or torch.get_default_dtype(), device=device)


@_rule("rand", "rand_like")
def _rand(source: Source, given: Given) -> Tensor:
    values = _made(source.uniform(_shape(given)), given)
    # Rounding to a narrower dtype may reach 1, which a number from [0, 1) never is.
    return values.clamp_max(1 - torch.finfo(values.dtype).eps / 2)


@_rule("randn", "randn_like")
def _randn(source: Source, given: Given) -> Tensor:
    return _made(source.normal(_shape(given)), given)


@_rule("randint", "randint_like")
def _randint(source: Source, given: Given) -> Tensor:
    values = _integers(source, given, given.get("low", 0), given["high"])
    return _made(values, given, None if isinstance(given.get("self"), Tensor) else torch.int64)


@_filling("random")
def _random(source: Source, given: Given) -> Tensor:
    like: Tensor = given["self"]
    high = given.get("to")
    if high is None:  # as far as the dtype counts without a gap, as torch does
        exact = like.is_floating_point()
        high = 2 / torch.finfo(like.dtype).eps if exact else min(torch.iinfo(like.dtype).max, 2**53)
    return _integers(source, given, given.get("from") or 0, high)


def _integers(source: Source, given: Given, low: Any, high: Any) -> Tensor:
    return int(low) + (source.uniform(_shape(given)) * (int(high) - int(low))).floor()


@_rule("normal")
def _normal(source: Source, given: Given) -> Tensor:
    mean, std = given["mean"], given["std"]
    tensors = [t for t in (mean, std) if isinstance(t, Tensor)]
    if not tensors:
        return _made(mean + std * source.normal(_shape(given)), given)
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    out: Tensor = mean + std * source.normal(shape).to(tensors[0])
    return out


@_rule("normal_")
def _normal_in_place(source: Source, given: Given) -> Tensor:
    out: Tensor = given["self"]
    return out.copy_(given["mean"] + given["std"] * source.normal(out.shape))


@_filling("uniform")
def _uniform(source: Source, given: Given) -> Tensor:
    return given["from"] + (given["to"] - given["from"]) * source.uniform(_shape(given))


@_filling("exponential")
def _exponential(source: Source, given: Given) -> Tensor:
    return -source.uniform(_shape(given)).log() / given["lambd"]


@_filling("log_normal")
def _log_normal(source: Source, given: Given) -> Tensor:
    return (given["mean"] + given["std"] * source.normal(_shape(given))).exp()


@_filling("cauchy")
def _cauchy(source: Source, given: Given) -> Tensor:
    angle = math.pi * (source.uniform(_shape(given)) - 0.5)
    return given["median"] + given["sigma"] * angle.tan()


@_filling("geometric")
def _geometric(source: Source, given: Given) -> Tensor:
    missed = math.log1p(-given["p"]) if given["p"] < 1 else -math.inf
    return (source.uniform(_shape(given)).log() / missed).ceil().clamp_min(1)


@_rule("bernoulli")
def _bernoulli(source: Source, given: Given) -> Tensor:
    """Probabilities ``p``, or ``self`` where it is left out."""
    return _hits(source, given, given.get("p", given["self"]))


@_rule("bernoulli_")
def _bernoulli_in_place(source: Source, given: Given) -> Tensor:
    out: Tensor = given["self"]
    return out.copy_(_hits(source, given, given["p"]))


def _hits(source: Source, given: Given, p: Any) -> Tensor:
    like: Tensor = given["self"]
    numbers = source.uniform(like.shape)
    return (numbers < (p.to(numbers.device) if isinstance(p, Tensor) else p)).to(like)


@_rule("multinomial")
def _multinomial(source: Source, given: Given) -> Tensor:
    """Exponential races: categories in the order in which their waiting times end."""
    weights: Tensor = given["self"].double()
    count, (*rows, kinds) = given["num_samples"], weights.shape
    if given["replacement"]:
        numbers = source.uniform([*rows, count], kinds).to(weights.device)
        return (-numbers.log() / weights.unsqueeze(-2)).argmin(-1)
    numbers = source.uniform(rows, kinds).to(weights.device)
    return (-numbers.log() / weights).topk(count, dim=-1, largest=False).indices


@_rule("native_dropout")
def _native_dropout(source: Source, given: Given) -> tuple[Tensor, Tensor]:
    return _dropped(source, given["input"], given["p"])


@_rule("dropout")
def _dropout(source: Source, given: Given) -> Tensor:
    return _dropped(source, given["input"], given["p"])[0]


def _dropped(source: Source, x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The rest scaled by ``1 / (1 - p)``, and which those are (bool)."""
    # As `bernoulli_(1 - p)`, by which dropout is done where there is no kernel of its own.
    kept = (source.uniform(x.shape) < 1 - p).to(x.device)
    return x * kept * (1 / (1 - p) if p < 1 else 0.0), kept
