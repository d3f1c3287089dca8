"""Bad input is a clear error that names the mend, and no error or interrupt leaves a trace."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    QUIET,
    TRAIN,
    X,
    Y,
    assert_same,
    assert_threads,
    delicate,
    fit,
    network,
    says,
    snapshot,
    unchanged,
)
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import nullbayes as nb
from nullbayes.certificate.measure import GuaranteeCheck
from nullbayes.solvers.dual import DualState

# -- labels and targets --------------------------------------------------------------------------

SOFT = torch.full((7, 3), 1 / 3)
TARGETS: dict[str, tuple[Any, int, Tensor, type[Exception], tuple[str, ...]]] = {
    "too-high": (
        "classification",
        3,
        Y + torch.tensor([0, 0, 0, 0, 0, 5, 0]),
        nb.InputError,
        ("batch 1", "reach 7", "3 outputs", "expected 0..2", "Renumber"),
    ),
    "from-one": (
        "classification",
        3,
        Y + 1,
        nb.InputError,
        ("reach 3", "start at 1", "targets - 1"),
    ),
    "negative": ("classification", 3, Y - 1, nb.InputError, ("down to -1", "ignore_index=-1")),
    "float": ("classification", 3, Y.float(), nb.InputError, ("float32", "(4,)", ".long()")),
    "soft-sum": ("classification", 3, SOFT * 2, nb.InputError, ("batch 0", "sum")),
    "soft-nan": ("classification", 3, SOFT * torch.nan, nb.NonFiniteError, ("targets", "NaN")),
    "one-hot": ("classification", 3, SOFT.long(), nb.InputError, ("(4, 3)", "argmax")),
    "column": ("classification", 3, Y[:, None], nb.InputError, ("(4, 1)", "reshape((4,))")),
    "one-logit": ("classification", 1, Y * 0, nb.InputError, ("two or more", "binary")),
    "binary-two": ("binary", 1, Y, nb.InputError, ("2", "0", "1")),
    "binary-shape": ("binary", 3, Y % 2, nb.InputError, ("(4, 3)", "(4,)")),
    "binary-nan": ("binary", 1, Y * torch.nan, nb.NonFiniteError, ("targets", "NaN", "Drop")),
    "regression-shape": ("regression", 3, X[:, :2], nb.InputError, ("(4, 3)", "(4, 2)")),
    "regression-inf": (
        "regression",
        3,
        X / 0,
        nb.NonFiniteError,
        ("targets", "infinity", "impute"),
    ),
    "regression-complex": ("regression", 3, X * 1j, nb.InputError, ("complex64", "real")),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets(case: str) -> None:
    likelihood, outputs, targets, kind, words = TARGETS[case]
    model = network(outputs=outputs)
    loader = [(X[:4], targets[:4]), (X[4:], targets[4:])]
    with unchanged(model), says(kind, "train_loader", *words):
        fit(model, loader, likelihood)
    if "batch 1" not in words:  # the plan tries the first batch, and says the same
        with says(kind, "train_loader", *words):
            nb.plan(model, loader, likelihood)


@settings(deadline=None, max_examples=25)
@given(labels=st.lists(st.integers(-4, 6), min_size=1, max_size=7), classes=st.integers(2, 4))
def test_any_labels_fit_or_are_refused(labels: list[int], classes: int) -> None:
    model, y = network(outputs=classes), torch.tensor(labels)
    loader = [(X[: len(y)], y)]
    if min(labels) >= 0 and max(labels) < classes:
        assert fit(model, loader).certificate.examples == len(y)
        return
    with says(nb.InputError, f"{classes} outputs", f"0..{classes - 1}"):
        fit(model, loader)


# -- the data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite_inputs(value: float) -> None:
    model, x = network(), X.clone()
    x[5, 1] = value
    posterior = fit(model)
    with unchanged(model):
        with says(nb.NonFiniteError, "train_loader, batch 1", "example 1", "impute"):
            fit(model, [(x[:4], Y[:4]), (x[4:], Y[4:])])
        with says(nb.NonFiniteError, "`x`", "example 5", "impute"):
            posterior.predict(x)
        with says(nb.NonFiniteError, "`x`", "example 5"):
            posterior.novelty(x)
        with says(nb.NonFiniteError, "val_loader, batch 0"):
            posterior.calibrate([(x, Y)], **QUIET)
        with says(nb.NonFiniteError, "ood_loader, batch 0"):
            posterior.calibrate(TRAIN, ood_loader=[(x, Y)], **QUIET)


def test_outputs_that_overflow() -> None:
    huge = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    for p in huge.parameters():
        p.data.copy_(torch.linspace(0.5, 1.5, p.numel()).reshape(p.shape))
    x = torch.full((4, 3), 3e38)
    with says(
        nb.NonFiniteError, "train_loader, batch 1", "outputs", "Check the weights and the inputs"
    ):
        fit(huge, [(X, Y), (x, Y[:4])])
    with says(
        nb.NonFiniteError, "predicted outputs", "first for example 0", "scaled as in training"
    ):
        fit(huge).predict(x)


@pytest.mark.parametrize("name", ["0.weight", "3.bias"])
def test_nan_in_the_weights(name: str) -> None:
    model = network(nn.Identity())
    dict(model.named_parameters())[name].data.view(-1)[1] = torch.nan
    for run in (lambda: fit(model), lambda: nb.plan(model, TRAIN)):
        with says(nb.NonFiniteError, "the model", repr(name), "checkpoint"):
            run()


def test_nan_in_a_buffer_but_infinity_is_fine() -> None:
    model = network(nn.BatchNorm1d(6))
    model[2].running_var[3] = torch.nan
    with says(nb.NonFiniteError, "'2.running_var'", "checkpoint"):
        fit(model)
    masked = network()
    masked.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    assert fit(masked).certificate.examples == 7


def test_other_dtypes_of_data_and_model() -> None:
    model, double = network(), network().double()
    x64 = X.double()
    assert fit(double, [(x64, Y)]).predict(x64).mean.dtype == torch.float64
    words = ("torch.float64", "torch.float32", "x.to(torch.float32)", "model.to(torch.float64)")
    with unchanged(model), pytest.raises(nb.InputError) as caught:
        fit(model, [(x64, Y)])
    assert all(word in str(caught.value) for word in ("train_loader, batch 0", *words))
    assert isinstance(caught.value.__cause__, RuntimeError)
    posterior = fit(model)
    with says(nb.InputError, "`x`", *words):
        posterior.predict(x64)
    with says(nb.InputError, "`x`", *words):
        posterior.novelty(x64)
    with says(nb.InputError, "val_loader, batch 0", *words):
        posterior.calibrate([(x64, Y)], **QUIET)
    with says(nb.InputError, "torch.float32", "model.to(torch.float32)"):
        fit(double)
    with says(nb.InputError, "train_loader, batch 0", *words):
        nb.plan(model, [(x64, Y)])


@pytest.mark.parametrize("method", ["linearised", "sampled"])
def test_predict_with_inputs_of_a_wrong_shape(method: str) -> None:
    posterior = fit(network())
    with says(nb.InputError, "`x`", "(2, 5)", "trained on", "forward="):
        posterior.predict(torch.randn(2, 5), method=method)
    with says(nb.InputError, "`x`", "no examples", "at least one"):
        posterior.predict(X[:0], method=method)
    with says(nb.InputError, "`x`", "list", "torch.as_tensor"):
        posterior.predict([[1.0, 2.0, 3.0]], method=method)
    with says(nb.InputError, "`x`", "(2, 3)", "forward="):
        posterior.predict((X[:2], X[:2]), method=method)
    with says(nb.InputError, "`x`", "unexpected keyword", "mapping"):
        posterior.predict({"a": X[:2]}, method=method)


def test_a_token_outside_the_table() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3)).eval()
    tokens = torch.tensor([[0, 1], [4, 5]])
    with says(nb.InputError, "train_loader, batch 0", "(2, 2) torch.int64", "out of range"):
        fit(model, [(tokens, Y[:2])])


# -- the loader ----------------------------------------------------------------------------------

LOADERS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "empty": (list, ("yields no batches", "list of batches")),
    "drop-last": (
        lambda: DataLoader(TensorDataset(X, Y), 8, drop_last=True),
        ("no batches", "drop_last=True"),
    ),
    "empty-batches": (lambda: [(X[:0], Y[:0])] * 2, ("no examples", "every batch is empty")),
    "generator": (lambda: (b for b in TRAIN), ("generator", "read only once", "DataLoader")),
    "iterator": (lambda: iter(TRAIN), ("list_iterator", "read only once", "DataLoader")),
    "number": (lambda: 3, ("int", "iterable", "DataLoader")),
    "bare-tensor": (lambda: [X], ("batch 0", "Tensor", "(inputs, targets)", "Wrap the data set")),
    "inputs-only": (
        lambda: DataLoader(TensorDataset(X), 4),
        ("list of length 1", "(inputs, targets)"),
    ),
    "no-labels": (lambda: [{"x": X, "z": Y}], ("['x', 'z']", "'labels'", "collate")),
    "text": (lambda: [("abc", Y[:1])], ("str", "collate")),
    "text-targets": (lambda: [(X[:1], ["a"])], ("targets are list", "tensor")),
    "arrays": (lambda: [(X.numpy(), Y.numpy())], ("ndarray", "torch.as_tensor")),
    "lengths": (lambda: [(X, Y[:5])], ("(7, 3)", "(5,)", "one target per example")),
    "shape": (lambda: [(X[:, :2], Y)], ("(7, 2)", "forward pass failed", "forward=")),
    "shape-later": (lambda: [*TRAIN, (X[:, :2], Y)], ("batch 2", "(7, 2)")),
}


@pytest.mark.parametrize("case", LOADERS)
def test_loaders(case: str) -> None:
    make, words = LOADERS[case]
    model = network()
    posterior = fit(model)
    with unchanged(model):
        with says(nb.InputError, "train_loader", *words):
            fit(model, make())
        if case != "shape-later":  # the plan tries the first batch only
            with says(nb.InputError, "train_loader", *words):
                nb.plan(model, make())
        with says(nb.InputError, "val_loader", *words):
            posterior.calibrate(make(), **QUIET)
        if case not in ("generator", "iterator", "text-targets", "lengths"):
            with says(nb.InputError, "ood_loader"):
                posterior.calibrate(TRAIN, ood_loader=make(), **QUIET)
    assert posterior.calibration is None


def test_empty_batches_among_full_ones_do_no_harm() -> None:
    model, empty = network(), (X[:0], Y[:0])
    with_empty = fit(model, [empty, TRAIN[0], empty, TRAIN[1]])
    assert_close(with_empty.predict(X).outputs, fit(model).predict(X).outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nb.NullBayesWarning)
        assert with_empty.calibrate([empty, *TRAIN], **QUIET).examples == 7


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(0, 3), min_size=7, max_size=12), seed=st.integers(0, 2**40))
def test_the_cut_into_batches_does_not_matter(sizes: list[int], seed: int) -> None:
    model, x = network(nn.Linear(6, 6), nn.Tanh()).double(), X.double()
    options: dict[str, Any] = {"delta": 0, "prior_precision": 1.0}
    whole = nb.NullSpacePosterior(model, **options).fit([(x, Y)], 3, seed, **QUIET)
    loader, start = [], 0
    for size in [*sizes, 7]:
        loader.append((x[start : start + size], Y[start : start + size]))
        start += size
    cut = nb.NullSpacePosterior(model, **options).fit(loader, 3, seed, **QUIET)
    assert_close(cut.predict(x).outputs, whole.predict(x).outputs, atol=1e-8, rtol=0)
    assert_close(cut._samples(), whole._samples(), atol=1e-6, rtol=0)
    one, other = cut.certificate.as_dict(), whole.certificate.as_dict()
    for name in (
        "constraints",
        "rank",
        "null_dim",
        "examples",
        "checked_examples",
        "held",
        "network_score",
    ):
        assert one[name] == other[name], name


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


# -- nothing is left behind ----------------------------------------------------------------------


def same_answers(posterior: Any) -> list[Any]:
    prediction = posterior.predict(X)
    return [
        prediction.mean,
        prediction.outputs,
        prediction.total,
        posterior.novelty(X),
        posterior.certificate,
        posterior.prior_precision,
        posterior.likelihood.config(),
        posterior.num_samples,
        None if posterior.calibration is None else posterior.calibration.as_dict(),
    ]


@contextmanager
def still_answers(posterior: Any) -> Iterator[None]:
    before = same_answers(posterior)
    yield
    assert_same(same_answers(posterior), before)


@pytest.mark.parametrize(
    ("likelihood", "error"),
    [
        ("classification", KeyboardInterrupt),
        ("regression", KeyboardInterrupt),
        ("classification", RuntimeError),
        ("regression", ValueError),
    ],
)
def test_an_interrupt_in_any_forward_pass_leaves_no_trace(likelihood: str, error: Any) -> None:
    model = delicate()
    model.error = error
    targets = Y if likelihood == "classification" else X
    loader = [(X[:4], targets[:4]), (X[4:], targets[4:])]
    posterior = nb.NullSpacePosterior(model, likelihood).fit(loader, 3, **QUIET)
    earlier, before = same_answers(posterior), snapshot(model)
    other = [(2 * X[:4], targets.flip(0)[:4]), (X[4:], targets.flip(0)[4:])]
    wanted = nb.NullSpacePosterior(model, likelihood).fit(loader, 3, **QUIET)
    model.countdown = 10**6
    wanted.fit(other, 3, 1, **QUIET)
    calls, stopped = 10**6 - model.countdown, 0
    for at in range(1, calls + 1, 5):
        model.countdown = at
        try:
            posterior.fit(other, 3, 1, **QUIET)
        except (error, nb.InputError, nb.ModelError) as caught:
            model.countdown, stopped = -1, stopped + 1
            assert caught.__class__ is error or caught.__cause__.__class__ is error
            assert_same(same_answers(posterior), earlier)
        else:  # the probe took another way round: then the fit is as good as without the error
            model.countdown = -1
            assert error is not KeyboardInterrupt
            assert_close(
                posterior.predict(X).outputs, wanted.predict(X).outputs, atol=1e-3, rtol=1e-3
            )
            posterior = nb.NullSpacePosterior(model, likelihood).fit(loader, 3, **QUIET)
            earlier = same_answers(posterior)
        assert_same(snapshot(model), before)
    assert stopped > 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_an_interrupt_in_the_loader_leaves_no_trace(error: Any, likelihood: str) -> None:
    targets = Y if likelihood == "classification" else X

    class Broken:
        def __init__(self, passes: int, batches: int) -> None:
            self.passes, self.batches = passes, batches

        def __iter__(self) -> Iterator[Any]:
            self.passes -= 1
            yield 3 * X[:4], targets[:4]
            if self.passes < 0:
                for _ in range(self.batches):
                    yield 3 * X[4:], targets[4:]
                raise error("the disk is gone")
            yield 3 * X[4:], targets[4:]

    model = delicate()
    posterior = fit(model, [(X, targets)], likelihood)
    with unchanged(model), still_answers(posterior):
        for passes in (0, 1) if likelihood == "regression" else (0,):
            for count in (0, 2):
                with pytest.raises(error, match="the disk is gone"):
                    posterior.fit(Broken(passes, count), **QUIET)
        whole = TRAIN if likelihood == "classification" else [(X, X)]
        with pytest.raises(error, match="the disk is gone"):
            posterior.calibrate(Broken(0, 1), **QUIET)  # one pass: the fit has proven its rows
        with pytest.raises(error, match="the disk is gone"):
            posterior.calibrate(whole, ood_loader=Broken(0, 1), **QUIET)


# Too few data to calibrate on.
@pytest.mark.filterwarnings("ignore::nullbayes.errors.NullBayesWarning")
@pytest.mark.parametrize("kind", [nb.NullSpacePosterior, nb.LaplacePosterior])
@pytest.mark.parametrize("stage", ["spectrum", "factorise", "project", "measure", "kept"])
def test_an_interrupt_in_the_solver_leaves_no_trace(
    kind: Any, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = delicate()
    loader = [(X, X)]
    posterior = kind(model, "regression").fit(loader, 3, **QUIET)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with unchanged(model), still_answers(posterior), monkeypatch.context() as patch:
        if stage in ("measure", "kept"):
            name = "measure" if stage == "measure" else "__init__"
            patch.setattr(GuaranteeCheck, name, stop)
        else:
            patch.setattr(DualState, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            posterior.fit([(2 * X, X.flip(0))], 4, 1, **QUIET)
        if stage == "project":
            with pytest.raises(KeyboardInterrupt):
                posterior.draw(2)
        if stage == "measure":
            with pytest.raises(KeyboardInterrupt):
                posterior.prior_precision = 123.0
            with pytest.raises(KeyboardInterrupt):
                posterior.calibrate(loader, tune="prior", **QUIET)


def test_a_whole_session_leaves_no_trace(tmp_path: Any) -> None:
    model = delicate()
    shuffling = DataLoader(TensorDataset(X, Y), 3, shuffle=True)
    threads = threading.active_count()
    with unchanged(model):
        posterior = nb.NullSpacePosterior(model).fit(shuffling, 4, progress=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nb.NullBayesWarning)
            posterior.calibrate(shuffling, ood_loader=[(5 * X, Y)], progress=True)
        posterior.predict(X)
        posterior.predict(X, method="sampled")
        for score in ("variance", "share", "entropy", "mutual_information"):
            posterior.novelty(X, score=score)
        for exact in (True, False):
            posterior.novelty(X, exact=exact)
        for weights in posterior.sample(6):
            for value in weights.values():
                value.zero_()  # what is given away is a copy
        posterior.save(tmp_path / "p.safetensors")
        nb.load(tmp_path / "p.safetensors", model).predict(X)
        nb.plan(model, shuffling)
    assert_threads(threads)


def test_wherever_gradients_are_off() -> None:
    """Callers wrap predictions in ``no_grad`` or ``inference_mode``; neither may change the answer."""
    model = network()
    posterior = fit(model)
    wanted = same_answers(posterior)[:4]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inside = X.clone()  # an inference tensor, in the second round
            prediction = posterior.predict(inside)
            found = [
                prediction.mean,
                prediction.outputs,
                prediction.total,
                posterior.novelty(inside),
            ]
            assert_same(found, wanted)
            assert_same(same_answers(fit(model))[:4], wanted)
        assert_same(posterior.predict(inside).mean, wanted[0])
    assert not any(t.requires_grad for t in same_answers(posterior)[:4])


def test_a_checkpoint_loaded_after_the_constructor_counts() -> None:
    """Weights and buffers are read when `fit` runs."""
    model, trained = network(nn.BatchNorm1d(6)), network(nn.BatchNorm1d(6))
    posterior = nb.NullSpacePosterior(model)
    trained[2].running_mean += 1.0
    trained[2].running_var *= 3.0
    trained[0].weight.data *= 2.0
    model.load_state_dict(trained.state_dict())
    posterior.fit(TRAIN, 3, **QUIET)
    assert_close(posterior.predict(X).point, trained(X).detach())
    assert_close(posterior.predict(X).outputs, fit(trained).predict(X).outputs)


def test_compiled_models_are_unwrapped() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    wanted = fit(model)
    found = fit(compiled)
    assert found.model is model
    assert_same(found.predict(X).outputs, wanted.predict(X).outputs)
    assert next(found.sample(1)).keys() == model.state_dict().keys()
    assert nb.plan(compiled, TRAIN).parameters == 45
    named = fit(compiled, parameters=["2.weight"], prior_precision={"2.weight": 2.0})
    assert named.certificate.parameters == 18


class TwoPrecisions(nn.Module):
    """A table in bfloat16 under a head in float32, with the conversion between them or without."""

    def __init__(self, join: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.join = join
        self.table, self.head = nn.Embedding(9, 6).bfloat16(), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.join(torch.tanh(self.table(tokens).mean(1))))
        return out


def test_a_network_whose_precisions_do_not_fit_together_fails_before_it_is_fitted() -> None:
    data = [(torch.arange(10).reshape(5, 2) % 9, torch.arange(5) % 3)]
    joined = nb.NullSpacePosterior(TwoPrecisions(Tensor.float)).fit(data, 3, progress=False)
    assert joined.certificate.audit is not None and joined.certificate.audit.passed
    model, says = TwoPrecisions(torch.relu), r"bfloat16 and torch\.float32.*autocast"
    with pytest.raises(nb.InputError, match="itself fails on the first example.*" + says):
        nb.NullSpacePosterior(model).fit(data, 3, progress=False)
