"""A network that is confident beyond rounding: its rows are zero, and the guarantee is measured on predictions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes.certificate.verdict import ALLOWED_DIVERGENCE
from tests.support import QUIET


def confident(scale: float) -> tuple[nn.Module, Tensor, Tensor]:
    """Logits of the size of ``scale``; labels are what the network says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        model[2].weight *= scale
        model[2].bias *= scale
        return model, x, model(x).argmax(1)


def dense_divergence(posterior: nb.NullSpacePosterior, x: Tensor) -> float:
    """Mean divergence of the samples' linearised predictions, one example alone, by plain derivatives."""
    model, total = posterior.model, 0.0
    parameters = list(model.parameters())
    for one in x:
        out = model(one[None])[0]
        rows = [torch.autograd.grad(o, parameters, retain_graph=True) for o in out]
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        moved = out + posterior._samples() @ jacobian.T
        p, moved = out.detach().log_softmax(0), moved.detach()
        total += float((p.exp() * (p - moved.log_softmax(1))).sum(1).mean())
    return total / len(x)


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_predictions_that_turn_over_are_not_held(scale: float) -> None:
    model, x, y = confident(scale)
    posterior = nb.NullSpacePosterior(model, prior_precision=1.0).fit([(x, y)], 5, **QUIET)
    certificate = posterior.certificate
    wanted = dense_divergence(posterior, x)
    assert wanted > 10 and certificate.row_drift < 0.01  # what the rows know of
    assert certificate.divergence == pytest.approx(wanted, rel=1e-6)
    assert not certificate.held and "so confident" in certificate.verdict
    posterior.prior_precision = 1e12
    assert posterior.certificate.held and "so confident" not in posterior.certificate.verdict


def test_the_evidence_bounds_it_and_older_files_do_not_say() -> None:
    model, x, y = confident(100.0)
    certificate = nb.NullSpacePosterior(model).fit([(x, y)], 5, **QUIET).certificate
    assert certificate.held and certificate.divergence is not None
    assert certificate.divergence <= ALLOWED_DIVERGENCE
    assert replace(certificate, divergence=None).stands
    values = certificate.as_dict()
    assert nb.Certificate.from_dict(values) == certificate
    assert not replace(certificate, divergence=float("nan")).held


def test_losses_that_no_row_holds() -> None:
    """Gradients of the loss underflow: nothing is held at a small prior precision; the audit does not fail for it."""
    model, x, y = confident(1e4)
    posterior = nb.NullSpacePosterior(model, preserve="loss", prior_precision=1.0)
    certificate = posterior.fit([(x, y)], 5, **QUIET).certificate
    assert not certificate.held and "so confident" in certificate.verdict
    posterior.prior_precision = 1e12
    assert posterior.certificate.held
    assert posterior.certificate.audit is not None and posterior.certificate.audit.passed
    ordinary, x, y = confident(1.0)
    posterior = nb.NullSpacePosterior(ordinary, preserve="loss", prior_precision=1.0)
    certificate = posterior.fit([(x, y)], 5, **QUIET).certificate
    assert certificate.stands and certificate.divergence is not None
    assert certificate.divergence > ALLOWED_DIVERGENCE  # predictions may move
