"""A posterior of version 0.1 comes with a certificate that nobody checked, and says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import nullbayes as nb

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture
def loaded() -> nb.NullSpacePosterior:
    """The file of version 0.1, around the network that it was fitted to."""
    layers = [nn.Linear(6, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 8), nn.GELU()]
    model = nn.Sequential(*layers, nn.Linear(8, 3)).double().eval()
    model.load_state_dict(load_file(DATA / "weights_0_1.safetensors"))
    posterior = nb.load(DATA / "posterior_0_1.safetensors", model)
    assert isinstance(posterior, nb.NullSpacePosterior)
    return posterior


def test_a_posterior_of_version_0_1_is_not_held(loaded: nb.NullSpacePosterior) -> None:
    certificate = loaded.certificate
    assert certificate.audit is None
    assert certificate.sound and not certificate.held
    assert "never audited" in certificate.verdict and "`fit` again" in certificate.verdict
    assert "The guarantee held" not in str(certificate)
    assert "none was made" in str(certificate)
    assert certificate.as_dict()["held"] is False
    assert "about" in str(certificate)  # whether its rank was an estimate is not known


def test_a_weak_one_that_was_never_audited_says_both(loaded: nb.NullSpacePosterior) -> None:
    weak = replace(loaded.certificate, residual=0.5, status="it was interrupted")
    assert not weak.sound and not weak.held
    assert "never audited" in weak.verdict and "misses the tolerance" in weak.verdict


def test_it_stays_unaudited_in_a_file_written_now(
    loaded: nb.NullSpacePosterior, tmp_path: Path
) -> None:
    loaded.save(tmp_path / "again.safetensors")
    again = nb.load(tmp_path / "again.safetensors", loaded.model)
    assert again.certificate.as_dict() == loaded.certificate.as_dict()
    x = torch.zeros(2, 6, dtype=torch.float64)
    torch.testing.assert_close(again.predict(x).mean, loaded.predict(x).mean, atol=0, rtol=0)


def test_the_same_fit_today_is_audited(loaded: nb.NullSpacePosterior) -> None:
    x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        batches = [(x, loaded.model(x).argmax(1))]
    fitted = nb.NullSpacePosterior(loaded.model).fit(batches, 4, progress=False)
    assert fitted.certificate.held
    assert "The guarantee held" in fitted.certificate.verdict
