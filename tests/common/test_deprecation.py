"""What leaves still works for a while, and says what to write instead."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from support import QUIET, TRAIN, X, fit, network

import nullbayes as nb
from nullbayes.common.deprecation import formerly_positional


def test_a_former_module_still_imports() -> None:
    sys.modules.pop("nullbayes.draws", None)
    with pytest.warns(DeprecationWarning, match=r"nullbayes\.draws"):
        draws = importlib.import_module("nullbayes.draws")
    v, noise = draws.standard_normal(0, range(2), 3, 4, torch.empty(0))
    assert v.shape == (2, 3) and noise.shape == (2, 4)


def test_positional_arguments_that_became_keywords() -> None:
    @formerly_positional("b", "c")
    def function(a: int, *, b: int = 0, c: int = 0) -> tuple[int, int, int]:
        return a, b, c

    assert function(1, b=2) == (1, 2, 0)
    with pytest.warns(DeprecationWarning, match=r"b=\.\.\., c=\.\.\."):
        assert function(1, 2, 3) == (1, 2, 3)
    with pytest.raises(TypeError):
        function(1, 2, 3, 4)  # type: ignore[misc]


def test_calls_of_version_0_1() -> None:
    posterior = fit(network())
    with pytest.warns(DeprecationWarning, match="method="):
        old = posterior.predict(X, "sampled")
    assert torch.equal(old.outputs, posterior.predict(X, method="sampled").outputs)
    with pytest.warns(DeprecationWarning, match="score="):
        score = posterior.novelty(X, "share")
    assert torch.equal(score, posterior.novelty(X, score="share"))
    certificate = posterior.certificate
    for name, new in (
        ("map_accuracy", "network_score"),
        ("posterior_accuracy", "posterior_score"),
        ("unseen_divergence", "left_out_divergence"),
    ):
        with pytest.warns(DeprecationWarning, match=new):
            assert getattr(certificate, name) == getattr(certificate, new)
    with pytest.raises(AttributeError, match="nothing"):
        _ = certificate.nothing
    with pytest.warns(DeprecationWarning, match="row_drift"):
        nb.NullSpacePosterior(network(), drift=0.1).fit(TRAIN, 2, **QUIET)


def test_the_base_class_says_that_it_is_abstract() -> None:
    with pytest.raises(nb.InputError, match=r"nb\.NullSpacePosterior"):
        nb.Posterior(network())  # type: ignore[call-arg, arg-type]
