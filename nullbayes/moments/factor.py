"""From second moments to the posterior of a block: ``I ⊗ P``, ``P = δ (C + δ I)⁻¹``; at ``δ = 0`` the one on ker C.

With ``δ`` this is the input factor of K-FAC without its output factor (Martens & Grosse 2015). All in float64, at prior
precision one. Every factor offers a root ``R`` with ``RᵀR = P``:

- ``spread(z)``: ``z R``, a sample from standard normal numbers ``z (*lead, G, O, I)``;
- ``whiten(j)``: ``j Rᵀ``, so that ``‖whiten(j)‖² = j (I ⊗ P) jᵀ`` is the variance along a row ``j (*lead, G, O, I)``;
- ``project(m)``: ``m P``; at ``δ = 0`` the part of a change that moves nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.common.decompositions import eigh, eigvalsh
from nullbayes.moments.second import BlockMoments, DenseMoments
from nullbayes.moments.sketch import Sketch

EPS = torch.finfo(torch.float64).eps
# Eigenvalues below this multiple of I · eps of the largest are those of the null space, and rounding.
_NOISE = 8.0
# In no layer, however wide, are eigenvalues above this share of the largest taken for zero.
_LARGEST_NOISE = 1e-11
# Columns from which on the zeros of a triangular root are left out of products.
_HALVED = 512


@dataclass(frozen=True)
class Edge:
    """Where the null space of a block ends, in the units of its sums; zeros: exact.

    ``inputs (G,)`` for ``C``; ``rows`` for how often rows of a table were read.
    """

    inputs: Tensor
    rows: float

    @property
    def exact(self) -> bool:
        return self.rows == 0.0

    @staticmethod
    def of(moments: BlockMoments, delta: float) -> Edge:
        """``delta`` times the mean eigenvalue of ``C``, and times how often a row was read on average."""
        rows = 1.0
        if moments.rows is not None and int(moments.rows.sum()):
            rows = float(moments.rows.double().mean())
        if moments.inputs is None:
            return Edge(torch.zeros(1, dtype=torch.float64), delta * rows)
        scale = moments.inputs.trace / _columns(moments.inputs)
        whole = scale.mean()
        # A group that received nothing is free whatever the scale.
        scale = torch.where(scale > 0, scale, whole if bool(whole > 0) else torch.ones_like(whole))
        return Edge(delta * scale, delta * rows)


class Factor(ABC):
    """The posterior covariance ``P`` of the rows of one block."""

    #: mean over rows of ``tr P``: how many of the ``I`` directions of a row are free
    free: float

    @abstractmethod
    def spread(self, z: Tensor) -> Tensor:
        """``z R``."""

    @abstractmethod
    def whiten(self, j: Tensor) -> Tensor:
        """``j Rᵀ``."""

    def unspread(self, m: Tensor) -> Tensor:
        """``m R⁻¹``, the inverse of :meth:`spread`, where that has one: not at ``δ = 0``."""
        raise NotImplementedError

    def project(self, m: Tensor) -> Tensor:
        """``m P``."""
        return self.spread(self.whiten(m))


class DenseFactor(Factor):
    """A root written out, ``(G, I, I)``; of a ``lower`` one half of each product is left out."""

    def __init__(self, root: Tensor, *, lower: bool = False) -> None:
        self.root, self.lower = root, lower
        self.free = float(root.square().sum() / len(root))

    def spread(self, z: Tensor) -> Tensor:
        if not self.lower or z.shape[-1] < _HALVED:
            return z @ self.root.to(z)
        root = self.root.to(z)
        return torch.cat([z[..., s:] @ root[:, s:, s:e] for s, e in _stretches(z.shape[-1])], -1)

    def whiten(self, j: Tensor) -> Tensor:
        if not self.lower or j.shape[-1] < _HALVED:
            return j @ self.root.mT.to(j)
        root = self.root.to(j)
        return torch.cat([j[..., :e] @ root[:, s:e, :e].mT for s, e in _stretches(j.shape[-1])], -1)


def _stretches(columns: int) -> list[tuple[int, int]]:
    step = -(-columns // 8)
    return [(start, min(columns, start + step)) for start in range(0, columns, step)]


class LowRankFactor(Factor):
    """Gains along some directions ``(G, I, k)``, and one for all others: the symmetric root."""

    def __init__(self, directions: Tensor, gains: Tensor, rest: Tensor) -> None:
        self.directions, self.gains, self.rest = directions, gains, rest
        _, columns, k = directions.shape
        total = gains.square().sum(1) + (columns - k) * rest.square()
        self.free = float(total.mean())

    def spread(self, z: Tensor) -> Tensor:
        directions, rest = self.directions.to(z), self.rest.to(z)[:, None, None]
        along = (z @ directions) * (self.gains.to(z)[:, None] - rest)
        return z * rest + along @ directions.mT

    def unspread(self, m: Tensor) -> Tensor:
        inverse = self.gains.reciprocal(), self.rest.reciprocal()
        return LowRankFactor(self.directions, *inverse).spread(m)

    def whiten(self, j: Tensor) -> Tensor:
        return self.spread(j)  # the root is symmetric


class RowFactor(Factor):
    """A table: one gain for each row ``(O,)``."""

    def __init__(self, gains: Tensor, columns: int) -> None:
        self.gains = gains
        self.free = float(gains.square().mean()) * columns

    def spread(self, z: Tensor) -> Tensor:
        return z * self.gains.to(z)[:, None]

    def unspread(self, m: Tensor) -> Tensor:
        return m / self.gains.to(m)[:, None]

    def whiten(self, j: Tensor) -> Tensor:
        return self.spread(j)  # the root is symmetric


class TiedFactor(Factor):
    """A table that also multiplies inputs: row precision ``1 + λ / δ + c / δ'`` along each eigenvector of ``C``."""

    def __init__(self, directions: Tensor, gains: Tensor) -> None:
        self.directions, self.gains = directions, gains  # (1, I, k), (O, k)
        self.free = float(gains.square().sum(1).mean())

    def spread(self, z: Tensor) -> Tensor:
        directions = self.directions.to(z)
        return ((z @ directions) * self.gains.to(z)) @ directions.mT

    def unspread(self, m: Tensor) -> Tensor:
        directions = self.directions.to(m)
        return ((m @ directions) / self.gains.to(m)) @ directions.mT

    def whiten(self, j: Tensor) -> Tensor:
        return self.spread(j)  # the root is symmetric


def factorise(moments: BlockMoments, edge: Edge, columns: int) -> Factor:
    """The posterior of a block of ``columns`` from its sums."""
    inputs, rows = moments.inputs, moments.rows
    if inputs is None:
        assert rows is not None
        return RowFactor(_row_gains(rows, edge), columns)
    if isinstance(inputs, Sketch):
        directions, values, rest = inputs.spectrum()
        both = torch.cat([values, rest[:, None]], dim=1)
        gains = eigen_gains(both, edge.inputs, directions.shape[1])
        if rows is None:
            return LowRankFactor(directions, gains[:, :-1], gains[:, -1])
        directions, gains = _completed(directions, gains)
        return TiedFactor(directions, _tied(gains[0], rows, edge))
    if rows is None and not edge.exact:
        return _soft(inputs, edge.inputs)
    values, directions = eigh(inputs.values)
    gains = eigen_gains(values, edge.inputs, values.shape[1])
    if rows is not None:
        return TiedFactor(directions, _tied(gains[0], rows, edge))
    return DenseFactor((directions * gains[:, None]) @ directions.mT)


def eigen_gains(values: Tensor, edge: Tensor, columns: int) -> Tensor:
    """``√P`` along eigenvectors of ``C`` with eigenvalues ``(G, k)``: 1 where nothing was ever seen."""
    values = values.clamp_min(0)
    if bool((edge == 0).all()):
        share = min(_NOISE * columns * EPS, _LARGEST_NOISE)
        return (values <= share * values.amax(1, keepdim=True)).to(values.dtype)
    return (edge[:, None] / (values + edge[:, None])).sqrt()


def _soft(inputs: DenseMoments, edge: Tensor) -> DenseFactor:
    """``√δ L⁻¹`` with ``C + δ I = L Lᵀ``; by eigenvalues where rounding spoils the factorisation."""
    values = inputs.values.clone()
    values.diagonal(dim1=1, dim2=2).add_(edge[:, None])
    lower, failed = torch.linalg.cholesky_ex(values)
    if bool((failed != 0).any()):
        found, directions = eigh(inputs.values)
        gains = eigen_gains(found, edge, found.shape[1])
        return DenseFactor((directions * gains[:, None]) @ directions.mT)
    eye = torch.eye(values.shape[1], dtype=values.dtype, device=values.device).expand_as(values)
    return DenseFactor(
        edge.sqrt()[:, None, None] * torch.linalg.solve_triangular(lower, eye, upper=False),
        lower=True,
    )


def _row_gains(rows: Tensor, edge: Edge) -> Tensor:
    if edge.exact:
        return (rows == 0).double()
    return (edge.rows / (rows.double() + edge.rows)).sqrt()


def _tied(gains: Tensor, rows: Tensor, edge: Edge) -> Tensor:
    """``(O, k)``: precisions of the two kinds of constraints add up."""
    if edge.exact:
        return (rows == 0).double()[:, None] * gains
    precision = gains.square().reciprocal()[None] + rows.double()[:, None] / edge.rows
    return precision.rsqrt()


def _completed(directions: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """A whole basis, where a table needs one: tables are tall, not wide."""
    columns, k = directions.shape[1:]
    basis = torch.linalg.qr(directions, mode="complete").Q
    basis = torch.cat([directions, basis[:, :, k:]], dim=2)
    return basis, torch.cat([gains[:, :k], gains[:, k:].expand(-1, columns - k)], dim=1)


def _columns(inputs: DenseMoments | Sketch) -> int:
    return inputs.values.shape[2] if isinstance(inputs, DenseMoments) else inputs.rows.shape[2]


def nearly_positive(moments: BlockMoments, share: float) -> bool:
    """Whether ``C`` has no eigenvalue below ``-share`` times its largest: what a wrong removal leaves."""
    if not isinstance(moments.inputs, DenseMoments):
        return True
    c = moments.inputs.values
    x = c.new_ones(*c.shape[:2], 1)
    for _ in range(8):  # the largest eigenvalue, from below
        x = c @ (x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(c.dtype).tiny))
    largest = torch.maximum(x.norm(dim=(1, 2)), c.diagonal(dim1=1, dim2=2).amax(1))
    if not bool((largest > 0).all()):  # groups that received nothing, or less than that
        values = eigvalsh(c)
        return bool((-values.amin(1) <= share * values.amax(1).clamp_min(0)).all())
    shifted = c.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(share * largest[:, None])
    return not bool(torch.linalg.cholesky_ex(shifted).info.any())
