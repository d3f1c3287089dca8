"""The evidence of the training data as a function of one prior precision for each of some groups of weights.

``log p(D | θ̂) - ½ Σ_g α_g ‖θ̂_g - m_g‖² - ½ log det(I + Σ_g K_g / α_g)`` with ``K_g = A_g A_gᵀ`` the Gram matrix of the
rows' columns that belong to group ``g``. Where there are fewer weights than rows the determinant is that of
``I + Λ^-½ AᵀA Λ^-½`` instead, which is the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nullbayes.common.memory import format_bytes
from nullbayes.constraints.problem import Problem
from nullbayes.constraints.training_rows import TrainingRows
from nullbayes.errors import MemoryBudgetError, SolverError
from nullbayes.jacobian.columns import rescaled, restricted
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.model.parameters import ParameterSpace

# How far a layer's precision may leave that of all layers together: a bias that was never trained has none at all.
REACH = 1e4
# A step of the search in the logarithm of a precision, and where it ends.
LONGEST_STEP, SHORTEST_STEP = 2.0, 1e-7
MOST_STEPS = 500
ROWS_AT_A_TIME = 1024

Groups = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class GroupedEvidence:
    """What the evidence depends on through the prior precisions of groups of weights.

    Attributes:
        groups: names of parameter tensors by the name of their group.
        squares: ``(G,)`` float64, ``‖θ̂_g - m_g‖²``.
        dual: ``(G, M, M)`` float64, a Gram matrix for each group; or ``primal (P, P)``: ``AᵀA``, with ``member (P,)``
            the group of each weight.
    """

    groups: Groups
    squares: Tensor
    dual: Tensor | None = None
    primal: Tensor | None = None
    member: Tensor | None = None

    def cooled(self, factor: Tensor) -> GroupedEvidence:
        """The same with the observation variance times ``factor``, a scalar that gradients flow to."""
        factor = factor.to(self.squares)
        return replace(
            self,
            dual=None if self.dual is None else self.dual / factor,
            primal=None if self.primal is None else self.primal / factor,
        )

    def penalty(self, alphas: Tensor) -> Tensor:
        """``-½ Σ α_g ‖θ̂_g - m_g‖² - ½ log det(...)``, nats, of ``alphas (G,)`` float64; gradients flow to them."""
        if self.dual is not None:
            matrix = torch.tensordot(1 / alphas, self.dual, 1)
        else:
            assert self.primal is not None and self.member is not None
            scale = alphas.rsqrt()[self.member]
            matrix = scale[:, None] * self.primal * scale
        matrix = matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            raise SolverError(
                "the evidence of one prior precision for each layer could not be factorised: these differ by too many "
                "orders of magnitude. Pass `prior_precision=` as numbers, or 'auto' for one of all layers."
            )
        return -0.5 * (alphas * self.squares).sum() - factor.diagonal().log().sum()


def grouped_evidence(
    rows: JacobianOperator, groups: Groups, departure: Tensor, budget: int | None = None
) -> GroupedEvidence:
    """From rows in coordinates of unit prior precision.

    Args:
        departure: ``θ̂ - m (P,)``.
        budget: bytes that the Gram matrices may take.

    Raises:
        MemoryBudgetError: they take more.
    """
    (m, p), device = rows.shape, rows.device
    fewer_weights = p <= m
    needed = 8 * (3 * p**2 if fewer_weights else (len(groups) + 3) * m**2)
    if budget is not None and needed > budget:
        raise MemoryBudgetError(
            f"the evidence of one prior precision for each of {len(groups)} layers takes {format_bytes(needed)} for "
            f"{m:,} rows and {p:,} weights, more than the {format_bytes(budget)} of `memory=`. Find the precisions on "
            "fewer examples (`max_examples=`), and pass them as `prior_precision={name: value}`."
        )
    squares = torch.stack(
        [
            torch.cat(_parts(departure, rows.space, names)).double().square().sum()
            for names in groups.values()
        ]
    )
    if not fewer_weights:
        dual = torch.stack([restricted(rows, set(names)).gram() for names in groups.values()])
        return GroupedEvidence(groups, squares, dual=dual)
    primal = torch.zeros(p, p, dtype=torch.float64, device=device)
    for part in rows.iter_rows(ROWS_AT_A_TIME):
        primal += part.double().T @ part.double()
    member = torch.zeros(p, dtype=torch.int64, device=device)
    for index, names in enumerate(groups.values()):
        for name in names:
            slot = rows.space.by_name[name]
            member[slot.start : slot.stop] = index
    return GroupedEvidence(groups, squares, primal=primal, member=member)


def _parts(vector: Tensor, space: ParameterSpace, names: Sequence[str]) -> list[Tensor]:
    return [vector[space.by_name[n].start : space.by_name[n].stop] for n in names]


def layers_of(space: ParameterSpace) -> dict[str, list[str]]:
    """Parameter tensors by the module that owns them: a layer's weight and bias share a prior precision."""
    out: dict[str, list[str]] = {}
    for name in space.names:
        path = name.rpartition(".")[0]
        out.setdefault(path or name, []).append(name)
    return out


def maximised(evidence: GroupedEvidence, tick: Callable[[float], None] | None = None) -> Tensor:
    """The precisions ``(G,)`` float64 where the evidence is largest, within ``REACH`` of a common one.

    MacKay's fixed point ``α_g ← γ_g / ‖θ̂_g - m_g‖²`` in logarithms, with ``γ_g`` read off the gradient of the evidence
    (``∂/∂log α_g = ½ (γ_g - α_g ‖·‖²)``). Each coordinate moves uphill, and a step that does not raise the evidence is
    halved.
    """
    common = _common(evidence)
    low, high = common.log() - torch.tensor(REACH).log(), common.log() + torch.tensor(REACH).log()
    at = common.log().expand(len(evidence.squares)).clone()
    value, step = _step(evidence, at)
    length = 1.0
    for count in range(MOST_STEPS):
        there = (at + length * step).clamp(low, high)
        if float((there - at).abs().max()) < SHORTEST_STEP:
            break
        better, onwards = _step(evidence, there)
        if better < value:
            length /= 2
            continue
        at, value, step = there, better, onwards
        length = min(1.0, 2 * length)
        if tick is not None:
            tick(count / MOST_STEPS)
    return at.exp()


def _common(evidence: GroupedEvidence) -> Tensor:
    """The one precision for all weights where the evidence is largest, by bisection."""
    ones = torch.ones_like(evidence.squares)
    low, high = torch.tensor(-30.0).double(), torch.tensor(60.0).double()
    for _ in range(60):
        middle = ((low + high) / 2).to(ones).requires_grad_()
        with torch.enable_grad():
            value = evidence.penalty(middle.exp() * ones)
        (slope,) = torch.autograd.grad(value, middle)
        low, high = (middle.detach(), high) if slope > 0 else (low, middle.detach())
    return ((low + high) / 2).to(ones).exp()


def _step(evidence: GroupedEvidence, at: Tensor) -> tuple[float, Tensor]:
    """The evidence at logarithms of precisions ``(G,)``, and the fixed point's step from there."""
    leaf = at.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = evidence.penalty(leaf.exp())
    (slope,) = torch.autograd.grad(value, leaf)
    explained = at.exp() * evidence.squares
    determined = (2 * slope + explained).clamp_min(1e-300)
    step = (determined / explained.clamp_min(1e-300)).log()
    return float(value.detach()), step.clamp(-LONGEST_STEP, LONGEST_STEP)


def by_layer(
    problem: Problem, rows: TrainingRows, budget: int, tick: Callable[[float], None] | None
) -> tuple[Problem, TrainingRows]:
    """The problem with the evidence's precision for each layer, and its rows in the units that these set."""
    groups = layers_of(problem.space)
    evidence = grouped_evidence(rows.operator, groups, problem.departure(), budget)
    found = maximised(evidence, tick).tolist()
    layers = {
        name: alpha for names, alpha in zip(groups.values(), found, strict=True) for name in names
    }
    problem = replace(problem, layers=layers)
    scales = problem.scale_by_name
    assert scales is not None
    return problem, replace(rows, operator=rescaled(rows.operator, scales), problem=problem)
