"""Leverages of one input at all layers together: the numbers of the definition, and never those of another pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nullbayes.moments import joined
from nullbayes.moments.convolution import middles
from nullbayes.posterior.layer_leverage import POSITIONS, Leverages
from tests.moments.layer_kinds import Calls
from tests.moments.layer_networks import quiet

WIDE = torch.float64


def leverage(posterior: Any, name: str, inputs: list[Tensor]) -> Tensor:
    """``log mean aᵀ (C + δ I)⁻¹ a / ‖a‖²`` of inputs ``(T, I)`` without the one of a bias, from the sums themselves."""
    state = posterior._fit.state
    (number,) = [i for i, b in enumerate(state.blocks.blocks) if b.name == name]
    block, a = state.blocks.blocks[number], torch.cat(inputs)
    c = state.gathered.sums[number].inputs.values[0].clone()
    c += state.edges[number].inputs * torch.eye(len(c), dtype=WIDE)
    if block.biases:
        a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
    return ((a * torch.linalg.solve(c, a.T).T).sum(1) / a.square().sum(1)).mean().log()


def patches(conv: Any, x: Tensor) -> Tensor:
    """``(T, I)`` at the positions that are looked at, by PyTorch's own unfolding of the padded map."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    around = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(around, conv.kernel_size, conv.dilation, 0, conv.stride)[0].T
    out = conv(x).shape[2:]
    rows = [
        torch.arange(start, size, step)
        for (start, step, _), size in zip(middles(out, POSITIONS), out, strict=True)
    ]
    return columns.unflatten(0, tuple(out))[rows[0]][:, rows[1]].flatten(0, 1)


def scored(posterior: Any, x: Tensor, want: Tensor) -> Leverages:
    """Scores by the general way, and then by the joined one, are those wanted."""
    for _ in range(4):
        torch.testing.assert_close(posterior.novelty(x, "leverage"), want.reshape(1))
    found: Leverages = posterior._of_layers()
    return found


class Images(nn.Module):
    """Convolutions with and without a map that is small, zeros around it, strides; two alike; ReLUs in place."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode)
        self.b = nn.Conv2d(4, 4, (3, 2), stride=2, bias=False)
        self.c = nn.Conv2d(4, 4, 3, padding=1, dilation=1, padding_mode=mode)
        self.d = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
        self.e = nn.Linear(4 * 9, 3)

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        one = torch.relu(self.a(x))
        two = self.b(one)
        three = self.c(two)
        four = self.d(torch.relu(three))
        return {"a": x, "b": one, "c": two, "d": torch.relu(three), "e": four}

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu_())
        k = self.c(h)
        if not torch.is_grad_enabled():
            h.mul_(0)  # what a layer received changes after it
        out: Tensor = self.e(self.d(k.relu_())[..., 0].flatten(1))
        return out


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_convolutions_against_their_definition(mode: str) -> None:
    torch.manual_seed(0)
    model = Images(mode).double().eval()
    x = torch.randn(12, 2, 19, 18, dtype=WIDE)
    posterior = quiet(model, x, delta=0.1)
    for one in (x[:1], x[1:2], x[2:3].transpose(2, 3).contiguous().transpose(2, 3)):
        want = torch.zeros((), dtype=WIDE)
        for name, inputs in model.inputs(one).items():
            if name == "e":
                want += leverage(posterior, "e.weight", [inputs[..., 0].flatten(1)])
            else:
                want += leverage(
                    posterior, f"{name}.weight", [patches(getattr(model, name), inputs)]
                )
        scorer = scored(posterior, one, want.detach())
        (plan,) = scorer._plans.values()
        assert len(plan) == 5
        assert sorted(len(g.steps) for g in plan.groups) == [1, 1, 1, 2]  # `c` and `d` are alike


def tokens(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    mixed = torch.softmax(q @ k.mT, -1) @ v
    out: Tensor = m.shared(torch.tanh(m.shared(mixed))).mean(1)
    return out


@pytest.mark.parametrize("few", [joined.FEW, 0])
def test_tokens_shared_inputs_and_tied_layers(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values of one tensor; a layer that is called twice: the mean over both calls."""
    monkeypatch.setattr(joined, "FEW", few)
    torch.manual_seed(0)
    layers = {name: nn.Linear(6, 6, bias=name != "v") for name in ("q", "k", "v", "shared")}
    model = Calls(tokens, **layers).double().eval()
    x = torch.randn(30, 5, 6, dtype=WIDE)
    posterior = quiet(model, x, delta=0.1)
    one = x[:1]
    mixed = torch.softmax(model.q(one) @ model.k(one).mT, -1) @ model.v(one)
    want = leverage(posterior, "shared.weight", [mixed[0], torch.tanh(model.shared(mixed))[0]])
    for name in "qkv":
        want = want + leverage(posterior, f"{name}.weight", [one[0]])
    scorer = scored(posterior, one, want.detach())
    assert len(scorer._plans) == 1


def branching(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.first(x))
    if bool(x[0, 0] > 0):
        h = torch.tanh(m.more(h))
    out: Tensor = m.last(h)
    return out


def test_a_pass_that_goes_another_way_is_not_used() -> None:
    torch.manual_seed(0)
    layers = {"first": nn.Linear(4, 5), "more": nn.Linear(5, 5), "last": nn.Linear(5, 3)}
    model = Calls(branching, **layers).double().eval()
    x = torch.randn(40, 4, dtype=WIDE)
    batches = [x[x[:, 0] > 0], x[x[:, 0] <= 0]]
    posterior = quiet(model, batches, delta=0.1)
    for turn in range(12):  # the two ways in turns: no plan fits twice running
        one = batches[turn % 2][turn : turn + 1]
        h = torch.tanh(model.first(one))
        want = leverage(posterior, "first.weight", [one])
        if turn % 2 == 0:
            want = want + leverage(posterior, "more.weight", [h])
            h = torch.tanh(model.more(h))
        want = want + leverage(posterior, "last.weight", [h])
        torch.testing.assert_close(posterior.novelty(one, "leverage"), want.detach().reshape(1))
    assert max(posterior._of_layers()._tries.values()) >= 4  # and it is not planned for ever


def test_looked_up_rows_go_the_general_way_beside_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 5), nn.Flatten(), nn.Linear(20, 2))
    model = model.double().eval()
    x = torch.randint(0, 20, (50, 4))
    posterior = quiet(model, x, delta=0.1)
    together = posterior.novelty(x[:3], "leverage")
    for i in range(3):
        for _ in range(3):
            torch.testing.assert_close(
                posterior.novelty(x[i : i + 1], "leverage"), together[i : i + 1]
            )
    (plan,) = posterior._of_layers()._plans.values()
    assert len(plan) == 2
    assert len(plan.others) == 1


def test_plans_are_few_and_each_of_one_size() -> None:
    torch.manual_seed(0)
    model = Calls(lambda m, x: m.a(x).mean(1), a=nn.Linear(4, 3)).double().eval()
    x = torch.randn(30, 12, 4, dtype=WIDE)
    posterior = quiet(model, x, delta=0.1)
    for size in range(1, 13):
        scored(posterior, x[:1, :size], leverage(posterior, "a.weight", [x[0, :size]]))
    assert len(posterior._of_layers()._plans) == 8


def test_what_is_not_finite_is_named_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    model = model.double().eval()
    x = torch.randn(30, 1, 4, 4, dtype=WIDE)
    posterior = quiet(model, x, delta=0.1)
    before = [posterior.novelty(x[:1], "leverage") for _ in range(3)][-1]
    with pytest.raises(Exception, match="NaN or infinity"):
        posterior.novelty(x[:1] * 1e308 * 10, "leverage")
    with pytest.raises(Exception, match="NaN or infinity"):
        posterior.novelty(x[:1] * 1e307, "leverage")
    assert torch.equal(posterior.novelty(x[:1], "leverage"), before)
