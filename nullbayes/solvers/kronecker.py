"""Per-layer curvature from captured factors: a Kronecker product, a full block or a diagonal."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from nullbayes.common.decompositions import eigh
from nullbayes.common.processes import Processes
from nullbayes.jacobian.block_storage import replaced
from nullbayes.jacobian.factors.base import Factor
from nullbayes.jacobian.factors.outer import OuterFactor
from nullbayes.jacobian.factors.products import gather, scatter_add
from nullbayes.jacobian.operator import JacobianOperator, Tick

# A side of a layer wider than this is not decomposed: its diagonal stands for it.
WIDEST = 2048


class Curvature(ABC):
    """Approximates the block of ``AᵀA`` that belongs to the columns of one factor."""

    values: Tensor

    @abstractmethod
    def add(self, factor: Factor, weights: Tensor | None = None) -> None:
        """Take in the rows of one block, each times its number of ``weights (B*C,)``."""

    @abstractmethod
    def sum_over(self, processes: Processes) -> None:
        """What has been taken in, summed over the processes."""

    @abstractmethod
    def finish(self, examples: int) -> None:
        """All rows are in: decompose."""

    @abstractmethod
    def damp(self, r: Tensor, out: Tensor, mu: float) -> None:
        """``out[columns] = mu (C + mu I)⁻¹ r[columns]``."""


def layer_curvatures(
    operator: JacobianOperator, tick: Tick | None = None, weights: Tensor | None = None
) -> list[Curvature]:
    """One pass over the rows, each times its number of ``weights (M,)``; a decomposition for each layer."""
    layers: dict[tuple[str, ...], Curvature] = {}
    processes = operator.processes
    if processes is not None:
        layers = _empty(operator, processes)
    own = None if weights is None else operator.own(weights[None])[0]
    for i, (kept, at) in enumerate(zip(operator.blocks, operator.starts, strict=False)):
        some = None if own is None else own[at : at + kept.num_rows]
        with kept.opened() as block:
            for key, factor in block.factors.items():
                if key not in layers:
                    layers[key] = _curvature(factor)
                layers[key].add(factor, some)
        if tick:
            tick(0.8 * (i + 1) / len(operator.blocks))
    for layer in layers.values():
        if processes is not None:
            layer.sum_over(processes)
        layer.finish(operator.examples)
    if tick:
        tick(1.0)
    return list(layers.values())


def _empty(operator: JacobianOperator, processes: Processes) -> dict[tuple[str, ...], Curvature]:
    """Sums over no rows for each layer that any process has, in the same order everywhere."""
    forms: dict[tuple[str, ...], Factor] = {}
    for kept in operator.blocks:
        with kept.opened() as block:
            for key, factor in block.factors.items():
                if key not in forms:
                    forms[key] = replaced(factor.narrow(0, 0), torch.clone)
    layers: dict[tuple[str, ...], Curvature] = {}
    for found in processes.gather(forms):
        for key, form in found.items():
            if key not in layers:
                layers[key] = _curvature(form)
                layers[key].add(form)
    return layers


def _curvature(factor: Factor) -> Curvature:
    outer = factor.as_outer
    if outer is not None:
        return _Product(outer)
    return _Full(factor) if factor.columns <= WIDEST else _Diagonal(factor)


class _Full(Curvature):
    def __init__(self, factor: Factor) -> None:
        self.slots, self.sum = factor.slots, torch.zeros(())

    def add(self, factor: Factor, weights: Tensor | None = None) -> None:
        rows = factor.rows()
        if weights is not None:
            rows = rows * weights[:, None].to(rows)
        self.sum = self.sum.to(rows) + rows.T @ rows

    def sum_over(self, processes: Processes) -> None:
        processes.sum_(self.sum)

    def finish(self, examples: int) -> None:
        self.values, self.basis = _decomposed(self.sum)
        self.sum = torch.zeros(())

    def damp(self, r: Tensor, out: Tensor, mu: float) -> None:
        change = gather(r, self.slots) @ self.basis
        change = (change * _gain(self.values, mu)) @ self.basis.T
        for slot in self.slots:
            out[:, slot.start : slot.stop] = 0
        scatter_add(out, self.slots, change)


class _Diagonal(Curvature):
    def __init__(self, factor: Factor) -> None:
        self.slots, self.values = factor.slots, torch.zeros(())

    def add(self, factor: Factor, weights: Tensor | None = None) -> None:
        step, width = max(1, 2**26 // max(1, factor.columns * factor.cotangents)), factor.cotangents
        for start in range(0, factor.examples, step):
            stop = min(start + step, factor.examples)
            part = factor.narrow(start, stop)
            rows = part.rows()
            if weights is not None:
                rows = rows * weights[start * width : stop * width, None].to(rows)
            self.values = self.values.to(part.tensors()[-1]) + rows.square().sum(0)
        if not factor.examples:
            self.values = self.values + factor.tensors()[-1].new_zeros(factor.columns)

    def sum_over(self, processes: Processes) -> None:
        processes.sum_(self.values)

    def finish(self, examples: int) -> None:
        pass

    def damp(self, r: Tensor, out: Tensor, mu: float) -> None:
        for slot in self.slots:
            out[:, slot.start : slot.stop] = 0
        scatter_add(out, self.slots, gather(r, self.slots) * _gain(self.values, mu))


class _Product(Curvature):
    """``E[a aᵀ] ⊗ Σ g gᵀ`` for each group; the bias is the last input."""

    def __init__(self, factor: OuterFactor) -> None:
        self.weight, self.bias, self.transposed = factor.weight, factor.bias, factor.transposed
        self.shape = (factor.groups, factor.width_out, factor.width_in)
        self.inputs = self.outputs = torch.zeros(())
        self.tokens = 0

    def add(self, factor: Factor, weights: Tensor | None = None) -> None:
        outer = factor.as_outer
        assert outer is not None
        g = outer.g
        if weights is not None:
            g = g * weights.reshape(outer.examples, outer.cotangents, 1, 1, 1).to(g)
        self.inputs = self.inputs.to(outer.a) + _moment(outer.a.movedim(-2, 0))
        self.outputs = self.outputs.to(outer.g) + _moment(g.movedim(-2, 0))
        self.tokens += outer.examples * outer.tokens

    def sum_over(self, processes: Processes) -> None:
        self.inputs = processes.sum_(self.inputs.contiguous())
        self.outputs = processes.sum_(self.outputs.contiguous())
        self.tokens = round(processes.total(self.tokens)[0])

    def finish(self, examples: int) -> None:
        # Tokens of one example add up in a row; their cross terms are what is left out.
        sides = [_side(self.inputs / max(1, self.tokens)), _side(self.outputs)]
        (in_values, self.in_basis), (out_values, self.out_basis) = sides
        self.values = out_values[:, :, None] * in_values[:, None, :]  # (G, O, I)
        self.inputs = self.outputs = torch.zeros(())

    def damp(self, r: Tensor, out: Tensor, mu: float) -> None:
        s, (g, o, i) = len(r), self.shape
        w = r[:, self.weight.start : self.weight.stop]
        if self.transposed:
            joint = w.reshape(s, g, i, o).transpose(2, 3)
        else:
            joint = w.reshape(s, g, o, -1)
            if self.bias is not None:
                bias = r[:, self.bias.start : self.bias.stop].reshape(s, g, o, 1)
                joint = torch.cat([joint, bias], dim=-1)
        joint = _rotate(joint, self.out_basis, self.in_basis, forward=True)
        joint = joint * _gain(self.values, mu)
        joint = _rotate(joint, self.out_basis, self.in_basis, forward=False)
        if self.transposed:
            joint = joint.transpose(2, 3)
        elif self.bias is not None:
            out[:, self.bias.start : self.bias.stop] = joint[..., -1].reshape(s, -1)
            joint = joint[..., :-1]
        out[:, self.weight.start : self.weight.stop] = joint.reshape(s, -1)


def _gain(values: Tensor, mu: float) -> Tensor:
    return mu / (values + mu)


def _moment(x: Tensor) -> Tensor:
    """``(G, ..., d)`` -> ``Σ x xᵀ (G, d, d)``, or its diagonal ``(G, d)`` where d is too wide."""
    flat = x.flatten(1, -2)
    return flat.square().sum(1) if x.shape[-1] > WIDEST else flat.transpose(1, 2) @ flat


def _side(moment: Tensor) -> tuple[Tensor, Tensor | None]:
    if moment.ndim == 2:
        return moment, None
    parts = [_decomposed(m) for m in moment]
    return torch.stack([v for v, _ in parts]), torch.stack([b for _, b in parts])


def _decomposed(moment: Tensor) -> tuple[Tensor, Tensor]:
    # In float64: float32 fails to converge on moments of nearly equal inputs, and bfloat16 has no decomposition.
    values, basis = (t.to(moment.dtype) for t in eigh(moment.double()))
    return values.clamp(min=0), basis


def _rotate(x: Tensor, left: Tensor | None, right: Tensor | None, *, forward: bool) -> Tensor:
    if left is not None:
        x = (left.mT if forward else left) @ x
    if right is not None:
        x = x @ (right if forward else right.mT)
    return x
