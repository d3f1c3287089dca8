"""What `calibrate` chooses, within which bounds, and what it says of it."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.errors import InputError
from nullbayes.posterior.calibration_path import CalibrationPath, warn

F64 = torch.float64


def problem(n: int = 60, noise: float = 1.5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, 6, generator=g, dtype=F64)
    logits = x[:, :3] + noise * torch.randn(n, 3, generator=g, dtype=F64)
    return x, logits.argmax(1)


def confident() -> nn.Module:
    """A network that has learned its training data by heart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 3)).to(F64)
    x, y = problem()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model


KINDS: dict[str, Any] = {
    "null": lambda m: nb.NullSpacePosterior(m).fit(problem(), 20, progress=False),
    "laplace": lambda m: nb.LaplacePosterior(m).fit(problem(), 20, progress=False),
    "layers": lambda m: nb.LayerNullSpacePosterior(m).fit(problem()[0], 20, progress=False),
}


def nll(p: Tensor, y: Tensor) -> float:
    return float(-p[torch.arange(len(y)), y].log().mean())


@pytest.mark.parametrize("kind", list(KINDS))
def test_temperature(kind: str, tmp_path) -> None:
    model, (x, y) = confident(), problem(200)
    posterior = KINDS[kind](model)
    alpha, before = posterior.prior_precision, posterior.predict(x, method="linearised")
    novelty = posterior.novelty(x[:9])
    path = posterior.calibrate((x, y), tune="temperature", progress=False)
    heat = path.chosen_temperature
    assert heat > 1.2 and not path.at_edge and posterior.prior_precision == alpha
    assert path.after["nll"] < path.before["nll"]
    now = posterior.predict(x, method="linearised")
    assert_close(now.outputs, before.outputs)  # raw outputs, samples and novelty stay
    assert_close(now.variance, before.variance)
    assert_close(posterior.novelty(x[:9]), novelty)
    both = torch.cat([now.outputs, 2 * now.point - now.outputs])  # with mirror images
    wanted = (both / heat).softmax(2).mean(0)
    assert_close(now.mean, wanted)
    assert path.after["nll"] == pytest.approx(nll(wanted, y), rel=1e-6)
    assert path.before["nll"] == pytest.approx(nll(before.mean, y), rel=1e-6)
    grid = {t: nll((both / t).softmax(2).mean(0), y) for t in path.temperature}
    assert heat == min(grid, key=lambda t: grid[t])
    posterior.save(tmp_path / "p.safetensors")
    loaded = nb.load(tmp_path / "p.safetensors", model)
    assert_close(loaded.predict(x[:5], method="linearised").mean, now.mean[:5])
    assert CalibrationPath(**json.loads(json.dumps(path.as_dict()))) == path


def test_links_and_evaluation_are_tempered() -> None:
    model, (x, y) = confident(), problem(200)
    posterior = KINDS["null"](model)
    posterior.calibrate((x, y), tune="temperature", progress=False)
    heat = posterior.calibration.chosen_temperature
    made = posterior.predict(x, link="probit")
    variance = made.covariance.diagonal(dim1=1, dim2=2) / heat**2
    kappa = (1 + torch.pi / 8 * variance).rsqrt()
    assert_close(made.mean, (kappa * made.point / heat).softmax(1))
    found = posterior.evaluate((x, y), progress=False)
    table = found.as_dict()
    assert f"temperature {heat:.4g}" in json.dumps(table)
    assert nll(posterior.predict(x).mean, y) == pytest.approx(
        _value(table, "calibrated", "nll"), rel=1e-6
    )


def _value(table: dict[str, Any], method: str, metric: str) -> float:
    """The figure of one method, wherever in the table it stands."""

    def search(node: Any) -> Any:
        if isinstance(node, dict):
            if method in node and isinstance(node[method], dict) and metric in node[method]:
                return node[method][metric]
            node = list(node.values())
        if isinstance(node, list):
            return next((v for v in map(search, node) if v is not None), None)
        return None

    value = search(table)
    return float(value["value"] if isinstance(value, dict) else value)


def path_of(**changes: Any) -> CalibrationPath:
    values: dict[str, Any] = {
        "prior_precision": [0.1, 1.0, 10.0, 1e4], "nll": [0.4, 0.5, 0.6, 0.7], "accuracy": [0.7, 0.8, 0.9, 0.9],
        "ece": None, "auroc": None, "chosen": 2, "metric": "nll", "score_name": "accuracy", "start": 1.0,
        "point": {"nll": 0.8, "accuracy": 0.9, "ece": None}, "examples": 1000, "at_edge": False,
    }  # fmt: skip
    return CalibrationPath(**(values | changes))


def test_accuracy_is_bounded() -> None:
    """Labels that the network has wrong where the posterior is widest: the best NLL has a worse accuracy."""
    torch.manual_seed(1)
    model = confident()
    g = torch.Generator().manual_seed(7)
    x = 3 * torch.randn(300, 6, generator=g, dtype=F64)
    y = torch.where(
        torch.rand(300, generator=g) < 0.6,
        model(x).argmax(1),
        torch.randint(0, 3, (300,), generator=g),
    )
    posterior = KINDS["null"](model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = posterior.calibrate((x, y), progress=False)
    allowed = [i for i, a in enumerate(path.accuracy) if not a < path.point["accuracy"] - 4 / 300]
    assert len(allowed) < len(path.accuracy)  # the bound excludes something here
    best = min(range(len(path.nll)), key=lambda i: path.nll[i])
    assert path.chosen == min(allowed, key=lambda i: path.nll[i])
    assert path.bounded == (best not in allowed)
    said = any("was bounded" in str(w.message) for w in caught)
    assert said == path.bounded
    score = (posterior.predict(x).mean.argmax(1) == y).double().mean()
    assert float(score) == pytest.approx(path.after["accuracy"])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"bounded": True}, "was bounded at 10:.*fall by more than 0.01"),
        ({"chosen": 3, "nll": [0.4, 0.5, 0.6, 0.3]}, "all but closed"),
        ({"chosen": 3, "at_edge": True}, "joint predictions .* are gone"),
        (
            {"chosen": 3, "point": {"nll": 0.7, "accuracy": 0.9, "ece": None}},
            "adds nothing. The prior precision grew from 1 to 1e.04.*set `prior_precision = 1` again",
        ),
    ],
)
def test_what_is_warned_of(changes: dict[str, Any], words: str) -> None:
    path = path_of(**changes)
    with pytest.warns(nb.NullBayesWarning, match=words):
        warn(path, path.nll)


def test_before_and_after() -> None:
    path = path_of()
    assert path.before == {"nll": 0.5, "accuracy": 0.8, "ece": None}
    assert path.after == {"nll": 0.6, "accuracy": 0.9, "ece": None}
    assert not path.closed and path_of(chosen=3).closed
    assert "prior precision 1 → 10; nll 0.5 → 0.6 (network 0.8), accuracy 0.8 → 0.9" in repr(path)
    assert "prior precision 1 → 1e+04, closed; nll" in repr(path_of(chosen=3))


def test_a_temperature_on_a_closed_posterior_is_warned_of() -> None:
    model, data = confident(), problem(200)
    posterior = KINDS["null"](model)
    open_at = posterior.prior_precision
    posterior.calibration, posterior.prior_precision = path_of(chosen=3), 1e4
    with pytest.warns(
        nb.NullBayesWarning, match="that an earlier calibration has closed"
    ) as caught:
        posterior.calibrate(data, tune="temperature", progress=False)
    assert caught[0].filename == __file__
    posterior.calibration, posterior.prior_precision = path_of(chosen=3), open_at
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.calibrate(data, tune="temperature", progress=False)


def test_a_temperature_needs_probabilities() -> None:
    torch.manual_seed(0)
    model, (x, _) = nn.Linear(6, 1).to(F64), problem()
    posterior = nb.NullSpacePosterior(model, "regression").fit(
        (x, x[:, :1] + x[:, 1:2]), progress=False
    )
    with pytest.raises(InputError, match="temperature"):
        posterior.calibrate((x, x[:, :1]), tune="temperature", progress=False)
