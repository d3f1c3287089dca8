"""Short cuts of scores and certificate: the same numbers as the long way, and where they may be taken."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from nullbayes.errors import ModelError, NonFiniteError
from nullbayes.model.fingerprint import Watch
from nullbayes.moments.convolution import ConvInputs, middles
from nullbayes.moments.rule import InputRule
from nullbayes.posterior.layer_left_out import FEW_LEFT_OUT, _far_below
from tests.moments.layer_networks import network, quiet

CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 4, 3, padding=1), (40,)),
    "1d, inside": (nn.Conv1d(2, 4, 3, dilation=2, stride=2), (50,)),
    "2d, groups": (nn.Conv2d(4, 4, (3, 2), groups=2, padding=(2, 1)), (12, 15)),
    "2d, reflect": (nn.Conv2d(3, 4, 3, padding=1, stride=2, padding_mode="reflect"), (11, 8)),
    "2d, small map": (nn.Conv2d(3, 4, 3, padding=1), (2, 3)),
    "3d": (nn.Conv3d(2, 4, (2, 3, 1), padding=(0, 1, 0)), (6, 7, 5)),
    "3d, circular": (nn.Conv3d(2, 4, 3, padding=1, padding_mode="circular"), (5, 4, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_looked_up_are_those_of_all(name: str) -> None:
    conv, space = CONVOLUTIONS[name]
    x = torch.randn(3, conv.in_channels, *space, generator=torch.Generator().manual_seed(0))
    out, rule = conv(x), ConvInputs()
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):  # any layout in memory
        (some,) = rule.thinned(conv, (given,), {}, out, 8)
        (every,) = InputRule.thinned(rule, conv, (x,), {}, out, 8)
        assert some.a is not None and every.a is not None
        positions = out.shape[2:]
        grid = every.a.unflatten(1, positions)
        steps = (slice(start, None, step) for start, step, _ in middles(positions, 8))
        cuts = (slice(None), *steps)
        assert torch.equal(some.a, grid[cuts].flatten(1, len(positions)))


def test_few_left_out_examples_serve_where_they_settle_it() -> None:
    alike = [1.0 + 0.01 * i for i in range(FEW_LEFT_OUT)]
    assert _far_below(alike, 2.5)
    assert not _far_below(alike, 1.5)  # allowed, but not far below
    one_large = [0.1] * (FEW_LEFT_OUT - 1) + [6.0]  # the mean is 0.84, its error 0.74
    assert not _far_below(one_large, 2.5)
    assert not _far_below([math.inf] * FEW_LEFT_OUT, 2.5)
    assert not _far_below([math.nan] * FEW_LEFT_OUT, 2.5)


def test_leverages_of_a_batch_by_hand() -> None:
    """Means over calls, positions and uses, with biases and without, against the factors in float64."""
    torch.manual_seed(0)
    shared = nn.Linear(6, 6, bias=False)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), shared, nn.Tanh(), shared, nn.Linear(6, 3))
    model = model.double().eval()
    x = torch.randn(40, 4, 5, dtype=torch.float64)
    posterior = quiet(model, x, delta=0.1)
    state = posterior._fit.state
    inputs: dict[int, list[Tensor]] = {0: [x], 1: [], 2: []}
    first = torch.tanh(model[0](x))
    second = torch.tanh(shared(first))
    inputs[1], inputs[2] = [first, second], [shared(second)]
    want = torch.zeros(40, dtype=torch.float64)
    for number, block in enumerate(state.blocks.blocks):
        c = state.gathered.sums[number].inputs.values[0]
        c = c + state.edges[number].inputs * torch.eye(len(c), dtype=c.dtype)
        a = torch.cat(inputs[number], 1)
        if block.biases:
            a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        leverages = (a * torch.linalg.solve(c, a.mT).mT).sum(-1) / a.square().sum(-1)
        want += leverages.mean(1).log()
    torch.testing.assert_close(posterior.novelty(x, "leverage"), want)
    singles = torch.cat([posterior.novelty(x[i : i + 1], "leverage") for i in range(3)])
    torch.testing.assert_close(singles, want[:3])


def test_outputs_that_overflow_are_named() -> None:
    model, x, _ = network("convnet", torch.float32)
    posterior = quiet(model, x)
    posterior.novelty(x[:1], "leverage")
    for size in (1, len(x)):
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            posterior.novelty(x[:size] * 1e38, "leverage")


def test_modes_and_modules_are_watched() -> None:
    model, x, _ = network("convnet", torch.float32)
    posterior = nb.LayerNullSpacePosterior(model).fit([x], progress=False)
    scores = posterior.novelty(x, "leverage")
    model.train()
    with pytest.raises(ModelError, match="training mode"):
        posterior.novelty(x, "leverage")
    model.eval()
    torch.testing.assert_close(posterior.novelty(x, "leverage"), scores)
    watch = Watch(model)
    assert watch.same(model)
    model.add_module("more", nn.Identity())
    assert not watch.same(model)
    assert not watch.same(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32])
def test_any_bit_is_watched(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("odd", torch.ones(7, dtype=dtype))
    model.register_buffer("even", torch.ones(64, dtype=dtype))
    model.register_buffer("part", torch.ones(9, dtype=dtype)[1:])
    watch = Watch(model)
    for name, tensor in model.named_buffers():
        for place in (0, len(tensor) - 1):
            tensor.data.view(-1)[place] = 2
            assert not watch.same(model), (name, place)
            tensor.data.view(-1)[place] = 1
            assert watch.same(model)
