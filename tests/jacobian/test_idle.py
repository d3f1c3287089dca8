"""Parameters that no output depends on stay where they are; those that outputs depend on in secret are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from tests.cases.dense import QUIET, normal, seeded

EXACT: dict[str, Any] = {"preserve": "outputs", "delta": 0.0, "prior_precision": 1.0}


class Masked(nn.Module):
    """As an encoder is for pretraining: a vector for masked positions, a pooler that the head does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.ones(3))
        self.layer = nn.Linear(3, 4)
        self.pooler = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            x = torch.where(mask[:, None], self.mask_token, x)
        out: Tensor = self.head(torch.tanh(self.layer(x)))
        return out


class Secret(Masked):
    """Adds what no gradient leads to; ``both``: only two vectors together show."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) + (self.a * self.b).detach()


IDLE = ("mask_token", "pooler.bias", "pooler.weight")


def data(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.arange(len(x)) % 2)]


def test_what_no_output_depends_on_stays() -> None:
    model, x = seeded(Masked), normal(5, 3)
    posterior = nb.NullSpacePosterior(model, **EXACT).fit(data(x), 4, **QUIET)
    assert posterior.space.idle == IDLE
    assert any(
        "'mask_token', 'pooler.bias', 'pooler.weight'" in n for n in posterior.certificate.notes
    )
    before = dict(model.named_parameters())
    for state in posterior.sample():
        for name, p in before.items():
            assert torch.equal(state[name], p) == (name in IDLE), name
    certificate = posterior.certificate
    assert certificate.held and certificate.audit is not None and certificate.audit.passed
    weights = sum(p.numel() for n, p in before.items() if n not in IDLE)
    assert certificate.null_dim == weights - certificate.rank


def test_the_rest_is_as_if_they_had_been_left_out() -> None:
    model, x, new = seeded(Masked), normal(5, 3), normal(4, 3, seed=1)
    options = EXACT | {"prior_precision": "evidence"}
    whole = nb.NullSpacePosterior(model, **options).fit(data(x), 4, **QUIET)
    part = nb.NullSpacePosterior(
        model, parameters=lambda n, p: not n.startswith(("mask", "pool")), **options
    ).fit(data(x), 4, **QUIET)
    assert whole.prior_precision == pytest.approx(part.prior_precision)
    assert_close(whole.novelty(new, score="variance"), part.novelty(new, score="variance"))


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "alternating projections"},
        {"prior_precision": "evidence-by-layer", "preserve": "predictions"},
    ],
    ids=str,
)
def test_other_solvers_and_priors(options: dict[str, Any]) -> None:
    model, x = seeded(Masked), normal(5, 3)
    posterior = nb.NullSpacePosterior(model, **(EXACT | {"delta": 1e-6} | options))
    posterior.fit(data(x), 4, **QUIET)
    state = next(iter(posterior.sample()))
    assert all(torch.equal(state[n], model.get_parameter(n)) for n in IDLE)
    assert posterior.predict(x).mean.isfinite().all()


def test_another_fit_may_depend_on_them() -> None:
    model, x = seeded(Masked), normal(5, 3)
    posterior = nb.NullSpacePosterior(model, **EXACT).fit(data(x), 3, **QUIET)
    masked = {"x": x, "mask": torch.arange(5) < 2}
    labelled = [masked | {"labels": torch.arange(5) % 2}]
    with pytest.raises(nb.ModelError, match=r"'mask_token'.*on which none did.*Fit anew"):
        posterior.update(labelled, **QUIET)
    posterior.fit(labelled, 3, **QUIET)
    assert posterior.space.idle == IDLE[1:]
    assert float(posterior.predict(masked).outputs.std(0).max()) < 1e-8


def test_hidden_paths_are_refused() -> None:
    with pytest.raises(
        nb.ModelError, match=r"no gradient path leads from the output to \['a', 'b'\]"
    ):
        nb.NullSpacePosterior(seeded(Secret), **EXACT).fit(data(normal(5, 3)), 3, **QUIET)


def test_nothing_that_outputs_depend_on() -> None:
    posterior = nb.NullSpacePosterior(seeded(Masked), parameters=["pooler.weight"], **EXACT)
    with pytest.raises(nb.ModelError, match="no output of any example depends on a parameter"):
        posterior.fit(data(normal(5, 3)), 3, **QUIET)
