"""Covariances of outputs: between the outputs of one input, and between inputs.

``J(x) Σ J(x')ᵀ`` of the linearised network, in the units of the raw outputs squared. From the factorisation of the
training rows where there is one, from the samples otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nullbayes.common.work import ENDLESS
from nullbayes.errors import InputError
from nullbayes.jacobian.linearise import linearised_outputs
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.model.batch import Inputs, batch_size
from nullbayes.posterior.novelty import Scorer, exact_covariances

# Bytes that a joint covariance of float64 numbers may take, twice over, before it is refused.
MOST_BYTES = 8 * 2**30


class Joint(NamedTuple):
    """The joint Gaussian of the raw outputs at several inputs.

    Attributes:
        mean: ``(B, *out)``, the trained network's outputs.
        covariance: ``(B·D, B·D)`` with ``D`` numbers in one output: entry ``(b·D + i, c·D + j)`` belongs to output
            ``i`` of input ``b`` and output ``j`` of input ``c``. Symmetric; positive semi-definite up to rounding.
    """

    mean: Tensor
    covariance: Tensor


def same(values: Tensor) -> Tensor:
    """Output changes as they are."""
    return values


def factorised(scorer: Scorer) -> bool:
    """Whether covariances come from a factorisation: as asked for, or where there is one."""
    if scorer.exact is None:
        state = scorer.fit.state
        return state is not None and state.alone and state.explained_work(1) != ENDLESS
    return scorer.is_exact(1)


def output_operator(scorer: Scorer, x: Inputs, outputs: int) -> tuple[Tensor, JacobianOperator]:
    """``f(θ̂, x) (B, *out)`` and all rows ``J(x)``, example by example."""
    points, blocks = [], []
    for point, operator in scorer.rows(x, outputs, same):
        points.append(point)
        blocks += operator.blocks
    return torch.cat(points), JacobianOperator(scorer.problem.space, blocks)


def joint(scorer: Scorer, x: Inputs) -> Joint:
    """See `nullbayes.Posterior.joint`."""
    outputs = check_size(scorer, x)
    fit, dtype = scorer.fit, scorer.problem.dtype
    if not factorised(scorer):
        point, change = linearised_outputs(scorer.problem.functional, scorer.plan, fit.stored, x)
        flat = fit.crowd.joined(change).double().flatten(1)
        return Joint(point, (flat.T @ flat / (len(flat) * fit.alpha)).to(dtype))
    point, operator = output_operator(scorer, x, outputs)
    state = fit.state
    assert state is not None
    if state.explained_work(1) != ENDLESS:
        covariance = operator.gram() - state.explained(operator, operator.shape[0])[0]
    else:
        rows = torch.cat(list(operator.iter_rows(operator.shape[0])))
        covariance = rows.double() @ state.covariance_times(rows).double().T
    covariance = (covariance + covariance.T) / (2 * fit.alpha)
    covariance.diagonal().clamp_(min=0)
    return Joint(point, covariance.to(dtype))


def check_size(scorer: Scorer, x: Inputs) -> int:
    """Numbers in one output. Raises `InputError` where a joint covariance would not fit."""
    outputs = scorer.outputs(x)
    check_rows(outputs, batch_size(x))
    return outputs


def check_rows(outputs: int, size: int) -> None:
    """Raises `InputError` where the joint covariance of ``size`` inputs would not fit."""
    rows = outputs * size
    if 16 * rows**2 > MOST_BYTES:
        raise InputError(
            f"`x` holds {size} inputs with {outputs} outputs each: their joint covariance is a matrix of "
            f"{rows:,} × {rows:,}. Ask for fewer inputs at a time, or use `predict(x).covariance`, (B, D, D)."
        )


def covariances(scorer: Scorer, x: Inputs) -> Iterator[Tensor]:
    """Covariances ``(b, D, D)`` float64 of the outputs of each input, some inputs at a time, from the factorisation."""
    for part in exact_covariances(scorer, x, scorer.outputs(x), same):
        yield part / scorer.fit.alpha
