"""What the certificate of a layer posterior says of examples left out: their divergence, linearised, in closed form."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nullbayes.certificate.verdict import ALLOWED_LEFT_OUT
from nullbayes.common.decompositions import solve
from nullbayes.likelihood import Classification, Likelihood
from nullbayes.model.batch import Inputs, batch_size, take
from nullbayes.moments.blocks import Block
from nullbayes.moments.capture import plain_paths, recording
from nullbayes.moments.factor import Factor, RowFactor, TiedFactor
from nullbayes.moments.rule import Seen
from nullbayes.moments.second import DenseMoments
from nullbayes.posterior.layer_guarantee import targets_for
from nullbayes.posterior.layer_state import LayerState

# Examples that are left out in turn, at most.
LEFT_OUT_EXAMPLES = 32
# So many will do where twice their mean divergence is allowed, and so is the mean with so many standard errors more.
FEW_LEFT_OUT, STANDARD_ERRORS = 8, 3.0
# Output numbers of an example up to which the left-out divergence is worked out.
LEFT_OUT_OUTPUTS = 4096
# Random directions of the output Hessian for each left-out example.
PROBES = 2
# The edge at which an exact null space is taken for examples left out: its limit, to rounding.
LIMIT_EDGE = 1e-8


def left_out_divergence(state: LayerState, likelihood: Likelihood, alpha: float) -> float | None:
    """Mean divergence at prior precision one of an example's prediction under the posterior without it, linearised.

    Half the trace of the output Hessian times ``Σ_l J_l (I ⊗ P_l') J_lᵀ``, with ``P_l'`` the layer's covariance without
    the example's own inputs: a downdate of rank one for each of them, all at once in closed form. By a few random
    directions of the Hessian (Hutchinson), so by as many backward passes. None where it does not apply; nor does it
    where an example is there with several draws of the model's randomness, of which all would have to go.

    Args:
        alpha: the prior precision that the posterior would have without the guarantee. Where a few examples say that
            the divergence there is far below what is allowed, they do.
    """
    if not state.gathered.kept or not state.blocks.blocks or state.functional.draws > 1:
        return None
    exact = state.delta == 0.0
    limit = (
        LayerState(
            state.functional,
            state.blocks,
            state.gathered,
            LIMIT_EDGE,
            state.seed,
            state.num_samples,
        )
        if exact
        else state
    )
    values: list[float] = []
    generator = torch.Generator().manual_seed(state.seed)
    kept = state.gathered.kept
    places = [(g, i) for g, (inputs, _) in enumerate(kept) for i in range(batch_size(inputs))]
    order = torch.randperm(len(places), generator=generator)[:LEFT_OUT_EXAMPLES]
    for g, i in (places[k] for k in order.tolist()):
        inputs, targets = kept[g]
        size = batch_size(inputs)
        one = take(inputs, i, i + 1, size)
        label = None if targets is None else take(targets, i, i + 1, size)
        value = _left_out(limit, likelihood, one, label, generator)
        if value is None:
            return None
        values.append(value)
        if len(values) >= FEW_LEFT_OUT and _far_below(values, alpha * ALLOWED_LEFT_OUT):
            break
    return math.fsum(values) / len(values)


def _far_below(values: list[float], allowed: float) -> bool:
    """Whether more examples would hardly say that the mean is above ``allowed``."""
    found = torch.tensor(values, dtype=torch.float64)
    mean, error = float(found.mean()), float(found.std()) / math.sqrt(len(values))
    return 2 * mean < allowed and mean + STANDARD_ERRORS * error < allowed


def _left_out(
    state: LayerState, likelihood: Likelihood, one: Inputs, label: Any, generator: torch.Generator
) -> float | None:
    functional, blocks = state.functional, state.blocks
    own = _Own(blocks.blocks)
    leaves = functional.weights(requires_grad=True)
    try:
        with torch.enable_grad(), recording(blocks.sites, own.receive):
            point = functional(leaves, one)
    except NotImplementedError:  # an operation that runs without gradients alone
        return None
    if point[0].numel() > LEFT_OUT_OUTPUTS:
        return None
    labels = targets_for(likelihood, point.detach(), label, one)
    columns = likelihood.hessian_factor(point.detach(), labels)  # (C, 1, *out)
    if not len(columns):
        return 0.0
    draws = torch.randn(PROBES, len(columns), generator=generator, dtype=torch.float64)
    cotangents = torch.einsum("pc,c...->p...", draws.to(columns), columns)
    names = list(leaves)
    variance = 0.0
    for cotangent in cotangents:
        rows = _pulled(point, leaves, cotangent)
        if rows is None:
            return None
        row = dict(zip(names, rows, strict=True))
        for number, block in enumerate(blocks.blocks):
            variance += own.variance(state, number, block.matrix(row))
    observed = 1
    if isinstance(labels, Tensor):
        observed = max(1, labels.numel() // max(1, len(labels)))
        if labels.is_floating_point() and isinstance(likelihood, Classification):
            observed = max(1, observed // point.shape[1])
    return variance / PROBES / (2 * observed)


def _pulled(point: Tensor, leaves: dict[str, Tensor], cotangent: Tensor) -> list[Tensor] | None:
    """Derivatives of ``cotangent · point`` by the weights; None where the network has none, and needs none."""
    try:
        with plain_paths():
            rows = torch.autograd.grad(
                point, list(leaves.values()), cotangent, retain_graph=True, materialize_grads=True
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (NotImplementedError, RuntimeError):
        return None
    return [row.to_dense() if row.is_sparse else row for row in rows]


class _Own:
    """The inputs of one example, by block."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.inputs: dict[int, list[Tensor]] = {}
        self.rows: dict[int, Tensor] = {}
        self.left: dict[int, _Left] = {}
        # What was seen last, and its copy: queries, keys and values receive one tensor.
        self._last: tuple[Any, ...] = (None,)

    def receive(self, site: int, number: int, column: int | None, seen: Seen) -> None:
        block = self.blocks[number]
        groups, outputs, columns = block.size
        if seen.index is not None:
            index = seen.index.reshape(-1).long()
            counts = torch.bincount(index, minlength=groups * outputs)
            self.rows[number] = self.rows.get(number, torch.zeros_like(counts)) + counts
            return
        assert seen.a is not None
        given = seen.a.detach()
        key = (given.data_ptr(), given.shape, given.stride(), given._version, column, columns)
        if self._last[0] != key:
            flat = given.reshape(-1, groups, given.shape[-1])
            a = torch.zeros(len(flat), groups, columns, dtype=torch.float64, device=flat.device)
            a[..., : block.own] = flat[..., : block.own]
            if column is not None:
                a[..., block.own + column] = 1.0
            self._last = (key, given, a)
        self.inputs.setdefault(number, []).append(self._last[2])

    def variance(self, state: LayerState, number: int, j: Tensor) -> float:
        """``j (I ⊗ P') jᵀ`` for ``j (G, O, I)``, with ``P'`` without these inputs.

        A row of derivatives is a sum of this example's own inputs, so the directions that these span are enough.
        """
        factor = state.factors[number]
        if isinstance(factor, (RowFactor, TiedFactor)):
            return self._table_variance(state, number, j)
        if number not in self.inputs:
            return float(factor.whiten(j.double()).square().sum())
        if number not in self.left:
            self.left[number] = self._left(state, number)
        return self.left[number].variance(j)

    def _left(self, state: LayerState, number: int) -> _Left:
        """Without these inputs; queries, keys and values have it together."""
        factor, inputs = state.factors[number], self.inputs[number]
        before = self.inputs.get(number - 1, [])
        same = len(before) == len(inputs) and all(map(operator.is_, before, inputs))
        if same and number - 1 in self.left and factor is state.factors[number - 1]:
            return self.left[number - 1]
        a = torch.cat(inputs).transpose(0, 1)  # (G, T, I)
        edge, moments = state.edges[number].inputs.to(a), state.gathered.sums[number].inputs
        if a.shape[1] >= a.shape[2] and isinstance(moments, DenseMoments):
            found = _Whole.of(moments, a, edge)
            if found is not None:
                return found
        return _Among(*_among(factor, a, edge))

    def _table_variance(self, state: LayerState, number: int, j: Tensor) -> float:
        """Of a table, tied or not: rows are released, inputs of the tied layer are not (fewer directions open)."""
        factor, edge = state.factors[number], state.edges[number]
        counts = self.rows.get(number)
        rows = state.gathered.sums[number].rows
        assert rows is not None
        fewer = torch.zeros_like(rows) if counts is None else counts.to(rows)
        before = 1 + rows.double() / edge.rows
        after = 1 + (rows - fewer).clamp_min(0).double() / edge.rows
        if isinstance(factor, RowFactor):
            read = fewer.nonzero()[:, 0]  # other rows have no derivatives
            squares = (j[0, read].double() * factor.gains[read, None]).square().sum(1)
            return float((squares * before[read] / after[read]).sum())
        assert isinstance(factor, TiedFactor)
        squares = ((j.double() @ factor.directions)[0] * factor.gains).square()  # (O, k)
        gains = factor.gains.square()
        released = (gains.reciprocal() - before[:, None] + after[:, None]).reciprocal()
        return float((squares / gains * released).sum())


@dataclass(frozen=True)
class _Whole:
    """``P' = δ (C - aᵀ a + δ I)⁻¹``, by the lower root ``(G, I, I)`` of that sum, over ``√δ``."""

    lower: Tensor

    @staticmethod
    def of(moments: DenseMoments, a: Tensor, edge: Tensor) -> _Whole | None:
        """Of the inputs ``a (G, T, I)``; None where rounding spoils it."""
        rest = torch.baddbmm(moments.values.to(a), a.mT, a, alpha=-1.0)
        rest.diagonal(dim1=1, dim2=2).add_(edge[:, None])
        lower, failed = torch.linalg.cholesky_ex(rest)
        return None if bool(failed.any()) else _Whole(lower / edge.sqrt()[:, None, None])

    def variance(self, j: Tensor) -> float:
        """``tr j P' jᵀ``."""
        white = torch.linalg.solve_triangular(self.lower, j.double().mT, upper=False)
        return float(white.square().sum())


@dataclass(frozen=True)
class _Among:
    """Orthonormal directions ``(G, I, k)`` that span some inputs, and ``P'`` among those."""

    directions: Tensor
    covariance: Tensor

    def variance(self, j: Tensor) -> float:
        """``tr j P' jᵀ`` of rows in their span."""
        along = (j @ self.directions.to(j)).double()
        return float(((along @ self.covariance) * along).sum())


_Left = _Whole | _Among


def _among(factor: Factor, a: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal ``Q (G, I, k)`` that span the inputs ``a (G, T, I)``, and ``Qᵀ P' Q``, ``P'`` without these inputs.

    ``P'⁻¹ = P⁻¹ - aᵀ a / δ``; with the root ``R`` of ``P`` and ``s = R aᵀ / √δ``, ``P' = Rᵀ (I - s sᵀ)⁻¹ R``.
    """
    _, tokens, columns = a.shape
    if tokens < columns:
        directions = torch.linalg.qr(a.mT).Q
        white = factor.whiten(directions.mT)  # (G, k, I)
        inner = white @ white.mT  # Qᵀ P Q
        seen = a @ directions / edge.sqrt()[:, None, None]
        along = seen @ inner
        eye = torch.eye(tokens, dtype=a.dtype, device=a.device)
        return directions, inner + along.mT @ solve(_safe(eye - along @ seen.mT), along)
    directions = torch.eye(columns, dtype=a.dtype, device=a.device).expand(len(a), -1, -1)
    root = factor.whiten(directions).mT
    s = factor.whiten(a).mT / edge.sqrt()[:, None, None]  # (G, I, T)
    return directions, root.mT @ solve(_safe(directions - s @ s.mT), root)


def _safe(matrix: Tensor) -> Tensor:
    """Positive definite in exact arithmetic; rounding takes at most this from the diagonal."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(1e-13)
    return matrix
