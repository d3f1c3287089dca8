"""Each rule: outputs of the re-weighted network stand, and the sums are those of plain loops over single examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nullbayes.model.batch import take
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import ParameterSpace
from nullbayes.moments import InputRule, Layout, Read, Seen, convolution, register, rule_for
from nullbayes.moments.blocks import Blocks
from nullbayes.moments.factor import Edge, factorise
from nullbayes.moments.second import BlockMoments, DenseMoments
from nullbayes.moments.verify import seen_by, verified_blocks
from tests.moments.layer_kinds import KINDS, Kind

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")

# Outputs relative to the largest, for weight changes of the size of the weights.
STAND = {torch.float64: 1e-9, torch.float32: 1e-4}


def prepared(model: nn.Module, inputs: Any) -> tuple[FunctionalModel, Blocks]:
    functional = FunctionalModel(model, ParameterSpace.from_model(model))
    return functional, verified_blocks(functional, inputs)


def moved(
    functional: FunctionalModel, blocks: Blocks, sums: list[BlockMoments], which: str | None = None
) -> dict[str, Tensor]:
    """Weights changed at random in the null space, by about as much as they are large."""
    weights = functional.weights()
    generator = torch.Generator().manual_seed(7)
    for block, moments in zip(blocks.blocks, sums, strict=True):
        factor = factorise(moments, Edge.of(moments, 0.0), block.columns)
        z = torch.randn(block.size, generator=generator, dtype=torch.float64)
        if which is None or block.name == which:
            scale = (
                block.matrix({n: weights[n] for n in block.names}).double().square().mean().sqrt()
            )
            changes = block.tensors((scale * factor.spread(z)).to(functional.dtype))
            weights |= {n: weights[n] + change for n, change in changes.items()}
    return weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_outputs_stand_while_weights_move(kind: Kind, dtype: torch.dtype) -> None:
    model, inputs = kind.make(dtype)
    functional, blocks = prepared(model, inputs)
    sums, point = seen_by(functional, blocks, inputs)
    assert set(blocks.fixed) >= set(kind.fixed)
    trained = functional.weights()
    for name in kind.free:  # each alone: none hides behind another
        weights = moved(functional, blocks, sums, name)
        change = (weights[name] - trained[name]).norm() / trained[name].norm()
        assert change > 0.1, name
        with torch.no_grad():
            out = functional(weights, inputs)
        assert (out - point).abs().max() <= STAND[dtype] * point.abs().max(), name
        # The same change turned round is no longer in the null space, and outputs move.
        other = dict(trained)
        other[name] = trained[name] + (weights[name] - trained[name]).flatten().flip(0).view_as(
            trained[name]
        )
        with torch.no_grad():
            assert (functional(other, inputs) - point).abs().max() > 1e-3 * point.abs().max(), name
    with torch.no_grad():
        out = functional(moved(functional, blocks, sums), inputs)
    assert (out - point).abs().max() <= STAND[dtype] * point.abs().max()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sums_are_those_of_single_examples(kind: Kind) -> None:
    model, inputs = kind.make()
    functional, blocks = prepared(model, inputs)
    whole, _ = seen_by(functional, blocks, inputs)
    if kind.name in ("attention", "lstm-packed"):  # their masks and lengths are for this batch
        return
    size = len(inputs[0] if isinstance(inputs, tuple) else inputs)
    singles = [seen_by(functional, blocks, take(inputs, i, i + 1))[0] for i in range(size)]
    for number, sums in enumerate(whole):
        total = singles[0][number]
        for one in singles[1:]:
            total = total.plus(one[number])
        assert total.count == sums.count
        if sums.rows is not None:
            assert torch.equal(total.rows, sums.rows)
        if isinstance(sums.inputs, DenseMoments):
            torch.testing.assert_close(total.inputs.values, sums.inputs.values)


def test_moments_of_a_linear_layer_against_a_loop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(5, 7, 4, dtype=torch.float64)
    functional, blocks = prepared(model, x)
    sums, _ = seen_by(functional, blocks, x)
    want = torch.zeros(5, 5, dtype=torch.float64)
    for example in x:
        for token in example:
            a = torch.cat([token, torch.ones(1, dtype=torch.float64)])
            want += torch.outer(a, a)
    torch.testing.assert_close(sums[0].inputs.values[0], want)


def test_moments_of_a_convolution_against_unfold() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, dilation=(1, 2)).double()
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    functional, blocks = prepared(model, x)
    sums, _ = seen_by(functional, blocks, x)
    a = F.unfold(x, (3, 2), dilation=(1, 2), padding=1, stride=2)  # (N, I, T)
    a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1).movedim(1, 2).flatten(0, 1)
    torch.testing.assert_close(sums[0].inputs.values[0], a.T @ a)


@pytest.mark.parametrize("kind", [k for k in KINDS if "conv" in k.name], ids=str)
def test_sums_of_slices_equal_those_of_patches(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = kind.make()
    functional, blocks = prepared(model, inputs)
    slices, _ = seen_by(functional, blocks, inputs)
    used: list[int] = []
    monkeypatch.setattr("nullbayes.moments.convolution.ConvSummer.add", lambda *a: False)
    patches = convolution.patches
    monkeypatch.setattr(convolution, "patches", lambda *a: used.append(1) or patches(*a))
    written, _ = seen_by(functional, blocks, inputs)
    assert used  # the other road was taken
    for a, b in zip(slices, written, strict=True):
        assert a.count == b.count
        torch.testing.assert_close(a.inputs.values, b.inputs.values)


def test_patches_in_several_parts_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = next(k for k in KINDS if k.name == "conv2d-replicate-groups").make()
    functional, blocks = prepared(model, inputs)
    whole, _ = seen_by(functional, blocks, inputs)
    monkeypatch.setattr("nullbayes.moments.convolution._PATCH_BYTES", 1)
    monkeypatch.setattr("nullbayes.moments.products.ROWS", 3)
    monkeypatch.setattr("nullbayes.moments.shifts._PIECE_BYTES", 1)
    parts, _ = seen_by(functional, blocks, inputs)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a.inputs.values, b.inputs.values)


class Hidden(nn.Module):
    """A weight with a second use that no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.head(F.linear(torch.tanh(self.b(h)), self.a.weight))


def test_the_layer_of_gpt2_is_a_linear_one_the_other_way_round() -> None:
    layers = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model = nn.Sequential(layers.Conv1D(20, 12), nn.Tanh(), layers.Conv1D(3, 20)).double()
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    functional, blocks = prepared(model, x)
    assert not blocks.fixed
    sums, point = seen_by(functional, blocks, x)
    weights = moved(functional, blocks, sums)
    change = (weights["0.weight"] - model[0].weight).norm() / model[0].weight.norm()
    with torch.no_grad():
        out = torch.func.functional_call(model, weights, x)
    assert change > 0.1
    assert (out - point).abs().max() <= 1e-9 * point.abs().max()


def test_a_use_outside_of_modules_is_found_and_fixed() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 12, dtype=torch.float64)
    functional, blocks = prepared(Hidden().double(), x)
    assert set(blocks.fixed) == {"a.weight", "a.bias"}
    assert "outside of the layers" in blocks.fixed["a.weight"]
    assert {b.name for b in blocks.blocks} == {"b.weight", "head.weight"}
    sums, point = seen_by(functional, blocks, x)
    with torch.no_grad():
        out = functional(moved(functional, blocks, sums), x)
    assert (out - point).abs().max() <= 1e-9 * point.abs().max()


class Doubled(nn.Linear):
    """Multiplies more than its input: its own square as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.square())


def test_a_wrong_rule_is_found_out() -> None:
    assert rule_for(Doubled(3, 3)) is None  # another forward: the rule of its parent does not serve

    @register(Doubled)
    class Wrong(InputRule):
        def reads(self, module: Any) -> tuple[Read, ...]:
            return (Read("weight", Layout(1, 12, 12), "bias"),)

        def inputs(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            yield Seen("weight", args[0].unsqueeze(-2))

    torch.manual_seed(0)
    model = nn.Sequential(Doubled(12, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    _, blocks = prepared(model, torch.randn(3, 12, dtype=torch.float64))
    assert set(blocks.fixed) == {"0.weight", "0.bias"}
    assert "would allow it" in blocks.fixed["0.weight"]


def test_what_has_no_rule_is_fixed_and_named() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(12))
            self.body = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x * self.scale)

    model = Scaled().double()
    _, blocks = prepared(model, torch.randn(3, 12, dtype=torch.float64))
    assert list(blocks.fixed) == ["scale"]
    weight_normed = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(12, 4)), nn.Linear(4, 3)
    )
    _, blocks = prepared(weight_normed.double(), torch.randn(2, 12, dtype=torch.float64))
    assert [b.name for b in blocks.blocks] == ["1.weight"]


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = next(k for k in KINDS if k.name == "transformer-layer").make()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    before = torch.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    prepared(model, inputs)
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in state.items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(before, torch.get_rng_state())
