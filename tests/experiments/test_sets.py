"""Conformal sets of classes against plain loops and MAPIE."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments import conformal, sets


def drawn(count: int, seed: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Probabilities, and labels drawn from them."""
    g = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(count, classes, generator=g, dtype=torch.float64)).softmax(1)
    return p, torch.multinomial(p, 1, generator=g)[:, 0]


def test_the_threshold_counts_the_new_one_too() -> None:
    scores = torch.arange(1.0, 20.0)  # 19 of them: the 18th
    assert conformal.threshold(scores, 0.9) == 18.0
    assert conformal.threshold(scores[:8], 0.9) == math.inf
    assert conformal.threshold(scores[:9], 0.9) == 9.0


def test_adaptive_scores_by_hand() -> None:
    p, _ = drawn(30, 0)
    u = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, penalised = conformal.adaptive(p, u), conformal.regularised(p, u, 0.1, 2)
    for i in range(30):
        for c in range(5):
            larger = [float(q) for q in p[i] if q > p[i, c]]
            expected = sum(larger) + float(u[i] * p[i, c])
            assert float(found[i, c]) == pytest.approx(expected)
            beyond = max(0, len(larger) + 1 - 2)
            assert float(penalised[i, c]) == pytest.approx(expected + 0.1 * beyond)


@pytest.mark.parametrize("way", ["likely", "adaptive", "regularised"])
def test_they_cover_what_they_say(way: str) -> None:
    """Whatever the probabilities are worth: those here are far too confident."""
    shares = []
    for seed in range(20):
        p, y = drawn(1500, seed)
        p = p.pow(3) / p.pow(3).sum(1, keepdim=True)
        u = torch.rand(len(p), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        scores = {
            "likely": conformal.likely(p),
            "adaptive": conformal.adaptive(p, u),
            "regularised": conformal.regularised(p, u),
        }[way]
        limit = conformal.threshold(scores[:500].gather(1, y[:500, None])[:, 0], 0.9)
        shares.append(conformal.figures(conformal.sets(scores[500:], limit), y[500:])["coverage"])
    assert np.mean(shares) == pytest.approx(0.9, abs=0.012)


def test_sets_by_mass_are_the_fewest_classes() -> None:
    p, y = drawn(50, 3)
    chosen = conformal.by_mass(p, 0.9)
    for row, held in zip(p, chosen, strict=True):
        kept = sorted(row[held].tolist(), reverse=True)
        assert sum(kept) >= 0.9 - 1e-12 > sum(kept[:-1]) - 1e-9
        assert kept == sorted(row.tolist(), reverse=True)[: len(kept)]
    calibrated = conformal.figures(*(lambda q, t: (conformal.by_mass(q, 0.9), t))(*drawn(4000, 4)))
    assert calibrated["coverage"] >= 0.9  # of probabilities that are right
    assert conformal.figures(chosen, y)["size"] == pytest.approx(float(chosen.sum()) / 50)


class Fixed:
    """A classifier for MAPIE whose inputs are its probabilities."""

    def __init__(self, classes: int) -> None:
        self.classes_, self.n_features_in_ = np.arange(classes), classes
        self.fitted_ = True

    def fit(self, x: Any, y: Any) -> Fixed:
        return self

    def predict_proba(self, x: Any) -> Any:
        return np.asarray(x)

    def predict(self, x: Any) -> Any:
        return np.asarray(x).argmax(1)


@pytest.mark.parametrize("way", ["lac", "aps"])
def test_against_mapie(way: str) -> None:
    """Its APS draws random numbers for what the threshold is set on, and keeps the class that crosses it: ``u = 0``."""
    mapie = pytest.importorskip("mapie.classification")
    from mapie.conformity_scores import APSConformityScore, LACConformityScore
    from sklearn.base import BaseEstimator, ClassifierMixin

    kind = type("Known", (Fixed, ClassifierMixin, BaseEstimator), {})
    p, y = drawn(700, 5)
    known, test = (p[:300].numpy(), y[:300].numpy()), p[300:]
    score = LACConformityScore() if way == "lac" else APSConformityScore()
    peer = mapie.SplitConformalClassifier(
        kind(5), confidence_level=0.9, conformity_score=score, prefit=True, random_state=3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.conformalize(*known)
        _, theirs = peer.predict_set(test.numpy())
    u = torch.zeros(len(p), dtype=torch.float64)
    theirs_drawn = np.random.RandomState(3).uniform(size=300)
    u[:300] = 1 - torch.from_numpy(theirs_drawn)  # there it is what is taken away
    scores = conformal.likely(p) if way == "lac" else conformal.adaptive(p, u)
    limit = conformal.threshold(scores[:300].gather(1, y[:300, None])[:, 0], 0.9)
    mine = conformal.sets(scores[300:], limit)
    same = torch.from_numpy(np.asarray(theirs)[..., 0].astype(bool))
    assert bool((mine == same).all()), (mine.sum(), same.sum())


def test_a_piece_has_every_source_and_way() -> None:
    result = sets.measure_job("breast cancer", 0)
    assert set(result["sources"]) == set(sets.SOURCES)
    for found in result["sources"].values():
        assert set(found) == set(sets.WAYS)
        assert 0.7 < found["adaptive"]["clean"]["coverage"] <= 1.0
        assert found["mass"]["clean"]["empty"] == 0.0
