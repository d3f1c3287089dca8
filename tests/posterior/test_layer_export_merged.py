"""Leverages of an exported module that are finished together: the numbers of their definition, from few operations."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nullbayes.moments.traced import Merged
from tests.moments.layer_kinds import Calls
from tests.moments.layer_networks import quiet

WIDE = torch.float64


def leverages(posterior: Any, name: str, inputs: Tensor) -> Tensor:
    """``log mean_t aᵀ (C + δ I)⁻¹ a / ‖a‖²`` of ``(B, T, I)``, from the sums themselves: ``(B,)``."""
    state = posterior._fit.state
    (number,) = [i for i, b in enumerate(state.blocks.blocks) if b.name == f"{name}.weight"]
    c = state.gathered.sums[number].inputs.values[0]
    c = c + state.edges[number].inputs * torch.eye(len(c), dtype=WIDE)
    a = inputs
    if state.blocks.blocks[number].biases:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    found: Tensor = (a * torch.linalg.solve(c, a.mT).mT).sum(-1) / a.square().sum(-1)
    return found.mean(1).log()


def received(m: Any, x: Tensor) -> dict[str, Tensor]:
    """What each layer of the network below receives."""
    k = m.key(x)
    h = torch.tanh(m.query(x) * k + m.value(x))
    pooled = m.out(h).mean(1, keepdim=True)
    return {
        "query": x, "key": x, "value": x, "out": h, "wide": pooled, "last": torch.relu(m.wide(pooled))
    }  # fmt: skip


def forward(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.query(x) * m.key(x) + m.value(x))
    pooled = m.out(h).mean(1)
    last: Tensor = m.last(torch.relu_(m.wide(pooled)))
    if not torch.is_grad_enabled() and m.changes:
        pooled.mul_(0)  # after a layer has received it
    return last


def made(*, changes: bool, bias: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    sizes = {
        "query": (6, 5),
        "key": (6, 5),
        "value": (6, 5),
        "out": (5, 4),
        "wide": (4, 9),
        "last": (9, 3),
    }
    layers = {n: nn.Linear(*s, bias=bias or n == "out") for n, s in sizes.items()}
    model = Calls(forward, **layers).double().eval()
    model.changes = changes  # type: ignore[assignment]
    return model, torch.randn(40, 3, 6, dtype=WIDE) * torch.linspace(1, 0.01, 6, dtype=WIDE)


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 0.3])
def test_merged_leverages_against_their_definition(
    changes: bool,
    bias: bool,
    tolerance: float,
) -> None:
    model, x = made(changes=changes, bias=bias)
    posterior = quiet(model, x, delta=0.1)
    module = posterior.export_module(x[:6], tolerance=tolerance)
    sizes = sorted(len(group.places) for group in module.merged)
    # Vectors: `wide` and `last`; of what changes norms are taken at once.
    assert sizes == ([4] if changes else [2, 4])
    for batch in (x[:1], x[3:20], torch.randn(7, 5, 6, dtype=WIDE)):  # of other lengths, too
        want = sum(leverages(posterior, n, a) for n, a in received(model, batch).items())
        room = 6 * math.log1p(tolerance) + 1e-9
        found = module(batch)[-1]
        assert (found - want.detach()).abs().max() <= room
        if not tolerance:
            torch.testing.assert_close(posterior.novelty(batch, "leverage"), found)


def test_what_is_merged_takes_few_operations() -> None:
    model, x = made(changes=False, bias=True)
    posterior = quiet(model, x, delta=0.1)
    module = posterior.export_module(x[:6])
    with torch.no_grad():
        program = torch.export.export(module, **module.arguments(x[:6]))
    names = Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")
    assert names["aten.log.default"] == 2
    assert names["aten.cat.default"] == 2
    norms = sum(n for name, n in names.items() if "vector_norm" in name)
    assert norms == 8  # of four layers with tokens; vectors have one product for all
    found = program.module()(x[:9])
    torch.testing.assert_close(found, module(x[:9]))


def test_weights_of_numbers_and_of_norms_agree() -> None:
    """Directions that are taken away, groups that are alike, layers without a bias: each term by hand."""
    model, x = made(changes=False, bias=False)
    posterior = quiet(model, x, delta=0.1)
    module = posterior.export_module(x[:6], tolerance=0.3)
    with torch.no_grad():
        calls = [call for _, call in module._calls(x[:9])]
    assert {call.probe.sign for call in calls} == {-1.0, 1.0}
    for group in module.merged:
        assert isinstance(group, Merged)
        own = [calls[i] for i in group.places]
        want = sum(c.values().reshape(9, -1).mean(1).log() for c in own)
        torch.testing.assert_close(group(own), want)
