"""Examples drawn from all the data are audited one at a time: wrong rows are found, right ones pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import QUIET, generator
from torch import Tensor, nn
from torch.nn import functional as F

import nullbayes as nb
from nullbayes.audit import derivative, examples
from nullbayes.audit.derivative import DIFFERENCES, Derivative
from nullbayes.audit.examples import Claim, Question, audit_examples
from nullbayes.audit.sampling import Drawn, Reservoir
from nullbayes.model.functional import FunctionalModel
from tests.audit.examples_setup import F64, Calls, dense, functional


def null_samples(rows: Tensor, count: int = 8) -> tuple[Tensor, Tensor]:
    """Samples that rows ``(N, C, P)`` say nothing of, and what they were projected from."""
    a = rows.flatten(0, 1)
    prior = torch.randn(count, a.shape[1], dtype=F64, generator=generator(3))
    q = torch.linalg.svd(a, full_matrices=True)[2][torch.linalg.matrix_rank(a) :]
    return prior @ q.T @ q, prior


def every_output(outputs: Tensor, targets: Any) -> Tensor:
    width = outputs[0].numel()
    eye = torch.eye(width, dtype=outputs.dtype)
    return eye.reshape(width, 1, *outputs.shape[1:])


def audited(
    f: FunctionalModel, x: Tensor, rows: Tensor, samples: Tensor, prior: Tensor
) -> nb.Audit:
    """What the audit says of samples whose ``rows`` are claimed to be the network's."""
    drawn = [Drawn(n, x[n : n + 1], None) for n in range(len(x))]
    claims = [Claim((samples @ rows[n].T).norm(dim=1)) for n in range(len(x))]
    return audit_examples(Question(f, samples, prior, every_output), drawn, claims, len(x))


# -- lies ----------------------------------------------------------------------------------------


def mlp() -> Calls:
    return Calls(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(4, 9), b=nn.Linear(9, 2))


def data(examples: int = 12, *shape: int) -> Tensor:
    return torch.randn(examples, *(shape or (4,)), dtype=F64, generator=generator(2))


def test_samples_that_keep_the_truth_pass_and_move_nothing() -> None:
    f, x = functional(mlp()), data()
    rows = dense(f, x)
    audit = audited(f, x, rows, *null_samples(rows))
    assert audit.passed and audit.moved < 1e-10 and audit.worst < 1e-10
    assert audit.plain_call is not None and audit.plain_call < 1e-12


def test_samples_of_any_other_kind_pass_where_the_rows_say_how_far_they_move() -> None:
    """A numerical null space, directions that are left out, Laplace: nothing is promised, and the rows are true."""
    f, x = functional(mlp()), data()
    rows = dense(f, x)
    samples, prior = null_samples(rows)
    for mixed in (0.01, 0.3, 1.0):
        audit = audited(f, x, rows, samples + mixed * prior, prior)
        assert audit.passed and audit.moved > 0.5 * mixed


Lie = tuple[FunctionalModel, Tensor, Tensor]


def sorted_inside() -> Lie:
    def forward(m: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return m.b(torch.tanh(m.a(x[order]))[order.argsort()])

    f, x = functional(Calls(forward, a=nn.Linear(4, 9), b=nn.Linear(9, 2))), data()
    rows = dense(f, x)
    for slot in f.space.slots[:2]:
        rows[..., slot.start : slot.stop] = rows[x[:, 0].argsort()][..., slot.start : slot.stop]
    return f, x, rows


def used_outside() -> Lie:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.tanh(F.linear(torch.tanh(m.a(x)), m.a.weight)))

    def seen(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.tanh(F.linear(torch.tanh(m.a(x)), m.a.weight.detach())))

    f, x = functional(Calls(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2))), data(6)
    return f, x, dense(functional(Calls(seen, a=nn.Linear(4, 4), b=nn.Linear(4, 2))), x)


def first_batch_of_one() -> Lie:
    """Rows by position instead of by example, as a batch of one does not tell the two apart."""
    f = functional(
        Calls(
            lambda m, x: m.b(torch.tanh(m.a(x.transpose(0, 1))).mean(0)),
            a=nn.Linear(3, 9),
            b=nn.Linear(9, 2),
        )
    )
    x = data(6, 6, 3)
    rows, model = dense(f, x), f.model
    h = torch.tanh(model.a(x)).detach()
    g = model.b.weight.detach()[None, :, None] * (1 - h[:, None] ** 2) / 6  # (B, O, L, 9)
    wrong = torch.einsum("nole,nli->loei", g, x).flatten(2)
    slot = f.space.by_name["a.weight"]
    rows[..., slot.start : slot.stop] = wrong
    return f, x, rows


def shared_mask() -> Lie:
    """A mask of all examples taken for one of each."""

    def masked(m: Any, x: Tensor, rows: int) -> Tensor:
        mask, h = torch.full((rows, 6), -2.0, dtype=F64).triu(1), m.a(x)
        return m.b(torch.tanh(torch.softmax(h @ h.transpose(1, 2) + mask, -1) @ h).mean(1))

    def forward(m: Any, x: Tensor) -> Tensor:
        return masked(m, x, 6)

    def cut(m: Any, x: Tensor) -> Tensor:
        return masked(m, x, 1)

    f, x = functional(Calls(forward, a=nn.Linear(3, 6), b=nn.Linear(6, 2))), data(6, 6, 3)
    return f, x, dense(functional(Calls(cut, a=nn.Linear(3, 6), b=nn.Linear(6, 2))), x)


def one_example_left_out() -> Lie:
    """An expert that no probe reached: zero rows for one example in a dozen."""
    f, x = functional(mlp()), data()
    rows = dense(f, x)
    rows[7, :, f.space.by_name["a.weight"].start : f.space.by_name["a.weight"].stop] = 0
    return f, x, rows


@pytest.mark.parametrize(
    "lie", [sorted_inside, used_outside, first_batch_of_one, shared_mask, one_example_left_out]
)
def test_wrong_rows_whose_own_residual_is_nothing(lie: Callable[[], Lie]) -> None:
    f, x, wrong = lie()
    samples, prior = null_samples(wrong)
    own = (samples @ wrong.flatten(0, 1).T).norm() / (prior @ wrong.flatten(0, 1).T).norm()
    assert own < 1e-12
    audit = audited(f, x, wrong, samples, prior)
    assert not audit.passed
    truth = torch.einsum("nop,sp->nso", dense(f, x), samples).norm(dim=2)
    reach = torch.einsum("nop,sp->nso", dense(f, x), prior).norm(dim=2)
    assert audit.worst > 0.01
    assert 0.3 < audit.moved / float(truth.norm() / reach.norm()) < 3
    if lie is one_example_left_out:
        assert audit.worst_example == 7


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y) * torch.where(y > 0, 1.0, 0.7)


class WrongForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)

    @staticmethod
    def jvp(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y)


def test_a_custom_gradient_that_is_not_the_derivative() -> None:
    """Rows, reverse passes and two reverse passes agree with one another, and not with the network."""
    f = functional(
        Calls(lambda m, x: m.b(WrongBackward.apply(m.a(x))), a=nn.Linear(4, 9), b=nn.Linear(9, 2))
    )
    x = data()
    rows = dense(f, x)
    audit = audited(f, x, rows, *null_samples(rows))
    assert not audit.passed and DIFFERENCES in audit.methods
    assert "custom gradient" in audit.verdict


PAST_THE_GRADIENT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "detach": lambda m, x: m.b(torch.tanh(m.a(x)) + torch.tanh(m.a(x)).detach()),
    "straight-through": lambda m, x: m.b((lambda h: h + (h.round() - h).detach())(m.a(x))),
    ".data": lambda m, x: m.b(torch.tanh(m.a(x) + F.linear(x, m.a.weight.data))),
    ".item()": lambda m, x: m.b(torch.tanh(m.a(x) * m.a.weight.norm().item())),
    "no_grad": lambda m, x: m.b(torch.tanh(m.a(x) + torch.no_grad()(m.a)(x))),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", PAST_THE_GRADIENT)
def test_weights_that_act_past_their_gradient(kind: str, dtype: torch.dtype) -> None:
    """Forward mode and reverse mode agree with the rows, and the network moves otherwise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Calls(PAST_THE_GRADIENT[kind], a=nn.Linear(4, 9), b=nn.Linear(9, 2)).to(dtype)
    x = data().to(dtype)
    posterior = nb.NullSpacePosterior(
        model.eval(), nb.Regression(noise_variance=1.0), "outputs", delta=0.0, prior_precision=1.0
    ).fit([(x, x.new_zeros(len(x), 2))], 3, progress=False)
    certificate = posterior.certificate
    assert certificate.residual < 1e-4 and not certificate.held
    assert "`.detach()`" in certificate.verdict


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_kinks_and_jumps_without_a_slope_do_not_condemn_right_rows(dtype: torch.dtype) -> None:
    """A ReLU of zero has no derivative, and the choice of an expert has none but zero."""
    model = Calls(
        lambda m, x: m.b(torch.relu(m.a(x)) * F.one_hot(m.g(x).argmax(-1), 9)),
        a=nn.Linear(4, 9),
        g=nn.Linear(4, 9),
        b=nn.Linear(9, 2),
    ).to(dtype)
    with torch.no_grad():
        model.a.bias.zero_()
    x = data().to(dtype)
    x[0] = 0
    posterior = nb.NullSpacePosterior(
        model.eval(),
        nb.Regression(noise_variance=1.0),
        "outputs",
        parameters=["a.weight", "a.bias", "b.weight", "b.bias"],
        delta=0.0,
        prior_precision=1.0,
    ).fit([(x, x.new_zeros(len(x), 2))], 3, progress=False)
    assert posterior.certificate.held


def test_a_wrong_forward_formula_does_not_condemn_right_rows() -> None:
    f = functional(
        Calls(
            lambda m, x: m.b(WrongForwardMode.apply(m.a(x))), a=nn.Linear(4, 9), b=nn.Linear(9, 2)
        )
    )
    x = data()
    rows = dense(f, x)
    audit = audited(f, x, rows, *null_samples(rows))
    assert audit.passed and DIFFERENCES in audit.methods


def test_a_network_that_is_deployed_otherwise() -> None:
    """A forward pass that refers to the trained module itself never sees other weights."""
    model = mlp()

    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (
                2.0 if any(p.requires_grad for p in self.inner.parameters()) else 1.0
            )

    f, x = functional(Detour().eval()), data()
    rows = dense(f, x)
    audit = audited(f, x, rows, *null_samples(rows))
    assert not audit.passed and audit.worst <= audit.allowed
    assert "plain call" in audit.verdict


def test_rows_that_underflow_are_not_rounded_into_a_failure() -> None:
    f, x = functional(mlp()), data()
    rows = dense(f, x)
    samples, prior = null_samples(rows)

    def confident(outputs: Tensor, example: Drawn) -> Tensor:
        return every_output(outputs, None) * (1e-25 if example.number == 3 else 1.0)

    drawn = [Drawn(n, x[n : n + 1], torch.tensor([n])) for n in range(12)]
    claims = [Claim(torch.zeros(len(samples), dtype=F64)) for _ in range(12)]
    noisy = samples + 1e-9 * prior  # a thousandth of what is allowed
    audit = audit_examples(Question(f, noisy, prior, confident), drawn, claims, 12)
    assert audit.passed


def test_no_copy_and_no_way_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    f, x = functional(mlp()), data()
    rows = dense(f, x)

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no deep copies here")

    monkeypatch.setattr(examples, "NetworkCopy", refuse)
    monkeypatch.setattr(derivative, "NetworkCopy", refuse)
    audit = audited(f, x, rows, *null_samples(rows))
    assert audit.passed and audit.plain_call is None
    assert "cannot be copied" in str(audit.reduced)
    monkeypatch.setattr(Derivative, "_forward", refuse)
    monkeypatch.setattr(Derivative, "_twice", refuse)
    monkeypatch.setattr(Derivative, "_rows", refuse)
    with pytest.raises(nb.errors.ModelError, match=r"could not be audited.*no deep copies here"):
        audited(f, x, rows, *null_samples(rows))


# -- which examples ------------------------------------------------------------------------------


def test_the_same_examples_however_the_data_are_cut_into_batches() -> None:
    x = torch.arange(200).double()[:, None]
    chosen = []
    for step in (200, 64, 7, 1):
        reservoir = Reservoir(10, 3, 10**9)
        for start in range(0, 200, step):
            reservoir.offer(x[start : start + step], x[start : start + step, 0])
        chosen.append([d.number for d in reservoir.drawn])
        assert all(float(d.inputs) == float(d.targets) == d.number for d in reservoir.drawn)
    assert chosen == chosen[:1] * 4
    assert chosen[0] != list(range(10)) and max(chosen[0]) > 100


def test_what_stays_does_not_hold_its_batch() -> None:
    reservoir, x = Reservoir(2, 0, 10**9), torch.randn(50, 100)
    reservoir.offer(x, torch.zeros(50))
    assert all(d.inputs.untyped_storage().nbytes() == 400 for d in reservoir.drawn)


# -- in a fit ------------------------------------------------------------------------------------


def fitted(**options: Any) -> nb.NullSpacePosterior:
    model, x = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)), data(40)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p, std=0.5)
    y = torch.arange(40) % 3
    dtype = options.pop("dtype", F64)
    loader = [(x[:15].to(dtype), y[:15]), (x[15:].to(dtype), y[15:])]
    return nb.NullSpacePosterior(model.to(dtype).eval(), **options).fit(loader, 9, **QUIET)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preserve": "outputs", "delta": 0},
        {"preserve": "loss"},
        {"directions": "auto"},
        {"directions": 1},
        {"solver": "conjugate gradients", "tolerance": 0.05},
    ],
    ids=str,
)
def test_it_does_not_cry_wolf(options: dict[str, Any], dtype: torch.dtype) -> None:
    audit = fitted(dtype=dtype, **options).certificate.audit
    assert audit is not None and audit.passed, audit


def test_samples_that_are_drawn_later_are_audited() -> None:
    posterior = fitted()
    first = posterior.certificate.audit
    assert first is not None
    posterior.draw(5)
    both = posterior.certificate.audit
    assert both is not None and both.passed and both.seconds > first.seconds
    assert both.worst >= first.worst and both.examples == first.examples


def test_what_it_costs_is_a_stage_and_the_plan_foresees_it() -> None:
    posterior = fitted()
    certificate = posterior.certificate
    assert certificate.audit is not None
    assert certificate.audit.seconds == pytest.approx(certificate.stages["audit"])
    assert sum(certificate.stages.values()) == pytest.approx(certificate.seconds)
    x, y = data(40), torch.arange(40) % 3
    assert posterior.plan([(x, y)], num_samples=9).seconds["audit"] > 0
