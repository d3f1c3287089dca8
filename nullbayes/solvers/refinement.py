"""Passes of the numerical null space, and refinement of direct solutions by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.jacobian.operator import RowOperator
from nullbayes.solvers.base import Projection, Status, relative, require_finite
from nullbayes.solvers.norms import fetched

# Passes of the numerical null space end when one reduces the residual by less than this: what is
# left then lies below the shift and is meant to stay.
GAP = 3.0


MAX_PASSES = 20
# Passes of the numerical null space that a direct solver makes; the second one finds that a third is not needed.
DIRECT_PASSES = 2


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
    first = operator.crowd.joined(operator.image_norms(x))
    require_finite(first, "the product of the Jacobian rows with prior samples")
    status, done, previous = Status.NUMERICAL, 0, 1.0
    while True:
        x, done = one_pass(x), done + 1
        after = operator.crowd.joined(operator.image_norms(x))
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

Precondition = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DualEquations:
    """``(AAᵀ + shift I) z = A v + √shift ξ``, of which the projection is ``x = v - Aᵀ z``.

    Attributes:
        vectors: ``v (S, P)``; ``noise``: ``ξ (S, M)`` or None.
    """

    operator: RowOperator
    vectors: Tensor
    noise: Tensor | None = None
    shift: float = 0.0

    @property
    def extra(self) -> Tensor | float:
        """``√shift ξ``."""
        none = self.noise is None or self.shift == 0
        return 0.0 if none else self.shift**0.5 * self.noise.double()  # type: ignore[union-attr]


@dataclass(frozen=True)
class Refinement:
    """When a refinement ends.

    Attributes:
        tolerance: on the residual relative to ``scale (S,)``; None: to the first residual.
        max_iterations: steps at most.
    """

    tolerance: float
    max_iterations: int
    scale: Tensor | None = None


def conjugate_gradients(
    equations: DualEquations, precondition: Precondition, goal: Refinement
) -> Projection:
    """Project by refinement, then preconditioned CG.

    Plain refinement (``z += precondition(r)``) comes first, for as long as it pays: it is exact where
    the preconditioner is. CG takes over for what is left. On its own it would trade the directions
    that the preconditioner gets right for those it does not, since it minimises the energy norm of
    the error and not the residual.

    The residual is never trusted to its recurrence: when that says "converged", it is computed
    again from ``x`` itself, and iteration starts anew from there if it disagrees ("twice is
    enough", and it repairs what float32 lost in large intermediate ``z``).

    Args:
        precondition: ``(S, M)`` float64 -> ``(S, M)``, symmetric positive definite.
    """
    run = _Refining(equations, precondition, goal)
    refining, cycle, status = True, FIRST_CYCLE, Status.MAX_ITERATIONS
    while not run.converged and run.iterations < goal.max_iterations:
        if refining:
            refining = run.refine()
        elif not run.cycle(cycle):
            # A cycle that gained little may have been too short, since the residual of CG does not fall
            # at every step: try longer ones.
            cycle *= 2
            if cycle > LAST_CYCLE:
                status = Status.STAGNATED
                break
    return Projection(
        run.x, run.reached, Status.CONVERGED if run.converged else status, run.iterations
    )


class _Refining:
    """The best solution so far: ``x (S, P)``, ``z (S, M)``, true residual ``r (S, M)`` float64."""

    def __init__(
        self, equations: DualEquations, precondition: Precondition, goal: Refinement
    ) -> None:
        self.operator, self.shift = equations.operator, equations.shift
        self.extra, self.precondition, self.goal = equations.extra, precondition, goal
        self.x = equations.vectors
        self.z = self.x.new_zeros(len(self.x), self.operator.shape[0], dtype=torch.float64)
        self.r = self._residual(self.x, self.z)
        (size,) = fetched(self.r.norm(dim=1))
        require_finite(size, "the product of the Jacobian rows with prior samples")
        #: of each sample, on the processor, which decides by them
        self.scale = size if goal.scale is None else goal.scale.to(size)
        self.reached = relative(size, self.scale)
        self.iterations = 0

    @property
    def converged(self) -> bool:
        return bool((self.reached <= self.goal.tolerance).all())

    def _residual(self, x: Tensor, z: Tensor) -> Tensor:
        r: Tensor = self.operator.matvec(x).double() + self.extra - self.shift * z
        return r

    def _offer(self, x: Tensor, z: Tensor, enough: float) -> bool:
        """Take what is better than the best so far; whether it leaves at most ``enough`` of its residual."""
        r = self._residual(x, z)
        (size,) = fetched(r.norm(dim=1))
        require_finite(size, "the residual of the projection")
        reached, before = relative(size, self.scale), self.reached.max()
        if reached.max() < before:
            self.reached, self.x, self.z, self.r = reached, x, z, r
        return bool(reached.max() <= enough * before)

    def refine(self) -> bool:
        """One step ``z += precondition(r)``; whether another one pays."""
        y = self.precondition(self.r)
        self.iterations += 1
        along = self.operator.rmatvec(y.to(self.x.dtype))
        x = torch.sub(self.x, along, out=along)
        return self._offer(x, self.z + y, 1 / GAP)

    def cycle(self, steps: int) -> bool:
        """Some steps of CG from the true residual, before float32 drifts away from it; whether they paid."""
        x, z, r, dtype = self.x, self.z, self.r, self.x.dtype
        y = self.precondition(r)
        p, ry = y, (r * y).sum(1)
        for _ in range(min(steps, self.goal.max_iterations - self.iterations)):
            self.iterations += 1
            q = self.operator.rmatvec(p.to(dtype))
            w = self.operator.matvec(q).double() + self.shift * p
            step = relative(ry, (p * w).sum(1).clamp(min=0))
            q *= step[:, None].to(dtype)
            x = torch.sub(x, q, out=q) if x is self.x else x.sub_(q)
            z = z + step[:, None] * p
            r = r - step[:, None] * w
            # Stop a little below the tolerance: the true residual is checked right after.
            (size,) = fetched(r.norm(dim=1))
            if bool((relative(size, self.scale) <= 0.5 * self.goal.tolerance).all()):
                break
            y = self.precondition(r)
            ry, previous = (r * y).sum(1), ry
            p = y + relative(ry, previous)[:, None] * p
        return self._offer(x, z, 0.7)
