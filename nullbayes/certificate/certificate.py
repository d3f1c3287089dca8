"""Did the guarantee hold? Measured on the training data after every fit, not assumed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nullbayes.common.memory import format_bytes
from nullbayes.solvers.base import Status

# What the directions below `delta` may leave of the prior's effect on the training rows.
NUMERICAL_RESIDUAL = 0.05
# The same as an absolute change: half the square is a hundredth of a nat for each example.
NUMERICAL_DRIFT = 0.1
# The same as a Kullback-Leibler divergence from the trained network's prediction, per observation, in nats.
ALLOWED_DIVERGENCE = NUMERICAL_DRIFT**2 / 2
# The same for examples that a posterior has not seen (leave-one-out).
ALLOWED_UNSEEN = 0.02
# From here on a certificate says that validation data should decide.
NOTABLE_UNSEEN = 0.01
# How far that may raise the prior precision above the evidence's before a certificate says that what is kept says
# little of other data (a Swin-T of which 256 of 10,000 images are kept: 2,200 times).
FAR_RAISED = 100.0

# Growth of the training score, relative to itself, that a held guarantee may show.
ALLOWED_GROWTH = {"rmse": 1e-3, "loss": 1e-2}


@dataclass(frozen=True)
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
        unseen_divergence: mean Kullback-Leibler divergence in nats between the trained network's prediction for an
            example and a sample's, had the example been left out of the fit: an estimate of what happens on other
            data of the same kind. None where the solver cannot tell, or means do not depend on the samples.
        map_accuracy, posterior_accuracy: accuracy of the trained network and of the posterior's mean
            prediction on the checked training examples; RMSE for regression; for a callable loss its mean at
            the trained network's outputs, and at those of the samples (``score_name``).
        constraints, parameters: the shape ``(M, P)`` of the constraint matrix.
        rank, null_dim: how many directions the data determine (the numerical rank; for Laplace the
            effective number of parameters ``γ``), and ``P - rank``.
        prior_share: mean ``‖Δ‖² / ‖ε‖²``: what share of the prior's variance survived.
        delta: where the null space ends, relative to the prior precision (0: exact; 1: Laplace).
        discarded_trace: share of the output Hessians' trace that ``directions`` left out.
        solver, reason, status, iterations: what solved it, why that, how it ended, how much work.
        seconds, peak_memory: of the fit, in seconds and bytes (the process's peak); ``stages``: the seconds of
            each of its stages.
        examples, checked_examples: how many are constrained, and how many of them were checked.
        generic: parameters without a layer rule, served by the slower generic path.
        notes: what else deserves a look.
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
    map_accuracy: float
    posterior_accuracy: float
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
    unseen_divergence: float | None = None
    evidence: float | None = None

    @property
    def projects(self) -> bool:
        """Whether a guarantee was promised at all (not for Laplace)."""
        return self.method == "null-space"

    @property
    def _score(self) -> str:
        return "RMSE" if self.score_name == "rmse" else self.score_name

    @property
    def score_loss(self) -> float:
        """How much worse the posterior scores on training data than the trained network."""
        change = self.posterior_accuracy - self.map_accuracy
        return -change if self.score_name == "accuracy" else change

    @property
    def held(self) -> bool:
        """Residual within tolerance (or only below ``delta``), a null space, no training score lost.

        Regression: RMSE grown by less than 1e-3 of itself; classification: no accuracy lost; a callable loss:
        its mean over the samples, which is second order, grown by less than 1e-2 of itself.
        """
        allowed = ALLOWED_GROWTH.get(self.score_name, 0.0) * abs(self.map_accuracy)
        kept = not math.isnan(self.score_loss) and self.score_loss <= allowed + 1e-12
        return self.projects and self.small_residual and self.null_dim > 0 and kept

    @property
    def small_residual(self) -> bool:
        """Within tolerance, or left on purpose in directions below ``delta`` and small."""
        if self.residual <= self.tolerance:
            return True
        # Where the network is sure of everything, rows and residual are small over small; what counts
        # is how far a sample moves the predictions.
        unseen = self.natural_units and self.row_drift <= NUMERICAL_DRIFT
        return self.status == Status.NUMERICAL.value and (
            self.residual <= NUMERICAL_RESIDUAL or unseen
        )

    @property
    def verdict(self) -> str:
        """The certificate in words."""
        name = self._score
        scores = f"training {name} {self.map_accuracy:.4f} → {self.posterior_accuracy:.4f}"
        if not self.projects:
            cost = f"it costs {self.score_loss:.4f} here" if self.score_loss > 0 else "it did here"
            if math.isnan(self.score_loss):
                cost = f"no training {name} could be measured"
            keep = f"A Laplace posterior does not promise to keep training predictions; {cost}"
            text = f"{keep} ({scores})."
            if self.status not in (Status.CONVERGED.value, Status.NUMERICAL.value):
                text += f" Its samples are not exact: {self.status}."
            return text
        if self.held:
            text = f"The guarantee held: {scores}. Samples move {self.preserve} by "
            text += f"{self.drift:.2g} (RMS), {self._left()} of what the prior would."
        else:
            text = " ".join(self._weaknesses(scores, name))
        return " ".join([text, *self._advice()])

    def _weaknesses(self, scores: str, name: str) -> list[str]:
        out = ["The guarantee is weak:"]
        if self.null_dim == 0:
            out.append(
                f"the null space is empty, the data determine all {self.parameters} weights; keep "
                "less of each example (`directions=`, `preserve='loss'`), fewer examples, or use "
                "`LaplacePosterior`."
            )
        if not self.small_residual:
            out.append(
                f"the residual {self.residual:.1e} misses the tolerance {self.tolerance:.1e}; "
                f"{self.status}."
            )
        if math.isnan(self.score_loss):
            out.append(f"no training {name} could be measured.")
        elif self.score_loss > 0:
            out.append(f"{scores}.")
        return out

    def _advice(self) -> list[str]:
        out = []
        if 0 < self.null_dim < 0.05 * self.parameters:
            share = 100 * self.null_dim / self.parameters
            out.append(
                f"Only {share:.1f} % of the weight directions are free, so uncertainty off the data "
                "will be small; constrain less (`directions='auto'`, `preserve='loss'`)."
            )
        if self.projects and self.constraints > self.parameters:
            kept = 100 * self.prior_share
            out.append(
                f"There are more constraints ({self.constraints:,}) than weights ({self.parameters:,}): the null "
                f"space is numerical. {kept:.0f} % of the prior's variance survived; a sample moves an example's "
                f"row by {self.row_drift:.2g} (RMS)."
            )
            if kept < 50:
                out.append(
                    "To keep more of it, accept a larger residual (`tolerance=`, `drift=`) or `delta`, or "
                    "constrain less (`max_examples=`, `directions='auto'`, `preserve='loss'`)."
                )
        if self.drift > 0 and self.sampled_drift > max(0.02, 10 * self.drift):
            out.append(
                f"The sampled network drifts at second order ({self.sampled_drift:.3g} against "
                f"{self.drift:.3g} linearised): predict with method='linearised'."
            )
        if self.discarded_trace > 0:
            out.append(f"{100 * self.discarded_trace:.2f} % of the Hessians' trace was left out.")
        return [*out, *self.notes, *self._on_the_prior()]

    def _on_the_prior(self) -> list[str]:
        """Nothing once something else than the evidence has decided."""
        if self.evidence is None:
            return []
        out = []
        if self.prior_precision > self.evidence:
            out.append(
                f"The evidence alone would set the prior precision to {self.evidence:.3g}; it was raised to "
                f"{self.prior_precision:.3g}, where samples move training predictions by {ALLOWED_DIVERGENCE:g} nats "
                f"at most, and those of examples that are left out by {ALLOWED_UNSEEN:g}."
            )
        unseen = self.unseen_divergence or 0.0
        if unseen >= NOTABLE_UNSEEN and self.prior_precision > FAR_RAISED * self.evidence:
            out.append(
                "What is kept says little of other data: keep more examples, or let fewer weights move (`parameters=`, "
                "the names of the last layers; a twentieth of the weights, say), of which the data determine more. "
                "That is often the better posterior of a large network."
            )
        if unseen >= NOTABLE_UNSEEN:
            out.append(
                f"Samples move predictions of left-out examples by {unseen:.2g} nats, more where the network is less "
                "sure than on training data: if it is well calibrated already, that costs. `calibrate` decides on "
                "validation data."
            )
        return out

    def as_dict(self) -> dict[str, Any]:
        """All fields, ``held`` and ``verdict``; JSON-able."""
        out = asdict(self) | {"held": self.held, "verdict": self.verdict}
        return out | {"generic": list(self.generic), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Certificate:
        """The inverse of :meth:`as_dict`."""
        known = {f.name for f in fields(cls)}
        kept: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known
        }
        return cls(**kept)

    def _left(self) -> str:
        percent = 100 * self.residual
        return f"{percent:.1f} %" if percent >= 0.1 else f"{self.residual:.0e}"

    def _residual_note(self) -> str:
        if self.residual <= self.tolerance or self.status != Status.NUMERICAL.value:
            return f"tolerance {self.tolerance:.0e}"
        return f"the share below delta = {self.delta:g}"

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed table."""
        score = self._score
        out = [
            ("method", f"{self.method} posterior, keeps {self.preserve}"),
            ("residual ‖AΔ‖/‖Aε‖", f"{self.residual:.2e}  ({self._residual_note()})"),
            (f"training {score}", f"{self.map_accuracy:.4f} → {self.posterior_accuracy:.4f}"),
            ("drift, linearised", f"{self.drift:.3g}  (raw outputs {self.output_drift:.3g})"),
            ("drift of a row, RMS", f"{self.row_drift:.3g}"),
            ("drift, sampled network", f"{self.sampled_drift:.3g}"),
            *self._unseen(),
            ("constraints × weights", f"{self.constraints:,} × {self.parameters:,}"),
            ("rank, null space", f"{self.rank:,}, {self.null_dim:,}"),
            ("prior variance kept", f"{100 * self.prior_share:.1f} %"),
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

    def _unseen(self) -> list[tuple[str, str]]:
        if self.unseen_divergence is None:
            return []
        return [("divergence, left out", f"{self.unseen_divergence:.3g} nats")]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        lines = [f"  {label:<{width}}  {value}" for label, value in rows]
        return "\n".join(["Certificate", *lines, "", f"  {self.verdict}"])
