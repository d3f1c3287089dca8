"""What samples do to the rows of a fit, for its certificate: by the rows themselves, outside of the solver."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nullbayes.constraints.training_rows import TrainingRows
from nullbayes.jacobian.operator import RowOperator
from nullbayes.solvers import Projection, Status
from nullbayes.solvers.agreement import Agreed
from nullbayes.solvers.base import relative
from nullbayes.solvers.block_cg import row_norms


def measured_rows(
    rows: TrainingRows, done: Projection, before: Tensor, after: Tensor, alpha: float
) -> dict[str, Any]:
    """What the certificate says of the rows; ``before``, ``after (S, M)``: prior samples, and samples, by own rows."""
    m, p = rows.operator.shape
    crowd = rows.operator.crowd
    norms = crowd.joined(norms_of(rows.operator, after))
    count = len(norms) * rows.examples
    earlier = crowd.joined(norms_of(rows.operator, before))
    return {
        "residual": residual_of(norms, earlier),
        "row_drift": (float(norms.square().sum()) / count / alpha) ** 0.5,
        "constraints": m,
        "parameters": p,
        "discarded_trace": rows.discarded_trace,
        "examples": rows.examples,
        "generic": tuple(rows.plan.generic),
        "status": _worst(crowd.gather(done.status)).value,
        "iterations": max(crowd.gather(done.iterations)),
    }


def _worst(statuses: list[Status]) -> Status:
    """The first that is not good, of those of all processes."""
    return next((status for status in statuses if status is not Status.CONVERGED), statuses[0])


def squared(vectors: Tensor) -> float:
    """Sum over all samples ``(S, P)``."""
    return float(row_norms(vectors).square().sum())


def norms_of(operator: RowOperator, image: Tensor) -> Tensor:
    """``‖A v‖ (S,)`` from the part of ``A v`` that this process has."""
    return Agreed(operator.processes).norms(image)


def residual_of(after: Tensor, before: Tensor) -> float:
    """The worst of all samples."""
    return float(relative(after, before).max())
