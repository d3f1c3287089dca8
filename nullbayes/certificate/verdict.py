"""A certificate in words: whether the guarantee held, what is weak about it, and the mend."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from nullbayes.solvers.base import Status

if TYPE_CHECKING:
    from nullbayes.certificate.certificate import Certificate

# What the directions below `delta` may leave of the prior's effect on the training rows, as a share.
NUMERICAL_RESIDUAL = 0.05
# The same as an absolute change: half the square is a hundredth of a nat for each example.
NUMERICAL_DRIFT = 0.1
# Where the prior itself would move losses by less, to first order, in nats, rows of losses hold nothing. (Residual and
# drift, of which this is the ratio, are a maximum and a mean.)
NO_EFFECT = 1e-3
# The same as a Kullback-Leibler divergence from the trained network's prediction, per observation, in nats.
ALLOWED_DIVERGENCE = NUMERICAL_DRIFT**2 / 2
# The same for examples that are left out of the fit, in nats.
ALLOWED_LEFT_OUT = 0.02
# From here on a certificate says that validation data should decide.
NOTABLE_LEFT_OUT = 0.01
# How many times the evidence's the prior precision may be before a certificate says that the constraints do not
# generalise (a Swin-T with 256 of 10,000 images constrained: 2,200 times).
FAR_RAISED = 100.0


def verdict_of(c: Certificate) -> str:
    """The certificate in words."""
    name = c.score_label
    scores = f"training {name} {c.network_score:.4f} → {c.posterior_score:.4f}"
    if not c.promises:
        cost = f"it costs {c.score_loss:.4f} here" if c.score_loss > 0 else "it did here"
        if math.isnan(c.score_loss):
            cost = f"no training {name} could be measured"
        keep = f"A Laplace posterior does not promise to preserve training predictions; {cost}"
        text = f"{keep} ({scores})."
        if c.status not in [status.value for status in Status if status.good]:
            text += f" Its samples are not exact: {c.status}."
        return text
    if c.held:
        text = f"The guarantee held: {scores}. Samples move {c.preserve} by "
        text += f"{c.drift:.2g} (RMS), {_left(c)} of what the prior would."
        if c.status == Status.ROUNDED.value:
            text += (
                f" Rounding them to what they are stored in left a residual of {c.residual:.1g}."
            )
    elif c.audit is None and c.sound:
        text = "Whether the guarantee held is not known: this fit was never audited (version 0.1 had no audit). By its "
        text += f"own rows, which nobody checked, {scores}, and samples move {c.preserve} by {c.drift:.2g} (RMS), "
        text += f"{_left(c)} of what the prior would. Call `fit` again to have it checked."
    else:
        text = " ".join(_weaknesses(c, scores, name))
    audited = [c.audit.verdict] if c.audit is not None and c.audit.passed else []
    return " ".join([text, *audited, *_advice(c)])


def _weaknesses(c: Certificate, scores: str, name: str) -> list[str]:
    out = ["The guarantee is weak:"]
    if c.audit is None:
        out.append("it was never audited (version 0.1 had no audit; call `fit` again).")
    elif not c.audit.passed:
        out.append(c.audit.verdict)
    if c.null_dim == 0:
        out.append(
            f"the null space is empty, the data determine all {c.parameters} weights. Constrain "
            "less of each example (`directions=`, `preserve='loss'`) or fewer examples, or use "
            "`LaplacePosterior`."
        )
    if not c.small_residual:
        out.append(
            f"the residual {c.residual:.1e} misses the tolerance {c.tolerance:.1e}; {c.status}."
        )
    if not c.stands:
        why = "the network is so confident that its output Hessian is next to nothing"
        if c.discarded_trace > 0:
            why = f"`directions` left out {100 * c.discarded_trace:.2g} % of the output Hessians' trace"
        out.append(
            f"samples move the training predictions by {c.divergence:.2g} nats an observation (mean Kullback-Leibler "
            f"divergence; {ALLOWED_DIVERGENCE:g} is allowed), far more than the rows know of: {why}. Raise the prior "
            "precision (`prior_precision='evidence'` bounds this), or use `preserve='outputs'`."
        )
    if math.isnan(c.score_loss):
        out.append(f"no training {name} could be measured.")
    elif c.score_loss > 0:
        out.append(f"{scores}.")
    return out


def _advice(c: Certificate) -> list[str]:
    out = []
    if 0 < c.null_dim < 0.05 * c.parameters:
        share = f"{'about ' if c.rank_estimated else ''}{100 * c.null_dim / c.parameters:.1f} %"
        out.append(
            f"Only {share} of the weight directions are free, so uncertainty off the data "
            "will be small; constrain less (`directions='auto'`, `preserve='loss'`)."
        )
    if c.promises and c.constraints > c.parameters:
        survived = 100 * c.prior_share
        out.append(
            f"There are more constraints ({c.constraints:,}) than weights ({c.parameters:,}): the null "
            f"space is numerical. {survived:.0f} % of the prior's variance survived; a sample moves an example's "
            f"row by {c.row_drift:.2g} (RMS)."
        )
        if survived < 50:
            out.append(
                "For more of it, accept a larger residual (`tolerance=`, `row_drift=`) or `delta`, or "
                "constrain less (`max_examples=`, `directions='auto'`, `preserve='loss'`)."
            )
    if c.drift > 0 and c.sampled_drift > max(0.02, 10 * c.drift):
        out.append(
            f"The sampled network drifts at second order ({c.sampled_drift:.3g} against "
            f"{c.drift:.3g} linearised): predict with method='linearised'."
        )
    if c.discarded_trace > 0:
        out.append(f"{100 * c.discarded_trace:.2f} % of the Hessians' trace was left out.")
    return [*out, *c.notes, *_on_the_prior(c)]


def _on_the_prior(c: Certificate) -> list[str]:
    """Nothing once something else than the evidence has decided."""
    if c.evidence is None:
        return []
    out = []
    if c.prior_precision > c.evidence:
        out.append(
            f"The evidence alone would set the prior precision to {c.evidence:.3g}; it was raised to "
            f"{c.prior_precision:.3g}, where samples move training predictions by {ALLOWED_DIVERGENCE:g} nats "
            f"at most, and those of examples that are left out by {ALLOWED_LEFT_OUT:g}."
        )
    left_out = c.left_out_divergence or 0.0
    if left_out >= NOTABLE_LEFT_OUT and c.prior_precision > FAR_RAISED * c.evidence:
        out.append(
            "The constraints do not generalise: at the evidence's prior precision, predictions of left-out training "
            f"examples would move far more than {ALLOWED_LEFT_OUT:g} nats. Raise `max_examples`, or restrict "
            "`parameters=` to the last layers (a twentieth of the weights, say), of which the data determine more; "
            "for a large network that is often the better posterior."
        )
    if left_out >= NOTABLE_LEFT_OUT:
        out.append(
            f"Samples move predictions of left-out examples by {left_out:.2g} nats. On new data, of which the network "
            "is less confident, they move more; if it is well calibrated already, that raises the NLL. Decide with "
            "`calibrate` on validation data."
        )
    return out


def _left(c: Certificate) -> str:
    percent = 100 * c.residual
    return f"{percent:.1f} %" if percent >= 0.1 else f"{c.residual:.0e}"
