"""Conformal prediction by MAPIE on top of the estimators."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from nullbayes.sklearn import NullSpaceClassifier, NullSpaceRegressor


def test_sets_of_classes_and_intervals_hold_their_level() -> None:
    from mapie.classification import SplitConformalClassifier
    from mapie.regression import SplitConformalRegressor

    x, y = load_digits(n_class=4, return_X_y=True)
    x = (x / 16).astype(np.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 4))
    level = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1))
    amount = x.sum(1).astype(np.float32) / 10
    train, conform, test = slice(0, 200), slice(200, 450), slice(450, None)
    inputs = torch.tensor(x[train])
    parameters = [*model.parameters(), *level.parameters()]
    optimiser = torch.optim.Adam(parameters, 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(inputs), torch.tensor(y[train]))
        (loss + F.mse_loss(level(inputs)[:, 0], torch.tensor(amount[train]))).backward()
        optimiser.step()
    options = {"num_samples": 5, "parameters": "last-layer"}
    classifier = NullSpaceClassifier(model.eval(), **options).fit(x[train], y[train])
    regressor = NullSpaceRegressor(level.eval(), **options).fit(x[train], amount[train])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sets = SplitConformalClassifier(classifier, confidence_level=0.9)
        _, chosen = sets.conformalize(x[conform], y[conform]).predict_set(x[test])
        intervals = SplitConformalRegressor(regressor, confidence_level=0.9)
        _, bounds = intervals.conformalize(x[conform], amount[conform]).predict_interval(x[test])
    held = chosen[np.arange(len(y[test])), y[test], 0].mean()
    low, high = bounds[:, 0, 0], bounds[:, 1, 0]
    within = ((amount[test] >= low) & (amount[test] <= high)).mean()
    # The level less four standard errors of 270 test examples and 250 for conforming.
    assert held > 0.8 and within > 0.8
    assert (high > low).all()
