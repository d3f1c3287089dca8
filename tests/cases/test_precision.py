"""Half precision, mixed precision and autocast: rows that can be proved, or a refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace
from tests.cases.dense import normal, rows

HALF = [torch.bfloat16, torch.float16]


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(torch.tanh(self.a(x.transpose(0, 1)))))
        return self.out(h.mean(0))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.conv(x.transpose(1, 2)))).mean(2))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x)[0][:, -1])


KINDS: dict[str, Callable[[], nn.Module]] = {
    "sequence first": SequenceFirst,
    "convolution": Convolutional,
    "recurrent": Recurrent,
}


def made(kind: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().to(dtype).eval()


def leak(posterior: nb.NullSpacePosterior, model: nn.Module, x: Tensor) -> float:
    """What samples move the outputs by, as a share of what isotropic changes of their size would."""
    wide = copy.deepcopy(model).double()
    dense = rows(wide, x.double().split(1))
    start = dict(model.named_parameters())
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    moved = []
    for state in posterior.sample():
        delta = torch.cat(
            [(state[n].double() - start[n].detach().double()).flatten() for n in names]
        )
        change = torch.einsum("nop,p->no", dense, delta).norm()
        moved.append(float(change / (dense.norm() * delta.norm() / len(delta) ** 0.5)))
    return max(moved)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_half_precision_fits_and_keeps_its_outputs(
    kind: str, dtype: torch.dtype
) -> None:
    model = made(KINDS[kind], dtype)
    x = normal(6, 6, 3).to(dtype)
    posterior = nb.NullSpacePosterior(model, preserve="outputs", delta=1e-4, prior_precision=1.0)
    posterior.fit([(x, torch.arange(6) % 2)], 4, progress=False)
    assert posterior.certificate.held
    assert leak(posterior, model, x) < 1e-3
    prediction = posterior.predict(x)
    assert prediction.outputs.dtype == torch.float32
    with torch.no_grad():
        deployed = model(x).float()
    assert_close(prediction.point, deployed, rtol=0.05, atol=0.05 * float(deployed.abs().max()))
    assert all(p.dtype == dtype for p in model.parameters())


class MixedHead(nn.Module):
    """A body in one precision, a head in another; the cast is written in, or follows the weights."""

    def __init__(self, body: torch.dtype, head: torch.dtype, hard: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.hard = nn.Linear(3, 5).to(body), nn.Linear(5, 2).to(head), hard
        self.cast = body

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x.to(self.cast if self.hard else self.body.weight.dtype)))
        return self.head(h.to(self.head.weight.dtype))


@pytest.mark.parametrize(
    ("body", "head", "hard", "bound"),
    [
        (torch.bfloat16, torch.float32, False, 1e-4),
        (torch.bfloat16, torch.float32, True, 2e-2),
        (torch.float32, torch.float64, False, 1e-4),
        (torch.float64, torch.float32, False, 1e-4),
    ],
    ids=str,
)
def test_several_precisions_in_one_model(
    body: torch.dtype, head: torch.dtype, hard: bool, bound: float
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixedHead(body, head, hard).eval()
    x = normal(5, 3).float()
    posterior = nb.NullSpacePosterior(model, preserve="outputs", delta=1e-4, prior_precision=1.0)
    posterior.fit([(x[:3], torch.arange(3) % 2), (x[3:], torch.arange(2))], 4, progress=False)
    wide = copy.deepcopy(model).double()
    wide.cast = torch.float64
    assert leak_of(posterior, wide, model, x) < bound
    assert posterior.space.dtype == (
        torch.float64 if torch.float64 in (body, head) else torch.float32
    )
    assert posterior.predict(x).outputs.shape == (4, 5, 2)
    assert posterior.predict(x, method="sampled").outputs.shape == (4, 5, 2)


def leak_of(
    posterior: nb.NullSpacePosterior, wide: nn.Module, model: nn.Module, x: Tensor
) -> float:
    dense = rows(wide, x.double().split(1))
    samples = posterior._samples().double()
    change = torch.einsum("nop,sp->sno", dense, samples).flatten(1).norm(dim=1)
    prior = dense.norm() * samples.norm(dim=1) / samples.shape[1] ** 0.5
    return float((change / prior).max())


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)
        )
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.on):
            out = self.net(x)
        return out.float()


def test_autocast_inside_and_around() -> None:
    model, x, y = made(Autocast, torch.float32), normal(10, 4).float(), torch.arange(10) % 3
    options = {"preserve": "outputs", "prior_precision": 1.0}
    inside = nb.NullSpacePosterior(model, **options).fit([(x, y)], 4, progress=False)
    model.on = False
    assert leak(inside, model, x) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        around = nb.NullSpacePosterior(model, **options).fit([(x, y)], 4, progress=False)
        prediction = around.predict(x)
    assert leak(around, model, x) < 1e-4
    assert_close(prediction.point, model(x).detach())
    audit = around.certificate.audit
    assert audit is not None and audit.rounds_to is None and "bfloat16" not in audit.verdict


class Rounding(nn.Module):
    """Rounds on the way, in one of the ways that people do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.on = how, True
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.gru, self.attend = (
            nn.GRU(6, 4, batch_first=True),
            nn.MultiheadAttention(4, 2, batch_first=True),
        )
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return self._run(x)
        if self.how == "whole":
            with torch.autocast("cpu", torch.bfloat16):
                return self._run(x).float()
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.how == "decorated" and self.on:
            h = self._decorated(h)
        else:
            h = torch.tanh(self.second(h))
        if self.how == "cast" and self.on:
            h = (h.to(torch.bfloat16) * torch.ones(6, dtype=torch.bfloat16)).float()
        h = self.gru(h)[0]
        return self.out(self.attend(h, h, h, need_weights=False)[0].mean(1))

    @torch.autocast("cpu", torch.bfloat16)
    def _decorated(self, h: Tensor) -> Tensor:
        return torch.tanh(self.second(h)).float()


@pytest.mark.parametrize("how", ["whole", "decorated", "cast"])
@pytest.mark.parametrize("preserve", ["outputs", "predictions"])
def test_a_network_that_rounds_on_the_way_has_the_rows_of_the_one_that_does_not(
    how: str, preserve: str
) -> None:
    """Judged by float64 rows of the network without rounding; samples and predictions are exact, the audit says why."""
    model, x, y = (
        made(lambda: Rounding(how), torch.float32),
        normal(6, 3, 4).float(),
        torch.arange(6) % 3,
    )
    before = [p.detach().clone() for p in model.parameters()]
    deployed = model(x).detach()
    posterior = nb.NullSpacePosterior(model, preserve=preserve, delta=1e-6, prior_precision=1.0)
    posterior.fit([(x[:4], y[:4]), (x[4:], y[4:])], 4, progress=False)
    certificate = posterior.certificate
    audit = certificate.audit
    assert certificate.held and audit is not None and audit.passed
    assert (audit.rounds_to, audit.computed_in) == ("bfloat16", "float32")
    assert "rounds to bfloat16" in audit.verdict and "differ by" in audit.verdict
    assert audit.plain_call is not None and 1e-6 < audit.plain_call < 0.02
    assert audit.allowed <= 2e-3
    wide = copy.deepcopy(model).double()
    wide.on = False
    dense = rows(wide, x.double().split(1))
    samples = posterior._samples().double()
    change = torch.einsum("nop,sp->sno", dense, samples)
    prediction = posterior.predict(x)
    size = float(dense.norm() * samples.norm() / samples.shape[1] ** 0.5)
    assert_close(
        (prediction.outputs - prediction.point).double(), change, rtol=1e-3, atol=1e-5 * size
    )
    if preserve == "outputs":
        assert leak_of(posterior, wide, model, x) < 1e-3
    # The deployed network is the same but for its rounding.
    assert_close(prediction.point, deployed, rtol=0.02, atol=0.02)
    sampled = posterior.predict(x, method="sampled").outputs[0].double()
    state = {k: v.double() for k, v in next(iter(posterior.sample())).items()}
    moved = torch.func.functional_call(wide, state, (x.double(),)).detach()
    assert_close(sampled, moved, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(model(x).detach(), deployed)


class Stubborn(nn.Module):
    """Asks whether it is rounded, and is another network if not."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.body(x)
            sign = 1.0 if h.dtype == torch.bfloat16 else -1.0
            return self.out(torch.tanh(sign * h + 1)).float()


def test_a_network_that_does_not_run_without_rounding_says_how_closely_it_is_proved() -> None:
    model, x = made(Stubborn, torch.float32), normal(5, 3).float()
    posterior = nb.NullSpacePosterior(model, preserve="outputs", delta=1e-4, prior_precision=1.0)
    posterior.fit([(x, torch.arange(5) % 2)], 4, progress=False)
    audit = posterior.certificate.audit
    assert audit is not None
    assert audit.computed_in == audit.rounds_to == "bfloat16" and audit.allowed == 2e-2
    assert not audit.passed or "within 1.0 % and no closer" in audit.verdict


def test_half_precision_is_told_by_the_audit() -> None:
    model, x = made(Recurrent, torch.bfloat16), normal(6, 6, 3).to(torch.bfloat16)
    posterior = nb.NullSpacePosterior(model, preserve="outputs", delta=1e-4, prior_precision=1.0)
    posterior.fit([(x, torch.arange(6) % 2)], 4, progress=False)
    audit = posterior.certificate.audit
    assert audit is not None and (audit.rounds_to, audit.computed_in) == ("bfloat16", "float32")
    assert "computed in float32 throughout" in audit.verdict
    again = type(audit).from_dict(audit.as_dict())
    assert again == audit


def test_each_tensor_keeps_its_precision() -> None:
    """The flat vector has the widest precision, each tensor its own."""
    model = MixedHead(torch.float32, torch.float64)
    space = ParameterSpace.from_model(model)
    parts = space.unflatten(torch.zeros(2, space.total, dtype=space.dtype))
    assert space.dtype == torch.float64
    assert parts["body.weight"].dtype == torch.float32
    assert parts["head.weight"].dtype == torch.float64
    functional = FunctionalModel(model.eval(), space)
    assert functional.outputs(functional.batch(normal(2, 3))).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8], ids=str)
def test_precisions_without_derivatives_are_named(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.zeros(2, 3).to(dtype), requires_grad=False)
    with pytest.raises(nb.ModelError, match=f"'weight' is {dtype}"):
        nb.NullSpacePosterior(model, parameters=["weight", "bias"])
