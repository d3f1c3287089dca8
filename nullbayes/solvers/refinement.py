"""Passes of the numerical null space, and refinement of direct solutions by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nullbayes.jacobian.operator import RowOperator
from nullbayes.solvers.base import Projection, Status, relative, require_finite

# Passes of the numerical null space end when one reduces the residual by less than this: what is
# left then lies below the shift and is meant to stay.
GAP = 3.0


MAX_PASSES = 20


def iterate(
    operator: RowOperator,
    vectors: Tensor,
    one_pass: Callable[[Tensor], Tensor],
    passes: int | None,
    tolerance: float,
    enough: float = 0.0,
) -> Projection:
    """Project onto the numerical null space: two passes, and more for as long as they pay.

    Where the spectrum has a gap around the shift, each pass gains orders of magnitude and the
    tolerance is reached. Where it has none, the second pass already works on directions that the
    shift leaves free, and iteration ends there.
    """
    x = vectors
    first = operator.matvec(x).double().norm(dim=1)
    require_finite(first, "the product of the Jacobian rows with prior samples")
    status, done, previous = Status.NUMERICAL, 0, 1.0
    while True:
        x, done = one_pass(x), done + 1
        after = operator.matvec(x).double().norm(dim=1)
        require_finite(after, "the residual of the projection")
        residual = relative(after, first)
        overall = float(relative(after.norm(), first.norm()))
        if bool((residual <= tolerance).all()) or bool((after <= enough).all()):
            status = Status.CONVERGED
        if passes is not None:
            if done >= passes:
                break
        elif (
            status is Status.CONVERGED
            or (done >= 2 and overall > previous / GAP)
            or done >= MAX_PASSES
        ):
            break
        previous = overall
    return Projection(x, residual, status, done)


# Steps of CG between two looks at the true residual.
FIRST_CYCLE = 10


LAST_CYCLE = 40


def conjugate_gradients(
    operator: RowOperator,
    vectors: Tensor,
    noise: Tensor | None,
    shift: float,
    precondition: Callable[[Tensor], Tensor],
    tolerance: float,
    max_iterations: int,
    scale: Tensor | None = None,
) -> Projection:
    """Project by refinement, then preconditioned CG, on ``(AAᵀ + shift I) z = A v + √shift ξ``.

    Plain refinement (``z += precondition(r)``) comes first, for as long as it pays: it is exact where
    the preconditioner is. CG takes over for what is left. On its own it would trade the directions
    that the preconditioner gets right for those it does not, since it minimises the energy norm of
    the error and not the residual.

    The residual is never trusted to its recurrence: when that says "converged", it is computed
    again from ``x`` itself, and iteration starts anew from there if it disagrees ("twice is
    enough", and it repairs what float32 lost in large intermediate ``z``).

    Args:
        precondition: ``(S, M)`` float64 -> ``(S, M)``, symmetric positive definite.
        scale: ``(S,)``, what residuals are relative to; None: to the first.
    """
    dtype = vectors.dtype
    x = vectors.clone()
    z = torch.zeros(len(x), operator.shape[0], dtype=torch.float64, device=x.device)
    extra = 0.0 if noise is None or shift == 0 else shift**0.5 * noise.double()

    def residual() -> Tensor:
        r: Tensor = operator.matvec(x).double() + extra - shift * z
        return r

    r = residual()
    require_finite(r, "the product of the Jacobian rows with prior samples")
    scale = r.norm(dim=1) if scale is None else scale.to(r)
    reached = relative(r.norm(dim=1), scale)
    best = (reached, x, z, r)
    iterations, status, refining, cycle = 0, Status.MAX_ITERATIONS, True, FIRST_CYCLE
    while True:
        if bool((reached <= tolerance).all()):
            status = Status.CONVERGED
            break
        if iterations >= max_iterations:
            break
        y = precondition(r)
        if refining:
            iterations += 1
            x, z = x - operator.rmatvec(y.to(dtype)), z + y
            r = residual()
            require_finite(r, "the residual of the projection")
            reached = relative(r.norm(dim=1), scale)
            refining = bool(reached.max() <= best[0].max() / GAP)
            if reached.max() < best[0].max():
                best = (reached, x, z, r)
            reached, x, z, r = best
            continue
        p, ry = y, (r * y).sum(1)
        for _ in range(min(cycle, max_iterations - iterations)):
            iterations += 1
            q = operator.rmatvec(p.to(dtype))
            w = operator.matvec(q).double() + shift * p
            step = relative(ry, (p * w).sum(1).clamp(min=0))
            x = x - step[:, None].to(dtype) * q
            z = z + step[:, None] * p
            r = r - step[:, None] * w
            # Stop a little below the tolerance: the true residual is checked right after.
            if bool((relative(r.norm(dim=1), scale) <= 0.5 * tolerance).all()):
                break
            y = precondition(r)
            ry, previous = (r * y).sum(1), ry
            p = y + relative(ry, previous)[:, None] * p
        # Restart from the true residual before float32 drifts away from it. A cycle that gained little
        # may have been too short, since the residual of CG does not fall at every step: try longer ones.
        r = residual()
        require_finite(r, "the residual of the projection")
        reached = relative(r.norm(dim=1), scale)
        gained = bool(reached.max() <= 0.7 * best[0].max())
        if reached.max() < best[0].max():
            best = (reached, x, z, r)
        reached, x, z, r = best
        if not gained:
            cycle *= 2
            if cycle > LAST_CYCLE:
                status = Status.STAGNATED
                break
    if bool((reached <= tolerance).all()):
        status = Status.CONVERGED
    return Projection(x, reached, status, iterations)
