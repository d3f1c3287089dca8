"""Block conjugate gradients: all samples search one Krylov space together, residuals measured anew.

What is as large as the weights is on the device. Numbers of a sample, and matrices of samples, are on the processor,
which decides by them: a step reads from the device two or three times, however many rows and samples there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nullbayes.common.decompositions import eigh
from nullbayes.jacobian.operator import RowOperator
from nullbayes.solvers.agreement import Agreed, together
from nullbayes.solvers.base import Status, require_finite
from nullbayes.solvers.checkpoint import QUIET, Watch
from nullbayes.solvers.norms import blocks as blocks
from nullbayes.solvers.norms import fetched as fetched
from nullbayes.solvers.norms import inner as inner
from nullbayes.solvers.norms import row_norms as row_norms

# Iterations between two measurements of the true residual; each costs as much as one iteration.
CHECK_EVERY = 10
# Given up when so many iterations have reduced the residual by less than the factor.
PATIENCE = 40
LEAST_GAIN = 0.9

Precondition = Callable[[Tensor], Tensor]
#: ``(‖A x‖ (S,), ‖r‖ (S,)) -> (S,)``, all on the processor: at most one where a sample is good enough
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


@dataclass(frozen=True)
class Objective:
    """``½‖A x‖² + shift/2 ‖x - anchor‖² - <linear, x>`` for ``S`` anchors at once.

    Without a shift and linear term its minimiser is the projection of the anchors onto ``ker A``.

    Attributes:
        anchor, linear: ``(S, P)``; ``linear`` may be None.
    """

    operator: RowOperator
    anchor: Tensor
    shift: float = 0.0
    linear: Tensor | None = None

    def descent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The negative gradient ``(S, P)``, and ``‖A x‖ (S,)``."""
        g, square = self.operator.normal(x)
        r = -g if self.shift == 0 else -g - self.shift * (x - self.anchor)
        if self.linear is not None:
            r = r + self.linear
        require_finite(square, "the product of the Jacobian rows with prior samples")
        return r, square.sqrt()

    def pulled(self, x: Tensor) -> Tensor:
        """What the shift adds to twice the objective, ``(S,)``."""
        if not self.shift:
            return torch.zeros(len(x), dtype=torch.float64, device=x.device)
        return self.shift * row_norms(x - self.anchor).square()


@dataclass(frozen=True)
class Start:
    """Where a search begins: at the anchors, unless something here says otherwise.

    Attributes:
        begin: ``(S, P)``; without a shift it has to differ from the anchors by combinations of rows.
        resumed: a checkpoint to go on from.
        carried: what else belongs into a checkpoint.
    """

    begin: Tensor | None = None
    resumed: dict[str, Tensor] | None = None
    carried: dict[str, Tensor] | None = None


def block_cg(
    objective: Objective,
    goal: Goal,
    max_iterations: int,
    *,
    precondition: Precondition | None = None,
    watch: Watch = QUIET,
    start: Start | None = None,
) -> Solved:
    """Minimise ``objective``, along the least residual ``‖A x‖`` that the Krylov space holds.

    All samples share their spaces (O'Leary 1980; orthonormalised as by Dubrulle 2001): the leading directions of
    ``A``, which slow down single vectors, are found by all together.

    Args:
        goal: see :data:`Goal`; given only measured quantities.
        precondition: ``(S, P) -> (S, P)``, symmetric positive definite.
        watch: progress and checkpoints.

    An interrupt (Ctrl-C) ends the search; what was reached is returned, and measured, as always.
    """
    with together(objective.operator.processes) as agreed:
        run = _Run(objective, goal, precondition, watch, start or Start(), agreed)
        try:
            while (status := agreed.status(run.ended(max_iterations))) is None:
                run.step(max_iterations)
        except KeyboardInterrupt:
            status = Status.INTERRUPTED
            run.interrupted()
    reached, x = run.best
    return Solved(x.to(objective.anchor.dtype), reached, status, run.done)


class _Run:
    """One search: where it is, what it has measured, and the best of that."""

    def __init__(
        self,
        objective: Objective,
        goal: Goal,
        precondition: Precondition | None,
        watch: Watch,
        start: Start,
        agreed: Agreed,
    ) -> None:
        self.agreed = agreed
        self.objective, self.goal, self.precondition = objective, goal, precondition
        self.watch, self.carried = watch, {} if start.carried is None else start.carried
        anchor = objective.anchor
        self.x, self.done = anchor if start.begin is None else start.begin, 0
        self.search: _Search | None = None
        self.active = torch.ones(len(anchor), dtype=torch.bool)
        if start.resumed is not None:
            self._resume(start.resumed)
        self._measure()
        self.infinite = torch.full_like(self.image, math.inf)
        self.best = (self.reached, self.x)
        watch.report(self.done, float(self.reached.max()))
        self.history = [(self.done, float(self.reached.max()))]
        # Of sums that the conditioning of a step has worn.
        self.rounding = torch.finfo(anchor.dtype).eps ** 0.75

    def _resume(self, there: dict[str, Tensor]) -> None:
        device = self.objective.anchor.device
        self.x, self.done = there["x"].to(device), int(there["done"])
        self.active = there["active"].cpu()
        if "q" in there:
            q, p = there["q"].to(device), there["p"].to(device)
            self.search = _Search(q, p, there["coefficients"].cpu(), float(there["largest"]))

    def _measure(self) -> None:
        """The true residual, and from it what each sample has reached."""
        self.r, image = self.objective.descent(self.x)
        pulled = self.objective.pulled(self.x)
        self.image, gradient, pulled = fetched(image, row_norms(self.r), pulled)
        self.reached = self.goal(self.image, gradient)
        self.energy = self.image.square() + pulled
        self.unchecked, self.gained = 0, torch.zeros_like(self.image)

    def ended(self, max_iterations: int) -> Status | None:
        """How the search has ended; None where it goes on."""
        if not bool((self.reached > 1).any()):
            return Status.CONVERGED
        if self.done >= max_iterations:
            return Status.MAX_ITERATIONS
        if self.done - self.history[0][0] >= PATIENCE:
            if self.history[-1][1] > LEAST_GAIN * self.history[0][1]:
                return Status.STAGNATED
            self.history = [h for h in self.history if self.done - h[0] < PATIENCE]
        if self.search is None:
            self.active = self.reached > 1
            self.search = _begin(self.r[self._places()], self.precondition)
        # None again: nothing is left but rounding.
        return Status.STAGNATED if self.search is None else None

    def step(self, max_iterations: int) -> None:
        """One step, and a measurement where one is due."""
        assert self.search is not None
        operator, shift = self.objective.operator, self.objective.shift
        step, along = _advance(operator, self.search, shift, self.precondition)
        self.done, self.unchecked = self.done + 1, self.unchecked + 1
        places = self._places()
        self.x = self.x.index_copy(0, places, self.x[places] + step)
        self.gained[self.active] += along
        hinted, little = self._hints(along)
        self.watch.report(self.done, float(hinted.max()))
        hoped, lost = bool((hinted <= 1).all()), bool(little.all())
        due = self.unchecked >= CHECK_EVERY or self.done >= max_iterations
        if self.agreed.whether(hoped or lost or due):
            self._look()

    def _places(self) -> Tensor:
        """Which samples are active, by number, on the device."""
        return self.active.nonzero()[:, 0].to(self.x.device)

    def _hints(self, along: Tensor) -> tuple[Tensor, Tensor]:
        """What is reached as far as can be told without measuring, and which steps gained little.

        Steps that gain less than the rounding of what was gained follow noise, into the null space where the shift
        is little more than that: it is time to measure.
        """
        hinted, little = self.reached, along <= self.rounding * self.gained[self.active]
        if self.objective.linear is None:
            # Each step says by how much it lowers what is minimised, hence, but for rounding, what is
            # left of ‖A x‖: that shows progress and tells when to measure.
            left = self.energy - self.gained - fetched(self.objective.pulled(self.x))[0]
            hint = torch.where(self.active, left.clamp(min=0).sqrt(), self.image)
            hinted = torch.minimum(self.reached, self.goal(hint, self.infinite))
            little |= (left <= self.rounding * self.energy)[self.active]
        return hinted, little

    def _look(self) -> None:
        """Measure; samples that are done retire from the block, and a checkpoint is offered."""
        assert self.search is not None
        self._measure()
        self.history.append((self.done, float(self.reached.max())))
        if float(self.reached.max()) <= float(self.best[0].max()):
            self.best = (self.reached, self.x)
        self.search = _true_to(self.search, self.r[self._places()])
        # The space that retired samples helped to find stays.
        going = self.active & (self.reached > 1)
        if self.search is not None:
            self.search.coefficients = self.search.coefficients[going[self.active]]
        self.active = going
        inside = self.search.tensors() if self.search else {}
        self.watch.offer({**self._state(self.x), **inside})

    def _state(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x, "done": torch.tensor(self.done), "active": self.active, **self.carried}

    def interrupted(self) -> None:
        """The better of what was measured last and of where the search is now, kept in a checkpoint."""
        r, image = self.objective.descent(self.x)
        reached = self.goal(*fetched(image, row_norms(r)))
        self.best = _better(self.best, reached, self.x)
        self.watch.offer(self._state(self.best[1]), now=True)


def _better(best: tuple[Tensor, Tensor], reached: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return (reached, x) if float(reached.max()) <= float(best[0].max()) else best


def _begin(r: Tensor, precondition: Precondition | None) -> _Search | None:
    made = _orthonormal(r, precondition)
    return made and _Search(made[0], made[1], made[2])


def _advance(
    operator: RowOperator, search: _Search, shift: float, precondition: Precondition | None
) -> tuple[Tensor, Tensor]:
    """One step: what to add to the active samples, ``(k, P)``, and by how much ``‖A x‖²`` falls, ``(k,)``."""
    p, dtype = search.p, search.p.dtype
    z, _ = operator.normal(p)
    if shift:
        z = z + shift * p
    alpha = _inverse_curvature(search, *fetched(inner(p, z), inner(p, p)))
    weights = search.coefficients @ alpha
    step = weights.to(p) @ p
    gained = (weights * search.coefficients).sum(1)
    # What one step leaves of a unit residual cannot be told from rounding below this.
    floor = 30 * torch.finfo(dtype).eps
    made = _orthonormal(search.q - alpha.to(p) @ z, precondition, floor)
    if made is None:  # the space is exhausted: no direction remains
        search.coefficients = torch.zeros_like(search.coefficients)
        return step, gained
    q, w, change = made
    search.q, search.p = q, w + change.T.to(p) @ p
    search.coefficients = search.coefficients @ change
    return step, gained


def _inverse_curvature(search: _Search, curvature: Tensor, lengths: Tensor) -> Tensor:
    """Pseudo-inverse of ``p H pᵀ``, without directions whose curvature is that of rounding.

    Those would be followed without end. Curvature is compared with the largest seen, per unit length.
    """
    values, vectors = eigh((lengths + lengths.T) / 2)
    keep = values > 1e-13 * values.amax().clamp(min=0)
    if not bool(keep.any()):  # directions without length lead nowhere
        return torch.zeros_like(curvature)
    to = vectors[:, keep] / values[keep].sqrt()  # p rows combined to unit length: toᵀ p
    reduced = to.T @ ((curvature + curvature.T) / 2) @ to
    values, vectors = eigh(reduced)
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
    (gram,) = fetched(inner(r, w))
    gram = (gram + gram.T) / 2
    length = gram.diagonal().clamp(min=0).sqrt()
    live = length > floor
    if not bool(live.any()):
        return None
    unit = torch.where(live, length, torch.ones_like(length))
    weights = live / unit
    values, vectors = eigh(gram * weights[:, None] * weights)
    keep = values > max(torch.finfo(r.dtype).eps, 1e-10) * values[-1]
    if not bool(keep.any()):
        return None
    root, vectors = values[keep].sqrt(), vectors[:, keep]
    to = (vectors / root).T * weights  # (k, S)
    change = (vectors * root) * (live * unit)[:, None]
    q = to.to(r) @ r
    return q, (q if precondition is None else to.to(r) @ w), change


def _true_to(search: _Search, r: Tensor) -> _Search | None:
    """The search, unless rounding took it away from the true residual and it has to begin anew.

    A residual that is measured lies in the row space. What the search's own differs from it by is rounding, which lies
    anywhere: steps along it wander in the null space, where no residual tells.
    """
    error = row_norms(search.coefficients.to(r) @ search.q - r)
    allowed = torch.finfo(r.dtype).eps ** 0.25
    return None if bool((error > allowed * row_norms(r)).any()) else search


def sample_size(vectors: Tensor, noise: Tensor | None) -> Tensor:
    """What the error of a Laplace sample is compared with, ``(S,)``.

    ``H = AᵀA + shift I`` weighs an error by what it does to the outputs and to the prior. By that measure an error
    ``e`` with the gradient ``g = H e`` has ``eᵀ H e ≤ ‖g‖² / shift``, and a sample ``shift P = shift ‖v‖²`` on
    average. A gradient that is small beside the first one says little: the first is that of the largest eigenvalues.
    """
    size = row_norms(vectors)
    return size if noise is None else torch.where(size > 0, size, row_norms(noise))
