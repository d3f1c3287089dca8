"""A prior that is the layer null space of all the data, for rows of some of them.

``N(θ̂, α⁻¹ ⊕_l I ⊗ P_l)`` in place of ``N(θ̂, α⁻¹ I)``: the directions in which a layer's training inputs are many are
narrow already, and rows of single examples take away what is left along them. Rows are kept in coordinates ``z`` with
``Δ = z R``, ``RᵀR = Σ``, in which the prior is isotropic, so every solver serves. Of each layer ``R`` is upper
triangular with the bias last: then the constant input of a bias stays constant, and rows stay sums of outer products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.jacobian.block import Block, Key
from nullbayes.jacobian.factors.base import Factor as RowFactor
from nullbayes.jacobian.factors.dense import DenseFactor as WrittenRows
from nullbayes.jacobian.factors.outer import OuterFactor
from nullbayes.model.parameters import ParameterSpace
from nullbayes.moments.blocks import Block as LayerBlock
from nullbayes.moments.factor import DenseFactor, Factor


@dataclass(frozen=True)
class Root:
    """``R`` of one block of a layer: a triangle ``(G, I, I)``, or the symmetric one of a factor."""

    factor: Factor
    triangle: Tensor | None

    @staticmethod
    def of(factor: Factor) -> Root:
        """Of ``P`` at prior precision one."""
        if isinstance(factor, DenseFactor):
            return Root(factor, torch.linalg.qr(factor.root).R)
        return Root(factor, None)

    def spread(self, z: Tensor) -> Tensor:
        """``z R``."""
        return self.factor.spread(z) if self.triangle is None else z @ self.triangle.to(z)

    def whiten(self, j: Tensor) -> Tensor:
        """``j Rᵀ``."""
        return self.factor.whiten(j) if self.triangle is None else j @ self.triangle.mT.to(j)

    def collect(self, m: Tensor) -> Tensor:
        """``m R⁻¹``."""
        if self.triangle is None:
            return self.factor.unspread(m)
        lead = m.shape[:-3]
        flat = m.reshape(-1, *m.shape[-3:]).transpose(0, 1)  # (G, n, O, I)
        triangle = self.triangle.to(m)[:, None]
        found = torch.linalg.solve_triangular(triangle, flat, upper=True, left=False)
        return found.transpose(0, 1).reshape(*lead, *m.shape[-3:])


@dataclass(frozen=True)
class LayerPrior:
    """The covariance of a layer posterior, at prior precision one, as a prior.

    Attributes:
        weights: fingerprint of the network that it belongs to.
    """

    space: ParameterSpace
    blocks: Sequence[LayerBlock]
    roots: Sequence[Root]
    weights: dict[str, str]

    def spread(self, vectors: Tensor) -> Tensor:
        """Coordinates ``(n, P)`` as weight changes; zero where a parameter stays fixed."""
        return self._flat(vectors, Root.spread)

    def collect(self, changes: Tensor) -> Tensor:
        """The inverse of :meth:`spread`."""
        return self._flat(changes, Root.collect)

    def whiten(self, rows: Tensor) -> Tensor:
        """Rows ``(n, P)`` by the weights as rows by the coordinates."""
        return self._flat(rows, Root.whiten)

    def sketched(self) -> list[float]:
        """Norms ``‖z R‖`` of a few fixed ``z``, one a block: two priors that agree in them are the same."""
        out = []
        for layer, root in zip(self.blocks, self.roots, strict=True):
            generator = torch.Generator().manual_seed(0)
            z = torch.randn(layer.size, generator=generator, dtype=torch.float64)
            out.append(float(root.spread(z).norm()))
        return out

    def _flat(self, vectors: Tensor, of: Callable[[Root, Tensor], Tensor]) -> Tensor:
        tensors = self.space.unflatten(vectors)
        out = {name: torch.zeros_like(t) for name, t in tensors.items()}
        for block, root in zip(self.blocks, self.roots, strict=True):
            matrix = block.matrix({n: tensors[n] for n in block.names})
            out.update(block.tensors(of(root, matrix.double()).to(matrix.dtype)))
        return self.space.flatten(out)

    def rows(self, block: Block) -> Block:
        """Captured rows by the coordinates. Columns of fixed parameters go."""
        factors: dict[Key, RowFactor] = {}
        left = dict(block.factors)
        others: list[tuple[LayerBlock, Root]] = []
        for layer, root in zip(self.blocks, self.roots, strict=True):
            factor = left.get(layer.names)
            if root.triangle is not None and _keeps_its_form(factor, layer):
                assert isinstance(factor, OuterFactor)
                factors[layer.names] = _outer(factor, root.triangle[0])
                del left[layer.names]
            else:
                others.append((layer, root))
        written = {name: part for f in left.values() for name, part in _by_name(f).items()}
        shape = (block.examples, block.cotangents)
        for layer, root in others:
            made = self._written(layer, root, written)
            if made is not None:
                slots = [self.space.by_name[name] for name in layer.names]
                factors[layer.names] = WrittenRows(slots, made.reshape(*shape, -1))
        return Block(factors, *shape)

    def _written(
        self, layer: LayerBlock, root: Root, written: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Rows ``(n, columns)`` of one layer; None where no row leads there."""
        some = next((written[n] for n in layer.names if n in written), None)
        if some is None:
            return None
        tensors = {}
        for name in layer.names:
            slot = self.space.by_name[name]
            values = written.get(name, some.new_zeros(len(some), slot.numel))
            tensors[name] = values.reshape(-1, *slot.shape)
        matrix = layer.matrix(tensors)
        out = layer.tensors(root.whiten(matrix.double()).to(matrix.dtype))
        return torch.cat([out[name].reshape(len(some), -1) for name in layer.names], 1)


def _keeps_its_form(factor: RowFactor | None, layer: LayerBlock) -> bool:
    return (
        isinstance(factor, OuterFactor)
        and factor.groups == 1
        and not factor.transposed
        and layer.own > 0
        and len(layer.biases) == (factor.bias is not None)
        and tuple(slot.name for slot in factor.slots) == layer.names
    )


def _outer(factor: OuterFactor, triangle: Tensor) -> OuterFactor:
    """``Σ_t g_t ⊗ (a_t, 1) Rᵀ``: the last number is that of the bias, the same for all."""
    a = factor.a if factor.bias is None else factor.a[..., :-1]
    own = a.shape[-1]
    r = triangle.to(a)
    new, last = a @ r[:own, :own].mT, 1.0
    if factor.bias is not None:
        new, last = new + r[:own, own], float(triangle[own, own])
    return OuterFactor(factor.weight, factor.bias, new, factor.g, bias_scale=last)


def _by_name(factor: RowFactor) -> dict[str, Tensor]:
    """Rows written out, ``(n, numel)`` of each parameter."""
    widths = [slot.numel for slot in factor.slots]
    parts = factor.rows().split(widths, dim=1)
    return {slot.name: part for slot, part in zip(factor.slots, parts, strict=True)}
