"""Posteriors made smaller for serving: fewer or narrower samples, samples left in their file."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import nullbayes as nb


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)).eval()


def fitted(model, samples=8):
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(2))
    data = [(x[:7], torch.arange(7) % 3), (x[7:], torch.arange(5) % 3)]
    return nb.NullSpacePosterior(model).fit(data, samples, progress=False), x


def dense_changes(model, x, samples):
    """``J(x) Δ_s (S, B, O)`` in float64."""
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(model, w, (x.double(),)))(
        weights
    )
    rows = torch.cat([jacobian[n].flatten(2) for n in weights], 2)
    return torch.einsum("bop,sp->sbo", rows, samples.double())


def test_compact_is_the_fit_with_fewer_samples():
    model = network()
    posterior, x = fitted(model)
    small, _ = fitted(model, 3)
    wanted = small.predict(x)
    assert posterior.compact(3) is posterior
    assert posterior.num_samples == 3
    assert_close(posterior.predict(x).mean, wanted.mean, rtol=1e-5, atol=1e-6)
    ours, theirs = posterior.certificate, small.certificate
    assert ours.num_samples == 3
    assert ours.held
    assert ours.audit.passed
    assert ours.prior_share == pytest.approx(theirs.prior_share, rel=1e-3)
    moved = dense_changes(model, x, posterior._samples())
    moved = moved - moved.mean(2, keepdim=True)
    assert ours.output_drift == pytest.approx(float(moved.square().mean().sqrt()), rel=0.05)
    assert posterior._fit.state is None
    assert posterior._fit.rows is None
    with pytest.raises(nb.NotFittedError, match="compacted"):
        posterior.draw(1)
    small.prior_precision = float(posterior.prior_precision)  # fewer samples chose another one
    theirs = small.certificate
    assert ours.sampled_drift == pytest.approx(theirs.sampled_drift, rel=2e-3)


def test_narrow_samples_are_measured_as_they_are_stored():
    posterior, x = fitted(network())
    before, residual = posterior._fit.stored.clone(), posterior.certificate.residual
    posterior.compact(dtype=torch.bfloat16)
    assert posterior.certificate.held
    assert posterior._fit.stored.dtype == torch.bfloat16
    assert_close(posterior._fit.stored, before.bfloat16())
    assert posterior.certificate.residual > 2 * residual  # of rounding by 0.4 %
    assert posterior.predict(x).mean.shape == (12, 3)


def test_compact_refuses_more_than_there_are():
    posterior, _ = fitted(network())
    with pytest.raises(nb.InputError, match="8 are stored"):
        posterior.compact(9)


def test_a_mapped_file_gives_the_same_predictions_and_is_read_when_used(tmp_path, monkeypatch):
    model = network()
    posterior, x = fitted(model)
    path = tmp_path / "p.safetensors"
    posterior.save(path)
    with monkeypatch.context() as m:
        m.setattr(
            "nullbayes.posterior.posterior_file.checksum", lambda *a: pytest.fail("read whole")
        )
        mapped = nb.load(path, model, mmap=True)
    whole = nb.load(path, model)
    assert_close(mapped.predict(x).mean, whole.predict(x).mean, rtol=1e-6, atol=1e-7)
    assert_close(mapped._fit.stored, whole._fit.stored, rtol=0, atol=0)
    mapped.compact(2)
    assert mapped.num_samples == 2
    assert "2 of 8 samples" in mapped.certificate.notes[-1]
