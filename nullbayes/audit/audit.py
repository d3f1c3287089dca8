"""What the audit of a fit saw, in figures and in words: are the rows that a certificate is computed from true?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

from nullbayes.audit.examples import (
    DIFFERENCES,
    EXAMPLES,
    Examiner,
    MakeCotangents,
    Moved,
    Question,
    Reservoir,
    prior_directions,
)
from nullbayes.audit.precision import FLOOR, eps, tolerance
from nullbayes.errors import InputError
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.precision import ALIKE

FULL = "full"
# Central differences leave this much of the prior's effect, whatever the precision.
DIFFERENCES_TOLERANCE = 1e-4
# A verdict calls movements in words by this share of the prior's.
NOTHING = 1e-3


@dataclass(frozen=True)
class Audit:
    """What plain differentiation says of a fit's rows and samples. ``print`` it.

    Every batch was compared, all its rows at once, with one backward pass of the unhooked network
    (``batches``); then examples drawn at random from all the data were moved along samples one at a time, without a
    captured row (``examples``). Ratios are to what prior directions as long as the samples do to these examples (RMS).

    Attributes:
        examples, of_examples: how many were audited, of how many that are constrained.
        batches, of_batches: how many batches were compared, of how many.
        worst: the largest effect ``‖A_n Δ‖`` of a sample on what is preserved, as a ratio; ``worst_example``: whose.
        overall: the same over all audited examples (RMS).
        apart: largest difference between an effect that was measured and the same by the fit's rows, as a share of what
            prior directions do to that example; ``apart_example``: whose.
        tolerance: what ``apart`` may be: rounding of the working precision, capped.
        deployed: largest relative distance between the outputs that the rows belong to and those of a plain call of
            the network; None where the network cannot be copied for one. ``deployed_tolerance``: what it may be.
        reweighted: the effect of re-weighting the network by a sample, second order included, as a ratio (RMS).
        method: ``"forward mode"``, ``"two reverse passes"`` or ``"central differences"``.
        reduced: what was audited less than usual, and why; None: nothing.
        seconds: of all of it; those of the batches passed while rows were captured.
    """

    examples: int
    of_examples: int
    batches: int
    of_batches: int
    worst: float
    worst_example: int
    overall: float
    apart: float
    apart_example: int
    tolerance: float
    deployed: float | None
    deployed_tolerance: float
    reweighted: float | None
    method: str
    reduced: str | None
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the fit's rows are true of the network, so that what a certificate says of them is.

        All batches were compared, at least one example was audited, what was measured agrees with the rows, and the
        rows belong to the network as it runs by itself.
        """
        measured = self.examples > 0 and self.batches == self.of_batches
        deployed = self.deployed is None or self.deployed <= self.deployed_tolerance
        return measured and self.apart <= self.tolerance and deployed

    def joined(self, other: Audit) -> Audit:
        """Of these samples and of others of the same fit, audited later."""
        worse = max(self, other, key=lambda a: _or_infinite(a.worst))
        further = max(self, other, key=lambda a: _or_infinite(a.apart / a.tolerance))
        return replace(
            further,
            worst=worse.worst,
            worst_example=worse.worst_example,
            overall=math.sqrt((self.overall**2 + other.overall**2) / 2),
            deployed=_larger(self.deployed, other.deployed),
            reweighted=_larger(self.reweighted, other.reweighted),
            seconds=self.seconds + other.seconds,
        )

    def words(self) -> str:
        """One sentence or two, for a verdict."""
        what = f"{self.examples:,} of {self.of_examples:,} training examples, drawn at random"
        if self.examples == self.of_examples:
            what = "every training example"
        if self.passed:
            text = (
                f"The audit agrees: {what} and differentiated one at a time by {self.method}, are moved as the "
                f"rows say (to {_share(max(self.apart, 1e-16))} of the prior's effect; {_share(self.worst)} at most)."
            )
            return text if self.reduced is None else f"{text} {self.reduced}"
        return " ".join(["The audit contradicts the certificate:", *self._failures()])

    def _failures(self) -> list[str]:
        out = []
        if self.batches < self.of_batches:
            out.append(
                f"only {self.batches:,} of {self.of_batches:,} batches were compared with plain differentiation."
            )
        if not self.examples:
            out.append("no example was audited.")
        if not self.apart <= self.tolerance:
            out.append(
                f"differentiated alone by {self.method}, training example {self.apart_example} is moved otherwise than "
                f"the rows say, by {_share(self.apart)} of the prior's effect (allowed: {_share(self.tolerance)}). Its "
                "rows, and all that this certificate computes from them, are not those of the network. Look for a "
                "forward pass that depends on the batch, on a state or on the precision, and for custom gradients "
                "(`torch.autograd.Function`); if there is none, please report it with the model."
            )
        if self.deployed is not None and not self.deployed <= self.deployed_tolerance:
            out.append(
                f"a plain call of the network gives other outputs (by {_share(self.deployed)}) than the function whose "
                "rows were taken: look for a forward pass that behaves otherwise where gradients are recorded, or "
                "that refers to another module than its own."
            )
        return out

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line in a certificate's table."""
        state = "agrees" if self.passed else "CONTRADICTS the rows"
        return [
            (
                "audit",
                f"{state}: {self.examples:,} of {self.of_examples:,} examples alone by {self.method}, "
                f"{self.batches:,} of {self.of_batches:,} batches",
            ),
            (
                "  moved, of the prior's effect",
                f"{self.worst:.1e} at most (example {self.worst_example}), {self.overall:.1e} RMS",
            ),
            (
                "  apart from the rows",
                f"{self.apart:.1e}  (tolerance {self.tolerance:.0e})",
            ),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        lines = [f"  {label:<{width}}  {value}" for label, value in rows]
        return "\n".join(["Audit", *lines, "", f"  {self.words()}"])

    def as_dict(self) -> dict[str, Any]:
        """All fields and ``passed``; JSON-able."""
        return asdict(self) | {"passed": self.passed}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Audit:
        """The inverse of :meth:`as_dict`."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known})


def check_audit(value: Any) -> int:
    """How many examples ``audit=`` asks for. Raises `InputError` for anything but ``"full"`` or a number."""
    if value == FULL:
        return EXAMPLES
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise InputError(
        f"`audit` is {value!r}; expected {FULL!r} ({EXAMPLES} examples and every batch) or how many examples to audit, "
        "1 or more. There is no certificate without an audit; one example costs about as much as predicting it."
    )


class Auditor:
    """Examples drawn while rows were captured, to be moved along samples once there are any.

    Args:
        drawn: examples of all the data that went by.
        cotangents: ``(outputs (1, *out), targets) -> (C, 1, *out)``, what is preserved.
        spans: by number of an example, the rows that it has in the constraint matrix; None: nobody claims anything.
        scales: prior standard deviations ``(P,)`` where they are not all the same.
        batch_seconds: what comparing the batches took.
    """

    def __init__(
        self,
        functional: FunctionalModel,
        drawn: Reservoir,
        cotangents: MakeCotangents,
        spans: Sequence[slice] | None,
        scales: Tensor | None = None,
        batch_seconds: float = 0.0,
    ) -> None:
        self.functional, self.cotangents, self.scales = functional, cotangents, scales
        self.examples, self.batches, self.of_examples = drawn.examples, drawn.batches, drawn.seen
        self.spans = {} if spans is None else {e.number: spans[e.number] for e in self.examples}
        self.batch_seconds = batch_seconds
        self._reduced = drawn.reduced

    def audit(
        self,
        samples: Tensor,
        effects: Tensor | None = None,
        scale: float = 1.0,
        tick: Callable[[float], None] | None = None,
    ) -> Audit:
        """Move every example along some of the samples.

        Args:
            samples: weight changes ``Δ (S, P)`` at prior precision one.
            effects: ``A Δ (S, M)`` as the rows have it; None: they are not compared.
            scale: what samples are multiplied with where the network is re-weighted.
            tick: told the share done.

        Raises:
            ModelError: no derivative along a weight change can be computed.
        """
        since = time.perf_counter()

        def claimed(number: int) -> Tensor:
            assert effects is not None
            return effects[:, self.spans[number]].double().norm(dim=1)

        functional = self.functional
        prior = prior_directions(functional.space, samples, self.scales)
        told = None if effects is None else claimed
        question = Question(self.cotangents, samples, prior, scale, told)
        allowed = tolerance(functional.rounding, functional.device)
        examiner, found = Examiner(functional), []
        for place, example in enumerate(self.examples):
            found.append(examiner.examine(example, place, question, allowed))
            if tick is not None:
                tick((place + 1) / len(self.examples))
        if examiner.along.method == DIFFERENCES:
            allowed = max(allowed, DIFFERENCES_TOLERANCE)
        reduced = self._reduced
        if examiner.no_copy is not None:
            text = f"The network cannot be copied ({examiner.no_copy}), so a plain call of it was not compared."
            reduced = text if reduced is None else f"{reduced} {text}"
        judged = _judged(found, eps(functional.rounding))
        return Audit(
            examples=len(found),
            of_examples=self.of_examples,
            batches=self.batches,
            of_batches=self.batches,
            **judged,
            tolerance=allowed,
            deployed_tolerance=ALIKE if functional.widened is not None else allowed,
            method=examiner.along.method,
            reduced=reduced,
            seconds=time.perf_counter() - since + self.batch_seconds,
        )


def _judged(found: Sequence[Moved], rounding: float) -> dict[str, Any]:
    """The figures of an :class:`Audit` that come from single examples."""
    # Rows of a very confident example are small, so that moving it far beside itself means nothing: what samples do
    # is held against all that was audited, as a certificate's residual is.
    size = math.sqrt(sum(m.scale**2 for m in found) / max(1, len(found)))
    worst, worst_example, apart, apart_example = 0.0, -1, 0.0, -1
    total, reweighted = 0.0, 0.0
    for m in found:
        ratio = _ratio(float(m.moved.max()), max(m.scale, size))
        # Whether rows are true is asked of each example beside itself, down to what rounding leaves of the others.
        off = _ratio(m.apart, max(m.scale, FLOOR * rounding * size))
        if worst_example < 0 or _or_infinite(ratio) > _or_infinite(worst):
            worst, worst_example = ratio, m.number
        if apart_example < 0 or _or_infinite(off) > _or_infinite(apart):
            apart, apart_example = off, m.number
        total += float(m.moved.square().mean())
        reweighted += m.reweighted**2
    if any(m.rows is None for m in found):  # nothing was compared, so nothing agrees
        apart = math.nan
    copied = bool(found) and found[0].before is not None
    count = max(1, len(found))
    return {
        "worst": worst,
        "worst_example": worst_example,
        "overall": _ratio(math.sqrt(total / count), size),
        "apart": apart,
        "apart_example": apart_example,
        "deployed": max(m.deployed for m in found) if copied else None,
        "reweighted": _ratio(math.sqrt(reweighted / count), size) if copied else None,
    }


def _ratio(value: float, scale: float) -> float:
    """Nothing beside nothing is nothing."""
    return 0.0 if value == 0 else value / scale if scale > 0 else math.inf


def _or_infinite(value: float) -> float:
    """What is not a number is as bad as can be."""
    return math.inf if math.isnan(value) else value


def _larger(a: float | None, b: float | None) -> float | None:
    return max((v for v in (a, b) if v is not None), default=None)


def _share(value: float) -> str:
    percent = 100 * value
    return f"{percent:.2g} %" if percent >= 1e-2 * NOTHING * 100 else f"{value:.0e}"
