"""Data as people have them give the posterior that a list of batches gives, and loaders can be predicted whole."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import QUIET, TRAIN, X, Y, network, says, unchanged
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import nullbayes as nb


class Module:
    """A Lightning data module, as far as its loaders go; set up only on demand."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def prepare_data(self) -> None:
        self.stages.append("prepare")

    def setup(self, stage: str) -> None:
        self.stages.append(stage)
        self.data = TensorDataset(X, Y)

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, 3)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(X[:4], Y[:4]), 2)


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return zip(X, Y, strict=True)


class Frame:
    """A table of pandas, as far as it is used."""

    iloc = None

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self.values


def mapping() -> list[dict[str, Any]]:
    return [{"input": x, "label_ids": y} for x, y in TRAIN]


def examples() -> list[dict[str, Any]]:
    return [{"x": x.tolist(), "y": int(y)} for x, y in zip(X, Y, strict=True)]


def stacked(some: list[dict[str, Any]]) -> Any:
    return torch.tensor([e["x"] for e in some]), torch.tensor([e["y"] for e in some])


FORMS: dict[str, Any] = {
    "tensors": lambda: (X, Y),
    "numpy": lambda: (X.double().numpy(), Y.numpy()),
    "reversed numpy": lambda: (X.numpy()[::-1].copy()[::-1], Y.numpy()),
    "pandas": lambda: (Frame(X.double().numpy()), Frame(Y.numpy())),
    "dataset": lambda: TensorDataset(X, Y),
    "stream": Stream,
    "data module": Module,
    "loader": lambda: DataLoader(TensorDataset(X, Y), 2),
    "key": lambda: nb.Batches(mapping(), targets="label_ids"),
    "split": lambda: nb.Batches([[y, x] for x, y in TRAIN], split=lambda b: (b[1], b[0])),
    "objects": lambda: nb.Batches(
        [SimpleNamespace(data=x, truth=y) for x, y in TRAIN],
        split=lambda b: (b.data, b.truth),
    ),
    "collate": lambda: nb.Batches(examples(), collate=stacked, batch_size=3),
    "batches of arrays": lambda: nb.Batches((X.numpy(), Y.numpy()), batch_size=2),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_posterior(form: str) -> None:
    wanted = nb.NullSpacePosterior(network()).fit(TRAIN, 3, **QUIET)
    found = nb.NullSpacePosterior(network()).fit(FORMS[form](), 3, **QUIET)
    assert found.certificate.examples == len(X)
    assert_close(found.predict(X + 1).outputs, wanted.predict(X + 1).outputs, rtol=1e-3, atol=1e-4)
    plan = nb.NullSpacePosterior(network()).plan(FORMS[form]())
    assert plan.rows == wanted.certificate.constraints


def test_a_data_module_is_set_up_once_and_calibrates_on_its_validation_data() -> None:
    module, posterior = Module(), nb.LaplacePosterior(network())
    posterior.fit(module, 3, **QUIET)
    assert module.stages == ["prepare", "fit"]
    with pytest.warns(nb.NullBayesWarning, match="lower end"):
        assert posterior.calibrate(module, progress=False).examples == 4
    assert module.stages == ["prepare", "fit"]


def test_several_inputs_in_arrays() -> None:
    model = network()
    pair = nb.NullSpacePosterior(model, forward=lambda m, x: m(x[0] + x[1]))
    pair.fit((X.numpy(), np.zeros_like(X), Y.numpy()), 3, **QUIET)
    wanted = nb.NullSpacePosterior(model).fit(TRAIN, 3, **QUIET)
    found = pair.predict((X.numpy(), np.zeros_like(X))).outputs
    assert_close(found, wanted.predict(X).outputs, rtol=1e-3, atol=1e-4)


def test_numpy_and_loaders_are_predicted_as_tensors_are() -> None:
    posterior = nb.NullSpacePosterior(network()).fit(TRAIN, 3, **QUIET)
    wanted, novelty = posterior.predict(X), posterior.novelty(X)
    for x in (
        X.double().numpy(),
        DataLoader(TensorDataset(X, Y), 3),
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X), 2),
        DataLoader(X, 4),
        (batch for batch in TRAIN),
        nb.Batches([{"input": x, "truth": y} for x, y in TRAIN], split=lambda b: tuple(b.values())),
    ):
        found = posterior.predict(x)
        for name in ("mean", "outputs", "point", "variance", "total", "epistemic", "covariance"):
            assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-5)
    for x in (X.numpy(), DataLoader(TensorDataset(X, Y), 3), iter(TRAIN)):
        assert_close(posterior.novelty(x), novelty, rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_said() -> None:
    posterior = nb.NullSpacePosterior(network())
    with says(nb.InputError, "train_loader", "7 inputs but 5 targets"):
        posterior.fit((X, Y[:5]), **QUIET)
    with says(nb.InputError, "train_loader", "targets are needed"):
        posterior.fit(X, **QUIET)
    with says(nb.InputError, "train_loader", "no examples"):
        posterior.fit((X[:0], Y[:0]), **QUIET)
    with says(nb.InputError, "object", "Encode"):
        posterior.fit((np.array([["a"], ["b"]], dtype=object), Y[:2]), **QUIET)
    with says(nb.InputError, "iterator"):
        posterior.fit(iter(TRAIN), **QUIET)
    with says(nb.InputError, "batch 0", "'labels_id'", "input"):
        posterior.fit(nb.Batches(mapping(), targets="labels_id"), **QUIET)
    with says(nb.InputError, "batch 0", "split=lambda"):
        posterior.fit(nb.Batches(TRAIN, targets="y"), **QUIET)
    with says(nb.InputError, "`split` returned", "(inputs, targets)"):
        posterior.fit(nb.Batches(TRAIN, split=lambda b: b[0]), **QUIET)
    with says(nb.InputError, "split", "targets"):
        nb.Batches(TRAIN, split=lambda b: b, targets="y")
    with says(nb.InputError, "collate", "DataLoader"):
        nb.Batches(DataLoader(TensorDataset(X, Y)), collate=stacked)
    with says(nb.InputError, "collate", "function"):
        nb.Batches(examples(), collate="stack")  # type: ignore[arg-type]
    with says(nb.InputError, "targets", "name"):
        nb.Batches(mapping(), targets=3)  # type: ignore[arg-type]
    posterior.fit(TRAIN, 3, **QUIET)
    with says(nb.InputError, "no batches"):
        posterior.predict(iter(()))
    with says(nb.InputError, "targets", "one batch"):
        posterior.novelty(DataLoader(TensorDataset(X, Y)), score="loss", targets=Y)


# -- the last layer ------------------------------------------------------------------------------


class HeadFirst(torch.nn.Module):
    """Registers its head before its body."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = torch.nn.Linear(6, 3), torch.nn.Linear(3, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x).tanh())
        return out


def test_the_last_layer_is_found_and_proved() -> None:
    model = network()
    found = nb.LaplacePosterior(model, parameters="last-layer").fit(TRAIN, 4, **QUIET)
    named = nb.LaplacePosterior(model, parameters=["2.weight", "2.bias"]).fit(TRAIN, 4, **QUIET)
    assert found.space.names == ("2.weight", "2.bias")
    assert torch.equal(found.predict(X).outputs, named.predict(X).outputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = HeadFirst().eval()
    with says(nb.ModelError, "'last-layer'", "body.weight", "not linear", "head.weight"):
        nb.LaplacePosterior(other, parameters="last-layer").fit(TRAIN, 4, **QUIET)
    with says(nb.InputError, "last-layer", "no parameters"):
        nb.LaplacePosterior(torch.nn.Flatten(), parameters="last-layer")
    with says(nb.InputError, "'last_layer'"):
        nb.LaplacePosterior(model, parameters="last_layer")


def test_pieces_of_a_tensor_are_batches_without_targets_for_a_loss_that_needs_none() -> None:
    model = network(outputs=3)

    def loss(outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return (outputs - inputs).square().sum(1)

    wanted = nb.LaplacePosterior(model, loss).fit([X[:4], X[4:]], 3, **QUIET)
    found = nb.LaplacePosterior(model, loss).fit(X.split(4), 3, **QUIET)
    assert torch.equal(found.predict(X).outputs, wanted.predict(X).outputs)
    paired = nb.LaplacePosterior(model, lambda out, y: (out[:, 0] - y).square())
    assert paired.fit((X, Y.float()), 3, **QUIET).certificate.examples == 7


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_inputs_are_named(layout: str) -> None:
    with says(nb.InputError, "train_loader, batch 0", "sparse", "to_dense()"):
        nb.NullSpacePosterior(network()).fit([(getattr(X, layout)(), Y)], 3, **QUIET)


class Noise(torch.nn.Linear):
    """Draws NumPy's numbers: refused, after it has drawn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + np.random.rand())  # noqa: NPY002


@pytest.mark.filterwarnings("ignore::nullbayes.NullBayesWarning")
@pytest.mark.parametrize("posterior", [nb.NullSpacePosterior, nb.LayerNullSpacePosterior])
def test_what_is_drawn_of_python_and_numpy_is_put_back(posterior: Any) -> None:
    class Augmented:
        def __iter__(self) -> Any:
            for x, y in TRAIN:
                yield x + 0.01 * random.random() + 0.01 * np.random.rand(), y  # noqa: NPY002

        def __len__(self) -> int:
            return len(TRAIN)

    model, noisy = network(), Noise(3, 3).eval()
    with unchanged(model), unchanged(noisy):
        posterior(model).fit(Augmented(), 2, **QUIET)
        with pytest.raises(nb.ModelError):
            posterior(noisy).fit(TRAIN, 2, **QUIET)
