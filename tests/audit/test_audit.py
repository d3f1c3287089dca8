"""The audit tells wrong rows from right ones, by no code of theirs; and a certificate heeds it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import QUIET
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.audit import Audit
from nullbayes.audit.examples import Claim, Question, agreement, audit_examples
from nullbayes.audit.sampling import Drawn, Reservoir
from nullbayes.fit import pipeline
from nullbayes.jacobian.capture import checking
from nullbayes.model.batch import batch_size, select
from nullbayes.model.functional import functional_model

F64 = torch.float64


def network(*layers: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        body = layers or (nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        model = nn.Sequential(*body)
        torch.manual_seed(1)
        for p in model.parameters():
            nn.init.normal_(p, std=0.5)
    return model.double().eval()


def data(examples: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(examples, 4, dtype=F64, generator=generator)
    return x, torch.arange(examples) % 3


def dense(model: nn.Module, x: Tensor) -> Tensor:
    """``(N, O, P)`` by plain reverse mode, one example alone."""
    names = [n for n, _ in model.named_parameters()]
    out = []
    for n in range(len(x)):
        jac = torch.func.jacrev(lambda w, n=n: torch.func.functional_call(model, w, x[n : n + 1]))(
            {k: p.detach() for k, p in model.named_parameters()}
        )
        out.append(torch.cat([jac[k].flatten(2)[0] for k in names], 1))
    return torch.stack(out)


def question(model: nn.Module, samples: Tensor, prior: Tensor) -> Question:
    functional = functional_model(model, None, None, None, None)

    def every_output(outputs: Tensor, targets: Any) -> Tensor:
        return torch.eye(outputs.shape[1], dtype=outputs.dtype)[:, None]

    return Question(functional, samples, prior, every_output)


def drawn(x: Tensor, numbers: list[int]) -> list[Drawn]:
    return [Drawn(n, x[n : n + 1], None) for n in numbers]


def test_it_measures_what_dense_rows_say() -> None:
    model, (x, _) = network(), data()
    rows = dense(model, x)
    generator = torch.Generator().manual_seed(3)
    samples, prior = (
        torch.randn(2, rows.shape[2], dtype=F64, generator=generator) for _ in range(2)
    )
    numbers = [0, 5, 11]
    truth = [(rows[n] @ samples.T).norm(dim=0) for n in numbers]
    audit = audit_examples(
        question(model, samples, prior), drawn(x, numbers), [Claim(t) for t in truth], len(x)
    )
    assert audit.passed and audit.examples == 3 and audit.total == 12
    assert audit.methods == ("forward mode",)
    moved = sum(float((rows[n] @ samples.T).square().sum()) for n in numbers)
    reach = sum(float((rows[n] @ prior.T).square().sum()) for n in numbers)
    assert audit.moved == pytest.approx(math.sqrt(moved / reach), rel=1e-9)
    # A claim that is off by a hundredth of what the prior would do is caught, and named.
    reach_of_5 = float((rows[5] @ prior.T).square().sum(0).mean().sqrt())
    wrong = [truth[0], truth[1] - 0.01 * reach_of_5, truth[2]]
    found = audit_examples(
        question(model, samples, prior), drawn(x, numbers), [Claim(t) for t in wrong], len(x)
    )
    assert not found.passed and found.worst_example == 5
    assert found.worst == pytest.approx(0.01, rel=1e-6)
    assert "failed" in found.verdict and "example 5" in found.verdict


class NoForwardMode(torch.autograd.Function):
    """A tanh whose author wrote a backward pass and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class OnlyOnce(NoForwardMode):
    """The same without a second derivative."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


@pytest.mark.parametrize("function", [NoForwardMode, OnlyOnce])
def test_other_ways_where_an_operation_has_no_forward_mode(function: Any) -> None:
    plain = network()
    model = network(nn.Linear(4, 8), Applied(function), nn.Linear(8, 3))
    x, _ = data()
    rows = dense(plain, x)
    samples = torch.randn(2, rows.shape[2], dtype=F64, generator=torch.Generator().manual_seed(4))
    truth = [Claim((rows[n] @ samples.T).norm(dim=0)) for n in (1, 2)]
    audit = audit_examples(question(model, samples, samples), drawn(x, [1, 2]), truth, 12)
    assert audit.passed and audit.methods and "forward mode" not in audit.methods


def test_every_example_has_the_same_chance_and_nothing_global_moves() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    counts = torch.zeros(20)
    for seed in range(400):
        reservoir = Reservoir(5, seed, 10**9)
        for start, stop in ((0, 3), (3, 4), (4, 12), (12, 20)):
            x = torch.arange(start, stop).double()[:, None]
            reservoir.offer(x, x[:, 0])
        chosen = reservoir.drawn
        assert len(chosen) == 5 and reservoir.seen == 20
        for d in chosen:
            assert float(d.inputs[0, 0]) == float(d.targets[0]) == d.number
            counts[d.number] += 1
    assert torch.equal(before, torch.random.get_rng_state())
    # 400 draws of 5 of 20: each example 100 times, give or take; chi-squared with 19 degrees of freedom.
    assert float(((counts - 100).square() / 100).sum()) < 50


def test_little_memory_holds_fewer_examples_and_at_least_one() -> None:
    x = torch.randn(10, 100, dtype=F64)
    for nbytes, expected in ((10**6, 6), (1700, 2), (10, 1)):
        reservoir = Reservoir(6, 0, nbytes)
        reservoir.offer(x, torch.zeros(10))
        assert len(reservoir.drawn) == expected


def fitted(audit: int | None = 12, **options: Any) -> nb.NullSpacePosterior:
    x, y = data()
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    posterior = nb.NullSpacePosterior(network(), prior_precision=1.0, **options)
    return posterior.fit(batches, 4, audit=audit, **QUIET)  # a number: not by the clock


@pytest.mark.parametrize("preserve", ["predictions", "outputs", "loss"])
def test_ordinary_fits_pass_and_say_so(preserve: str) -> None:
    certificate = fitted(preserve=preserve, delta=0).certificate
    audit = certificate.audit
    assert audit is not None and audit.passed
    assert certificate.held or preserve == "loss"  # which may move the accuracy
    assert (audit.examples, audit.total, audit.batches) == (12, 12, 2)
    assert "passed" in str(certificate)
    assert not certificate.held or "Audited on 12 of 12" in certificate.verdict
    assert certificate.stages["audit"] > 0
    assert Audit.from_dict(audit.as_dict()) == audit
    assert nb.Certificate.from_dict(certificate.as_dict()).audit == audit


def test_a_prior_by_tensor_and_the_laplace_posterior_are_audited_too() -> None:
    prior = {n: 1.0 + i for i, (n, _) in enumerate(network().named_parameters())}
    x, y = data()
    posterior = nb.NullSpacePosterior(network(), prior_precision=prior).fit([(x, y)], 4, **QUIET)
    assert posterior.certificate.audit is not None and posterior.certificate.audit.passed
    laplace = nb.LaplacePosterior(network()).fit([(x, y)], 4, **QUIET).certificate
    assert laplace.audit is not None and laplace.audit.passed and not laplace.held


def test_wrong_rows_are_caught_whatever_their_own_residual_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of another example in place of an example's own, past the check of each batch."""
    x, y = data()
    rolled = checking.capture

    def lying(functional: Any, plan: Any, inputs: Tensor, make: Any, scales: Any = None) -> Any:
        other = select(inputs, torch.tensor([0, *range(batch_size(inputs) - 1)]))
        return rolled(functional, plan, other, make, scales)

    def unchecked(capturing: checking.Capturing, *rest: Any) -> Any:
        piece = capturing.functional, capturing.plan, capturing.inputs, capturing.make
        return lying(*piece)

    monkeypatch.setattr("nullbayes.jacobian.capture.spot_checks.checked", unchecked)
    posterior = nb.NullSpacePosterior(network(), preserve="outputs", delta=0, prior_precision=1.0)
    certificate = posterior.fit([(x[:2], y[:2]), (x[2:4], y[2:4])], 4, **QUIET).certificate
    assert certificate.residual < 1e-8  # by its own rows all is well
    assert certificate.audit is not None and not certificate.audit.passed
    assert not certificate.held
    assert "The guarantee is weak: The audit failed" in certificate.verdict


def test_less_is_asked_for_and_said() -> None:
    x, y = data()
    posterior = nb.NullSpacePosterior(network())
    certificate = posterior.fit([(x, y)], 4, audit=3, **QUIET).certificate
    assert certificate.audit is not None
    assert certificate.audit.examples == 3
    assert certificate.audit.reduced == "audit=3 was asked for"
    assert "Audited less than usual: audit=3" in certificate.verdict
    with pytest.raises(nb.InputError, match="`audit` is 0"):
        posterior.fit([(x, y)], 4, audit=0, **QUIET)


def test_no_time_ends_it_early_but_not_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "LEAST_AUDIT", 0.0)
    monkeypatch.setattr(pipeline, "AUDIT_SHARE", 0.0)
    audit = fitted(audit=None).certificate.audit
    assert audit is not None and audit.examples == 4 and audit.passed
    assert audit.reduced == "4 of 12 drawn examples, to save time"


def test_held_needs_it() -> None:
    certificate = fitted(delta=0).certificate
    assert certificate.held and certificate.audit is not None
    failed = replace(certificate.audit, worst=0.5)
    assert not replace(certificate, audit=failed).held
    nothing = replace(certificate.audit, examples=0)
    assert not replace(certificate, audit=nothing).held
    assert not replace(certificate, audit=None).held  # as in a file of version 0.1


def test_rounding_is_capped_whatever_the_precision() -> None:
    assert agreement(torch.float64) < agreement(torch.float32) < 1e-2
    assert agreement(torch.bfloat16) == agreement(torch.float16) == 2e-2


def test_frozen_noise_is_audited_as_it_was_fitted() -> None:
    x, y = data()
    model = network(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3)).train()
    posterior = nb.NullSpacePosterior(model, randomness="frozen", draws=2)
    audit = posterior.fit([(x, y)], 4, **QUIET).certificate.audit
    assert audit is not None and audit.passed and audit.total == 24


def test_a_lone_number_of_outputs_and_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(2, 6)
            self.out = nn.Linear(6, 1)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.out(torch.tanh(self.a(x) + self.b(z)))[:, 0]

    x, _ = data()
    z, y = x[:, :2] * 2, (x[:, 0] > 0).double()
    posterior = nb.NullSpacePosterior(network(Two())[0].double(), "binary")
    audit = posterior.fit([(x, z, y)], 4, **QUIET).certificate.audit
    assert audit is not None and audit.passed
    assert_close(torch.tensor(audit.worst), torch.tensor(0.0), atol=1e-8, rtol=0)


@pytest.mark.parametrize("function", [NoForwardMode, OnlyOnce])
def test_predictions_by_two_reverse_passes_are_never_silently_wrong(function: Any) -> None:
    """More outputs than two for each sample: products go sample by sample, not by rows."""
    plain = network(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 9))
    model = network(nn.Linear(4, 8), Applied(function), nn.Linear(8, 9))
    x, _ = data()
    y = torch.arange(len(x)) % 9
    posterior = nb.NullSpacePosterior(model, prior_precision=1.0).fit([(x, y)], 3, **QUIET)
    rows = dense(plain, x[:5])
    deltas = posterior._samples()
    prediction = posterior.predict(x[:5])
    wanted = torch.einsum("nop,sp->sno", rows, deltas)
    assert_close(prediction.outputs - prediction.point, wanted, atol=1e-9, rtol=1e-7)
