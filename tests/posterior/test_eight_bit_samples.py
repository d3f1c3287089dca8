"""Samples in 8 bits: how far they are from what they were, products with them, files, and what the certificate says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.common import eight_bits
from nullbayes.common.eight_bits import ALIGNED, Packed

SHAPES = [(7,), (300, 600), (50, 3, 3, 3), (2, 8), (1500, 10)]


def samples(count: int = 5) -> Tensor:
    total = sum(torch.Size(shape).numel() for shape in SHAPES)
    return torch.randn(count, total, generator=torch.Generator().manual_seed(0))


def test_each_number_is_within_half_a_step_and_small_tensors_stay() -> None:
    x = samples()
    q = Packed.of(x, SHAPES)
    assert q.shape == x.shape
    assert q.nbytes < 0.3 * x.nbytes
    away, at = (q.to(torch.float64) - x.double()).abs(), 0
    for shape in SHAPES:
        size = torch.Size(shape).numel()
        part = slice(at, at + size)
        step = float(x[:, part].abs().max()) / 127 if len(shape) > 1 and size >= 1024 else 0.0
        assert float(away[:, part].max()) <= step / 2 * 1.001
        at += size
    relative = float(away[:, 7:180007].square().mean().sqrt())
    assert 0.008 < relative < 0.012  # of numbers with variance one


@pytest.mark.parametrize("fast", [True, False])
def test_parts_and_products_are_those_of_the_same_numbers_in_float64(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setattr(eight_bits, "_kernel", lambda: False)
    x = samples()
    q = Packed.of(x, SHAPES)
    wide = q.to(torch.float64)
    assert_close(torch.stack(list(q)).double(), wide)
    assert_close(q[1:3].to(torch.float64), wide[1:3])
    for start, stop in ((0, 5), (3, 100_000), (7 + 600, 7 + 180_000), (180_000, x.shape[1])):
        assert_close(q[:, start:stop].double(), wide[:, start:stop])
        rows = torch.randn(3, stop - start, generator=torch.Generator().manual_seed(stop))
        found, exact = q.few_rows(start, rows), wide[:, start:stop] @ rows.double().T
        # In the kernel, rows and results are rounded to bfloat16.
        allowed = 5e-3 if fast else 1e-5
        assert float((found - exact).norm() / exact.norm()) < allowed
    table = x.shape[1] - 15_000
    index = torch.tensor([3, 1499, 0, 3])
    assert_close(
        q.looked_up(table, index).double(), wide[:, table:].view(len(x), 1500, 10)[:, index]
    )


def test_values_at_any_place_in_memory_give_the_same() -> None:
    q = Packed.of(samples(), SHAPES)
    raw = torch.zeros(len(q.values) + 2 * ALIGNED, dtype=torch.int8)
    at = -raw.data_ptr() % ALIGNED + 3
    raw[at : at + len(q.values)] = q.values
    moved = Packed(q.pieces, raw[at : at + len(q.values)], q.scales, q.plain)
    assert moved.values.data_ptr() % ALIGNED
    rows = torch.randn(2, 180_000, generator=torch.Generator().manual_seed(1))
    assert_close(moved.few_rows(7, rows), q.few_rows(7, rows))


class Texts(nn.Module):
    """A table, a layer with tokens, and a head: each is multiplied in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(200, 64), nn.Linear(64, 64)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.layer(self.table(ids)).tanh())
        return self.head(hidden.mean(1))


def fitted(count: int = 12) -> tuple[nn.Module, nb.NullSpacePosterior, Tensor]:
    torch.manual_seed(0)
    model = Texts().eval()
    ids = torch.randint(0, 200, (count, 9), generator=torch.Generator().manual_seed(1))
    posterior = nb.NullSpacePosterior(model, preserve="outputs", prior_precision=100.0)
    return model, posterior.fit([(ids, torch.arange(count) % 3)], 6, progress=False), ids


def changes(model: nn.Module, ids: Tensor, moved: Tensor) -> Tensor:
    """``J(x) Δ_s (S, B, O)`` in float64 by autograd."""
    wide = Texts().double().eval()
    wide.load_state_dict(model.state_dict())
    weights = dict(wide.named_parameters())
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(wide, w, (ids,)))(weights)
    rows = torch.cat([jacobian[n].flatten(2) for n in weights], 2).detach()
    return torch.einsum("bop,sp->sbo", rows, moved.double())


def test_predictions_and_certificate_are_of_what_is_stored(tmp_path: Path) -> None:
    model, posterior, ids = fitted()
    before = posterior.certificate
    exact = posterior._samples()
    posterior.compact(dtype=torch.int8)
    assert posterior._fit is not None and isinstance(posterior._fit.stored, Packed)
    stored = posterior._samples()
    assert 0.003 < float((stored - exact).norm() / exact.norm()) < 0.012
    drift = changes(model, ids, stored)
    certificate = posterior.certificate
    assert certificate.drift == pytest.approx(float(drift.square().mean().sqrt()), rel=0.05)
    assert certificate.drift > 2 * before.drift
    assert certificate.audit is not None and certificate.audit.passed
    new = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(2))
    for x in (new[:1], new, torch.cat([new] * 20)):  # by few rows, and by many
        found = posterior.predict(x)
        wanted = changes(model, x, stored)
        assert float((found.outputs - found.point - wanted).norm() / wanted.norm()) < 5e-3
    sampled = posterior.predict(new, method="sampled")
    state = next(iter(posterior.sample(1)))
    again = Texts().eval()
    again.load_state_dict(state)
    assert_close(sampled.outputs[0], again(new).detach(), rtol=1e-4, atol=1e-5)
    path = tmp_path / "p.safetensors"
    posterior.save(path)
    for options in ({}, {"mmap": True}):
        loaded = nb.load(path, model, **options)
        assert isinstance(loaded, nb.NullSpacePosterior)
        assert_close(loaded.predict(new[:1]).outputs, posterior.predict(new[:1]).outputs)
        assert_close(loaded.novelty(new), posterior.novelty(new))
        assert loaded._fit is not None
        assert loaded._fit.stored.values.data_ptr() % ALIGNED == 0  # type: ignore[attr-defined]
    posterior.compact(2)
    assert posterior.num_samples == 2
    assert_close(posterior._samples(), stored[:2])
    with pytest.raises(nb.InputError, match=r"`dtype` is torch.uint8; expected .*torch.int8"):
        posterior.compact(dtype=torch.uint8)
    with pytest.raises(nb.NotFittedError, match="compacted"):
        posterior.update([(new, torch.zeros(2, dtype=torch.long))])


def test_files_that_say_other_sizes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, posterior, _ = fitted(4)
    posterior.compact(dtype=torch.int8)
    real: Any = Packed.each
    with monkeypatch.context() as m:
        m.setattr(Packed, "each", lambda self, start: max(0, real(self, start) - 1))
        posterior.save(tmp_path / "p.safetensors")
    with pytest.raises(nb.StorageError, match="8 bits of other sizes"):
        nb.load(tmp_path / "p.safetensors", model)


def test_a_fit_does_not_store_8_bits() -> None:
    """The certificate of rounding needs the rows, and the samples before."""
    model = Texts().eval()
    with pytest.raises(nb.InputError, match="`sample_dtype`"):
        nb.NullSpacePosterior(model).fit([], 2, sample_dtype=torch.int8, progress=False)
