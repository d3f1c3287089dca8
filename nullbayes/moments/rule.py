"""Which layers have a rule of inputs, and how to add one.

A rule says how a layer reads its weight: as a matrix ``W (G, O, I)`` that multiplies inputs ``a (G, I)``, with a bias
that is the column for a constant one. To support a layer, write one class and decorate it::

    @nb.moments.register(MyLinear)
    class MyRule(nb.moments.InputRule):
        def reads(self, module):
            return (Read("weight", Layout(1, module.out_features, module.in_features), bias="bias"),)
        def inputs(self, module, args, kwargs, output):
            yield Seen("weight", args[0].unsqueeze(-2))       # (*lead, G, I)

The claim of a rule is: where ``ΔW a = 0`` for every input that it yields, the layer's output stands. Nothing is
taken on trust: each fit replays its first batch with weights changed in the null space of that batch, and with every
layer that has a rule put back by force; weights for which outputs move are fixed and named (``verify.py``).
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
class Layout:
    """How a weight tensor is read as ``groups`` matrices ``(outputs, inputs)``.

    Laid out ``(G, O, I)``; or ``(G, I / taps, O, taps)`` where ``taps`` is given (transposed convolutions).
    """

    groups: int
    outputs: int
    inputs: int
    taps: int | None = None

    def matrix(self, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Weights ``(*lead, *shape)`` as ``(*lead, G, O, I)``."""
        lead = weight.shape[: weight.ndim - len(shape)]
        if self.taps is None:
            return weight.reshape(*lead, self.groups, self.outputs, self.inputs)
        inputs = self.inputs // self.taps
        split = weight.reshape(*lead, self.groups, inputs, self.outputs, self.taps)
        whole = split.transpose(-3, -2)
        return whole.reshape(*lead, self.groups, self.outputs, self.inputs)

    def tensor(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of :meth:`matrix`: ``(*lead, G, O, I)`` as weights ``(*lead, *shape)``."""
        lead = matrix.shape[:-3]
        if self.taps is None:
            return matrix.reshape(*lead, *shape)
        inputs = self.inputs // self.taps
        split = matrix.reshape(*lead, self.groups, self.outputs, inputs, self.taps)
        return split.transpose(-3, -2).reshape(*lead, *shape)


@dataclass(frozen=True)
class Read:
    """One weight of a module, by its name relative to the module, and the bias that is added to what it gives.

    ``bias`` has ``groups * outputs`` numbers. A name that the module does not have, or that is None there, is left out.
    ``table``: rows of the weight are looked up instead; the layer then yields indices.
    """

    weight: str
    layout: Layout
    bias: str | None = None
    table: bool = False


@dataclass(frozen=True)
class Seen:
    """Inputs that a read weight received: ``a (*lead, G, I)``; or, of a table, ``index (*lead)``.

    ``lead`` are axes of examples and tokens in the order of the layer's own input. A rule may yield parts of them, cut
    along the first axis, to save memory; all but the first then say that they follow on.
    """

    weight: str
    a: Tensor | None = None
    index: Tensor | None = None
    follows: bool = False


@dataclass(frozen=True)
class Summed:
    """Sums over inputs of one weight: ``gram (G, I, I)`` and ``sums (G, I)``, float32 or float64, and how many."""

    weight: str
    gram: Tensor
    sums: Tensor
    count: int


class Summer(ABC):
    """Adds up what the weights of one module receive, call by call, where that costs less than the inputs do."""

    @abstractmethod
    def add(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
        """Add one call; False: nothing was added, and its inputs are needed."""

    @abstractmethod
    def flush(self) -> Iterator[Summed]:
        """The sums since the last time."""

    @abstractmethod
    def mark(self) -> Tensor | None:
        """A number that is finite where the sums are; None: there are none."""


class InputRule(ABC):
    """Inputs of one kind of layer."""

    def supports(self, module: Any) -> bool:
        """Whether the rule holds for this module's settings; otherwise its weights are fixed."""
        return True

    @abstractmethod
    def reads(self, module: Any) -> tuple[Read, ...]:
        """The weights of ``module`` that the rule accounts for."""

    @abstractmethod
    def inputs(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Iterator[Seen]:
        """The inputs of one call ``module(*args, **kwargs) -> output``; run without a graph."""

    def thinned(
        self,
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        at_most: int,
    ) -> Iterator[Seen]:
        """Inputs at about ``at_most`` positions of each example, evenly spaced; by default at all of them."""
        return self.inputs(module, args, kwargs, output)

    def summer(self, module: Any, dtype: torch.dtype) -> Summer | None:
        """What adds up the sums of :meth:`inputs` for less, in products of ``dtype``; None: nothing does."""
        return None


_RULES = ModuleRules[InputRule]()


def register(*kinds: type[nn.Module] | str) -> Callable[[type[InputRule]], type[InputRule]]:
    """Class decorator: use this rule for modules of these classes (or of these ``"module.Class"`` names)."""
    return _RULES.register(*kinds)


def rule_for(module: nn.Module) -> InputRule | None:
    """The rule of the nearest registered ancestor whose ``forward`` the class still runs."""
    return _RULES.rule_for(module)


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    """An argument of a call, by position or by name; None where it was left out."""
    return args[position] if len(args) > position else kwargs.get(name)
