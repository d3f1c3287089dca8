"""Models and arguments that cannot be used are refused by name, with what is expected and the mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    QUIET,
    TRAIN,
    X,
    fit,
    network,
    says,
    unchanged,
)
from torch import Tensor, nn

import nullbayes as nb

# -- the model -----------------------------------------------------------------------------------

MODES: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm1d(6),
    "Dropout": lambda: nn.Dropout(0.1),
    "AlphaDropout": lambda: nn.AlphaDropout(0.1),
    "MultiheadAttention": lambda: SelfAttention(),
}


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x[:, None], x[:, None], x[:, None])[0][:, 0]
        return out


@pytest.mark.parametrize("layer", MODES)
def test_training_mode(layer: str) -> None:
    model = network(MODES[layer]())
    posterior = fit(model)  # evaluation mode: fine
    model.train()
    with unchanged(model):
        for run in (
            lambda: fit(model),
            lambda: nb.plan(model, TRAIN),
            lambda: posterior.predict(X),
            lambda: posterior.novelty(X),
            lambda: posterior.calibrate(TRAIN, **QUIET),
        ):
            with says(nb.ModelError, "training mode", "'2", "model.eval()"):
                run()
    assert model.training and model[2].training


def test_training_mode_without_effect_is_fine() -> None:
    model = network(nn.Dropout(0.0)).train()
    assert fit(model).certificate.examples == 7
    assert model.training


class Hidden(nn.Module):
    """Randomness, or a tie between examples, that no layer's type gives away."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(x)


RANDOM = ("two forward passes", 'randomness="frozen"', "model.eval()")
TIED = ("evaluated alone", "model.eval()", "batch statistics")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda h: nn.functional.dropout(h, 0.5), RANDOM),
        (lambda h: h - h.mean(0), TIED),
        (lambda h: h + torch.rand(1), RANDOM),
    ],
    ids=["functional-dropout", "batch-mean", "noise"],
)
def test_hidden_randomness_and_ties(
    what: Callable[[Tensor], Tensor], words: tuple[str, ...]
) -> None:
    model = network(Hidden(what))
    # Two numbers drawn one after the other may be almost the same; then the example alone tells it, in other words.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with unchanged(model), says(nb.ModelError, *words):
            fit(model)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            network(nn.BatchNorm1d(6, track_running_stats=False)),
            ("'2'", "running statistics", "GroupNorm"),
        ),
        (
            nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Linear(4, 3)),
            ("'0'", "max_norm=None"),
        ),
        (
            network(Hidden(lambda h: h.detach())),
            ("no gradient path", "'0.bias', '0.weight'", "parameters="),
        ),
        (network(Hidden(lambda h: h.round().long().float())), ("no gradient path", ".detach()")),
        (
            nn.Sequential(network(), Hidden(lambda h: h.sum())),
            ("shape ()", "4 examples", "forward="),
        ),
        (
            nn.Sequential(network(), Hidden(lambda h: h.mean(0))),
            ("shape (3,)", "4 examples", "reduced"),
        ),
        (nn.Sequential(network(), Hidden(lambda h: [h])), ("list", ".logits", "forward=")),  # type: ignore[arg-type, return-value]
    ],
    ids=["no-statistics", "max-norm", "detach", "integers", "loss", "mean", "list"],
)
def test_models(model: nn.Module, words: tuple[str, ...]) -> None:
    model.eval()
    with unchanged(model), says(nb.ModelError, *words):
        fit(model)


def test_outputs_without_any_gradient_path() -> None:
    model = nn.Sequential(network(), Hidden(lambda h: h.detach())).eval()
    with says(nb.ModelError, "no gradient path", ".detach()"):
        fit(model)


def test_an_unused_parameter_stays_or_is_left_out() -> None:
    model = network()
    model[1].register_module("spare", nn.Linear(2, 2))  # within Tanh, which does not call it
    note = "depends on '1.spare.bias', '1.spare.weight': they stay where they are"
    assert any(note in n for n in fit(model).certificate.notes)
    kept = fit(model, parameters=lambda name, _: "spare" not in name)
    assert kept.certificate.parameters == 45


def test_model_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 3)
    with says(nb.ModelError, "inference_mode", "outside"):
        fit(model)


# -- arguments -----------------------------------------------------------------------------------

ARGUMENTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"likelihood": "softmax"}, ("likelihood", "'softmax'", "'classification'")),
    ({"likelihood": nb.Regression}, ("Regression (call it)",)),
    ({"preserve": "weights"}, ("preserve", "'weights'", "'predictions'")),
    ({"directions": 0}, ("directions", "0", "'auto'")),
    ({"directions": 1.5}, ("directions", "1.5", "'auto'")),
    ({"directions": 2, "preserve": "loss"}, ("directions=2", '"loss"', "Leave `directions` out")),
    ({"solver": "cg"}, ("`solver`", "'cg'", "DualCholesky()")),
    ({"solver": nb.solvers.DualCholesky}, ("`solver`", "DualCholesky()")),
    (
        {"solver": nb.solvers.DualCholesky(), "tolerance": 1e-3},
        ("`tolerance`", "DualCholesky(tolerance=...)"),
    ),
    ({"tolerance": 0}, ("`tolerance`", "0", "positive")),
    ({"tolerance": "tight"}, ("`tolerance`", "'tight'", "positive")),
    ({"memory": "lots"}, ("`memory`", "'lots'", "'8GB'")),
    ({"memory": "1.2.3 GB"}, ("`memory`", "'8GB'")),
    ({"memory": 0}, ("`memory`", "'8GB'")),
    ({"memory": -5.0}, ("`memory`", "'8GB'")),
    ({"memory": float("inf")}, ("`memory`", "inf", "'8GB'")),
    ({"delta": -1}, ("`delta`", "-1", "0 (exact)")),
    ({"delta": float("nan")}, ("`delta`", "nan", "0 (exact)")),
    ({"delta": "small"}, ("`delta`", "'small'")),
    ({"prior_precision": None}, ("`prior_precision`", "None", "positive")),
    ({"prior_precision": 0.0}, ("`prior_precision`", "0.0", "positive")),
    ({"prior_precision": True}, ("`prior_precision`", "True", "positive")),
    ({"prior_precision": float("inf")}, ("`prior_precision`", "inf", "finite")),
    ({"prior_precision": "flat"}, ("`prior_precision`", "'flat'", "'evidence'")),
    ({"prior_precision": np.ones(2)}, ("`prior_precision`", "positive")),
    ({"prior_precision": {"0.weight": 1.0}}, ("missing ['0.bias', '2.bias', '2.weight']",)),
    (
        {"prior_precision": dict.fromkeys(["0.weight", "0.bias", "2.weight", "2.bias"], -1)},
        ("'0.weight'", "-1"),
    ),
    ({"prior_precision": {"0.weight": "x"}}, ("prior_precision['0.weight']", "'x'", "positive")),
    ({"parameters": ["0.weigth"]}, ("`parameters`", "'0.weigth'", "Did you mean ['0.weight'")),
    ({"parameters": "zzz"}, ("`parameters`", "'zzz'", "It has", "'2.bias'")),
    ({"parameters": []}, ("`parameters` selects nothing", "requires_grad_(True)")),
    ({"parameters": lambda name, _: "conv" in name}, ("`parameters` selects nothing", "filter")),
    ({"parameters": 3}, ("`parameters`", "3", "filter")),
    ({"parameters": [0, 1]}, ("`parameters`", "[0, 1]", "names")),
]


@pytest.mark.parametrize(
    ("options", "words"), ARGUMENTS, ids=lambda v: "-".join(v) if isinstance(v, dict) else ""
)
def test_arguments_of_the_constructor(options: dict[str, Any], words: tuple[str, ...]) -> None:
    """Said at once, before any data is read."""
    with says(nb.InputError, *words):
        nb.NullSpacePosterior(network(), **options)
    shared = ("likelihood", "preserve", "directions", "solver", "memory", "parameters")
    if set(options) <= set(shared):
        with says(nb.InputError, *words):
            nb.plan(network(), TRAIN, **options)


def test_what_is_no_model() -> None:
    for run in (nb.NullSpacePosterior, nb.LaplacePosterior, lambda m: nb.plan(m, TRAIN)):
        with says(nb.InputError, "`model` is dict", "torch.nn.Module"):
            run({"0.weight": X})


def test_mixed_dtypes_and_integer_parameters() -> None:
    model = network()
    model[0].double()
    assert nb.NullSpacePosterior(model).space.dtype == torch.float64
    assert nb.NullSpacePosterior(model, parameters=["2.weight"]).space.dtype == torch.float32
    complex_model = nn.Linear(3, 3, dtype=torch.complex64)
    with says(nb.ModelError, "real", "complex64"):
        nb.NullSpacePosterior(complex_model)
    frozen = network().requires_grad_(False)
    with says(nb.InputError, "`parameters` selects nothing", "requires_grad_(True)"):
        nb.NullSpacePosterior(frozen)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_samples": 0}, ("`num_samples` is 0", "1 or more")),
        ({"num_samples": 2.0}, ("`num_samples` is 2.0", "whole number")),
        ({"num_samples": True}, ("`num_samples` is True",)),
        ({"seed": -1}, ("`seed` is -1", "0 or more")),
        ({"seed": 0.5}, ("`seed` is 0.5", "whole number")),
        ({"max_examples": 0}, ("`max_examples` is 0", "1 or more")),
    ],
    ids=str,
)
def test_arguments_of_fit(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with says(nb.InputError, *words):
        nb.NullSpacePosterior(network()).fit(TRAIN, **arguments, **QUIET)
    assert (
        nb.NullSpacePosterior(network()).fit(TRAIN, np.int64(3), np.int32(1), **QUIET).num_samples
        == 3
    )


def test_arguments_of_the_questions() -> None:
    posterior = fit(network())
    with says(nb.InputError, "`method` is 'exact'", "'linearised', 'sampled'"):
        posterior.predict(X, method="exact")
    with says(nb.InputError, "`score` is 'entropie'", "'mutual_information'"):
        posterior.novelty(X, score="entropie")
    with says(nb.InputError, "`metric` is 'auc'", "'nll', 'ece'"):
        posterior.calibrate(TRAIN, metric="auc", **QUIET)
    with says(nb.InputError, "`count` is 0"):
        posterior.sample(0)
    with says(nb.InputError, "`count` is -1"):
        posterior.draw(-1)
    with says(nb.InputError, "`prior_precision` is -1"):
        posterior.prior_precision = -1
    with says(nb.InputError, "num_samples"):
        fit(network(), num_samples=1).predict(X, method="sampled")
    for name in ("num_samples", "max_examples"):
        with says(nb.InputError, f"`{name}` is 0"):
            nb.plan(network(), TRAIN, **{name: 0})
    assert posterior.prior_precision == posterior.certificate.prior_precision > 0


def test_metric_of_another_likelihood() -> None:
    posterior = fit(network(), [(X, X)], "regression")
    with says(nb.InputError, "metric='ece'", "Regression", "'nll'"):
        posterior.calibrate([(X, X)], metric="ece", **QUIET)


def test_questions_before_fit() -> None:
    posterior = nb.LaplacePosterior(network())
    for ask in (
        lambda: posterior.predict(X),
        lambda: posterior.novelty(X),
        lambda: posterior.calibrate(TRAIN, **QUIET),
        lambda: posterior.sample(),
        lambda: posterior.draw(1),
        lambda: posterior.certificate,
        lambda: posterior.prior_precision,
        lambda: setattr(posterior, "prior_precision", 1.0),
        lambda: posterior.num_samples,
        lambda: posterior.save("never.safetensors"),
    ):
        with says(nb.NotFittedError, "LaplacePosterior", "fit(train_loader)", "nb.load"):
            ask()


def test_memory_budget() -> None:
    with says(
        nb.MemoryBudgetError, "memory=", "max_examples=", "directions='auto'", "preserve='loss'"
    ):
        fit(network(), memory="1 kB")
    with says(nb.MemoryBudgetError, "no solver fits", "memory=", "max_examples="):
        fit(network(), memory="3 kB")


def test_all_weights_zero_have_no_evidence() -> None:
    model = nn.Linear(3, 3)
    for p in model.parameters():
        p.data.zero_()
    with says(nb.InputError, "zero", "prior_precision="):
        fit(model)
    assert fit(model, prior_precision=1.0).prior_precision == 1.0
