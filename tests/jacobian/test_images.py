"""Products that are asked for again: the same numbers, computed once, until something is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.jacobian import images
from nullbayes.jacobian.factors.outer import OuterFactor


def fitted() -> nb.NullSpacePosterior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
        batch = torch.randn(5, 4).double(), torch.arange(5) % 3
    return nb.NullSpacePosterior(model).fit([batch], 4, progress=False)


@pytest.fixture()
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    monkeypatch.setattr(images, "FROM", 0)
    seen: list[Tensor] = []
    original = OuterFactor.matvec

    def matvec(self: Any, vectors: Tensor) -> Tensor:
        seen.append(vectors)
        return original(self, vectors)

    monkeypatch.setattr(OuterFactor, "matvec", matvec)
    return seen


def test_the_same_vectors_are_multiplied_once(counted: list[Tensor]) -> None:
    operator = fitted()._fit.state.operator
    counted.clear()
    vectors = torch.randn(3, operator.shape[1], dtype=torch.float64)
    first = operator.matvec(vectors)
    layers = len(counted)
    second = operator.matvec(vectors)
    assert layers > 0
    assert len(counted) == layers
    assert torch.equal(first, second)
    second.zero_()  # a copy: nobody else's product changes
    assert torch.equal(first, operator.matvec(vectors))


def test_what_is_written_to_is_multiplied_again(counted: list[Tensor]) -> None:
    operator = fitted()._fit.state.operator
    vectors = torch.randn(3, operator.shape[1], dtype=torch.float64)
    first = operator.matvec(vectors)
    vectors[0] *= 2
    again = operator.matvec(vectors)
    assert_close(again[0], 2 * first[0])
    assert torch.equal(again[1:], first[1:])
    for number in range(images.KEPT + 1):  # the oldest one goes
        operator.matvec(torch.full_like(vectors, float(number)))
    assert torch.equal(operator.matvec(vectors), again)


def test_a_fit_multiplies_each_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FROM", 0)
    seen: list[tuple[OuterFactor, Tensor]] = []
    original = OuterFactor.matvec

    def matvec(self: OuterFactor, vectors: Tensor) -> Tensor:
        seen.append((self, vectors))
        return original(self, vectors)

    monkeypatch.setattr(OuterFactor, "matvec", matvec)
    posterior = fitted()
    own = [f for block in posterior._fit.state.operator.blocks for f in block.factors.values()]
    whole = [(id(f), id(v)) for f, v in seen if any(f is o for o in own) and len(v) == 4]
    assert len(whole) == len(set(whole))
    # Prior samples, and what each pass made of them.
    assert len(whole) == len(own) * (1 + posterior._fit.state.passes)
