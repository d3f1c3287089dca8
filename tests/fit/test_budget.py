"""Temporaries are cut to a budget, and cutting changes nothing but rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes.common import memory
from nullbayes.constraints.memory_budget import FitMemory
from nullbayes.jacobian import gram as grams
from nullbayes.jacobian.factors import products
from nullbayes.solvers import DualCholesky, PrimalQR, spectrum
from tests.support import operator_for

F64 = torch.float64
HOST = torch.device("cpu")


@pytest.mark.parametrize("megabytes", [20, 50, 200, 1000, 20_000])
def test_the_parts_of_a_budget_fit_into_it(megabytes: int) -> None:
    budget = megabytes * 2**20
    parts = FitMemory.of(budget, 10, 20_000, torch.float32)
    vectors = 9 * 10 * 20_000 * 4
    if megabytes >= 50:
        assert parts.rows + parts.beside + max(vectors, parts.block) <= budget
    assert parts.temporaries <= budget // 8 and parts.libraries <= budget // 3
    assert parts.rows >= budget // 8


def test_work_is_limited_only_within() -> None:
    before = memory.working_bytes()
    with pytest.raises(KeyError), memory.working_within(10_000):
        assert memory.working_bytes() == 10_000
        assert products.chunk_elements(HOST) == 625
        with memory.working_within(2**40):
            assert memory.working_bytes() == memory.WORKING_BYTES
        raise KeyError
    assert memory.working_bytes() == before == memory.WORKING_BYTES
    assert products.chunk_elements(HOST) == products.CHUNK_ELEMENTS
    memory.give_back()


@pytest.mark.parametrize(("gigabytes", "times"), [(4, 1), (12, 1), (24, 2), (80, 8), (1000, 16)])
def test_pieces_grow_with_the_memory_of_an_accelerator(
    monkeypatch: pytest.MonkeyPatch, gigabytes: int, times: int
) -> None:
    """A launch costs as much for few numbers as for many."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, gigabytes * 2**30))
    card = torch.device("cuda", gigabytes)
    assert memory.times_on(HOST) == 1 and memory.times_on(card) == times
    assert memory.working_bytes(card) == times * memory.WORKING_BYTES
    assert products.chunk_elements(card) == times * products.CHUNK_ELEMENTS
    assert not memory.bounded(card)
    with memory.working_within(10_000):
        assert memory.working_bytes(card) == 10_000 and memory.bounded(card)
        assert products.chunk_elements(card) == 625
    parts = FitMemory.of(gigabytes * 2**29, 10, 20_000, torch.float32, device=card)
    assert 16 * parts.block <= gigabytes * 2**29 >= 8 * parts.temporaries


class Tokens(nn.Module):
    """Convolution, embedding and linear layers: every kind of factor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.inner = nn.Linear(6, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(self.table(x).mT)).mT
        out: Tensor = self.last(torch.tanh(self.inner(h)).mean(1))
        return out


@pytest.mark.parametrize("room", [1, 3_000, 100_000])
def test_products_in_pieces_are_those_of_the_whole(room: int) -> None:
    torch.manual_seed(0)
    operator, _ = operator_for(Tokens().double(), torch.randint(0, 7, (9, 5)))
    v, w = (
        torch.randn(4, operator.shape[1], dtype=F64),
        torch.randn(4, operator.shape[0], dtype=F64),
    )
    rows = torch.cat(list(operator.iter_rows(100)))
    with memory.working_within(room):
        found = (operator.matvec(v), operator.rmatvec(w), operator.gram(), operator.squared_norms())
    whole = (v @ rows.T, w @ rows, rows @ rows.T, rows.square().sum(1))
    for some, all_ in zip(found, whole, strict=True):
        torch.testing.assert_close(some, all_, atol=1e-10, rtol=1e-10)


def test_a_mirrored_matrix_and_a_sum_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(11, 11, dtype=F64)
    lower = a.tril()
    grams._mirror(mirrored := lower.clone(), 3)
    torch.testing.assert_close(mirrored, lower + lower.tril(-1).T, atol=0, rtol=0)
    monkeypatch.setattr(products, "ADDED_ROWS", 4)
    out, more = a.clone(), torch.randn(11, 11)
    products.add_into(out, more)
    torch.testing.assert_close(out, a + more, atol=0, rtol=0)


@pytest.mark.parametrize("solver", [DualCholesky(), PrimalQR()])
def test_a_posterior_under_a_budget_is_the_same(solver: Any) -> None:
    torch.manual_seed(0)
    model = Tokens().double().eval()
    x, y = torch.randint(0, 7, (60, 5)), torch.randint(0, 3, (60,))
    batches = [(x[i : i + 20], y[i : i + 20]) for i in range(0, 60, 20)]
    options: dict[str, Any] = {"solver": solver, "prior_precision": 1.0, "delta": 0}
    ample = nb.NullSpacePosterior(model, **options).fit(batches, 5, progress=False)
    tight = nb.NullSpacePosterior(model, memory="7MB", **options).fit(batches, 5, progress=False)
    assert tight.certificate.held and ample.certificate.held
    torch.testing.assert_close(tight._samples(), ample._samples(), atol=1e-8, rtol=0)
    for name in ("drift", "output_drift", "left_out_divergence", "posterior_score"):
        mine, theirs = getattr(tight.certificate, name), getattr(ample.certificate, name)
        if theirs is None:  # primal QR without a shift cannot leave examples out
            assert mine is None and name == "left_out_divergence"
            continue
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-9)


def test_too_little_memory_for_an_exact_spectrum_gives_an_estimate() -> None:
    torch.manual_seed(0)
    operator, _ = operator_for(
        nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 3)).double(),
        torch.randn(60, 8, dtype=F64),
    )
    exact = spectrum.operator_spectrum(operator)
    short = spectrum.operator_spectrum(operator, room=spectrum.spectrum_bytes(*operator.shape))
    assert exact.exact and not short.exact
    for shift in (1e-2, 1.0, 100.0):
        assert short.effective_rank(shift) == pytest.approx(exact.effective_rank(shift), rel=0.25)


@pytest.mark.parametrize("problem", ["tokens"])
def test_the_peak_of_a_fit_is_within_five_per_cent(problem: str) -> None:
    """In a fresh process: the kernel's high-water mark. All ten are in `benchmarks/results/reliability.md`."""
    command = [sys.executable, "-m", "tests.torture.endurance", "--budget", problem]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert json.loads(done.stdout)["share"] <= 1.05
