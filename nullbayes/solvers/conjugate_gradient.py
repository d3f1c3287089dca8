"""Conjugate gradients: nothing but products with the rows, linear in weights and examples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nullbayes.common.progress import FACTORISATION, GRAM, PROJECTION
from nullbayes.common.work import ENDLESS, Work
from nullbayes.errors import InputError
from nullbayes.jacobian.operator import RowOperator, Tick
from nullbayes.solvers.base import (
    Cost,
    Projection,
    Settled,
    Size,
    Solver,
    Spectrum,
    State,
    Status,
    relative,
)
from nullbayes.solvers.block_cg import (
    Goal,
    Objective,
    Solved,
    Start,
    block_cg,
    blocks,
    fetched,
    inner,
    row_norms,
    sample_size,
)
from nullbayes.solvers.checkpoint import QUIET, Watch
from nullbayes.solvers.preconditioners import Preconditioner, resolve
from nullbayes.solvers.refinement import MAX_PASSES, DualEquations, Refinement, conjugate_gradients
from nullbayes.solvers.rehearsal import Rehearsal, timed
from nullbayes.solvers.row_scaling import RowScaled, RowWeighted
from nullbayes.solvers.spectrum import (
    EXACT_UP_TO,
    OPERATOR_PROBES,
    OPERATOR_STEPS,
    operator_spectrum,
    spectrum_bytes,
)

# How exactly one pass of the numerical null space solves its equations, relative to the tolerance. The
# gradient falls long before the residual does: it weighs directions by the squares of the rows.
PASS_ACCURACY = 1e-3
# Passes over the rows that a fit takes, for counting its cost beforehand (benchmarks/whole.py).
EXPECTED_ITERATIONS = 67


class ConjugateGradient(Solver):
    """Block conjugate gradients, preconditioned; the one solver for data sets of any size.

    Memory: about eight vectors of ``P`` numbers a sample, and the preconditioner.

    Args:
        tolerance: on the relative residual; None: 5e-2.
        max_iterations: passes over all rows at most.
        preconditioner: ``"none"``, ``"kronecker"``, ``"subset"``, ``"rows"``, ``"sketch"``, ``"pivoted"`` or an
            object from ``nb.solvers``.
        equilibrate: power of its length by which a row is shortened, 0 to 1 (not for Laplace, nor with ``"sketch"`` and
            ``"pivoted"``). It leaves the null space as it is; what ends early keeps the outputs of
            confident examples better. With an edge of the null space, that too is one of scaled rows.
    """

    name = "conjugate gradients"
    iterative = True

    def __init__(
        self,
        tolerance: float | None = None,
        max_iterations: int = 300,
        preconditioner: str | Preconditioner = "none",
        equilibrate: float = 0.0,
    ) -> None:
        self.tolerance, self.max_iterations = tolerance, max_iterations
        resolve(preconditioner)  # raises now, not after the capture
        self.preconditioner = preconditioner
        if not 0 <= equilibrate <= 1:
            raise InputError(f"`equilibrate` is {equilibrate!r}; expected a number from 0 to 1.")
        self.equilibrate = equilibrate

    def cost(self, size: Size) -> Cost:
        flops = EXPECTED_ITERATIONS * 2.2 * size.samples * size.product_flops
        chosen = resolve(self.preconditioner)
        more = 0 if chosen is None else chosen.nbytes(size.rows, size.columns)
        vectors = 9 * size.samples * size.columns * size.itemsize
        return Cost(flops, max(vectors, spectrum_bytes(size.rows, size.columns)) + more)

    def forecast(self, rehearsal: Rehearsal) -> dict[str, float]:
        return iterative_forecast(rehearsal)

    def prepare(self, operator: RowOperator, tick: Tick | None = None) -> ConjugateGradientState:
        return ConjugateGradientState(self, operator)


def iterative_forecast(rehearsal: Rehearsal) -> dict[str, float]:
    """Seconds by stage of a solver that only multiplies with the rows."""
    v = rehearsal.samples_like
    once = rehearsal.seconds_of_pass(v[:OPERATOR_PROBES])
    # Each step keeps a block of search directions conjugate: a few products of (S, P) with (S, S).
    vectors = timed(lambda: (inner(v, v), inner(v, v), inner(v, v), v.T @ v[:, :1]))
    steps = EXPECTED_ITERATIONS * (rehearsal.one_pass + 2 * vectors)
    return {
        GRAM: 0.0,
        FACTORISATION: OPERATOR_STEPS * once if rehearsal.rows > EXACT_UP_TO else 0.0,
        PROJECTION: rehearsal.drawing + steps,
    }


class IterativeState(State):
    """What iterative solvers share: spectrum, novelty and rank without a factorisation."""

    solver: Solver

    def spectrum(self, settled: Settled | None = None) -> Spectrum:
        return operator_spectrum(self.operator, settled, self.room)

    def explained(self, rows: RowOperator, width: int = 1) -> Tensor:
        """By projecting the rows themselves: as exact as the solver is."""
        parts = []
        for values in rows.iter_rows(width * max(1, 64 // width)):
            done = self._mean(values)
            before = blocks(values.double().T, width)
            if self.shift and not self.numerical:  # Laplace: the covariance is the filter itself
                parts.append(before - blocks(values.double().T, width, done.double().T))
            else:
                parts.append(before - blocks(done.double().T, width))
        return torch.cat(parts)

    def explained_work(self, rows: int) -> Work:
        return ENDLESS

    def _scale(self, vectors: Tensor, noise: Tensor | None) -> Tensor | None:
        """Norm ``(S,)`` of Laplace samples, which residuals are relative to; None for a projection."""
        if self.numerical or not self.shift:
            return None
        return self.shift**0.5 * sample_size(vectors, noise)

    def _mean(self, vectors: Tensor) -> Tensor:
        return self.project(vectors).value


class ConjugateGradientState(IterativeState):
    """Holds the preconditioner. Each pass of the numerical null space is one Tikhonov problem."""

    def __init__(self, solver: ConjugateGradient, operator: RowOperator) -> None:
        self.solver: ConjugateGradient = solver
        self.operator = operator
        self._preconditioner: Preconditioner | None = None
        self._prepared = True
        #: the rows that the search works on; residuals are always those of ``operator``
        self._rows = operator
        self._begin: Tensor | None = None

    def factorise(
        self,
        shift: float = 0.0,
        *,
        numerical: bool = False,
        enough: float = 0.0,
        tick: Tick | None = None,
    ) -> None:
        self.shift, self.numerical, self.enough = shift, numerical, enough
        chosen = resolve(self.solver.preconditioner)
        dual = chosen is not None and chosen.dual
        if self.solver.equilibrate and not dual and (numerical or not shift):
            self._rows = RowScaled(self.operator, self.solver.equilibrate)
        if chosen is not None and not chosen.keeps_range and not shift:
            raise InputError(
                f"preconditioner={chosen.name!r} needs an edge of the null space (`delta` above 0): it would "
                "end in the null space, but not at the projection. Use 'subset' or 'none' with `delta=0`."
            )
        self._preconditioner, self._prepared = chosen, chosen is None
        if tick:
            tick(1.0)

    def _prepare_for(self, rows: RowOperator) -> None:
        """The preconditioner, made ready once, for the rows with which the search begins."""
        chosen = self._preconditioner
        if chosen is None or self._prepared:
            return
        chosen.prepare(rows, self.shift, None)
        self.notes = (*self.notes, f"Preconditioner: {'; '.join(chosen.notes)}.")
        self._prepared = True

    def project(
        self, vectors: Tensor, noise: Tensor | None = None, watch: Watch = QUIET
    ) -> Projection:
        self._prepare_for(self._rows)
        if self.numerical:
            return self._numerical(vectors, watch)
        tolerance, limit = self.solver.tolerance_for(vectors.dtype), self.solver.max_iterations
        scale = self._scale(vectors, noise)
        scale = None if scale is None else scale.cpu()
        if self._preconditioner is not None and self._preconditioner.dual:
            goal_of = Refinement(tolerance, limit, scale)
            return self._dual(vectors, noise, goal_of)
        linear = None
        if self.shift and noise is not None:
            linear = -self.operator.rmatvec((self.shift**0.5 * noise).to(vectors.dtype))
        resumed = watch.resume()
        norms = _FirstNorms(resumed)

        def goal(image: Tensor, gradient: Tensor) -> Tensor:
            norms.see(image, gradient)
            if scale is not None:
                return relative(gradient, tolerance * self.shift**0.5 * scale)
            return relative(image, (asked * norms.image).clamp(min=self.enough))

        asked, iterations = tolerance, 0
        objective = Objective(self._rows, vectors, self.shift, linear)
        solved = self._block(objective, goal, limit, watch, Start(None, resumed, norms.carried))
        if self.shift:
            residual = solved.reached * tolerance
            return Projection(solved.value, residual, solved.status, solved.iterations)
        before = self._image(vectors)
        while True:
            iterations += solved.iterations
            image = self._image(solved.value)
            excess = float(relative(image, (tolerance * before).clamp(min=self.enough)).max())
            if excess <= 1 or solved.status is not Status.CONVERGED or iterations >= limit:
                break
            # Scaled rows were small enough, the rows themselves are not yet.
            asked *= 0.5 / excess
            objective = Objective(self._rows, solved.value, self.shift, linear)
            start = Start(carried=norms.carried)
            solved = self._block(objective, goal, limit - iterations, watch, start)
        return Projection(solved.value, relative(image, before), solved.status, iterations)

    def begin_at(self, vectors: Tensor) -> None:
        if self._preconditioner is None or not self._preconditioner.dual:
            self._begin = vectors

    def project_without(
        self, vectors: Tensor, spans: Sequence[slice], watch: Watch = QUIET
    ) -> Projection | None:
        chosen = self._preconditioner
        # (Of rows as they are: as version 0.1 has it, for the same seed gives the same samples.)
        if chosen is not None and not (self.solver.equilibrate and chosen.keeps_range):
            return None
        if chosen is not None and chosen.dual:
            return None
        there = torch.ones(self.operator.shape[0], dtype=self.operator.dtype)
        for span in spans:
            there[span] = 0
        there = there.to(self.operator.device)
        some = copy.copy(self)
        some.operator = RowWeighted(self.operator, there)
        some._rows = RowWeighted(self._rows, there)
        # Without the rows of ``spans`` for good: a preconditioner that knew them would let the search see them.
        self._prepare_for(some._rows)
        some._prepared = True
        done = some.project(vectors, None, watch)
        self._begin = done.value
        return done

    def _numerical(self, vectors: Tensor, watch: Watch) -> Projection:
        """Passes until the tolerance, or until two of them stand and a third would gain little."""
        tolerance = self.solver.tolerance_for(vectors.dtype)
        before = self._image(vectors)
        target = (tolerance * before).clamp(min=self.enough)
        x, done, iterations = vectors, 0, 0
        resumed = watch.resume()
        if resumed is not None:
            x, done = resumed["anchor"].to(vectors), int(resumed["passes"])
        # Whether another pass is worth it depends on what the last one left, also where that was before a kill.
        after, status = before if resumed is None else self._image(x), Status.NUMERICAL
        while True:
            previous = after
            solved = self._pass(_Pass(x, after, target, done, iterations), resumed, watch)
            resumed = None
            x, done, iterations = solved.value, done + 1, iterations + solved.iterations
            after = self._image(x)
            if bool((after <= target).all()):
                status = Status.CONVERGED
                break
            if solved.status is not Status.CONVERGED:
                status = solved.status
                break
            if self.passes is not None:
                if done >= self.passes:
                    break
            elif (done >= 2 and float(after.norm()) > float(previous.norm()) / 3) or (
                done >= MAX_PASSES
            ):
                break
        self.passes = done if self.passes is None else self.passes
        return Projection(x, relative(after, before), status, iterations)

    def _pass(self, at: _Pass, resumed: dict[str, Tensor] | None, watch: Watch) -> Solved:
        anchor, tolerance = at.anchor, self.solver.tolerance_for(at.anchor.dtype)
        left = max(1, self.solver.max_iterations - at.iterations)
        rounding = 30 * torch.finfo(anchor.dtype).eps
        accuracy = max(PASS_ACCURACY * min(tolerance, 1e-2), rounding)
        if self._preconditioner is not None and self._preconditioner.dual:
            dual = self._dual(anchor, None, Refinement(accuracy, left))
            ratio = dual.residual / accuracy
            return Solved(dual.value, ratio, dual.status, dual.iterations)
        norms = _FirstNorms(resumed)
        # The first pass may end at the tolerance itself; whatever is left by then is small enough.
        free = self.passes is None or at.done + 1 < self.passes

        def goal(image: Tensor, gradient: Tensor) -> Tensor:
            norms.see(image, gradient)
            solved = relative(gradient, accuracy * norms.gradient)
            # In the units of the scaled rows.
            allowed = at.target * relative(norms.image, at.before)
            return torch.minimum(solved, relative(image, allowed)) if free else solved

        norms.carried |= {"anchor": anchor, "passes": torch.tensor(at.done)}
        objective = Objective(self._rows, anchor, self.shift)
        return self._block(objective, goal, left, watch, Start(None, resumed, norms.carried))

    def _block(
        self, objective: Objective, goal: Goal, limit: int, watch: Watch, start: Start
    ) -> Solved:
        apply = None if self._preconditioner is None else self._preconditioner.apply
        begin, self._begin = self._begin, None
        if begin is not None:  # goals are relative to the anchor, not to where the search begins
            gradient, square = self._rows.normal(objective.anchor)
            assert start.carried is not None
            image, size = fetched(square.sqrt(), row_norms(gradient))
            start.carried.update({"image": image, "gradient": size})
        start = replace(start, begin=begin)
        return block_cg(objective, goal, limit, precondition=apply, watch=watch, start=start)

    def _dual(self, vectors: Tensor, noise: Tensor | None, refinement: Refinement) -> Projection:
        assert self._preconditioner is not None
        equations = DualEquations(self.operator, vectors, noise, self.shift)
        return conjugate_gradients(equations, self._preconditioner.apply, refinement)

    def _image(self, x: Tensor) -> Tensor:
        """``‖A x‖ (S,)`` on the processor, where goals are judged."""
        return self.operator.image_norms(x).cpu()


@dataclass(frozen=True)
class _Pass:
    """Where one pass of the numerical null space begins.

    Attributes:
        anchor: ``(S, P)``, what the passes ``done`` so far have left; they took so many ``iterations``.
        before, target: ``‖A x‖ (S,)`` at the anchor, and that which is small enough.
    """

    anchor: Tensor
    before: Tensor
    target: Tensor
    done: int
    iterations: int


class _FirstNorms:
    """Norms where a search began: what its goals are relative to. They travel with its checkpoints."""

    def __init__(self, resumed: dict[str, Tensor] | None) -> None:
        #: one dictionary for the whole search: it is handed over before the first measurement
        self.carried: dict[str, Tensor] = {}
        if resumed is not None:
            self.carried.update({name: resumed[name].cpu() for name in ("image", "gradient")})

    def see(self, image: Tensor, gradient: Tensor) -> None:
        """The first measurement is the one that counts."""
        if "image" not in self.carried:
            self.carried.update({"image": image, "gradient": gradient})

    @property
    def image(self) -> Tensor:
        return self.carried["image"]

    @property
    def gradient(self) -> Tensor:
        return self.carried["gradient"]
