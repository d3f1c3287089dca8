"""Which layers have a rule, and how to add one.

A rule turns what a layer saw (its input) and what the loss says about its output (the gradient)
into contributions to Jacobian rows. To support a layer, write one class and decorate it::

    @nb.jacobian.register(MyScale)
    class ScaleRule(nb.jacobian.LayerRule):
        def contributions(self, module, x, g):            # x: (N, ..., d), g: (C, N, ..., d)
            yield Rows("weight", (g * x).flatten(2, -2).sum(2))

Nothing a rule says is taken on trust: every fit compares it with automatic differentiation on a
probe batch, and a parameter whose rows do not match goes to the generic path and is named.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nullbayes.model.module_rules import ModuleRules


@dataclass(frozen=True)
class Rows:
    """Rows written out: ``values (C, N, numel)`` for the parameter ``name`` of the module."""

    name: str
    values: Tensor


@dataclass(frozen=True)
class Outer:
    """Rows ``Σ_t g ⊗ a`` for ``weight``, and ``Σ_t g`` for ``bias`` where it is named.

    ``a``: ``(N, T, G, I)``; ``g``: ``(C, N, T, G, O)``; weight laid out ``(G, O, I)``, or
    ``(G, I, O)`` if ``transposed`` (then without a bias).
    """

    weight: str
    a: Tensor
    g: Tensor
    bias: str | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Lookup:
    """Rows of a table: ``index (N, T)`` (-1: no gradient), ``g (C, N, T, D)``."""

    name: str
    index: Tensor
    g: Tensor


Contribution = Rows | Outer | Lookup


def working(item: Contribution, dtype: torch.dtype) -> Contribution:
    """``item`` with its numbers in ``dtype``: layers of one model may compute in several."""
    if isinstance(item, Rows):
        return item if item.values.dtype == dtype else Rows(item.name, item.values.to(dtype))
    if isinstance(item, Lookup):
        return item if item.g.dtype == dtype else Lookup(item.name, item.index, item.g.to(dtype))
    if item.a.dtype == item.g.dtype == dtype:
        return item
    return Outer(item.weight, item.a.to(dtype), item.g.to(dtype), item.bias, item.transposed)


class LayerRule(ABC):
    """Contributions of one kind of layer. ``N`` is the leading axis of the layer's own input."""

    #: Local names of the parameters that the rule accounts for.
    parameters: tuple[str, ...] = ("weight", "bias")

    def supports(self, module: Any) -> bool:
        """Whether the rule holds for this module's settings; otherwise the generic path serves."""
        return True

    @abstractmethod
    def contributions(self, module: Any, x: Tensor, g: Tensor) -> Iterator[Contribution]:
        """Contributions from the input ``x (N, ...)`` and output gradients ``g (C, N, ...)``."""


_RULES = ModuleRules[LayerRule]()


def register(*kinds: type[nn.Module] | str) -> Callable[[type[LayerRule]], type[LayerRule]]:
    """Class decorator: use this rule for modules of these classes (or of these ``"module.Class"`` names)."""
    return _RULES.register(*kinds)


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of the nearest registered ancestor whose ``forward`` the class still runs."""
    return _RULES.rule_for(module)


def registered() -> dict[type[nn.Module] | str, LayerRule]:
    """A copy of the table of rules; classes of packages that need not be installed stand by name."""
    return dict(_RULES.table)


def tokens(x: Tensor) -> Tensor:
    """``(N, *axes, d)`` -> ``(N, T, d)``, also where there are no token axes."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def grad_tokens(g: Tensor) -> Tensor:
    """``(C, N, *axes, d)`` -> ``(C, N, T, d)``."""
    return g.reshape(*g.shape[:2], -1, g.shape[-1])
