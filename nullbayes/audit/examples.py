"""At the end of a fit: how far do samples really move what is preserved, by plain derivatives of one example alone?

Forward mode, so that not even the backward pass is shared with the rows that are judged; two reverse passes, rows by
reverse mode, or central differences of a copy of the network, where an operation has no forward mode.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nullbayes.audit.audit import Audit
from nullbayes.audit.derivative import DIFFERENCES, FORWARD, Derivative
from nullbayes.audit.network import Exchanged, NetworkCopy
from nullbayes.audit.precision import FLOOR, eps, tolerance
from nullbayes.audit.sampling import Drawn
from nullbayes.common.processes import Processes
from nullbayes.errors import ModelError
from nullbayes.model.adapters import has_fixed_norms
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.precision import ALIKE
from nullbayes.model.size import is_large

# Samples that each audited example is moved by, and as many prior directions; of large networks fewer.
SAMPLES, SAMPLES_OF_LARGE = 6, 3
# What those may occupy; fewer where weights are very many.
DIRECTION_BYTES = 2**28
# By how much of what the prior would do an example's change may differ from what the rows say of it: rounding of
# deep networks in float32 explains 1e-4. Capped, whatever the precision.
AGREE = {torch.float64: 1e-6, torch.float32: 2e-3}
LARGEST = 2e-2
FEWEST = 4
# Examples of a large network on which a way is confirmed by central differences; of others all: of a custom gradient
# that is wrong, the backward pass knows no more than rows do, and of what is detached (`.detach()`, `.data`, `.item()`)
# forward mode does not either. Some examples alone may take the way where that is so.
CONFIRMED = 2
# Changes below this are none: their squares underflow, so sums of them say nothing (rows of a network whose outputs
# exceed each other by a thousand nats).
UNDERFLOW = 1e-150
# Steps say no more than so many times their own doubt.
SURE = 3.0

#: cotangents ``(C, 1, *out)`` of one example's rows, from its outputs ``(1, *out)``
Rows = Callable[[Tensor, Drawn], Tensor]


@dataclass(frozen=True)
class Claim:
    """What the fit's own rows say of one example.

    Attributes:
        moved: ``‖A_n Δ_s‖ (S,)`` float64 for the samples at prior precision one.
    """

    moved: Tensor


@dataclass(frozen=True)
class Question:
    """What is audited.

    Attributes:
        samples, prior: weight changes ``(S, P)`` and ``(k, P)``: posterior samples at prior precision one, and vectors
            of the prior.
        rows: what turns an example's output changes into what is preserved.
    """

    functional: FunctionalModel
    samples: Tensor
    prior: Tensor
    rows: Rows

    def which(self, place: int) -> list[int]:
        """The samples that example ``place`` of those audited is moved by: in turn, so that all are used."""
        count = min(len(self.prior), len(self.samples))
        return [(place * count + k) % len(self.samples) for k in range(count)]


@dataclass(frozen=True)
class Measured:
    """One example.

    Attributes:
        moved: ``‖A_n Δ_s‖ (k,)`` float64 of the samples ``which``.
        reach: RMS of ``‖A_n ε‖`` over prior vectors.
        away: largest distance of ``moved`` from what the rows say.
        doubt: how far ``moved`` may be wrong itself.
        deployed: distance of a plain call's outputs from those that the rows belong to, relative; None: no such call.
        jump: how far outputs jump at the trained weights themselves, relative; 0: they do not.
    """

    number: int
    moved: Tensor
    reach: float
    away: float
    doubt: float
    way: str
    deployed: float | None
    jump: float = 0.0


@dataclass(frozen=True)
class Together:
    """The processes among which audited examples are spread; None: this one has them all.

    Attributes:
        places: which of all that are audited this process's examples are; empty: these are all.
    """

    processes: Processes | None = None
    places: Sequence[int] = ()

    def gathered(self, found: list[Measured]) -> list[Measured]:
        """What all processes have measured, in the order of the data."""
        if self.processes is None:
            return found
        return sorted(
            (m for part in self.processes.gather(found) for m in part), key=lambda m: m.number
        )

    def total(self, count: int) -> int:
        """Summed over the processes."""
        return count if self.processes is None else round(self.processes.total(count)[0])


ALONE = Together()


def prior_vectors(samples: Tensor, model: nn.Module) -> int:
    """How many prior vectors, and at most as many of ``samples (S, P)`` at a time, examples are moved by."""
    most = SAMPLES_OF_LARGE if is_large(model) else SAMPLES
    fits = DIRECTION_BYTES // max(1, 2 * samples.element_size() * samples.shape[1])
    return max(1, min(most, len(samples), fits))


def audit_examples(
    question: Question,
    drawn: Sequence[Drawn],
    claims: Sequence[Claim],
    total: int,
    seconds: float = math.inf,
    together: Together = ALONE,
) -> Audit:
    """Compare what samples do to each example with what the fit's rows claim.

    Args:
        drawn: examples; ``claims``: one for each.
        total: how many examples the data have.
        together: who audits the other examples, where these are some of several processes'.
        seconds: stop early once so much time has passed, but not before :data:`FEWEST` examples.

    Raises:
        ModelError: no way leads to the network's derivative along a weight change.
    """
    started = begun = time.perf_counter()
    examiner = _Examiner(question)
    found: list[Measured] = []
    places = together.places or range(len(drawn))
    for place, example, claim in zip(places, drawn, claims, strict=True):
        if len(found) >= FEWEST and time.perf_counter() - begun > seconds:
            break
        found.append(examiner.examine(example, place, claim))
        if len(found) == 1:  # what a way needs once (imports take two seconds) is no example's
            begun = time.perf_counter()
    found, wanted = together.gathered(found), together.total(len(drawn))
    clear = [m for m in found if m.jump or m.doubt <= LARGEST * m.reach]
    reduced = []
    if len(found) < wanted:
        reduced.append(f"{len(found)} of {wanted} drawn examples, to save time")
    if len(clear) < len(found):
        reduced.append(f"{len(found) - len(clear)} drawn examples are rounded too coarsely to tell")
    if examiner.no_copy is not None:
        reduced.append(f"the network cannot be copied to be called plainly ({examiner.no_copy})")
    return replace(
        _judged(clear, question.functional),
        total=total,
        seconds=time.perf_counter() - started,
        reduced="; ".join(reduced) or None,
    )


def _judged(found: Sequence[Measured], functional: FunctionalModel) -> Audit:
    size = math.sqrt(sum(m.reach**2 for m in found) / max(1, len(found)))
    # An example's rows are judged beside themselves, down to what rounding leaves of the others': those of very
    # confident examples may underflow.
    floor = FLOOR * eps(functional.rounding) * size
    worst, which, moved, prior = 0.0, None, 0.0, 0.0
    for m in found:
        away = 0.0 if m.away == 0 else m.away / max(m.reach, floor, UNDERFLOW)
        if not away <= worst or which is None:
            worst, which = away, m.number
        moved += float(m.moved.square().sum())
        prior += m.reach**2 * len(m.moved)
    plain = [m.deployed for m in found if m.deployed is not None]
    return Audit(
        examples=len(found),
        total=len(found),
        worst=worst,
        worst_example=which,
        allowed=agreement(functional.rounding),
        moved=(moved / prior) ** 0.5 if prior > 0 else 0.0,
        methods=tuple(dict.fromkeys(m.way for m in found)),
        plain_call=max(plain, default=None),
        plain_call_allowed=_plain_allowed(functional),
        jump=max((m.jump for m in found), default=0.0),
        **_precision(functional),
    )


def _precision(functional: FunctionalModel) -> dict[str, Any]:
    """What the rows were computed in, and what the deployed network rounds to."""
    rounds_to = functional.rounds_to
    name = None if rounds_to is None else str(rounds_to).removeprefix("torch.")
    return {"computed_in": str(functional.rounding).removeprefix("torch."), "rounds_to": name}


def _plain_allowed(functional: FunctionalModel) -> float:
    """Half precision, computed in float32 for the rows, rounds that much."""
    if functional.widened is not None or functional.unrounded:
        return ALIKE
    return tolerance(functional.rounding, functional.device)


def agreement(dtype: torch.dtype) -> float:
    """Share of the prior's effect by which rounding in ``dtype`` may part rows and reality."""
    return min(AGREE.get(dtype, LARGEST), LARGEST)


class _Examiner:
    """Moves examples of a network, one at a time."""

    def __init__(self, question: Question) -> None:
        self.question, self.functional = question, question.functional
        self.along = Derivative(self.functional)
        # What DoRA detaches is known, and noted in the certificate.
        large = is_large(self.functional.model)
        most = CONFIRMED if large else math.inf
        self._to_confirm = 0 if has_fixed_norms(self.functional.model) else most
        #: the last example's changes, in terms of its rows, and these
        self._last: tuple[Tensor, Tensor] | None = None
        #: why no copy of the network could be made; None where one was
        self.no_copy: str | None = None
        self._copy: NetworkCopy | None = None
        #: what short steps are taken on in the network's own precision, for the first example and for the others
        self._own: tuple[NetworkCopy | Exchanged, NetworkCopy | Exchanged]
        #: the samples that the last example was moved by, and these with the prior vectors: one copy of them for all
        #: examples that are moved by the same
        self._directions: tuple[list[int], Tensor] | None = None
        try:
            self._copy = NetworkCopy(self.functional)
            first = self._copy if large else NetworkCopy(self.functional, fresh=True)
            self._own = first, self._copy
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a network's attributes make of being copied
            self.no_copy = type(error).__name__
            self._own = Exchanged(self.functional), Exchanged(self.functional)
        #: the same in float64, where that decides
        self._stepped = [
            Derivative(self.functional, (DIFFERENCES,), fresh=not large),
            Derivative(self.functional, (DIFFERENCES,)),
        ]

    def examine(self, example: Drawn, place: int, claim: Claim) -> Measured:
        """One example; where rows and derivative part, central differences of a copy of the network decide.

        They know no formula that could be wrong, as some of PyTorch's forward mode have been.
        """
        found = self._measured(self.along, example, place, claim)
        parted = found.away > agreement(self.functional.rounding) * found.reach
        confirmed = place >= self._to_confirm or found.way == DIFFERENCES
        if found.way == FORWARD and not (parted or confirmed):
            confirmed = not self._steps_otherwise(example, place, found.reach)
        if found.way == DIFFERENCES or (confirmed and not parted):
            return found
        measured = self._by_steps(example, place, claim)
        if measured is None:
            return found
        again, bend = measured
        again = replace(again, reach=max(found.reach, again.reach))
        agrees = again.away <= agreement(self.functional.rounding) * again.reach
        if again.jump:
            return replace(found, jump=again.jump)
        if again.doubt > LARGEST * again.reach or (agrees and not parted):
            return found
        if found.way == FORWARD and not parted:
            assert self._last is not None
            doubt = again.doubt + bend * float(self._last[1].norm())
            return found if again.away <= SURE * doubt else again
        return again

    def _by_steps(self, example: Drawn, place: int, claim: Claim) -> tuple[Measured, float] | None:
        """One example by central differences in float64, or in its own precision where it takes no other, and the bend.

        None: there is neither.
        """
        which = min(place, 1)
        for last in (False, True):
            steps = self._stepped[which]
            try:
                return self._measured(steps, example, place, claim), steps.bend
            except ModelError:
                if last or not self._is_precise():
                    return None
            self._stepped[which] = Derivative(self.functional, (DIFFERENCES,), self._own[which])
        return None

    def _steps_otherwise(self, example: Drawn, place: int, reach: float) -> bool:
        """Whether short steps of a plain copy along one prior vector move an example otherwise than forward mode says.

        Only a few passes of one example, in the network's own precision: float64 decides where they say so.
        """
        functional = self.functional
        if self._last is None:
            return False
        if not self._is_precise():
            return not is_large(functional.model)
        changes, rows = self._last
        steps = Derivative(functional, (DIFFERENCES,), self._own[min(place, 1)])
        direction, allowed = self.question.prior[:1], agreement(functional.rounding) * reach
        expected = changes[-len(self.question.prior)]

        def away(moved: Tensor) -> float:
            in_rows = moved.reshape(1, -1).double() @ rows.T
            return float((in_rows - expected.to(in_rows)).norm())

        try:
            if place >= CONFIRMED and away(steps.quickly(example.inputs, direction)) <= allowed:
                return False
            apart = away(steps(example.inputs, direction))
        except ModelError:
            return False
        doubt = (steps.doubt + steps.bend) * float(rows.norm())
        return steps.jump > 0 or apart > max(allowed, SURE * doubt)

    def _is_precise(self) -> bool:
        """Whether short steps in the network's own precision say anything: in half precision they do not."""
        return self.functional.rounding in AGREE and _plain_allowed(self.functional) != ALIKE

    def _both(self, which: list[int]) -> Tensor:
        """Samples and prior vectors ``(2 k, P)``."""
        if self._directions is None or self._directions[0] != which:
            self._directions = None  # before the next ones are there
            samples, prior = self.question.samples, self.question.prior
            some = samples if which == list(range(len(samples))) else samples[which]
            self._directions = which, torch.cat([some.to(prior), prior])
        return self._directions[1]

    def _measured(self, along: Derivative, example: Drawn, place: int, claim: Claim) -> Measured:
        question, functional = self.question, self.functional
        with torch.no_grad():
            outputs = functional(functional.weights(), example.inputs)
        rows = question.rows(outputs, example).detach()
        rows = rows.reshape(len(rows), -1).double()  # (C, out)
        which = question.which(place)
        both = self._both(which)
        changes = along(example.inputs, both)
        in_rows = changes.reshape(len(both), -1).double() @ rows.T
        self._last, values = (in_rows, rows), in_rows.norm(dim=1)
        ours, prior = values[: len(which)], values[len(which) :]
        deployed = None
        if self._copy is not None:
            plain = self._copy.outputs(example.inputs).double()
            there = outputs.double()
            deployed = float((plain - there).norm() / there.norm().clamp_min(1e-300))
        return Measured(
            example.number,
            ours,
            float(prior.square().mean().sqrt()),
            float((ours - claim.moved.to(ours)[which]).abs().max()),
            along.doubt * float(rows.norm()) if along.doubt else 0.0,
            along.way,
            deployed,
            along.jump,
        )
