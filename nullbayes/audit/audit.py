"""What the audit saw, in figures and in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nullbayes.audit.precision import LARGEST


@dataclass(frozen=True)
class Audit:
    """How far samples really move what is preserved, by plain derivatives of examples drawn from all the data.

    Attributes:
        examples, total: how many were audited, of how many.
        worst: the largest difference between what samples do to an audited example and what the fit's rows say that
            they do, as a share of what the prior would do to it.
        worst_example: which one, by its place in the data.
        allowed: the share that rounding explains.
        moved: what samples do to the audited examples together, as a share of what the prior would do.
        batches: how many batches were proved at capture, each against one plain backward pass.
        plain_call: largest distance of the outputs of a plain call of the network from those that rows belong to,
            relative, and ``plain_call_allowed``; None where the network cannot be copied for one.
        jump: how far outputs jump at the trained weights themselves, relative to them; 0: not at all.
        methods: how the derivatives were taken.
        computed_in: the least precise numbers that rows, samples and predictions were computed with, such as "float32".
        rounds_to: half precision that the deployed network computes with, in its weights or on the way (autocast,
            casts); None: none. Where ``computed_in`` is finer, the posterior is that of the same network without this
            rounding, from which a plain call differs by ``plain_call``.
        seconds: what it cost.
        reduced: what was audited less, and why; None where nothing was.
    """

    examples: int
    total: int
    worst: float
    worst_example: int | None
    allowed: float
    moved: float
    methods: tuple[str, ...] = ()
    seconds: float = 0.0
    reduced: str | None = None
    batches: int = 0
    plain_call: float | None = None
    plain_call_allowed: float = 0.0
    computed_in: str | None = None
    rounds_to: str | None = None
    jump: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the rows speak the truth of every example that was audited, and at least one was."""
        right = self.worst <= self.allowed and self.jump == 0
        return self.examples > 0 and right and self.deployed

    @property
    def deployed(self) -> bool:
        """Whether the rows belong to the network as a plain call of it runs, as far as one could be made."""
        return self.plain_call is None or self.plain_call <= self.plain_call_allowed

    def joined(self, other: Audit) -> Audit:
        """Of these samples and of others of the same fit that were drawn later."""
        worse = other if not other.worst <= self.worst else self
        calls = [a.plain_call for a in (self, other) if a.plain_call is not None]
        return replace(
            self,
            examples=min(self.examples, other.examples),
            worst=worse.worst,
            worst_example=worse.worst_example,
            moved=max(self.moved, other.moved),
            methods=tuple(dict.fromkeys((*self.methods, *other.methods))),
            seconds=self.seconds + other.seconds,
            reduced=self.reduced or other.reduced,
            plain_call=max(calls, default=None),
            jump=max(self.jump, other.jump),
        )

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.examples:
            return (
                "No example was audited, so whether the rows are those of the network is not known."
            )
        ways = " and ".join(self.methods) or "plain derivatives"
        seen = f"{self.examples} of {self.total:,} training examples, each alone, by {ways}"
        if self.passed:
            text = f"Audited on {seen}: samples move what is preserved as the rows say"
            end = f" (within {_share(self.worst)} of what the prior would do)." + self._rounding
            return (
                text + end + (f" Audited less than usual: {self.reduced}." if self.reduced else "")
            )
        if self.jump:
            return (
                f"The audit failed: outputs of training examples jump by {_share(self.jump)} of their size as soon as "
                "weights move at all (weights that are rounded down or cut to integers on the very grid that they lie "
                "on, a choice between equals): there is no derivative at the trained weights, and linearised samples "
                "say nothing of this network. Leave these weights out with `parameters=`, or round to the nearest."
            )
        if self.worst <= self.allowed:
            return (
                "The audit failed: a plain call of the network gives other outputs (by "
                f"{_share(self.plain_call or 0)}) than the function that its rows were taken of. Look for a forward "
                "pass that takes another path where gradients are recorded, or that uses another module than its own."
            )
        return (
            f"The audit failed: audited on {seen}, samples move example {self.worst_example} otherwise than the rows "
            f"say, by {_share(self.worst)} of what the prior would do (rounding explains {_share(self.allowed)}). "
            "Figures that come from the rows, the residual among them, do not speak of this network: do not rely on "
            "this posterior. Look for a custom gradient (`torch.autograd.Function`, a straight-through estimator) that "
            "is not the derivative, for weights that act on outputs past their gradient (`.detach()`, `.data`, "
            "`.item()`, `no_grad`), and for a forward pass that depends on the batch; if there is none, report it "
            "with the model's code."
        )

    @property
    def _rounding(self) -> str:
        """A sentence on half precision, where the network computes with it."""
        if self.rounds_to is None:
            return ""
        if self.computed_in == self.rounds_to:
            return (
                f" The network rounds to {self.rounds_to} on the way and does not run without, so its rows are proved "
                f"within {_share(LARGEST)} and no closer; take casts and autocast out of its forward pass for more."
            )
        away = (
            ""
            if self.plain_call is None
            else f", whose outputs differ by {_share(self.plain_call)}"
        )
        return (
            f" Rows, samples and predictions are those of the network computed in {self.computed_in} throughout; the "
            f"deployed one rounds to {self.rounds_to}{away}."
        )

    def as_dict(self) -> dict[str, Any]:
        """All fields and ``passed``; JSON-able."""
        return asdict(self) | {"methods": list(self.methods), "passed": self.passed}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Audit:
        """The inverse of :meth:`as_dict`."""
        known = {f.name for f in fields(cls)}
        kept: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known
        }
        return cls(**kept)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 1e-3 else f"{value:.0e}"
