"""The evaluation's laplace-torch methods against that package's own answers: ``make test-peers``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters
from torch.testing import assert_close

from experiments.methods import METHODS, Case
from experiments.tasks import Recipe, Scale, Task, small_resnet
from nullbayes.datasets import Dataset, Split

pytest.importorskip("laplace", reason="`make peers` installs it", exc_type=ImportError)

from experiments.methods.peer_laplace import PeerLaplace, quiet
from experiments.methods.row_backend import RowsGGN

torch.set_num_threads(1)


def case(network: nn.Module, kind: str, samples: int, shape: tuple[int, ...]) -> Case:
    """Forty random examples around an untrained network; cost and shapes are what matters."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, *shape, generator=generator)
    y = torch.arange(40) % 3 if kind == "classification" else x.flatten(1)[:, :1]
    split = Split(x, y)
    scale = Scale(1, None, 0, None, 0, 0, 40, Recipe(1, 10, 1e-3), samples=samples)
    data = Dataset("random", split, split, split)
    task = Task("random", kind, 0, scale, data, lambda rate: network, {})
    return Case(task, network.eval(), split, split, 0, None if kind == "classification" else 0.5)


def dense() -> nn.Module:
    """A small network whose last layer has three outputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def fitted(name: str, of: Case) -> PeerLaplace:
    """One of the package's posteriors, not tuned."""
    method = METHODS[name]()
    assert isinstance(method, PeerLaplace)
    method.build(of)
    return method


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_diagonal_from_our_rows_is_the_packages_own(kind: str) -> None:
    """Residual connections and BatchNorm, and a regression."""
    from laplace import Laplace
    from laplace.curvature import CurvlinopsGGN

    torch.manual_seed(0)
    network = small_resnet(3, widths=(2, 4)) if kind == "classification" else dense()[:1]
    if kind == "regression":
        network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    shape = (1, 8, 8) if kind == "classification" else (4,)
    given = case(network, kind, 2, shape)
    found: dict[Any, Tensor] = {}
    losses = []
    for backend in (CurvlinopsGGN, RowsGGN):
        with quiet():
            laplace = Laplace(
                copy.deepcopy(network),
                kind,
                subset_of_weights="all",
                hessian_structure="diag",
                backend=backend,
            )
            laplace.fit(given.train.loader(16))
        found[backend] = laplace.H
        losses.append(float(laplace.loss))
    assert_close(found[RowsGGN], found[CurvlinopsGGN], rtol=1e-4, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", ["laplace_diag", "laplace_kron"])
def test_draws_have_the_packages_linearised_variance(name: str) -> None:
    """Every entry of the output covariances within five standard errors."""
    method = fitted(name, case(dense(), "classification", 4000, (4,)))
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    point, change = method.linearised(method.changes(2.0), x)
    with quiet():
        method.laplace.prior_precision = 2.0
        jacobians, mean = method.laplace.backend.jacobians(x)
        wanted = method.laplace.functional_variance(jacobians).detach()
    assert_close(point, mean.detach(), rtol=1e-5, atol=1e-6)
    found = torch.einsum("sbi,sbj->bij", change, change) / len(change)
    diagonal = wanted.diagonal(dim1=1, dim2=2)
    error = ((diagonal[:, :, None] * diagonal[:, None] + wanted.square()) / len(change)).sqrt()
    assert bool(((found - wanted).abs() <= 5 * error).all())


def test_a_last_layer_is_changed_as_the_package_changes_it() -> None:
    """Weight by weight."""
    method = fitted("laplace_last", case(dense(), "classification", 5, (4,)))
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    changes = method.changes(2.0)
    method.kept = {"laplace_last": changes}
    found = method.batch(x, ["laplace_last"])["laplace_last"].outputs
    last = method.laplace.model.last_layer
    for change, outputs in zip(changes, found, strict=True):
        vector_to_parameters(method.laplace.mean + change, last.parameters())
        with torch.no_grad():
            assert_close(method.laplace.model(x), outputs, rtol=1e-5, atol=1e-5)
