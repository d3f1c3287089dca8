"""Did the guarantee hold? Measured on the training data after every fit, not assumed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from html import escape
from typing import Any

from nullbayes.audit import Audit
from nullbayes.certificate.verdict import (
    ALLOWED_DIVERGENCE,
    NO_EFFECT,
    NUMERICAL_DRIFT,
    NUMERICAL_RESIDUAL,
    verdict_of,
)
from nullbayes.common.deprecation import warn_deprecated
from nullbayes.common.memory import format_bytes
from nullbayes.constraints.preserve import Predictions
from nullbayes.likelihood.score import score_named
from nullbayes.solvers.base import Status

NULL_SPACE = "null-space"
#: fields of version 0.1 -> what they are called now, that they hold an RMSE or a loss as well
RENAMED = {
    "map_accuracy": "network_score",
    "posterior_accuracy": "posterior_score",
    "unseen_divergence": "left_out_divergence",
}


@dataclass(frozen=True, repr=False)
class Certificate:
    """What a fit reached, in figures and in words (``verdict``). ``print`` it.

    Attributes:
        residual: largest ``‖AΔ‖ / ‖Aε‖`` over the samples, recomputed from the rows after the solve.
        tolerance: what the solver was asked for.
        drift: RMS change of the preserved quantity (probabilities, outputs or losses) over the
            checked training examples and all samples, linearised, at ``prior_precision``.
        sampled_drift: the same for the re-weighted network itself, on a subset.
        row_drift: ``√(mean_n ‖A_n Δ‖²)``, linearised, over all constrained examples. With
            ``preserve="predictions"``, half its square is the mean Kullback-Leibler divergence in nats
            between the trained network's prediction and a sample's.
        natural_units: whether ``row_drift`` has such units (not for raw outputs).
        output_drift: RMS change of the raw outputs (softmax: up to a constant), linearised.
        left_out_divergence: mean Kullback-Leibler divergence in nats between the trained network's prediction for an
            example and a sample's, had the example been left out of the fit: an estimate of what happens on other
            data of the same kind. None where the solver cannot tell, or means do not depend on the samples.
        network_score, posterior_score: accuracy of the trained network and of the posterior's mean
            prediction on the checked training examples; RMSE for regression; for a callable loss its mean at
            the trained network's outputs, and at those of the samples (``score_name``).
        constraints, parameters: the shape ``(M, P)`` of the constraint matrix.
        rank, null_dim: how many directions the data determine (the numerical rank; with an edge of the null space or
            for Laplace the effective number ``γ = Σ (1 - f)``, with the share ``f`` of each direction's variance that
            is left), and how many others there are.
        rank_estimated: whether these come from the samples or from random probes, and not from a factorisation.
        divergence: mean Kullback-Leibler divergence between the trained network's prediction and a sample's on the
            checked training examples, linearised outputs, nats an observation. With ``preserve="predictions"`` it is
            what `row_drift` says to second order. None where raw outputs are preserved, and in older files.
        gamma: ``γ`` as the samples have it, which the prior precision by the evidence and `novelty` count with; None
            in files of version 0.1, where it is ``rank``.
        prior_share: mean ``‖Δ‖² / ‖ε‖²``: what share of the prior's variance survived.
        delta: where the null space ends, relative to the prior precision (0: exact; 1: Laplace).
        discarded_trace: share of the output Hessians' trace that ``directions`` left out.
        solver, reason, status, iterations: what solved it, why that, how it ended, how much work.
        seconds, peak_memory: of the fit, in seconds and bytes (the process's peak); ``stages``: the seconds of
            each of its stages.
        examples, checked_examples: how many are constrained, and how many of them were checked.
        generic: parameters without a layer rule, served by the slower generic path.
        notes: what else deserves a look.
        audit: what plain derivatives of examples drawn from all the data say; None for a posterior of version 0.1.
        evidence: the prior precision that the evidence alone asks for; None where something else decided.
    """

    method: str
    preserve: str
    residual: float
    tolerance: float
    drift: float
    sampled_drift: float
    row_drift: float
    natural_units: bool
    output_drift: float
    network_score: float
    posterior_score: float
    score_name: str
    constraints: int
    parameters: int
    rank: int
    null_dim: int
    prior_share: float
    prior_precision: float
    delta: float
    discarded_trace: float
    solver: str
    reason: str
    status: str
    iterations: int
    seconds: float
    peak_memory: int
    examples: int
    checked_examples: int
    num_samples: int
    generic: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    stages: dict[str, float] = field(default_factory=dict)
    left_out_divergence: float | None = None
    evidence: float | None = None
    audit: Audit | None = None
    rank_estimated: bool = True
    gamma: int | None = None
    divergence: float | None = None

    def joined(self, new: dict[str, Any], measured: dict[str, Any] | None) -> Certificate:
        """The certificate of these samples and ``new["num_samples"]`` more.

        Args:
            new: residual, row drift, share of the prior, status and iterations of the new ones.
            measured: drifts and scores of all of them; None where that cannot be measured.
        """
        here, there = self.num_samples, new["num_samples"]

        def mean(a: float, b: float) -> float:
            return (here * a + there * b) / (here + there)

        worse = not new["status"].good
        return replace(
            self,
            residual=max(self.residual, new["residual"]),
            row_drift=math.sqrt(mean(self.row_drift**2, new["row_drift"] ** 2)),
            prior_share=mean(self.prior_share, new["prior_share"]),
            status=new["status"].value if worse else self.status,
            iterations=self.iterations + new["iterations"],
            num_samples=here + there,
            **(measured or {}),
        )

    @property
    def promises(self) -> bool:
        """Whether a guarantee was promised at all (not for Laplace)."""
        return self.method == NULL_SPACE

    @property
    def score_label(self) -> str:
        return score_named(self.score_name).label

    @property
    def score_loss(self) -> float:
        """How much worse the posterior scores on training data than the trained network."""
        return score_named(self.score_name).worsened(self.network_score, self.posterior_score)

    @property
    def held(self) -> bool:
        """The audit passed, residual within tolerance (or only below ``delta``), a null space, no training score lost.

        Predictions also have to stand as measured, as far as rows are to hold them (`stands`).

        Without an audit, as in files of version 0.1, it is not known: False.

        Regression: RMSE grown by less than 1e-3 of itself; classification: no accuracy lost; a callable loss:
        its mean over the samples, which is second order, grown by less than 1e-2 of itself.
        """
        return self.audit is not None and self.audit.passed and self.sound

    @property
    def sound(self) -> bool:
        """What `held` asks for beside the audit: what the fit's own rows and scores say."""
        allowed = score_named(self.score_name).allowed_growth * abs(self.network_score)
        kept = not math.isnan(self.score_loss) and self.score_loss <= allowed + 1e-12
        return self.promises and self.small_residual and self.null_dim > 0 and kept and self.stands

    @property
    def stands(self) -> bool:
        """Whether predictions move by as little as the rows say, or by less than `ALLOWED_DIVERGENCE`.

        Rows know divergences and losses to second or first order. Where a network is so confident that these are next
        to nothing, no row holds what turns its predictions over. Where losses are preserved, predictions may move as
        long as the prior would move the rows.
        """
        if self.divergence is None or self.divergence <= 1.0001 * ALLOWED_DIVERGENCE:
            return True
        if math.isnan(self.divergence):
            return False
        if self.preserve == Predictions().describe():
            return self.divergence <= 2 * self.row_drift**2
        return self.row_drift > NO_EFFECT * self.residual

    @property
    def small_residual(self) -> bool:
        """Within tolerance; or left on purpose, below ``delta`` or by rounding what is stored, and small."""
        if self.residual <= self.tolerance:
            return True
        # For very confident networks both norms in the residual are close to zero, so their ratio means
        # little; `row_drift`, in nats, decides.
        little = self.natural_units and self.row_drift <= NUMERICAL_DRIFT
        return self.status in (Status.NUMERICAL.value, Status.ROUNDED.value) and (
            self.residual <= NUMERICAL_RESIDUAL or little
        )

    @property
    def verdict(self) -> str:
        """The certificate in words."""
        return verdict_of(self)

    def __getattr__(self, name: str) -> Any:
        if name in RENAMED:
            warn_deprecated(f"`Certificate.{name}`", f"`Certificate.{RENAMED[name]}`")
            return getattr(self, RENAMED[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def as_dict(self) -> dict[str, Any]:
        """All fields, ``held`` and ``verdict``; JSON-able."""
        out = asdict(self) | {"held": self.held, "verdict": self.verdict}
        audit = None if self.audit is None else self.audit.as_dict()
        return out | {"generic": list(self.generic), "notes": list(self.notes), "audit": audit}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Certificate:
        """The inverse of :meth:`as_dict`, that of version 0.1 included."""
        values = {RENAMED.get(name, name): value for name, value in values.items()}
        known = {f.name for f in fields(cls)}
        kept: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known
        }
        if kept.get("audit") is not None:
            kept["audit"] = Audit.from_dict(kept["audit"])
        return cls(**kept)

    def _residual_note(self) -> str:
        if self.residual > self.tolerance and self.status == Status.NUMERICAL.value:
            return f"the share below delta = {self.delta:g}"
        if self.residual > self.tolerance and self.status == Status.ROUNDED.value:
            return f"tolerance {self.tolerance:.0e}, before samples were rounded"
        return f"tolerance {self.tolerance:.0e}"

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed table."""
        score = self.score_label
        out = [
            ("method", f"{self.method} posterior, preserves {self.preserve}"),
            ("residual ‖AΔ‖/‖Aε‖", f"{self.residual:.2e}  ({self._residual_note()})"),
            (f"training {score}", f"{self.network_score:.4f} → {self.posterior_score:.4f}"),
            ("drift, linearised", f"{self.drift:.3g}  (raw outputs {self.output_drift:.3g})"),
            ("drift of a row, RMS", f"{self.row_drift:.3g}"),
            ("drift, sampled network", f"{self.sampled_drift:.3g}"),
            *self._left_out(),
            *self._audited(),
            ("constraints × weights", f"{self.constraints:,} × {self.parameters:,}"),
            ("rank, null space", self._directions()),
            ("prior variance left", f"{100 * self.prior_share:.1f} %"),
            ("prior precision", f"{self.prior_precision:.4g}"),
            ("solver", f"{self.solver}, {self.iterations} iterations, {self.num_samples} samples"),
            ("examples", f"{self.examples:,}  ({self.checked_examples:,} checked)"),
            ("time, peak memory", f"{self.seconds:.1f} s, {format_bytes(self.peak_memory)}"),
        ]
        if self.discarded_trace > 0:
            out.append(("Hessian trace left out", f"{100 * self.discarded_trace:.3f} %"))
        if self.generic:
            names = ", ".join(self.generic[:4]) + (" …" if len(self.generic) > 4 else "")
            out.append(("generic path", f"{len(self.generic)} tensors: {names}"))
        return out

    def _directions(self) -> str:
        if self.rank_estimated:
            return f"about {self.rank:,}, about {self.null_dim:,}  (estimates)"
        return f"{self.rank:,}, {self.null_dim:,}"

    def _left_out(self) -> list[tuple[str, str]]:
        if self.left_out_divergence is None:
            return []
        return [("divergence, left out", f"{self.left_out_divergence:.3g} nats")]

    def _audited(self) -> list[tuple[str, str]]:
        a = self.audit
        if a is None:
            return [("audit", "none was made")] if self.promises else []
        state = "passed" if a.passed else "FAILED"
        told = f"{state}: {a.examples} examples, {a.batches} batches, worst {a.worst:.1e}"
        return [("audit", told)]

    def __repr__(self) -> str:
        return f"Certificate(held={self.held}, {self.method}, preserves {self.preserve})"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{escape(n)}</th><td>{escape(v)}</td></tr>" for n, v in self.rows())
        return f"<table>{rows}</table><p>{escape(self.verdict)}</p>"

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        lines = [f"  {label:<{width}}  {value}" for label, value in rows]
        return "\n".join(["Certificate", *lines, "", f"  {self.verdict}"])
