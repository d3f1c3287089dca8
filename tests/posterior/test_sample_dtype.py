"""Samples stored in bfloat16: half the room, and a certificate that speaks of what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb

QUIET: dict[str, Any] = {"progress": False}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype).eval()


def data(
    count: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator).to(dtype), torch.arange(count) % 3


def rows(model: nn.Module, x: Tensor) -> Tensor:
    """``(N·O, P)`` in float64 by autograd."""
    wide = network(torch.float64)
    wide.load_state_dict(model.state_dict())
    found = []
    for one in x.double():
        for value in wide(one[None])[0]:
            grads = torch.autograd.grad(value, list(wide.parameters()), retain_graph=True)
            found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


@pytest.mark.parametrize(
    "prior", [1.0, {"0.weight": 2.0, "0.bias": 1.0, "2.weight": 0.5, "2.bias": 1.0}]
)
def test_the_certificate_measures_what_is_stored(prior: Any) -> None:
    model, batch = network(), data()
    options: dict[str, Any] = {"preserve": "outputs", "prior_precision": prior}
    exact = nb.NullSpacePosterior(model, **options).fit([batch], 8, **QUIET)
    half = nb.NullSpacePosterior(model, **options)
    half.fit([batch], 8, sample_dtype=torch.bfloat16, **QUIET)
    assert half._fit.stored.dtype == torch.bfloat16
    assert_close(half._samples(), exact._samples().bfloat16().float(), rtol=1e-2, atol=1e-6)
    moved = half._samples().double() @ rows(model, batch[0]).T
    assert half.certificate.drift == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-3)
    assert half.certificate.row_drift == pytest.approx(
        float(moved.square().sum() / (8 * 12)) ** 0.5, rel=1e-3
    )
    assert exact.certificate.drift < half.certificate.drift < 0.05
    assert half.certificate.audit.passed
    # What was asked for is no weakness, and the certificate says what it costs.
    assert half.certificate.residual > half.certificate.tolerance
    assert half.certificate.held
    assert "Rounding them to what they are stored in left a residual" in half.certificate.verdict
    assert "Rounding" not in exact.certificate.verdict
    assert "before samples were rounded" in str(half.certificate)


def test_more_samples_files_updates_and_predictions(tmp_path: Path) -> None:
    model, batch = network(), data()
    options: dict[str, Any] = {"preserve": "outputs", "prior_precision": 1.0}
    posterior = nb.NullSpacePosterior(model, **options)
    posterior.fit([batch], 4, sample_dtype=torch.bfloat16, **QUIET)
    posterior.draw(3)
    at_once = nb.NullSpacePosterior(model, **options)
    at_once.fit([batch], 7, sample_dtype=torch.bfloat16, **QUIET)
    assert posterior._fit.stored.dtype == torch.bfloat16
    assert_close(posterior._samples(), at_once._samples(), rtol=2e-2, atol=1e-5)
    assert posterior.certificate.drift == pytest.approx(at_once.certificate.drift, rel=0.1)
    posterior.save(tmp_path / "half.safetensors")
    again = nb.load(tmp_path / "half.safetensors", model)
    assert again._fit.stored.dtype == torch.bfloat16
    x = data(5, seed=1)[0]
    for method in ("linearised", "sampled"):
        first, second = (p.predict(x, method=method) for p in (posterior, again))
        assert first.outputs.dtype == torch.float32
        assert_close(first.outputs, second.outputs)
    assert_close(posterior.novelty(x, exact=False), again.novelty(x))
    assert (tmp_path / "half.safetensors").stat().st_size < _size(at_once, tmp_path, model, batch)
    posterior.update([data(3, seed=2)], **QUIET)
    assert posterior._fit.stored.dtype == torch.bfloat16


def _size(half: nb.NullSpacePosterior, folder: Path, model: nn.Module, batch: Any) -> int:
    full = nb.NullSpacePosterior(model, preserve="outputs", prior_precision=1.0)
    full.fit([batch], half.num_samples, **QUIET)
    full.save(folder / "full.safetensors")
    return (folder / "full.safetensors").stat().st_size - half.num_samples * half.space.total


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8, "bfloat16"], ids=str)
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(nb.InputError, match=r"expected None .* or torch.bfloat16"):
        nb.NullSpacePosterior(network()).fit([data()], 2, sample_dtype=dtype, **QUIET)
