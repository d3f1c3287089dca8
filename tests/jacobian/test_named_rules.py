"""Rules of layers of packages that need not be installed: registered by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support import operator_for
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import dense_jacobian

from nullbayes.jacobian import registered
from nullbayes.jacobian.factors.outer import OuterFactor
from nullbayes.jacobian.layers.rule import rule_for

CONV1D = "transformers.pytorch_utils.Conv1D"


def network(*between: nn.Module) -> nn.Module:
    layers = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    first, last = layers.Conv1D(6, 5), layers.Conv1D(3, 6)
    with torch.no_grad():
        for layer in (first, last):
            layer.weight.mul_(20), layer.bias.normal_()
    return nn.Sequential(first, nn.Tanh(), *between, last).double().eval()


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@pytest.mark.parametrize("shape", [(4, 5), (4, 7, 5), (3, 2, 3, 5)], ids=str)
def test_rows_of_gpt2s_layer(shape: tuple[int, ...]) -> None:
    model = network(*[Mean() for _ in shape[2:]])
    x = torch.randn(shape, dtype=torch.float64)
    dense = dense_jacobian(model, x)
    operator, plan = operator_for(model, x)
    assert not plan.generic
    assert_close(torch.cat(list(operator.iter_rows(5))), dense)
    vectors = torch.randn(3, dense.shape[1], dtype=torch.float64)
    weights = torch.randn(3, dense.shape[0], dtype=torch.float64)
    assert_close(operator.matvec(vectors), vectors @ dense.T)
    assert_close(operator.rmatvec(weights), weights @ dense)
    assert_close(operator.gram(), dense @ dense.T)
    assert_close(operator.squared_norms(), dense.square().sum(1))


def test_they_are_held_as_outer_products_where_that_is_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model = nn.Sequential(layers.Conv1D(60, 50), nn.Tanh(), layers.Conv1D(2, 60)).double().eval()
    x = torch.randn(4, 50, dtype=torch.float64)
    operator, _ = operator_for(model, x)
    factor = operator.blocks[0].factors[("0.weight",)]
    assert isinstance(factor, OuterFactor)
    assert factor.transposed
    dense = dense_jacobian(model, x)
    assert_close(operator.gram(), dense @ dense.T)
    weights = torch.randn(3, dense.shape[0], dtype=torch.float64)
    assert_close(operator.rmatvec(weights), weights @ dense)


def test_a_subclass_with_another_forward_has_no_rule() -> None:
    layers = pytest.importorskip("transformers.pytorch_utils")

    class Same(layers.Conv1D):  # type: ignore[misc, name-defined]
        pass

    class Other(layers.Conv1D):  # type: ignore[misc, name-defined]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert rule_for(Same(3, 4)) is registered()[CONV1D]
    assert rule_for(Other(3, 4)) is None


def test_nothing_is_imported_for_it() -> None:
    code = (
        "import sys, nullbayes as nb; "
        f"assert {CONV1D!r} in nb.jacobian.registered(); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
