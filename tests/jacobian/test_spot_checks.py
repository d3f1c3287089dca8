"""Later batches of large networks are looked at in part: what is wrong there is found all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes.errors import ModelError
from nullbayes.jacobian.capture import checking, spot_checks
from nullbayes.model.batch import batch_size

QUIET = {"progress": False}
BATCH, BATCHES = 8, 5


def batches(scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.randn(BATCH * BATCHES, 4, generator=generator, dtype=torch.float64)
    return list(zip(x.split(BATCH), (torch.arange(len(x)) % 3).split(BATCH), strict=True))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every network is large; how many examples each comparison in full was of."""
    found: list[int] = []
    real = checking._compared

    def counted(functional: Any, inputs: Any, *rest: Any) -> Any:
        found.append(len(inputs.inputs if hasattr(inputs, "inputs") else inputs))
        return real(functional, inputs, *rest)

    monkeypatch.setattr(spot_checks, "is_large", lambda model: True)
    monkeypatch.setattr(checking, "_compared", counted)
    return found


def test_the_first_batches_are_compared_in_full_and_later_ones_in_part(
    compared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[int] = []
    real = spot_checks.gradient_of_parts

    def counted(functional: Any, weights: Any, shown: Any, cotangents: Tensor) -> Tensor:
        parts.append(sum(len(part) for part, _ in shown))
        found = real(functional, weights, shown, cotangents)
        plain = spot_checks.plain_gradient(functional, last[0], cotangents)
        torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-12)  # by all examples at once
        return found

    last: list[Any] = [None]
    shown_separate = spot_checks.shown_separate

    def remembered(functional: Any, weights: Any, inputs: Any, *rest: Any) -> Any:
        last[0] = inputs
        return shown_separate(functional, weights, inputs, *rest)

    monkeypatch.setattr(spot_checks, "gradient_of_parts", counted)
    monkeypatch.setattr(spot_checks, "shown_separate", remembered)
    posterior = nb.NullSpacePosterior(network(), delta=0, prior_precision=1.0)
    certificate = posterior.fit(batches(), 4, **QUIET).certificate
    assert certificate.held
    whole = [size for size in compared if size == BATCH]
    # The first two batches, each in reverse order as well, and no other.
    assert len(whole) >= spot_checks.IN_FULL and parts == [BATCH // 4] * (BATCHES - 2)
    assert certificate.audit is not None and certificate.audit.batches == BATCHES
    compared.clear()
    posterior.predict(torch.randn(7, 4, dtype=torch.float64))  # at use nothing is left of it
    assert posterior._fit is not None and posterior._fit.plan is not None
    assert posterior._fit.plan.shown is None


def test_each_way_through_the_network_is_proved_in_reverse_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turned: list[int] = []
    real = checking._in_other_order

    def counted(functional: Any, plan: Any, inputs: Any, *rest: Any) -> Any:
        turned.append(batch_size(inputs))
        return real(functional, plan, inputs, *rest)

    monkeypatch.setattr(checking, "_in_other_order", counted)
    x = torch.randn(30, 4, dtype=torch.float64)
    sizes = [8, 8, 5, 1, 8]
    data = list(zip(x.split(sizes), (torch.arange(30) % 3).split(sizes), strict=True))
    posterior = nb.NullSpacePosterior(network(), delta=0, prior_precision=1.0)
    assert posterior.fit(data, 4, **QUIET).certificate.held
    assert turned == [8, 5]


class Turns(nn.Module):
    """Another way for large inputs: the same weight, by a product that the layer does not make."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if float(x.abs().max()) > 100:
            hidden = hidden + x @ self.first.weight.T
        return self.last(hidden.tanh())


def test_a_batch_that_takes_another_way_is_compared_in_full(compared: list[int]) -> None:
    torch.manual_seed(0)
    model = Turns().double()
    data = batches(0.1)
    x, y = data[-1]
    data[-1] = (1e4 * x, y)
    posterior = nb.NullSpacePosterior(model, delta=0, prior_precision=1.0, preserve="outputs")
    fitted = posterior.fit(data, 4, **QUIET)
    assert fitted._fit is not None and fitted._fit.plan is not None
    assert "first.weight" in fitted._fit.plan.generic  # found, and mended


class Experts(nn.Module):
    """Each batch goes to one of two layers by its own sign: a way that is not known yet, with right rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        for positive, expert in ((True, self.first), (False, self.second)):
            chosen = ((x[:, 0] > 0) == positive).nonzero()[:, 0]
            if len(chosen):
                out = out.index_add(0, chosen, expert(x[chosen]))
        return out


def test_an_unknown_way_is_captured_once(
    compared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not once more, to be compared in full."""
    taken: list[int] = []
    real = checking.capture

    def counted(functional: Any, plan: Any, inputs: Any, *rest: Any) -> Any:
        if batch_size(inputs) == BATCH and plan.shown is not None:
            taken.append(int(plan.where.split()[-1]))
        return real(functional, plan, inputs, *rest)

    monkeypatch.setattr(checking, "capture", counted)
    torch.manual_seed(0)
    data = [(x.clone(), y) for x, y in batches()]
    for number, (x, _) in enumerate(
        data
    ):  # half of each batch to either, and all of the last to one
        x[:, 0] = x[:, 0].abs()
        x[: BATCH // 2, 0] *= 1 if number == BATCHES - 1 else -1
    posterior = nb.NullSpacePosterior(Experts().double(), delta=0, prior_precision=1.0)
    assert posterior.fit(data, 4, **QUIET).certificate.held
    # The last batch once more in reverse order.
    assert taken == [2, 3, 4, 4]


def test_examples_that_come_to_depend_on_one_another_are_refused(compared: list[int]) -> None:
    class Mixes(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out + out.detach().mean(0) * (x[:1, 0].abs() > 100)

    torch.manual_seed(0)
    model = nn.Sequential(Mixes(4, 3)).double()
    data = batches(0.1)
    x, y = data[-1]
    x = x.clone()
    x[:, 0] = 1e3
    data[-1] = (x, y)
    with pytest.raises(ModelError, match="batch 4: the outputs of example"):
        nb.NullSpacePosterior(model).fit(data, 2, **QUIET)


def test_rows_that_go_wrong_later_are_found(
    compared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a later batch that are not those of its examples: compared in full, which then says so."""
    real, calls = checking.capture, [0]

    def lying(functional: Any, plan: Any, inputs: Any, make: Any, *rest: Any) -> Any:
        block, made = real(functional, plan, inputs, make, *rest)
        if block.examples == BATCH and plan.compared >= spot_checks.IN_FULL:
            calls[0] += 1
            for factor in block.factors.values():
                for t in factor.tensors():
                    t.mul_(1.5)
        return block, made

    monkeypatch.setattr(checking, "capture", lying)
    with pytest.raises(ModelError, match="differ from automatic differentiation"):
        nb.NullSpacePosterior(network()).fit(batches(), 2, **QUIET)
    assert calls[0] > 1
