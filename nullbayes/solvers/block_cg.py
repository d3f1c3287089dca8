"""Block conjugate gradients: all samples search one Krylov space together, residuals measured anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.jacobian.operator import RowOperator
from nullbayes.solvers.base import Status, require_finite
from nullbayes.solvers.checkpoint import Watch

# Iterations between two measurements of the true residual; each costs as much as one iteration.
CHECK_EVERY = 10
# Given up when so many iterations have reduced the residual by less than the factor.
PATIENCE = 40
LEAST_GAIN = 0.9
# Columns that a float64 product of two blocks of vectors holds at a time.
_COLUMNS = 2**20

Precondition = Callable[[Tensor], Tensor]
#: ``(‖A x‖ (S,), ‖r‖ (S,)) -> (S,)``: at most one where a sample is good enough
Goal = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Solved:
    """``value (S, P)``, the goal reached by each sample, and the work."""

    value: Tensor
    reached: Tensor
    status: Status
    iterations: int


@dataclass
class _Search:
    """Block of search directions: ``r = coefficients @ q`` with ``q`` orthonormal for ``M⁻¹``."""

    q: Tensor
    p: Tensor
    coefficients: Tensor
    #: the largest curvature seen, per unit length: an estimate of the largest eigenvalue from below
    largest: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        largest = torch.tensor(self.largest, dtype=torch.float64)
        return {"q": self.q, "p": self.p, "coefficients": self.coefficients, "largest": largest}


def block_cg(
    operator: RowOperator,
    anchor: Tensor,
    shift: float,
    linear: Tensor | None,
    precondition: Precondition | None,
    goal: Goal,
    max_iterations: int,
    watch: Watch,
    resumed: dict[str, Tensor] | None = None,
    carried: dict[str, Tensor] | None = None,
    begin: Tensor | None = None,
) -> Solved:
    """Minimise ``½‖A x‖² + shift/2 ‖x - anchor‖² - <linear, x>`` for ``S`` anchors at once.

    Without a shift and linear term that is the projection of the anchors onto ``ker A``, reached along
    the least residual ``‖A x‖`` that the Krylov space holds. All samples share their spaces (O'Leary
    1980; orthonormalised as by Dubrulle 2001): the leading directions of ``A``, which slow down single
    vectors, are found by all together.

    Args:
        anchor: ``(S, P)``; also where the search begins, unless ``begin (S, P)`` is given, which without a shift has to
            differ from it by combinations of rows.
        linear: ``(S, P)`` or None.
        precondition: ``(S, P) -> (S, P)``, symmetric positive definite.
        goal: see :data:`Goal`; given only measured quantities.
        watch: progress and checkpoints; ``resumed``: the checkpoint to go on from; ``carried``: what
            else belongs into one.

    An interrupt (Ctrl-C) ends the search; what was reached is returned, and measured, as always.
    """
    dtype = anchor.dtype
    x, done, search = anchor if begin is None else begin, 0, None
    active = torch.ones(len(anchor), dtype=torch.bool, device=anchor.device)
    if resumed is not None:
        there = {name: t.to(anchor.device) for name, t in resumed.items()}
        x, done, active = there["x"], int(there["done"]), there["active"]
        if "q" in there:
            search = _Search(there["q"], there["p"], there["coefficients"], float(there["largest"]))

    def measured(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g, square = operator.normal(x)
        r = -g if shift == 0 else -g - shift * (x - anchor)
        if linear is not None:
            r = r + linear
        require_finite(square, "the product of the Jacobian rows with prior samples")
        return r, square.sqrt(), goal(square.sqrt(), row_norms(r))

    def pulled(x: Tensor) -> Tensor | float:
        """What the shift adds to twice the objective, ``(S,)``."""
        return shift * row_norms(x - anchor).square() if shift else 0.0

    r, image, reached = measured(x)
    energy = image.square() + pulled(x)
    infinite = torch.full_like(image, math.inf)
    best = (reached, x)
    watch.report(done, float(reached.max()))
    history = [(done, float(reached.max()))]
    status = Status.MAX_ITERATIONS
    unchecked, gained = 0, torch.zeros_like(image)
    rounding = torch.finfo(dtype).eps ** 0.75  # of sums that the conditioning of a step has worn
    try:
        while True:
            if not bool((reached > 1).any()):
                status = Status.CONVERGED
                break
            if done >= max_iterations:
                break
            if done - history[0][0] >= PATIENCE:
                if history[-1][1] > LEAST_GAIN * history[0][1]:
                    status = Status.STAGNATED
                    break
                history = [h for h in history if done - h[0] < PATIENCE]
            if search is None:
                active = reached > 1
                search = _begin(r[active], precondition)
                if search is None:  # nothing left but rounding
                    status = Status.STAGNATED
                    break
            step, along = _advance(operator, search, shift, precondition)
            done, unchecked = done + 1, unchecked + 1
            x = x.index_put((active,), x[active] + step)
            gained[active] += along
            # A step that gained less than the rounding of what was gained: whoever goes on unseeing follows
            # noise, into the null space where the shift is little more than that.
            hinted, little = reached, along <= rounding * gained[active]
            if linear is None:
                # Each step says by how much it lowers what is minimised, hence, but for rounding, what is
                # left of ‖A x‖: that shows progress and tells when to measure.
                left = energy - gained - pulled(x)
                hint = torch.where(active, left.clamp(min=0).sqrt(), image)
                hinted = torch.minimum(reached, goal(hint, infinite))
                little |= (left <= rounding * energy)[active]
            watch.report(done, float(hinted.max()))
            hoped = bool((hinted <= 1).all())
            lost = bool(little.all())
            if not (hoped or lost or unchecked >= CHECK_EVERY or done >= max_iterations):
                continue
            r, image, reached = measured(x)
            energy = image.square() + pulled(x)
            unchecked, gained = 0, torch.zeros_like(image)
            history.append((done, float(reached.max())))
            if float(reached.max()) <= float(best[0].max()):
                best = (reached, x)
            search = _kept(search, r[active])
            # Samples that are done retire from the block; the space that they helped to find stays.
            going = active & (reached > 1)
            if search is not None:
                search.coefficients = search.coefficients[going[active]]
            active = going
            state = {"x": x, "done": torch.tensor(done), "active": active, **(carried or {})}
            watch.offer({**state, **(search.tensors() if search else {})})
    except KeyboardInterrupt:
        status = Status.INTERRUPTED
        best = _better(best, measured(x)[2], x)
        state = {"x": best[1], "done": torch.tensor(done), "active": active, **(carried or {})}
        watch.offer(state, now=True)
    reached, x = best
    return Solved(x.to(dtype), reached, status, done)


def _better(best: tuple[Tensor, Tensor], reached: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return (reached, x) if float(reached.max()) <= float(best[0].max()) else best


def _begin(r: Tensor, precondition: Precondition | None) -> _Search | None:
    made = _orthonormal(r, precondition)
    return made and _Search(made[0], made[1], made[2])


def _advance(
    operator: RowOperator, search: _Search, shift: float, precondition: Precondition | None
) -> tuple[Tensor, Tensor]:
    """One step: what to add to the active samples, and by how much ``‖A x‖²`` falls."""
    p, dtype = search.p, search.p.dtype
    z, _ = operator.normal(p)
    if shift:
        z = z + shift * p
    alpha = _inverse_curvature(search, inner(p, z), inner(p, p))
    weights = search.coefficients @ alpha
    step = weights.to(dtype) @ p
    gained = (weights * search.coefficients).sum(1)
    # What one step leaves of a unit residual cannot be told from rounding below this.
    floor = 30 * torch.finfo(dtype).eps
    made = _orthonormal(search.q - alpha.to(dtype) @ z, precondition, floor)
    if made is None:  # the space is exhausted: no direction remains
        search.coefficients = torch.zeros_like(search.coefficients)
        return step, gained
    q, w, change = made
    search.q, search.p = q, w + change.T.to(dtype) @ p
    search.coefficients = search.coefficients @ change
    return step, gained


def _inverse_curvature(search: _Search, curvature: Tensor, lengths: Tensor) -> Tensor:
    """Pseudo-inverse of ``p H pᵀ``, without directions whose curvature is that of rounding.

    Those would be followed without end. Curvature is compared with the largest seen, per unit length.
    """
    values, vectors = torch.linalg.eigh((lengths + lengths.T) / 2)
    keep = values > 1e-13 * values[-1]
    to = vectors[:, keep] / values[keep].sqrt()  # p rows combined to unit length: toᵀ p
    reduced = to.T @ ((curvature + curvature.T) / 2) @ to
    values, vectors = torch.linalg.eigh(reduced)
    search.largest = max(search.largest, float(values[-1]))
    live = values > 10 * torch.finfo(search.p.dtype).eps * search.largest
    inverse = torch.where(live, 1 / torch.where(live, values, torch.ones_like(values)), 0.0)
    basis = to @ vectors
    return (basis * inverse) @ basis.T


def _orthonormal(
    r: Tensor, precondition: Precondition | None, floor: float = 0.0
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``q (k, P)`` and ``w = M⁻¹ q`` with ``q wᵀ = I`` and ``r = change (S, k) @ q``; None where r = 0.

    Directions that are linear combinations of others up to rounding are left out, so ``k <= S``.
    """
    w = r if precondition is None else precondition(r)
    gram = inner(r, w)
    gram = (gram + gram.T) / 2
    length = gram.diagonal().clamp(min=0).sqrt()
    live = length > floor
    if not bool(live.any()):
        return None
    unit = torch.where(live, length, torch.ones_like(length))
    weights = live / unit
    values, vectors = torch.linalg.eigh(gram * weights[:, None] * weights)
    keep = values > max(torch.finfo(r.dtype).eps, 1e-10) * values[-1]
    root, vectors = values[keep].sqrt(), vectors[:, keep]
    to = (vectors / root).T * weights  # (k, S)
    change = (vectors * root) * (live * unit)[:, None]
    q = to.to(r.dtype) @ r
    return q, (q if precondition is None else to.to(r.dtype) @ w), change


def _kept(search: _Search, r: Tensor) -> _Search | None:
    """The search, unless rounding took it away from the true residual and it has to begin anew.

    A residual that is measured lies in the row space. What the search's own differs from it by is rounding, which lies
    anywhere: steps along it wander in the null space, where no residual tells.
    """
    error = row_norms(search.coefficients.to(r.dtype) @ search.q - r)
    allowed = torch.finfo(r.dtype).eps ** 0.25
    return None if bool((error > allowed * row_norms(r)).any()) else search


def inner(a: Tensor, b: Tensor) -> Tensor:
    """``a bᵀ`` in float64 for ``(S, P)`` and ``(T, P)``, a piece of the columns at a time."""
    out = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for i in range(0, a.shape[1], _COLUMNS):
        out += a[:, i : i + _COLUMNS].double() @ b[:, i : i + _COLUMNS].double().T
    return out


def blocks(a: Tensor, width: int, b: Tensor | None = None) -> Tensor:
    """Diagonal blocks ``(R / width, width, width)`` of ``aᵀ b (R, R)`` for ``(K, R)``; ``b`` None: of ``aᵀ a``."""
    first = a.T.reshape(-1, width, len(a))
    second = first if b is None else b.T.reshape(-1, width, len(b))
    return first @ second.mT


def row_norms(a: Tensor) -> Tensor:
    """``(S, P)`` -> ``(S,)`` float64, without a float64 copy of all of it."""
    out = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    for part in a.split(_COLUMNS, dim=1):
        out += part.double().square().sum(1)
    return out.sqrt()


def sample_size(vectors: Tensor, noise: Tensor | None) -> Tensor:
    """What the error of a Laplace sample is compared with, ``(S,)``.

    ``H = AᵀA + shift I`` weighs an error by what it does to the outputs and to the prior. By that measure an error
    ``e`` with the gradient ``g = H e`` has ``eᵀ H e ≤ ‖g‖² / shift``, and a sample ``shift P = shift ‖v‖²`` on
    average. A gradient that is small beside the first one says little: the first is that of the largest eigenvalues.
    """
    size = row_norms(vectors)
    return size if noise is None else torch.where(size > 0, size, row_norms(noise))
