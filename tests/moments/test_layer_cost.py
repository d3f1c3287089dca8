"""What the layer posterior saves must not change its answers: short cuts against plain sums in float64, and counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nullbayes as nb
from nullbayes.errors import InputError, ModelError, NonFiniteError
from nullbayes.model.fingerprint import Watch
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace
from nullbayes.moments import members, products
from nullbayes.moments.blocks import find_blocks
from nullbayes.moments.convolution import ConvInputs, ConvSummer
from nullbayes.moments.factor import Edge
from nullbayes.moments.leverage import DIRECTIONS, Leverage
from nullbayes.moments.second import BlockMoments, DenseMoments
from nullbayes.moments.verify import seen_by
from tests.moments.layer_networks import network, quiet


def gram_of_patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``(G, I, I)`` by unfold, float64."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x.double(), conv._reversed_padding_repeated_twice, mode=mode)
    a = F.unfold(x, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
    a = a.movedim(1, 2).flatten(0, 1).unflatten(1, (conv.groups, -1)).transpose(0, 1)
    return a.mT @ a


CONVOLUTIONS = {
    "3x3": nn.Conv2d(18, 4, 3, padding=1),
    "1x3": nn.Conv2d(16, 4, (1, 3), padding="same"),
    "5x2 dilated": nn.Conv2d(16, 4, (5, 2), padding=(3, 1), dilation=(2, 3)),
    "groups": nn.Conv2d(40, 4, 3, padding=2, groups=2, padding_mode="circular"),
    "stride": nn.Conv2d(17, 4, 3, padding=1, stride=2, bias=False),
    "stride, dilated": nn.Conv2d(16, 4, (3, 2), stride=(2, 1), dilation=(2, 1)),
    "few channels": nn.Conv2d(3, 4, 5, padding=2),
    "few channels, dilated": nn.Conv2d(4, 4, 3, dilation=2, stride=(2, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_sums_of_patches_by_every_way(name: str, dtype: torch.dtype) -> None:
    conv = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(0)
    summer = ConvSummer(conv, dtype)
    want = 0
    total = 0
    for height, width in ((13, 9), (8, 8), (8, 8)):  # maps of several sizes add up
        x = torch.randn(3, conv.in_channels, height, width, generator=generator) + 0.5
        out = conv(x)
        assert summer.add(conv, (x,), {}, out)
        want = want + gram_of_patches(conv, x)
        total += out[:, 0].numel()
    found = list(summer.flush())
    gram = sum(s.gram.double() for s in found)
    assert sum(s.count for s in found) == total
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert (gram - want).abs().max() <= tolerance * want.abs().max()
    assert list(summer.flush()) == []


@pytest.mark.parametrize("size", [(40, 33), (9, 24), (7, 5)], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_at_some_positions_are_those_of_all(name: str, size: tuple[int, int]) -> None:
    conv, x = CONVOLUTIONS[name], torch.randn(2, CONVOLUTIONS[name].in_channels, *size)
    out, rule = conv(x), ConvInputs()
    (some,) = rule.thinned(conv, (x,), {}, out, 16)
    (every,) = rule.inputs(conv, (x,), {}, out)
    grid = every.a.unflatten(1, out.shape[2:])
    step = math.ceil((out[0, 0].numel() / 16) ** 0.5)
    rows, columns = (slice(min(step, n) // 2, None, step) for n in out.shape[2:])
    assert torch.equal(some.a, grid[:, rows, columns].flatten(1, 2))


def test_many_maps_go_to_float64_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nullbayes.moments.shifts._ROWS", 100)
    for name in ("3x3", "stride"):
        conv = CONVOLUTIONS[name]
        summer, want = ConvSummer(conv, torch.float32), 0
        for seed in range(4):
            x = torch.randn(
                2, conv.in_channels, 9, 9, generator=torch.Generator().manual_seed(seed)
            )
            assert summer.add(conv, (x,), {}, conv(x))
            want = want + gram_of_patches(conv, x)
        (found,) = summer.flush()
        assert (found.gram - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("columns", [5, 300])
def test_half_of_a_product_is_the_product(columns: int) -> None:
    x = torch.randn(50, columns, dtype=torch.float64)
    out = torch.full((columns, columns), torch.nan, dtype=torch.float64)
    products.add_lower(out, x, fresh=True)
    products.mirror(out[None])
    torch.testing.assert_close(out, x.T @ x)


def test_float32_serves_a_soft_edge_alone() -> None:
    assert products.working_dtype(torch.float32, 1e-2) == torch.float32
    assert products.working_dtype(torch.bfloat16, 1e-3) == torch.float32
    assert products.working_dtype(torch.float32, 0.0) == torch.float64
    assert products.working_dtype(torch.float64, 1e-2) == torch.float64
    model, x, likelihood = network("encoder", torch.float32)
    soft = quiet(model, x, likelihood, delta=1e-2, prior_precision=1.0)
    functional, blocks = soft.functional, soft._fit.state.blocks
    exact, _ = seen_by(functional, blocks, x)
    for one, two in zip(soft._fit.gathered.sums, exact, strict=True):
        assert one.count == two.count
        size = two.inputs.values.abs().max()
        assert (one.inputs.values - two.inputs.values).abs().max() <= 1e-6 * size


class Attended(nn.Module):
    """Three layers read one tensor, which is then overwritten; a fourth reads what it has become."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        a = self.q(h) * self.k(h)
        v = self.v(h)
        h += a * v
        return self.out(h)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_tensor_is_multiplied_out_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Attended().eval(), torch.randn(9, 6)
    made: list[int] = []
    add = products.add_lower
    monkeypatch.setattr(products, "add_lower", lambda *a, **k: made.append(1) or add(*a, **k))
    functional = FunctionalModel(model, ParameterSpace.from_model(model))
    blocks = find_blocks(model, functional.space)
    sums, _ = seen_by(functional, blocks, x, dtype=dtype)
    assert len(made) == 2
    h = (2 * x).double()
    after = h + (model.q(2 * x) * model.k(2 * x) * model.v(2 * x)).double().detach()
    for moments, a in zip(sums, (h, h, h, after), strict=True):
        a = torch.cat([a, torch.ones(9, 1, dtype=torch.float64)], dim=1)
        torch.testing.assert_close(moments.inputs.values[0], a.T @ a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"delta": 0, "prior_precision": 1.0}], ids=str)
def test_the_network_runs_about_once_over_the_data(options: dict[str, float]) -> None:
    """Examples that pass through the network, not seconds: one pass, and a number that does not grow with the data."""
    model, _, _ = network("mlp", torch.float32)
    seen: list[int] = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for count in (3000, 12000):
        seen.clear()
        quiet(model, list(torch.randn(count, 60).split(300)), **options)
        assert count <= sum(seen) < count + 1500


def test_one_pass_scores_a_batch() -> None:
    model, x, _ = network("convnet", torch.float32)
    posterior = quiet(model, x, delta=1e-2)
    calls: list[int] = []
    posterior.novelty(x, "leverage")
    posterior._leverages._network = None  # built anew with the hook below
    model[0].register_forward_hook(lambda module, args, out: calls.append(len(out)))
    # A network with another hook is asked whether it is still the same function.
    posterior.novelty(x, "leverage")
    calls.clear()
    first = posterior.novelty(x, "leverage")
    assert calls == [len(x)]
    torch.testing.assert_close(posterior.novelty(x, "leverage"), first)
    assert calls == [len(x)] * 2


@pytest.mark.parametrize("groups", [1, 2])
def test_few_directions_stand_for_a_wide_root(groups: int) -> None:
    torch.manual_seed(groups)
    columns, own = 601, 600
    a = torch.randn(900, groups, own, dtype=torch.float64) @ torch.randn(own, own).double() / 20
    whole = torch.cat([a, torch.ones(900, groups, 1, dtype=torch.float64)], dim=2).transpose(0, 1)
    moments = BlockMoments(DenseMoments(whole.mT @ whole), None, 900)
    edge = Edge.of(moments, 1e-2)
    new = torch.randn(300, groups, own, dtype=torch.float64)
    with_one = torch.cat([new, torch.ones(300, groups, 1, dtype=torch.float64)], dim=2)
    want = torch.zeros(300, dtype=torch.float64)
    for g in range(groups):
        c = moments.inputs.values[g] + edge.inputs[g] * torch.eye(columns, dtype=torch.float64)
        want += (with_one[:, g] * torch.linalg.solve(c, with_one[:, g].T).T).sum(1)
    full = Leverage(moments, edge, columns, torch.float64, directions=None)
    torch.testing.assert_close(full.of(new, own, 0), want)
    few = Leverage(moments, edge, columns, torch.float64).of(new, own, 0)
    error = (few / want).log()
    expected = (2 / DIRECTIONS * (1 - DIRECTIONS / columns)) ** 0.5
    assert error.square().mean().sqrt() < 1.5 * expected
    assert error.mean().abs() < expected
    # It is an estimate, and this is where it is made.
    assert not torch.allclose(few, want, rtol=1e-3)


class Placed(nn.Module):
    """Positions are looked up once for all examples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.a, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, t: Tensor) -> Tensor:
        h = self.table(t) + self.place(torch.arange(t.shape[1])[None])
        return self.head(torch.tanh(self.a(h)).mean(1))


def test_leverage_where_examples_share_a_call() -> None:
    torch.manual_seed(0)
    model, t = Placed().double().eval(), torch.randint(0, 20, (7, 6))
    posterior = quiet(model, t, delta=0.1)
    whole = posterior.novelty(t, "leverage")
    assert posterior._leverages._axes
    singles = torch.cat([posterior.novelty(t[i : i + 1], "leverage") for i in range(7)])
    torch.testing.assert_close(whole, singles)


@pytest.mark.parametrize("how", ["in place", "past autograd", "new tensor", "buffer"])
def test_scores_of_a_changed_model_are_refused(how: str) -> None:
    model, x, _ = network("convnet", torch.float32)
    posterior = quiet(model, x)
    scores = posterior.novelty(x, "leverage")
    torch.testing.assert_close(posterior.novelty(x, "leverage"), scores)
    weight = model[3].weight
    kept = weight.detach().clone()
    if how == "in place":
        with torch.no_grad():
            weight[0, 0, 0, 0] += 1
    elif how == "past autograd":
        weight.detach().numpy()[0, 0, 0, 0] += 1
    elif how == "new tensor":
        model[3].weight = nn.Parameter(kept + 1)
    else:
        model[1].running_mean[0] += 1
    with pytest.raises(ModelError, match="changed since"):
        posterior.novelty(x, "leverage")
    if how == "buffer":
        model[1].running_mean[0] -= 1
    else:
        with torch.no_grad():
            model[3].weight.copy_(kept)
    torch.testing.assert_close(posterior.novelty(x, "leverage"), scores)


def test_a_large_model_is_watched_in_turns() -> None:
    model = nn.Linear(2000, 300)  # 600,300 numbers: ten pieces, one or two at a time
    watch = Watch(model)
    assert all(watch.same(model) for _ in range(20))
    model.weight.detach().numpy()[299, 1999] += 1
    assert not all(watch.same(model) for _ in range(len(watch.pieces)))


def test_a_network_that_keeps_a_state_is_copied_anew() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.body(x) * self.calls

    model = Counts().eval()
    functional = FunctionalModel(model, ParameterSpace.from_model(model))
    call, x = functional.bound(functional.weights()), torch.randn(4, 3)
    with torch.no_grad():
        assert torch.equal(call(x), model.body(x))
        assert torch.equal(call(x), model.body(x))
    assert float(model.calls) == 0


def test_examples_are_told_apart() -> None:
    x = torch.arange(4000.0).reshape(1000, 4)
    words = members.digests(x)
    assert len(words.unique()) == 1000
    assert torch.equal(words, members.digests(x.double()))
    assert torch.equal(words[3:5], members.digests(x[3:5]))
    assert not torch.equal(words, members.digests(x.flip(1)))
    assert torch.equal(members.digests(x * 0), members.digests(x * -0.0))
    images = (torch.rand(2000, 784, generator=torch.Generator().manual_seed(0)) * 16).round()
    images[1:, :100] = images[:1, :100]
    assert len(members.digests(images).unique()) == 2000
    shared = torch.randn(1, 5)  # what all have in common is the same for a batch and for one alone
    pair = members.digests((x, shared))
    assert torch.equal(pair[7:8], members.digests((x[7:8], shared)))
    assert not torch.equal(pair, words)
    one = torch.zeros(785, 784)
    one[range(784), range(784)] = 1.0  # a single small difference, at every place
    assert len(members.digests(one).unique()) == 785


# -- bad input ---------------------------------------------------------------------------------------


def scores(posterior: Any, x: Tensor) -> tuple[Tensor, ...]:
    return posterior.novelty(x, "leverage"), posterior.novelty(x), posterior.predict(x).outputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_fails_changes_nothing(dtype: torch.dtype) -> None:
    model, x, _ = network("mlp", dtype)
    posterior = quiet(model, [x[:10], x[10:]], delta=0.05)
    fit, before = posterior._fit, scores(posterior, x)
    counts = fit.gathered.members.counts.clone()
    sums = [s.inputs.values.clone() for s in fit.gathered.sums]
    wrong = x[:4] + 0.1
    failures: list[tuple[str, Any, type[Exception], str]] = [
        ("update", [], InputError, "no batches"),
        ("update", [x[:0]], InputError, "no examples"),
        ("update", [x[:3], x[:3, :5]], InputError, "more, batch 1"),
        ("update", [x[:3], x[:3] * torch.inf], NonFiniteError, "more, batch 1"),
        ("update", 3, InputError, "more"),
        ("remove", [], InputError, "no batches"),
        ("remove", [x[:0]], InputError, "no examples"),
        ("remove", [x[:4], wrong], InputError, "some, batch 1: 4 of 4"),
        ("remove", [x[:4], x[:4]], InputError, "some, batch 1: 4 of 4"),  # there once, not twice
        ("remove", [x[:4, :5]], InputError, "some, batch 0"),
        ("remove", (x[:4] for _ in range(1)), InputError, "some"),
        ("remove", x, InputError, "all examples"),
    ]
    for method, data, kind, text in failures:
        with pytest.raises(kind, match=text):
            getattr(posterior, method)(data, progress=False)
        assert posterior._fit is fit
    model[1].register_module("noise", nn.Dropout(0.5))
    for call in (
        lambda: posterior.update(x[:3], progress=False),
        lambda: posterior.remove(x[:3], progress=False),
        lambda: posterior.novelty(x),
    ):
        with pytest.raises(ModelError, match="training mode"):
            call()
    del model[1].noise
    assert posterior._fit is fit
    assert torch.equal(fit.gathered.members.counts, counts)
    assert all(
        torch.equal(s.inputs.values, v) for s, v in zip(fit.gathered.sums, sums, strict=True)
    )
    for now, then in zip(scores(posterior, x), before, strict=True):
        assert torch.equal(now, then)


class Overflows(nn.Module):
    """What the second layer receives is infinite for some inputs; what comes out never is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.head(
            h + torch.nan_to_num(self.b(1 / (x - 7).abs()), 0.0, 0.0, 0.0).clamp(-1, 1)
        )


@pytest.mark.parametrize("delta", [0.0, 1e-2])
def test_a_layer_that_receives_infinity_is_named_with_its_batch(delta: float) -> None:
    torch.manual_seed(0)
    model, x = Overflows().eval(), torch.randn(8, 6)
    bad = x.clone()
    bad[2, 3] = 7.0
    posterior = nb.LayerNullSpacePosterior(model, delta=delta)
    with pytest.raises(NonFiniteError, match=r"train, batch 1: .*'b\.weight' hold NaN or infinity"):
        posterior.fit([x, bad], progress=False)
    posterior.fit(x, 4, progress=False)
    fit = posterior._fit
    with pytest.raises(NonFiniteError, match=r"more, batch 0: .*'b\.weight'"):
        posterior.update(bad, progress=False)
    assert posterior._fit is fit
    assert posterior.predict(x).outputs.isfinite().all()


def test_float32_data_come_and_go() -> None:
    model, x, likelihood = network("convnet", torch.float32)
    torch.manual_seed(3)
    more = torch.randn_like(x)
    both = torch.cat([x, more])
    options = {"delta": 1e-2, "prior_precision": 50.0}
    whole = quiet(model, both, likelihood, **options)
    grown = quiet(model, x, likelihood, **options).update(more, progress=False)
    small = quiet(model, x, likelihood, **options)
    shrunk = quiet(model, both, likelihood, **options).remove(more, progress=False)
    for one, two in ((grown, whole), (shrunk, small)):
        torch.testing.assert_close(
            one.novelty(both, "leverage"), two.novelty(both, "leverage"), rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(one.novelty(both), two.novelty(both), rtol=1e-3, atol=1e-4)
    # Of the right shape and never added: the filter says so, and where it is too full, the sums do.
    never = 3 * torch.randn_like(x)
    small._fit.gathered.members.counts += 1
    with pytest.raises(InputError, match="would not be positive"):
        small.remove(never[:2], progress=False)


def test_kept_examples_come_together_where_they_have_one_shape() -> None:
    model, _, _ = network("encoder", torch.float32)
    data = [torch.randn(40, length, 96) for length in (5, 5, 5, 4)]
    labels = [torch.arange(40) % 4 for _ in data]
    posterior = quiet(model, list(zip(data, labels, strict=True)))
    kept = posterior._fit.gathered.kept
    assert sum(len(x) for x, _ in kept) == 128
    assert len(kept) < 8
    assert all(len(x) == len(y) <= 40 for x, y in kept)  # no larger than the batches were
    known = {
        tuple(x.flatten().tolist()[:8]): int(y)
        for d, t in zip(data, labels, strict=True)
        for x, y in zip(d, t, strict=True)
    }
    for inputs, targets in kept:
        for x, y in zip(inputs, targets, strict=True):
            assert known[tuple(x.flatten().tolist()[:8])] == int(y)
    checked = posterior._fit.state.checked
    assert sum(len(point) for _, _, point in checked) == 32
    with torch.no_grad():
        for x, _, point in checked:
            torch.testing.assert_close(point, model(x))
