"""Labels, data and loaders that cannot be used are refused by name; what can be used is used as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    QUIET,
    TRAIN,
    X,
    Y,
    fit,
    network,
    says,
    unchanged,
)
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import nullbayes as nb

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
