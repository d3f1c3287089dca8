"""The estimators in scikit-learn's own machinery, against the posteriors that they stand for."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from support import QUIET, says
from torch import nn
from torch.nn import functional as F

import nullbayes as nb
from nullbayes.sklearn import NullSpaceClassifier, NullSpaceRegressor

IRIS = load_iris(return_X_y=True)
DIABETES = tuple(a[:120] for a in load_diabetes(return_X_y=True))


def trained(inputs: Any, targets: Any, outputs: int, loss: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(inputs.shape[1], 12), nn.Tanh(), nn.Linear(12, outputs))
    x, y = torch.tensor(inputs, dtype=torch.float32), torch.as_tensor(targets)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        loss(model(x), y).backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def flowers() -> nn.Module:
    return trained(*IRIS, 3, F.cross_entropy)


@pytest.fixture(scope="module")
def glucose() -> nn.Module:
    y = torch.tensor(DIABETES[1], dtype=torch.float32)[:, None] / 100
    return trained(DIABETES[0], y, 1, F.mse_loss)


def test_a_classifier_is_its_posterior(flowers: nn.Module) -> None:
    x, y = IRIS
    names = np.array(["setosa", "versicolor", "virginica"])
    estimator = NullSpaceClassifier(flowers, num_samples=8, random_state=3).fit(x, names[y])
    posterior = nb.NullSpacePosterior(flowers).fit((x, y), 8, 3, **QUIET)
    np.testing.assert_allclose(
        estimator.predict_proba(x), posterior.predict(x).mean.numpy(), rtol=1e-3, atol=1e-4
    )
    assert estimator.classes_.tolist() == names.tolist()
    assert (
        estimator.score(x, names[y])
        == (flowers(torch.tensor(x).float()).argmax(1).numpy() == y).mean()
    )
    assert estimator.certificate_.held and estimator.n_features_in_ == 4
    far = estimator.score_samples(x + 30)
    assert far.shape == (150,) and far.mean() < estimator.score_samples(x).mean()
    laplace = NullSpaceClassifier(flowers, posterior="laplace").fit(x, y)
    assert isinstance(laplace.posterior_, nb.LaplacePosterior)


def test_two_classes_of_one_logit() -> None:
    x, y = IRIS[0][:100], IRIS[1][:100]
    model = trained(x, y[:, None].astype(np.float32), 1, F.binary_cross_entropy_with_logits)
    estimator = NullSpaceClassifier(model).fit(x, y)
    probabilities = estimator.predict_proba(x)
    assert probabilities.shape == (100, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert (estimator.predict(x) == y).mean() > 0.95


def test_a_regressor_is_its_posterior(glucose: nn.Module) -> None:
    x, y = DIABETES[0], DIABETES[1] / 100
    estimator = NullSpaceRegressor(glucose, num_samples=8).fit(x, y)
    mean, std = estimator.predict(x, return_std=True)
    posterior = nb.NullSpacePosterior(glucose, "regression").fit((x, y[:, None]), 8, **QUIET)
    wanted = posterior.predict(x)
    np.testing.assert_allclose(mean, wanted.mean[:, 0].numpy(), rtol=1e-4)
    np.testing.assert_allclose(std, wanted.total.sqrt()[:, 0].numpy(), rtol=1e-3)
    assert mean.shape == std.shape == (120,)
    assert estimator.score(x, y) > 0.3
    several = NullSpaceRegressor(glucose, noise_variance=0.5).fit(x, y[:, None])
    assert several.predict(x).shape == (120, 1)


def test_clones_pickles_and_pipelines(flowers: nn.Module) -> None:
    x, y = IRIS
    estimator = NullSpaceClassifier(flowers, num_samples=5)
    again = clone(estimator).set_params(num_samples=6)
    assert again.get_params()["num_samples"] == 6 and estimator.num_samples == 5
    with pytest.raises(NotFittedError):
        estimator.predict(x)
    estimator.fit(x, y)
    copied = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(copied.predict_proba(x), estimator.predict_proba(x))
    scaled = make_pipeline(StandardScaler(), NullSpaceClassifier(flowers)).fit(x, y)
    assert scaled.predict(x).shape == (150,)
    order = np.random.default_rng(0).permutation(150)
    search = GridSearchCV(
        NullSpaceClassifier(flowers), {"posterior": ["null-space", "laplace"]}, cv=2
    )
    search.fit(x[order], y[order])
    assert search.best_score_ > 0.9
    with torch.no_grad():
        before = estimator.predict_proba(x)
        flowers[0].weight.add_(0.0)
        np.testing.assert_array_equal(estimator.predict_proba(x), before)


def test_calibration_on_a_share(flowers: nn.Module) -> None:
    x, y = IRIS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nb.NullBayesWarning)
        estimator = NullSpaceClassifier(flowers, calibration_share=0.2).fit(x, y)
    assert estimator.posterior_.calibration.examples == 30
    assert estimator.certificate_.examples == 120


def test_a_skorch_net_is_trained_on_a_clone() -> None:
    skorch = pytest.importorskip("skorch")
    x, y = IRIS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # before the weights are made, from which the training starts
        net = skorch.NeuralNetClassifier(
            nn.Linear(4, 3),
            criterion=nn.CrossEntropyLoss,
            max_epochs=100,
            lr=0.05,
            optimizer=torch.optim.Adam,
            verbose=0,
            train_split=None,
        )
        estimator = NullSpaceClassifier(net).fit(x, y)
        assert estimator.score(x, y) > 0.8 and not hasattr(net, "module_")
        held = cross_val_predict(NullSpaceClassifier(net), x, y, cv=3, method="predict_proba")
    assert held.shape == (150, 3)
    assert estimator.certificate_.held


#: scikit-learn's own checks that a prefit network of one input size can meet; the others train on data of many shapes
CHECKS = (
    "check_no_attributes_set_in_init",
    "check_get_params_invariance",
    "check_set_params",
    "check_estimators_unfitted",
    "check_estimator_cloneable",
    "check_estimator_repr",
)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", [NullSpaceClassifier, NullSpaceRegressor])
def test_scikit_learns_own_checks(kind: Any, check: str, flowers: nn.Module) -> None:
    found = getattr(estimator_checks, check, None)
    if found is None:
        pytest.skip("not in this version of scikit-learn")
    found(kind.__name__, kind(flowers))


def test_what_cannot_be_used_is_said(flowers: nn.Module) -> None:
    x, y = IRIS
    with says(nb.InputError, "2 classes", "3 outputs"):
        NullSpaceClassifier(flowers).fit(x[:100], y[:100])
    with says(nb.InputError, "one class"):
        NullSpaceClassifier(flowers).fit(x[:50], y[:50])
    with says(nb.InputError, "`posterior`", "null-space"):
        NullSpaceClassifier(flowers, posterior="swag").fit(x, y)
    with says(nb.InputError, "`calibration_share`"):
        NullSpaceClassifier(flowers, calibration_share=1.0).fit(x, y)
    with says(nb.InputError, "`module`", "skorch"):
        NullSpaceClassifier("network").fit(x, y)
    fitted = NullSpaceClassifier(flowers).fit(x, y)
    with says(nb.InputError, "3 features", "expecting 4"):
        fitted.predict(x[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        fitted.predict(np.full((2, 4), np.nan))
