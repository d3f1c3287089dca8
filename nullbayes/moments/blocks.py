"""The blocks of weights that change together: one weight tensor with the biases that are added to what it gives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nullbayes.model.parameters import ParameterSpace
from nullbayes.moments.rule import InputRule, Layout, Read, rule_for

NO_RULE = "no rule says what it multiplies"
TWO_LAYOUTS = "two layers read it in different ways"
TWO_WEIGHTS = "it is added to what two weights give"


@dataclass(frozen=True)
class Block:
    """A matrix ``(G, O, I)`` of weights whose rows multiply the same inputs.

    Its columns are those of the weight (none where the weight does not take part), then one for each bias.
    A tied weight is one block, with a bias column for each different bias that its uses have.
    """

    name: str
    layout: Layout
    shape: tuple[int, ...]
    own: int  # columns of the weight itself
    biases: tuple[str, ...]
    bias_shapes: tuple[tuple[int, ...], ...]
    table: bool  # whether rows of it are looked up
    multiplied: bool  # whether it multiplies inputs

    @property
    def columns(self) -> int:
        """``I``: of the weight and the biases."""
        return self.own + len(self.biases)

    @property
    def size(self) -> tuple[int, int, int]:
        """``(G, O, I)``."""
        return self.layout.groups, self.layout.outputs, self.columns

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters in it."""
        return ((self.name,) if self.own else ()) + self.biases

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """Changes ``(*lead, G, O, I)`` as changes ``(*lead, *shape)`` of the parameters by name."""
        out, lead = {}, matrix.shape[:-3]
        if self.own:
            out[self.name] = self.layout.tensor(matrix[..., : self.own], self.shape)
        for i, (name, shape) in enumerate(zip(self.biases, self.bias_shapes, strict=True)):
            out[name] = matrix[..., self.own + i].reshape(*lead, *shape)
        return out

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`tensors`: ``(*lead, *shape)`` -> ``(*lead, G, O, I)``."""
        parts = [self.layout.matrix(tensors[self.name], self.shape)] if self.own else []
        groups, outputs, _ = self.size
        for name, shape in zip(self.biases, self.bias_shapes, strict=True):
            lead = tensors[name].shape[: tensors[name].ndim - len(shape)]
            parts.append(tensors[name].reshape(*lead, groups, outputs, 1))
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class Site:
    """A module with a rule, and where each of the weights that it reads belongs."""

    path: str
    module: nn.Module
    rule: InputRule
    # Local weight: its block, and its bias's column there.
    places: Mapping[str, tuple[int, int | None]]
    claimed: tuple[str, ...]  # local names of all weights and biases that the rule accounts for


@dataclass
class Blocks:
    """All blocks of a model, the modules that feed them, and the parameters that stay fixed, with the reason."""

    blocks: list[Block]
    sites: list[Site]
    fixed: dict[str, str] = field(default_factory=dict)


@dataclass
class _Weight:
    layouts: set[Layout] = field(default_factory=set)
    biases: list[str] = field(default_factory=list)
    table: bool = False
    multiplied: bool = False


def find_blocks(
    model: nn.Module, space: ParameterSpace, fixed: Mapping[str, str] | None = None
) -> Blocks:
    """Blocks of the parameters of ``space``.

    Args:
        fixed: parameters that have to stay as they are, with the reason.
    """
    reasons = dict(fixed or {})
    canonical = {id(p): n for n, p in model.named_parameters()}
    found: dict[str, _Weight] = defaultdict(_Weight)
    calls: list[tuple[str, nn.Module, InputRule, list[tuple[Read, str, str | None]]]] = []
    for path, module in model.named_modules():
        rule = rule_for(module)
        if rule is None:
            continue
        reads = []
        for read in rule.reads(module):
            weight = _parameter(module, read.weight, canonical)
            if weight is None:  # computed from other parameters, which stay fixed
                continue
            bias = None if read.bias is None else _parameter(module, read.bias, canonical)
            entry = found[weight]
            entry.layouts.add(read.layout)
            entry.table |= read.table
            entry.multiplied |= not read.table
            if bias is not None and bias not in entry.biases:
                entry.biases.append(bias)
            reads.append((read, weight, bias))
        if reads:
            calls.append((path, module, rule, reads))
    _conflicts(found, reasons)
    named = dict(model.named_parameters())
    blocks: list[Block] = []
    number: dict[str, int] = {}
    for name, entry in found.items():
        if len(entry.layouts) > 1:
            continue
        biases = [b for b in entry.biases if b in space.by_name and b not in reasons]
        layout = next(iter(entry.layouts))
        own = layout.inputs if name in space.by_name and name not in reasons else 0
        if not own and not biases:
            continue
        number[name] = len(blocks)
        shapes = tuple(tuple(named[b].shape) for b in biases)
        shape = tuple(named[name].shape)
        blocks.append(
            Block(name, layout, shape, own, tuple(biases), shapes, entry.table, entry.multiplied)
        )
    sites = [_site(*call, blocks, number) for call in calls]
    covered = {n for block in blocks for n in block.names}
    for name in space.names:
        if name not in covered:
            reasons.setdefault(name, NO_RULE)
    return Blocks(
        blocks, [s for s in sites if s.places], {n: reasons[n] for n in space.names if n in reasons}
    )


def _parameter(module: nn.Module, local: str, canonical: Mapping[int, str]) -> str | None:
    """The model's name for a parameter of a module by its local name, if it is one."""
    *folders, leaf = local.split(".")
    for folder in folders:
        module = getattr(module, folder)
    value = module._parameters.get(leaf)
    return None if value is None else canonical.get(id(value))


def _conflicts(found: Mapping[str, _Weight], reasons: dict[str, str]) -> None:
    """Fix what two uses read in ways that no one block can hold."""
    owners: dict[str, set[str]] = defaultdict(set)
    for name, entry in found.items():
        if len(entry.layouts) > 1:
            reasons.setdefault(name, TWO_LAYOUTS)
        for bias in entry.biases:
            owners[bias].add(name)
    for bias, weights in owners.items():
        if len(weights) > 1 or bias in found:
            reasons.setdefault(bias, TWO_WEIGHTS)
        if bias in found:
            reasons.setdefault(bias, TWO_LAYOUTS)


def _site(
    path: str,
    module: nn.Module,
    rule: InputRule,
    reads: list[tuple[Read, str, str | None]],
    blocks: list[Block],
    number: Mapping[str, int],
) -> Site:
    places: dict[str, tuple[int, int | None]] = {}
    claimed: list[str] = []
    for read, weight, bias in reads:
        claimed.append(read.weight)
        if bias is not None and read.bias is not None:
            claimed.append(read.bias)
        if weight in number:
            block = blocks[number[weight]]
            column = block.biases.index(bias) if bias in block.biases else None
            places[read.weight] = (number[weight], column)
    return Site(path, module, rule, places, tuple(claimed))
