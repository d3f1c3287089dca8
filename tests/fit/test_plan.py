"""What a plan says, and that the fit does the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support import QUIET, TRAIN, X, Y, network, unchanged
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.fit import plan as planning

# -- planning ------------------------------------------------------------------------------------


def test_the_plan_in_words() -> None:
    model = network()
    with unchanged(model):
        plan = nb.plan(model, TRAIN, memory="1 GB")
    text = str(plan)
    for words in (
        "Plan",
        "14 × 45",
        "7 examples, 2 rows each",
        str(plan.solver),
        "of 1.0 GB",
        "about",
    ):
        assert words in text
    assert plan.fits and not plan.advice and not plan.unsupported
    assert json.loads(json.dumps(plan.as_dict())) == plan.as_dict()
    assert plan.rows == plan.examples * plan.rows_per_example


def test_a_plan_that_does_not_fit_names_the_mend() -> None:
    plan = nb.plan(network(), TRAIN, memory="1 kB")
    assert not plan.fits and plan.solver is None
    assert "none fits" in str(plan)
    mends = " ".join(plan.advice)
    assert "max_examples=" in mends and "directions='auto'" in mends and "preserve='loss'" in mends


def test_the_plan_names_what_has_no_rule() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.out = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(torch.sin(x * self.scale))
            return out

    plan = nb.plan(Scaled(), TRAIN)
    assert plan.unsupported == {"scale": "no rule for Scaled"}
    assert "generic path" in str(plan) and "20 % of the weights" in str(plan)
    assert "nb.jacobian.register" in str(plan)


@pytest.mark.parametrize("preserve", ["predictions", "outputs", "loss"])
def test_plan_and_fit_count_alike(preserve: str) -> None:
    options: dict[str, Any] = {"preserve": preserve, "parameters": ["2.weight", "2.bias"]}
    plan = nb.plan(network(), TRAIN, max_examples=5, **options)
    posterior = nb.NullSpacePosterior(network(), **options).fit(TRAIN, 3, max_examples=5, **QUIET)
    c = posterior.certificate
    assert (
        (plan.examples, plan.rows, plan.parameters)
        == (c.examples, c.constraints, c.parameters)
        == (
            5,
            {"predictions": 10, "outputs": 15, "loss": 5}[preserve],
            21,
        )
    )


@pytest.mark.parametrize(
    "solver",
    [
        nb.solvers.DualCholesky(),
        nb.solvers.PrimalQR(),
        nb.solvers.ConjugateGradient(),
        nb.solvers.AlternatingProjections(),
    ],
    ids=lambda solver: solver.name,
)
def test_a_plan_foretells_every_stage_that_the_certificate_times(solver: Any) -> None:
    many = [(X.repeat(12, 1), Y.repeat(12))]  # more examples than are tried
    plan = nb.plan(network(), many, solver=solver, num_samples=3)
    posterior = nb.NullSpacePosterior(network(), solver=solver).fit(many, 3, **QUIET)
    c = posterior.certificate
    assert plan.seconds.keys() == c.stages.keys()
    assert all(0 <= value < 60 for value in (*plan.seconds.values(), *c.stages.values()))
    assert sum(plan.seconds.values()) > 0
    assert sum(c.stages.values()) == pytest.approx(c.seconds)
    assert all(stage in str(plan) for stage in plan.seconds)


def test_the_plan_of_a_regression_needs_no_noise() -> None:
    likelihood = nb.Regression()
    plan = nb.plan(network(), [(X, X)], likelihood)
    assert plan.rows == 21 and likelihood.noise_variance is None


def test_the_plan_leaves_random_state_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    many = [(X.repeat(30, 1), Y.repeat(30))]
    plan = nb.plan(network(), many, solver=nb.solvers.PrimalQR())
    assert plan.solver == "primal QR" and plan.examples > planning.TRIED_EXAMPLES
    assert_close(torch.rand(3), wanted, rtol=0, atol=0)
