"""Graphs of PyTorch Geometric: posteriors against dense float64 rows of one graph, or one node, alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import QUIET, says
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.model.ragged import regular, restored

pytest.importorskip("torch_geometric")

from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCNConv, GINEConv, global_mean_pool

SIZES = (4, 2, 5, 3, 6, 1)
# Of torch.jit, which torch_geometric still uses.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def graph(i: int) -> Data:
    generator = torch.Generator().manual_seed(i)
    n = SIZES[i]
    pairs = torch.randint(0, n, (2, 2 * n), generator=generator)
    return Data(
        x=torch.randn(n, 3, generator=generator, dtype=torch.float64),
        edge_index=pairs,
        edge_attr=torch.randn(2 * n, 4, generator=generator, dtype=torch.float64),
        pos=torch.randn(n, 2, generator=generator, dtype=torch.float64),
        temperature=torch.rand(1, generator=generator, dtype=torch.float64),
        y=torch.tensor([i % 3]),
        scale=1.0 + i,
        name=f"graph {i}",
    )


class OfGraphs(nn.Module):
    """Takes a batch: nodes, edges with attributes, a number and a tensor for each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = GINEConv(nn.Sequential(nn.Linear(3, 6), nn.Tanh()), edge_dim=4)
        self.conv, self.out = GCNConv(6, 5), nn.Linear(6, 3)

    def forward(self, data: Any) -> Tensor:
        h = self.edges(data.x, data.edge_index, data.edge_attr)
        h = self.conv(h, data.edge_index).tanh()
        pooled = global_mean_pool(h, data.batch) * torch.as_tensor(data.scale)[:, None].to(h)
        out: Tensor = self.out(torch.cat([pooled, data.temperature[:, None]], 1))
        return out


class OfNodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GCNConv(3, 5), GCNConv(5, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x, edge_index).tanh(), edge_index)
        return out


def made(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().double().eval()


def rows(model: nn.Module, values: Tensor) -> Tensor:
    parameters, found = list(model.parameters()), []
    for value in values:
        grads = torch.autograd.grad(
            value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        found.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(found)


def covariance(outputs: Tensor, each: Tensor, alpha: float) -> Tensor:
    p = outputs.softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    precision = torch.einsum("nop,noq,nqr->pr", each, hessian, each)
    return torch.linalg.inv(precision + alpha * torch.eye(each.shape[-1], dtype=torch.float64))


def check_joint(posterior: Any, x: Any, outputs: Tensor, each: Tensor, wanted: Tensor) -> None:
    joint = posterior.joint(x)
    flat = each.flatten(0, 1)
    assert_close(joint.mean, outputs, rtol=1e-9, atol=1e-10)
    assert_close(joint.covariance, flat @ wanted @ flat.T, rtol=1e-6, atol=1e-9)


def test_graphs_by_themselves() -> None:
    model, graphs = made(OfGraphs), [graph(i) for i in range(6)]
    parts = [model(Batch.from_data_list([g]))[0] for g in graphs]
    outputs, each = torch.stack(parts).detach(), torch.stack([rows(model, out) for out in parts])
    wanted = covariance(outputs, each, 0.7)
    loaders: dict[str, Any] = {
        "loader": DataLoader(graphs, batch_size=4),
        "named": nb.Batches(DataLoader(graphs, batch_size=4), targets="y"),
        "split": nb.Batches(DataLoader(graphs, batch_size=3), split=lambda b: (b, b.y)),
        "collate": nb.Batches(
            graphs,
            collate=lambda some: (Batch.from_data_list(some), torch.cat([g.y for g in some])),
        ),
        "list of graphs": graphs,
    }
    order = [5, 0, 3]
    x = Batch.from_data_list([graphs[i] for i in order])
    head = ["out.weight", "out.bias"]  # which has a rule: the quick part of each form
    expected = None
    for data in loaders.values():
        quick = nb.LaplacePosterior(model, prior_precision=0.7, parameters=head)
        found = quick.fit(data, 3, **QUIET).predict(x).outputs
        assert quick.certificate.examples == 6
        expected = found if expected is None else expected
        assert_close(found, expected, rtol=1e-7, atol=1e-8)
    posterior = nb.LaplacePosterior(model, prior_precision=0.7)
    posterior.fit(loaders["loader"], 3, **QUIET)
    assert posterior.certificate.audit is not None and posterior.certificate.audit.passed
    check_joint(posterior, x, outputs[order], each[order], wanted)
    change = torch.einsum("nop,sp->sno", each, posterior._samples())
    prediction = posterior.predict(DataLoader(graphs, batch_size=4))
    assert_close(prediction.outputs, outputs + change, rtol=1e-8, atol=1e-9)
    assert_close(posterior.predict(graphs[2]).outputs, prediction.outputs[:, 2:3])
    assert posterior.novelty(x).shape == (3,)
    preserved = nb.NullSpacePosterior(model, preserve="outputs", delta=0)
    preserved.fit(graphs[:3], 3, **QUIET)
    moved = torch.einsum("nop,sp->sno", each[:3], preserved._samples())
    assert preserved.certificate.held and moved.abs().max() < 1e-8


def test_nodes_of_one_graph() -> None:
    model, data = made(OfNodes), graph(4)
    all_of_them = model(data.x, data.edge_index)
    each = rows(model, all_of_them.flatten()).reshape(SIZES[4], 3, -1)
    outputs, labels = all_of_them.detach(), torch.arange(SIZES[4]) % 3
    seen = torch.tensor([0, 2, 3, 5])
    posterior = nb.LaplacePosterior(
        model,
        forward=lambda m, nodes: m(data.x, data.edge_index)[nodes],
        prior_precision=0.7,
    ).fit((seen, labels[seen]), 3, **QUIET)
    wanted = covariance(outputs[seen], each[seen], 0.7)
    check_joint(posterior, torch.arange(6), outputs, each, wanted)


def test_a_batch_is_put_together_as_it_was() -> None:
    batch = Batch.from_data_list([graph(i) for i in (0, 2)])
    again = restored(regular(batch))
    for name in ("x", "edge_index", "edge_attr", "pos", "temperature", "y", "batch", "ptr"):
        assert torch.equal(getattr(again, name), getattr(batch, name))
    assert again.scale.tolist() == [1.0, 3.0]
    lone = restored(regular(graph(1)))
    assert lone.num_graphs == 1 and torch.equal(lone.x, graph(1).x)
    empty = Data(x=torch.zeros(2, 3), edge_index=torch.zeros(2, 0, dtype=torch.int64))
    assert restored(regular(empty)).edge_index.shape == (2, 0)


def test_gradients_by_the_features_of_nodes() -> None:
    model, graphs = made(OfGraphs), [graph(i) for i in range(4)]
    posterior = nb.LaplacePosterior(model, prior_precision=1.0).fit(graphs, 3, **QUIET)
    x = Batch.from_data_list(graphs[:2])
    x.x.requires_grad_()
    posterior.predict(x, differentiable=True).variance.sum().backward()
    assert x.x.grad is not None and bool((x.x.grad.abs().sum(1) > 0).all())


def test_what_cannot_be_used_is_said() -> None:
    model, nodes = made(OfGraphs), made(OfNodes)
    with says(nb.ModelError, "for each node", "nodes the examples"):
        nb.LaplacePosterior(nodes, forward=lambda m, d: m(d.x, d.edge_index)).fit(
            [graph(0), graph(2)], **QUIET
        )
    unlabelled = [Data(x=graph(i).x, edge_index=graph(i).edge_index) for i in range(2)]
    with says(nb.InputError, "train_loader, batch 0", "without `y`", "targets="):
        nb.LaplacePosterior(model).fit(unlabelled, **QUIET)
    with says(nb.InputError, "'label'"):
        nb.LaplacePosterior(model).fit(nb.Batches([graph(0)], targets="label"), **QUIET)
    with says(nb.InputError, "HeteroData", "several types"):
        regular(HeteroData(paper={"x": torch.zeros(2, 3)}))
    sparse = graph(0)
    sparse.adj = torch.eye(4).to_sparse()
    with says(nb.InputError, "'adj'", "edge_index"):
        regular(sparse)
    with says(nb.InputError, "no tensors"):
        regular(Data())
