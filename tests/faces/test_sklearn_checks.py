"""scikit-learn's own checks of estimators, on networks that take the shape of whatever data they are given."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import check_estimator
from torch import Tensor, nn

skorch = pytest.importorskip("skorch")

from nullbayes.sklearn import NullSpaceClassifier, NullSpaceRegressor  # noqa: E402

#: Checks that do not apply, and why; the table of docs/howto/scikit-learn.md.
NOT_APPLICABLE = {
    "check_methods_sample_order_invariance": "asks for 1e-7 or 1e-9: less than single precision rounds",
    "check_methods_subset_invariance": "asks for 1e-7, and 1e-4 of scores near zero: less than single precision rounds",
}


class Perceptron(nn.Module):
    def __init__(self, inputs: int = 2, outputs: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out = nn.Linear(inputs, 8), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.hidden(x).tanh())
        return out


class Sizes(skorch.callbacks.Callback):  # type: ignore[misc, name-defined]
    """Inputs and outputs as many as the data have."""

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **_: Any) -> None:
        classes = isinstance(net, skorch.NeuralNetClassifier)
        outputs = len(np.unique(y)) if classes else y.reshape(len(y), -1).shape[1]
        net.set_params(module__inputs=X.shape[1], module__outputs=outputs)


def net(kind: Any, **options: Any) -> Any:
    return kind(
        Perceptron,
        max_epochs=25,
        lr=0.1,
        optimizer=torch.optim.Adam,
        train_split=None,
        verbose=0,
        callbacks=[("sizes", Sizes())],
        **options,
    )


ESTIMATORS = {
    "classifier": lambda: NullSpaceClassifier(
        net(skorch.NeuralNetClassifier, criterion=nn.CrossEntropyLoss), num_samples=4
    ),
    "regressor": lambda: NullSpaceRegressor(net(skorch.NeuralNetRegressor), num_samples=4),
}


@pytest.mark.skipif(
    "expected_failed_checks" not in inspect.signature(check_estimator).parameters,
    reason="scikit-learn before 1.6 cannot be told which checks do not apply",
)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_scikit_learns_checks_of_estimators(name: str) -> None:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its data have one example or one class; libraries say so
        found = check_estimator(
            ESTIMATORS[name](), expected_failed_checks=NOT_APPLICABLE, on_fail=None
        )
    failed = {r["check_name"]: r["exception"] for r in found if r["status"] == "failed"}
    assert not failed
    passed = [r for r in found if r["status"] == "passed"]
    assert len(passed) >= 45


def test_the_page_names_the_checks_that_do_not_apply() -> None:
    page = Path(__file__).parents[2] / "docs" / "howto" / "scikit-learn.md"
    named = re.findall(r"^\| `(check_\w+)` \|", page.read_text(), flags=re.MULTILINE)
    assert sorted(named) == sorted([*NOT_APPLICABLE, "check_array_api_input"])
