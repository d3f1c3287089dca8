"""The prior precision by the evidence, and what a certificate says."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import QUIET, TRAIN, X, Y, fit, network, says
from torch import nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.certificate.certificate import Certificate
from nullbayes.fit.evidence import fixed_point, null_space_precision
from nullbayes.posterior.calibration_path import CalibrationPath
from nullbayes.solvers import Spectrum
from nullbayes.solvers.base import Status

positive = st.floats(1e-6, 1e6)

# -- evidence ------------------------------------------------------------------------------------


def spectrum(values: list[float]) -> Spectrum:
    t = torch.tensor(values, dtype=torch.float64)
    return Spectrum(t, torch.ones_like(t), True)


@settings(deadline=None)
@given(st.lists(positive, min_size=1, max_size=9), st.floats(1e-3, 1e3), st.floats(1e-4, 1.0))
def test_the_fixed_point_is_one(values: list[float], norm: float, delta: float) -> None:
    """``α ‖θ‖² = Σ λ/(λ + δα)``, with the sum written out."""
    weights = torch.full((4,), (norm / 4) ** 0.5, dtype=torch.float64)
    alpha = fixed_point(spectrum(values), weights, delta)
    assert alpha * norm == pytest.approx(sum(v / (v + delta * alpha) for v in values), rel=1e-6)


def test_the_fixed_point_is_the_maximum_of_the_evidence() -> None:
    """MacKay's evidence itself, as a function of the prior precision, on a Gaussian linear model."""
    rows = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hessian = rows.T @ rows

    def log_evidence(alpha: float) -> float:
        precision = hessian + alpha * torch.eye(8, dtype=torch.float64)
        return float(
            4 * math.log(alpha) - alpha / 2 * weights.square().sum() - precision.logdet() / 2
        )

    best = fixed_point(spectrum(torch.linalg.svdvals(rows).square().tolist()), weights)
    for factor in (0.7, 0.97, 1.03, 1.5):
        assert log_evidence(best * factor) < log_evidence(best)


@settings(deadline=None)
@given(st.floats(0.5, 100), st.floats(1e-3, 1e3))
def test_a_precision_not_a_variance(gamma: float, scale: float) -> None:
    """Larger weights ask for a wider prior: the precision falls with the square of their size."""
    weights = torch.ones(10, dtype=torch.float64)
    one = null_space_precision(gamma, 10, weights)
    assert one == pytest.approx(gamma / 10)
    assert null_space_precision(gamma, 10, scale * weights) == pytest.approx(one / scale**2)


def test_evidence_without_data_or_weights() -> None:
    with pytest.warns(nb.NullBayesWarning, match=r"no direction.*ignore_index.*prior_precision="):
        assert null_space_precision(0, 8, torch.ones(4)) == 2.0
    zero = torch.zeros(3)
    for run in (
        lambda: null_space_precision(1, 3, zero),
        lambda: fixed_point(spectrum([1.0]), zero),
    ):
        with says(nb.InputError, "weights are zero", "prior_precision="):
            run()
    assert math.isfinite(fixed_point(spectrum([0.0, 0.0]), torch.ones(2)))


# -- certificate ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good() -> Certificate:
    """A certificate whose guarantee held, to be spoilt field by field."""
    certificate = fit(
        network(nn.Linear(6, 6), nn.Tanh()).double(), [(X.double(), Y)], delta=0
    ).certificate
    assert certificate.status == Status.CONVERGED.value and certificate.residual <= 1e-10
    return replace(
        certificate, drift=1e-3, sampled_drift=2e-3, network_score=0.9, posterior_score=0.9
    )


def test_held(good: Certificate) -> None:
    assert good.held and good.verdict.startswith("The guarantee held")
    assert "0.9000 → 0.9000" in good.verdict and "the training predictions" in good.verdict
    assert replace(good, posterior_score=0.95).held
    assert "weak" not in good.verdict and "sampled network drifts" not in good.verdict


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"residual": 1e-3, "status": Status.STAGNATED.value},
            ("1.0e-03", "tolerance", "float64 model"),
        ),
        ({"residual": 1e-3, "status": Status.MAX_ITERATIONS.value}, ("misses", "max_iterations")),
        (
            {"null_dim": 0},
            ("null space is empty", "directions=", "preserve='loss'", "LaplacePosterior"),
        ),
        ({"posterior_score": 0.89}, ("accuracy 0.9000 → 0.8900",)),
        ({"network_score": math.nan, "posterior_score": math.nan}, ("no training accuracy",)),
        ({"posterior_score": math.nan}, ("no training accuracy",)),
        ({"score_name": "rmse", "posterior_score": 0.902}, ("RMSE 0.9000 → 0.9020",)),
        ({"residual": math.nan}, ("nan", "misses the tolerance")),
        ({"residual": math.inf}, ("inf", "misses the tolerance")),
    ],
    ids=str,
)
def test_weak(good: Certificate, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    spoilt = replace(good, **changes)
    assert not spoilt.held and spoilt.verdict.startswith("The guarantee is weak:")
    assert [w for w in words if w not in spoilt.verdict] == []
    assert spoilt.verdict in str(spoilt) and spoilt.as_dict()["held"] is False


def test_regression_scores_may_move_a_little(good: Certificate) -> None:
    regression = replace(good, score_name="rmse")
    assert replace(regression, posterior_score=0.9005).held
    assert replace(regression, posterior_score=0.1).held
    assert not replace(regression, posterior_score=0.91).held
    assert "training RMSE" in str(regression) and "accuracy" not in regression.verdict


def test_a_residual_below_delta_is_on_purpose(good: Certificate) -> None:
    numerical = replace(good, status=Status.NUMERICAL.value, delta=1e-3, residual=0.01)
    assert numerical.held and "delta = 0.001" in str(numerical)
    assert not replace(numerical, status=Status.STAGNATED.value).held


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"null_dim": 1}, "% of the weight directions are free"),
        ({"sampled_drift": 0.5}, "method='linearised'"),
        ({"discarded_trace": 0.0123}, "1.23 % of the Hessians' trace was left out"),
        ({"notes": ("jitter raised to 1e-4",)}, "jitter raised to 1e-4"),
        ({"evidence": 0.1, "prior_precision": 2.0}, "prior precision to 0.1; it was raised to 2,"),
        ({"evidence": 2.0, "left_out_divergence": 0.015}, "by 0.015 nats. On new data"),
        (
            {"evidence": 0.01, "prior_precision": 2.0, "left_out_divergence": 0.02},
            "the last layers",
        ),
    ],
    ids=str,
)
def test_advice_beside_a_guarantee_that_held(
    good: Certificate, changes: dict[str, Any], words: str
) -> None:
    assert words not in good.verdict
    advised = replace(good, **changes)
    assert advised.held and words in advised.verdict


def test_a_prior_raised_a_little_is_no_reason_to_keep_more(good: Certificate) -> None:
    raised = replace(good, evidence=0.1, prior_precision=2.0, left_out_divergence=0.02)
    assert "it was raised" in raised.verdict and "last layers" not in raised.verdict
    # Raised for the training data's sake: other examples are no worse off.
    kept = replace(good, evidence=0.01, prior_precision=2.0, left_out_divergence=0.001)
    assert "it was raised" in kept.verdict and "last layers" not in kept.verdict


def test_laplace_promises_nothing(good: Certificate) -> None:
    laplace = replace(good, method="Laplace", posterior_score=0.85)
    assert not laplace.held and not laplace.promises
    assert "does not promise" in laplace.verdict and "costs 0.0500" in laplace.verdict
    assert "it did here" in replace(laplace, posterior_score=0.9).verdict
    unknown = replace(laplace, network_score=math.nan, posterior_score=math.nan).verdict
    assert "does not promise" in unknown and "it did here" not in unknown
    stopped = replace(laplace, status=Status.MAX_ITERATIONS.value)
    assert "not exact" in stopped.verdict and "`max_iterations`" in stopped.verdict
    assert "not exact" not in laplace.verdict


def test_the_printed_table(good: Certificate) -> None:
    text = str(
        replace(good, generic=("a", "b", "c", "d", "e"), discarded_trace=0.5, peak_memory=3 * 2**30)
    )
    lines = text.splitlines()
    assert lines[0] == "Certificate"
    for words in (
        "14 × ",
        "5 tensors: a, b, c, d …",
        "50.000 %",
        "3.0 GB",
        "7 checked",
        good.solver,
    ):
        assert words in text
    table = lines[1 : lines.index("")]
    labels = {len(line) - len(line[2:].lstrip()) for line in table}
    assert labels == {2} and max(map(len, table)) < 120  # fits beside a shell prompt


@pytest.mark.parametrize("value", [0.0, 1e-300, 0.1 + 0.2, math.inf, -math.inf, math.nan])
def test_round_trip_through_json(good: Certificate, value: float) -> None:
    names = [f.name for f in fields(Certificate) if f.type == "float"]
    assert len(names) > 10
    odd = replace(good, **dict.fromkeys(names, value), generic=("a.b",), notes=("ä", "→"))
    back = Certificate.from_dict(json.loads(json.dumps(odd.as_dict())))
    assert repr(back) == repr(odd)  # NaN is not equal to itself
    assert back.verdict == odd.verdict and str(back) == str(odd)
    later = odd.as_dict() | {"a field of a later version": 1}
    assert repr(Certificate.from_dict(later)) == repr(odd)


def test_the_calibration_path_through_json() -> None:
    posterior = fit(network(), [(X, X)], "regression")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nb.NullBayesWarning)
        path = posterior.calibrate([(X, X)], **QUIET)
    assert path.ece is None and path.auroc is None
    assert CalibrationPath(**json.loads(json.dumps(path.as_dict()))) == path


def test_what_is_measured_is_true() -> None:
    """Drift, residual and accuracies, computed here from the samples themselves."""
    model = network()
    posterior = fit(model, num_samples=8)
    c, p = posterior.certificate, posterior.predict(X)
    before = model(X).detach().softmax(1)
    drift = (p.outputs.softmax(2) - before).square().mean().sqrt()
    linear = posterior.preserve.change(posterior.likelihood, p.point, p.outputs, Y, linear=True)
    assert_close(
        torch.tensor(c.drift, dtype=torch.float64),
        linear.double().square().mean().sqrt(),
        rtol=1e-4,
        atol=0,
    )
    assert float(drift) <= 3 * c.drift + 1e-6
    sampled = posterior.predict(X, method="sampled").outputs.softmax(2) - before
    assert c.sampled_drift == pytest.approx(
        float(sampled.double().square().mean().sqrt()), rel=1e-4
    )
    assert c.network_score == pytest.approx(float((before.argmax(1) == Y).double().mean()))
    assert c.posterior_score == pytest.approx(float((p.mean.argmax(1) == Y).double().mean()))
    assert (c.examples, c.checked_examples, c.num_samples) == (7, 7, 8)
    assert c.rank + c.null_dim == c.parameters == 45 and c.constraints == 14
    assert 0 < c.prior_share < 1 and c.seconds > 0 and c.peak_memory > 2**20


def test_drift_follows_the_prior_precision() -> None:
    posterior = nb.LaplacePosterior(network()).fit(TRAIN, 8, **QUIET)
    start = posterior.certificate
    posterior.prior_precision = 4 * start.prior_precision
    assert posterior.certificate.output_drift == pytest.approx(start.output_drift / 2, rel=1e-4)
    assert posterior.certificate.prior_precision == 4 * start.prior_precision
    assert posterior.certificate.residual == start.residual
    posterior.prior_precision = start.prior_precision
    assert replace(posterior.certificate, seconds=0) == replace(start, seconds=0)
