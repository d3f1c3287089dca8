"""What samples do to the outputs of training examples, from what they do to the rows that the fit has already.

Rows ``L_nᵀ J_n`` say all of ``J_n Δ`` but for what no prediction depends on, so the rows of the examples that the
certificate looks at need not be captured again: that took as long as capturing them, and a product with all samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.constraints.problem import Problem
from nullbayes.constraints.training_rows import TrainingRows
from nullbayes.jacobian.linearise import linearised_outputs
from nullbayes.model.batch import Inputs, batch_size, select

# Numbers of the samples from which it pays, and outputs of an example up to which a small matrix of each is inverted.
FROM, MOST_OUTPUTS = 2**18, 256
# By how much rounding may grow on the way back from rows to outputs.
CONDITION = 100.0
# Rows that are smaller, beside the largest of the batch, are near what products leave out.
SMALLEST = 1e-20

#: outputs and what samples do to them; None: not known
Changes = tuple[Tensor | None, Tensor | None]


def known_changes(
    problem: Problem, rows: TrainingRows, samples: Tensor, effects: Tensor
) -> list[Changes]:
    """For each batch of ``rows.checked``: ``f(θ̂, x) (B, *out)``, None where they were not kept, and ``J(x) Δ_s
    (S, B, *out)`` but for what `Likelihood.centre` takes away, None where rows do not say that.

    Args:
        samples: ``(S, P)``, weight changes at prior precision one.
        effects: ``A Δ (S, M)``, by the rows that this process has.
    """
    wanted = samples.numel() >= FROM and not problem.preserve.numbered
    own = rows.operator.own_span
    out: list[Changes] = []
    outputs = rows.checked_outputs or [None] * len(rows.checked)
    examples = zip(rows.checked, rows.checked_numbers, outputs, strict=True)
    for (inputs, targets), numbers, point in examples:
        spans = [rows.span(n) for n in numbers]
        widths = {s.stop - s.start for s in spans}
        if not wanted or len(widths) != 1 or len(spans) != batch_size(inputs):
            out.append((point, None))
            continue
        index = torch.tensor([range(s.start, s.stop) for s in map(own, spans)])
        moved = effects[:, index.to(effects.device)]  # (S, B, C)
        out.append(_changes(problem, rows, (inputs, targets, point), moved, samples))
    return out


def _changes(
    problem: Problem,
    rows: TrainingRows,
    examples: tuple[Inputs, object, Tensor | None],
    moved: Tensor,
    samples: Tensor,
) -> Changes:
    inputs, targets, point = examples
    if point is None:
        point = problem.functional.outputs(inputs)
    size, outputs = len(point), point[0].numel()
    if outputs > MOST_OUTPUTS:
        return point, None
    made = problem.cotangents(point, targets).values  # (C, B, *out)
    b = made.reshape(len(made), size, outputs).transpose(0, 1).double()
    eye = torch.eye(outputs, dtype=torch.float64, device=point.device)
    kept = problem.likelihood.centre(eye.reshape(outputs, 1, *point.shape[1:]))
    rank = round(float(kept.reshape(outputs, outputs).diagonal().sum()))  # of a projection
    if b.shape[1] != rank or moved.shape[2] != rank:
        return point, None
    norms = torch.linalg.vector_norm(b, dim=2)  # (B, C)
    tells = norms.amin(1) > SMALLEST * norms.max()
    scale = torch.where(norms > 0, norms, torch.ones_like(norms))
    u, s, vh = torch.linalg.svd(b / scale[:, :, None], full_matrices=False)
    tells &= s.amin(1) * CONDITION >= s.amax(1)
    inverse = (vh.mT / s.clamp_min(1e-300)[:, None]) @ u.mT  # (B, D, C)
    found = torch.einsum("sbc,bdc->sbd", moved.double() / scale, inverse)
    unit = found.to(point.dtype).reshape(len(moved), *point.shape)
    missing = (~tells).nonzero()[:, 0]
    if len(missing):
        some = select(inputs, missing.to(problem.device))
        with torch.no_grad():
            direct = linearised_outputs(problem.functional, rows.plan, samples, some)[1]
        unit[:, missing] = problem.likelihood.centre(direct).to(unit)
    return point, unit
