"""Products of factors with vectors: whichever way they take, they are those of the rows written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nullbayes.jacobian.factors import dense, outer
from nullbayes.jacobian.factors.dense import DenseFactor
from nullbayes.jacobian.factors.outer import OuterFactor
from nullbayes.model.parameters import Slot


def slot(name: str, start: int, *shape: int) -> Slot:
    size = torch.Size(shape)
    return Slot(name, size, start, start + size.numel())


def check(factor: DenseFactor | OuterFactor, rows: Tensor, total: int, samples: int) -> None:
    """``rows (R, total)`` float64."""
    g = torch.Generator().manual_seed(1)
    v, w = torch.randn(samples, total, generator=g), torch.randn(samples, len(rows), generator=g)
    error = 1e-5 * rows.norm(dim=1).max() * v.norm(dim=1).max()
    assert_close(factor.matvec(v).double(), v.double() @ rows.T, rtol=0, atol=float(error))
    there = torch.randn(samples, total, generator=g)
    out = there.clone()
    factor.rmatvec(w, out)
    wanted = there.double() + w.double() @ rows
    assert_close(out.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()) * 10)


@pytest.mark.parametrize("samples", [3, 70])
def test_rows_written_out(samples: int) -> None:
    g = torch.Generator().manual_seed(0)
    # Two weights that are no neighbours, a gap of 50 columns between them.
    slots = (slot("a", 10, 40, 20), slot("b", 860, 300))
    values = torch.randn(100, 10, 1100, generator=g)
    factor = DenseFactor(slots, values)
    assert factor._few(torch.zeros(samples, 1)) == (samples * dense.MANY <= 1000)
    rows = torch.zeros(1000, 1200, dtype=torch.float64)
    flat = values.double().reshape(1000, -1)
    rows[:, 10:810], rows[:, 860:1160] = flat[:, :800], flat[:, 800:]
    check(factor, rows, 1200, samples)


@pytest.mark.parametrize(("examples", "copied"), [(outer.COPY_USES, True), (40, False)])
def test_weights_that_are_used_often_are_copied(examples: int, copied: bool) -> None:
    g = torch.Generator().manual_seed(0)
    weight, bias = slot("weight", 7, 300, 350), slot("bias", 7 + 300 * 350, 300)
    a = torch.randn(examples, 1, 1, 350, generator=g)
    grads = torch.randn(examples, 2, 1, 1, 300, generator=g)
    factor = OuterFactor(weight, bias, a, grads)
    assert examples * 300 * 351 > outer.COPIED_PRODUCT
    # Three samples of 105,300 numbers: a copy is small. A hundred of them are not.
    assert factor._copies(3) == copied
    assert not factor._copies(100)
    rows = torch.zeros(2 * examples, 106_000, dtype=torch.float64)
    outers = grads[:, :, 0, 0, :, None].double() * a[:, :, 0, None].double()
    rows[:, 7 : 7 + 300 * 350] = outers.reshape(2 * examples, -1)
    rows[:, 7 + 300 * 350 : 7 + 300 * 351] = grads.double().reshape(2 * examples, -1)
    check(factor, rows, 106_000, 3)
