"""Networks that hold sparse tensors: a graph as a buffer, a frozen matrix, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nullbayes as nb
from tests.support import says

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CS:UserWarning")  # "in beta state"

X = torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LAYOUTS = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc]


class Graph(nn.Module):
    """Features of the nodes of one graph, which all examples share."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        edges = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)).double()
        self.register_buffer("edges", (edges * (edges > 0.5)).to_sparse(layout=layout))
        self.a, self.o = nn.Linear(3, 9), nn.Linear(9, 2)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.o(torch.stack([self.edges @ one for one in h])).mean(1)


def made(layout: torch.layout) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Graph(layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_graph_that_all_examples_share(layout: torch.layout, tmp_path: Path) -> None:
    model = made(layout)
    posterior = nb.NullSpacePosterior(
        model, nb.Regression(noise_variance=1.0), "outputs", delta=0.0, prior_precision=1.0
    ).fit([(X, torch.zeros(8, 2).double())], 2, progress=False)
    assert posterior.certificate.held
    trained = model.state_dict()
    for sample in posterior.sample(2):  # by central differences of plain networks
        ends = []
        for step in (1e-6, -1e-6):
            fresh = made(layout)
            moved = {n: t + step * (sample[n] - t) for n, t in trained.items() if n != "edges"}
            fresh.load_state_dict(trained | moved)
            with torch.no_grad():
                ends.append(fresh(X))
        assert float((ends[0] - ends[1]).abs().max()) < 1e-6 * 1e-6
    posterior.save(tmp_path / "posterior")
    loaded = nb.load(tmp_path / "posterior", made(layout))
    torch.testing.assert_close(loaded.predict(X).mean, posterior.predict(X).mean)
    values = model.edges._values() if layout == torch.sparse_coo else model.edges.values()
    values.mul_(2)
    with says(nb.ModelError, "'edges.", "values'", "fit anew"):
        posterior.predict(X)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", [nb.NullSpacePosterior, nb.LayerNullSpacePosterior])
def test_sparse_weights_are_named(kind: Any, layout: torch.layout) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model.register_parameter("w", nn.Parameter(torch.eye(3).to_sparse(layout=layout)))
    with says(nb.ModelError, "'w'", "sparse", "to_dense()", "`parameters=`"):
        kind(model)
