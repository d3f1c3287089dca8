"""The certificate's look at training examples by way of the fit's own rows, against dense derivatives in float64."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.certificate import measure, row_changes
from nullbayes.jacobian import linearise


def _network(outputs: int) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, outputs)).double().eval()


def _dense_changes(model: nn.Module, x: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """``J(x) Δ_s (S, B, O)``."""
    weights = dict(model.named_parameters())
    jacobian = jacrev(lambda w: functional_call(model, w, (x,)))(weights)
    rows = torch.cat([jacobian[n].flatten(2) for n in weights], 2)
    return torch.einsum("bop,sp->sbo", rows, samples)


def _fitted(model: nn.Module, x: torch.Tensor, y: torch.Tensor, **options: object) -> nb.Posterior:
    data = [(x[:6], y[:6]), (x[6:], y[6:])]
    posterior = nb.NullSpacePosterior(model, **options)
    return posterior.fit(data, 9, progress=False)


def test_changes_from_rows_are_those_of_the_dense_jacobian(monkeypatch):
    monkeypatch.setattr(row_changes, "FROM", 0)
    called: list[int] = []
    direct = measure.linearised_outputs
    monkeypatch.setattr(measure, "linearised_outputs", lambda *a: called.append(1) or direct(*a))
    model, x = _network(4), torch.randn(10, 5, dtype=torch.float64)
    posterior = _fitted(model, x, torch.arange(10) % 4, delta=0.1)
    check = posterior._fit.check
    assert not called
    found = torch.cat([unit for _, unit, _ in check.batches], 1)
    wanted = _dense_changes(model, x, posterior._fit.unit)
    wanted = wanted - wanted.mean(2, keepdim=True)
    assert wanted.abs().max() > 1e-3
    assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def test_training_examples_are_not_shown_separate_once_more(monkeypatch):
    monkeypatch.setattr(row_changes, "FROM", 10**9)
    shown: list[int] = []
    real = linearise.separate_at_use
    monkeypatch.setattr(linearise, "separate_at_use", lambda *a: shown.append(1) or real(*a))
    model, x = _network(8), torch.randn(10, 5, dtype=torch.float64)
    posterior = nb.NullSpacePosterior(model, preserve="loss", delta=0.1)
    # Eight outputs under two samples: forward mode.
    posterior.fit([(x[:6], torch.arange(6)), (x[6:], torch.arange(4))], 2, progress=False)
    assert not shown
    batches = posterior._fit.check.batches
    found = torch.cat([unit for _, unit, _ in batches], 1)
    assert_close(found, _dense_changes(model, x, posterior._fit.unit))
    assert_close(torch.cat([point for point, _, _ in batches]), model(x).detach())
    posterior.predict(x)
    assert shown  # others are


def test_regression_and_outputs_keep_every_number(monkeypatch):
    monkeypatch.setattr(row_changes, "FROM", 0)
    model, x = _network(3), torch.randn(10, 5, dtype=torch.float64)
    for options in ({"likelihood": "regression"}, {"preserve": "outputs"}):
        y = (
            torch.randn(10, 3, dtype=torch.float64)
            if "likelihood" in options
            else torch.arange(10) % 3
        )
        posterior = _fitted(model, x, y, delta=0.1, **options)
        found = torch.cat([unit for _, unit, _ in posterior._fit.check.batches], 1)
        assert_close(found, _dense_changes(model, x, posterior._fit.unit), rtol=1e-7, atol=1e-9)


def test_examples_whose_rows_vanish_are_differentiated(monkeypatch):
    monkeypatch.setattr(row_changes, "FROM", 0)
    model, x = _network(3), torch.randn(10, 5, dtype=torch.float64)
    with torch.no_grad():
        model[0].bias.zero_()
        model[2].weight.mul_(3)
        x[:3] *= 1e-3
        model[2].bias.copy_(torch.tensor([0.0, -0.5, 0.3]))
        model[0].weight[:, 0] += 2
        model[2].weight[0] += 400.0 * model[0].weight[:, 0].sign()
        x[:, 0] *= 0.01
        x[3, 0] = 50  # its smallest probabilities are zero in double precision
        outputs = model(x)
    assert float(outputs.softmax(1).min()) == 0
    posterior = _fitted(model, x, outputs.argmax(1), delta=0.1)
    found = torch.cat([unit for _, unit, _ in posterior._fit.check.batches], 1)
    wanted = _dense_changes(model, x, posterior._fit.unit)
    assert_close(found, wanted - wanted.mean(2, keepdim=True), rtol=1e-6, atol=1e-7)


def test_one_row_an_example_says_too_little(monkeypatch):
    """`preserve="loss"`: outputs are differentiated as before."""
    monkeypatch.setattr(row_changes, "FROM", 0)
    model, x = _network(3), torch.randn(10, 5, dtype=torch.float64)
    posterior = _fitted(model, x, torch.arange(10) % 3, delta=0.1, preserve="loss")
    found = torch.cat([unit for _, unit, _ in posterior._fit.check.batches], 1)
    assert_close(found, _dense_changes(model, x, posterior._fit.unit), rtol=1e-7, atol=1e-9)
