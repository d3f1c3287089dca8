"""Output covariances in closed form: ``Σ_l J_l (I ⊗ P_l) J_lᵀ``, without samples, from one backward pass an output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.linearise import blaming_inputs, first_output, output_rows
from nullbayes.jacobian.operator import JacobianOperator
from nullbayes.model.batch import Inputs, batch_size
from nullbayes.moments.capture import plain_paths
from nullbayes.moments.factor import Factor
from nullbayes.posterior.joint import check_rows, same
from nullbayes.posterior.layer_state import LayerState

# Bytes of rows written out at a time.
ROW_BYTES = 2**27


def output_covariance(
    state: LayerState,
    plan: CapturePlan,
    inputs: Inputs,
    centre: Callable[[Tensor], Tensor],
) -> Tensor:
    """``(B, O, O)`` float64 at prior precision one, of the outputs that ``centre`` leaves.

    Args:
        plan: of the model's Jacobian rows, proved on a batch (``nullbayes.jacobian``).
    """
    functional, space = state.functional, state.functional.space
    outputs = first_output(functional, inputs, "`x`").numel()
    vectors = torch.empty(1, 0, dtype=functional.dtype)
    at_most = max(1, ROW_BYTES // (8 * space.total * outputs)) * outputs
    parts = []
    with plain_paths(), blaming_inputs(functional, inputs, "`x`"):
        for _, operator in output_rows(functional, plan, inputs, outputs, vectors, None, centre):
            for rows in operator.iter_rows(at_most):
                tensors = space.unflatten(rows.double())
                total = rows.new_zeros(len(rows) // outputs, outputs, outputs, dtype=torch.float64)
                for block, factor in zip(state.blocks.blocks, state.factors, strict=True):
                    j = block.matrix({n: tensors[n] for n in block.names})
                    white = factor.whiten(j).reshape(-1, outputs, j[0].numel())
                    total += white @ white.mT
                parts.append(total)
    return torch.cat(parts)


def joint_covariance(state: LayerState, plan: CapturePlan, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """``f(θ̂, x) (B, *out)`` and ``J Σ Jᵀ (B·D, B·D)`` float64 at prior precision one, of all outputs of all inputs.

    Raises `InputError` where the matrix would not fit.
    """
    functional, space = state.functional, state.functional.space
    outputs = first_output(functional, inputs, "`x`").numel()
    check_rows(outputs, batch_size(inputs))
    vectors = torch.empty(1, 0, dtype=functional.dtype)
    points, blocks = [], []
    with plain_paths(), blaming_inputs(functional, inputs, "`x`"):
        for point, part in output_rows(functional, plan, inputs, outputs, vectors, None, same):
            points.append(point)
            blocks += part.blocks
    operator = JacobianOperator(space, blocks)
    columns = [
        operator.matvec(state.flat(rows.double(), Factor.project).to(rows.dtype))
        for rows in operator.iter_rows(max(1, ROW_BYTES // (8 * space.total)))
    ]
    covariance = torch.cat(columns).double()
    return torch.cat(points), (covariance + covariance.T) / 2
