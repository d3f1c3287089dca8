"""Whatever ends a call early, model, random state, modes and an earlier fit are as they were."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
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
    snapshot,
    unchanged,
)
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import nullbayes as nb
from nullbayes.certificate.measure import GuaranteeCheck
from nullbayes.solvers.dual import DualState

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
