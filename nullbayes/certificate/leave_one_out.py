"""How far samples move the predictions of training examples that the posterior has not seen.

The guarantee is about the training data. What a posterior does to other data of the same kind can be told from the
training data as well, without holding any back: leave an example's rows out, and see where its predictions go. From
one factorisation that costs a few columns of an inverse (``State.left_out``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nullbayes.certificate.measure import Batch, GuaranteeCheck
from nullbayes.common.decompositions import pinv
from nullbayes.constraints.problem import Problem
from nullbayes.constraints.training_rows import TrainingRows
from nullbayes.model.batch import Inputs, batch_size, select
from nullbayes.solvers import State
from nullbayes.solvers.dual import rows_left_out
from nullbayes.solvers.norms import fetched

# Examples left out at most, each by itself, and multiplications of all that: about a second's work.
MOST_EXAMPLES = 500
MOST_BYTES = 2**27  # of what samples do to their outputs
# Examples held out together while a solver iterates: a share of all, at least so many where there are twice as many.
HELD_SHARE = 0.02
FEWEST_HELD = 64


@dataclass(frozen=True)
class Held:
    """Training examples that a projection does without at first, and their rows."""

    inputs: Inputs
    targets: Any
    spans: list[slice]


def held_out(problem: Problem, rows: TrainingRows, vectors: Tensor) -> list[Held]:
    """Some examples, evenly spaced, for :meth:`State.project_without`; none where their predictions cannot move.

    Args:
        vectors: ``(S, P)``, what is projected.
    """
    processes = rows.operator.processes
    if not problem.likelihood.mean_moves or (not rows.checked and processes is None):
        return []
    wanted = max(FEWEST_HELD, round(HELD_SHARE * rows.examples))
    limit = min(wanted, MOST_EXAMPLES, rows.examples // 2)
    out = []
    for which, numbers, index in _chosen(rows, limit) if limit else []:
        inputs, targets = rows.checked[which]
        size = batch_size(inputs)
        assert size == len(numbers)
        some = index.to(vectors.device)
        spans = [rows.span(numbers[i]) for i in index.tolist()]
        out.append(Held(select(inputs, some), select(targets, some), spans))
    return out


def left_out(
    problem: Problem,
    state: State,
    prior: tuple[Tensor | None, Tensor],
    rows: TrainingRows,
    check: GuaranteeCheck,
) -> list[Batch]:
    """Some checked examples with what samples at prior precision one do to each if it is left out.

    Along the rows of an example the change is that of a posterior without it; what else its outputs do is what they do
    under the posterior itself. With ``preserve="predictions"`` and all directions, rows are all that counts.

    Args:
        prior: ``v (S, P)``, what the samples were projected from, None where that was written over; and ``A v (S, M)``.

    Returns:
        Batches as ``check`` has them; empty where the solver cannot tell, or for a likelihood whose predictions
        keep their mean whatever the samples do.
    """
    if not problem.likelihood.mean_moves or not check.examples:
        return []
    each = max((unit[:, :1].nbytes for _, unit, _ in check.batches[:1]), default=1)
    if check.processes is not None:
        each = int(check.processes.largest(each))
    m = rows.operator.shape[0]
    limit = rows_left_out(m) // max(1, m // rows.examples)
    limit = min(limit, MOST_BYTES // max(1, each), MOST_EXAMPLES)
    chosen = _chosen(rows, max(1, limit))
    spans = [rows.span(numbers[i]) for _, numbers, index in chosen for i in index.tolist()]
    found = state.left_out(prior[0], spans, prior[1])
    if found is None:
        return []
    out, at = [], 0
    for which, numbers, index in chosen:
        which_examples = torch.tensor([rows.label(numbers[i]) for i in index.tolist()])
        point, unit, targets = check.batches[which]
        index = index.to(point.device)
        point, unit = point[index], unit[:, index]
        targets = select(targets, index)
        values = [check.crowd.joined(v) for v in found[at : at + len(index)]]
        at += len(index)
        cotangents = problem.cotangents(point, targets, which_examples).values.double()
        # One small matrix after the other: the processor's, and read at once.
        (unit,), (cotangents,) = fetched(unit), fetched(cotangents)
        changes = [_changed(unit[:, b], cotangents[:, b], values[b]) for b in range(len(index))]
        out.append((point, torch.stack(changes, 1).to(point.device), targets))
    return out


def _chosen(rows: TrainingRows, limit: int) -> list[tuple[int, range, Tensor]]:
    """Evenly spaced examples, ``limit`` at most: which checked batch, its examples' numbers, and which of them."""
    places, total = rows.checked_places()
    step = max(1.0, total / limit)
    wanted = torch.arange(0, total, step).long().unique()
    out = []
    for which, (numbers, before) in enumerate(zip(rows.checked_numbers, places, strict=True)):
        index = wanted[(wanted >= before) & (wanted < before + len(numbers))] - before
        if len(index):
            out.append((which, numbers, index))
    return out


def _changed(unit: Tensor, cotangents: Tensor, values: Tensor) -> Tensor:
    """``(S, *out)``: the change ``unit`` with ``values (S, k)`` along the rows of ``cotangents (C, *out)``."""
    flat = unit.reshape(len(unit), -1).double()
    b = cotangents.reshape(len(cotangents), -1)
    # With directions="auto", rows that an example does not need are not there; of tokens, those after the last that
    # any of these examples has are zero.
    count = min(len(b), values.shape[1])
    b, values = b[:count], values[:, :count]
    scale = torch.linalg.vector_norm(b, dim=1)
    live = scale > 0
    b = b[live] / scale[live, None]
    missing = values[:, live] / scale[live] - flat @ b.T
    return (flat + missing @ pinv(b, rtol=1e-6).T).to(unit.dtype).reshape(unit.shape)
