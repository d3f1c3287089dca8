"""Position tables and class tokens given to each example: their rows, and networks that do something else with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.jacobian.capture.verify import prove
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace
from tests.support import all_rows

WIDTH, TOKENS, OUT = 4, 5, 3


class Encoder(nn.Module):
    """Tokens with positions from a table, a class token and a scale, all shared; ``joined`` adds the positions."""

    def __init__(self, joined: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(7, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.offset = nn.Parameter(torch.randn(1, TOKENS + 1, WIDTH))
        self.mixed, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUT)
        self.joined = joined

    def forward(self, ids: Tensor) -> Tensor:
        where = self.positions(torch.arange(TOKENS)[None])
        h = self.joined(self.table(ids), where)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.offset
        h = torch.tanh(self.mixed(h))
        out: Tensor = self.last(h * h.mean(1, keepdim=True))[:, 0]
        return out


def added(h: Tensor, where: Tensor) -> Tensor:
    return h + where


def squeezed(h: Tensor, where: Tensor) -> Tensor:
    """Only where the first axis has length one does this repeat it."""
    return h + where[0]


def repeated(h: Tensor, where: Tensor) -> Tensor:
    return h + where.repeat(len(h), 1, 1)


def dense_rows(functional: FunctionalModel, ids: Tensor) -> Tensor:
    """``(B·O, P)`` by one backward pass for each output of each example alone."""
    rows = []
    for n in range(len(ids)):
        for o in range(OUT):
            weights = functional.weights(requires_grad=True)
            value = functional(weights, ids[n : n + 1])[0, o]
            found = torch.autograd.grad(value, list(weights.values()))
            rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)


def planned(model: nn.Module, ids: Tensor) -> tuple[FunctionalModel, CapturePlan]:
    functional = FunctionalModel(model, ParameterSpace.from_model(model))
    return functional, prove(functional, ids)


@pytest.mark.parametrize(("joined", "given"), [(added, True), (squeezed, False), (repeated, False)])
@pytest.mark.parametrize("examples", [1, 6])
def test_rows_of_what_all_examples_share(
    joined: Callable[[Tensor, Tensor], Tensor], given: bool, examples: int
) -> None:
    torch.manual_seed(0)
    model, ids = Encoder(joined).double().eval(), torch.randint(0, 7, (6, TOKENS))
    functional, plan = planned(model, ids)
    sites = {site.path: site.spread for site in plan.sites}
    assert (sites.get("positions") is True) == given
    assert ("positions.weight" in plan.generic) != given
    if given:  # where the network fails, nothing is given to each any more
        assert plan.spread == ["token", "offset"] and not plan.local
    found = torch.cat(list(all_rows(functional, plan, ids[:examples]).iter_rows(100)))
    assert_close(found, dense_rows(functional, ids[:examples]), atol=1e-12, rtol=1e-10)


def test_a_batch_on_which_it_fails_later() -> None:
    """What the probe did not see: the plan is mended, and the rows are right."""
    torch.manual_seed(0)

    def either(h: Tensor, where: Tensor) -> Tensor:
        return (repeated if len(h) == 4 else added)(h, where)

    model, ids = Encoder(either).double().eval(), torch.randint(0, 7, (4, TOKENS))
    functional, plan = planned(model, ids[:3])
    assert any(site.spread for site in plan.sites) and plan.spread
    found = torch.cat(list(all_rows(functional, plan, ids).iter_rows(100)))
    assert_close(found, dense_rows(functional, ids), atol=1e-12, rtol=1e-10)
    assert not any(site.spread for site in plan.sites) and not plan.spread
