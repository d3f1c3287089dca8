"""The networks of other libraries that docs/howto/your-model.md starts from, each as a user of its library has it."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import skorch
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader as GraphLoader
from torch_geometric.nn import GCNConv, global_add_pool

from nullbayes import datasets

Names = dict[str, Any]


def images() -> datasets.Dataset:
    return datasets.digits(train=80, validation=40)


def arrays() -> Names:
    """Digits as NumPy has them, and a skorch net that learned them."""
    data = images()
    x, test = (s.inputs.flatten(1).numpy() for s in (data.train, data.test[:100]))
    y, labels = (s.targets.numpy() for s in (data.train, data.test[:100]))
    net = skorch.NeuralNetClassifier(
        nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=1e-2,
        max_epochs=40,
        train_split=None,
        verbose=0,
    ).fit(x, y)
    return {"net": net, "X": x, "y": y, "X_test": test, "y_test": labels}


class Module(lightning.LightningModule):
    """A Lightning module as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Digits(lightning.LightningDataModule):
    def setup(self, stage: str) -> None:
        data = images()
        self.parts = [TensorDataset(s.inputs, s.targets) for s in (data.train, data.test[:100])]

    def train_dataloader(self) -> Any:
        return DataLoader(self.parts[0], 20, shuffle=True)

    def test_dataloader(self) -> Any:
        return DataLoader(self.parts[1], 100)


def vision() -> Names:
    """An image classifier from its configuration, and batches with the names that its processor gives them."""
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=10,
    )
    model = transformers.AutoModelForImageClassification.from_config(config)
    data = images()

    def batches(split: datasets.Split, size: int) -> list[Names]:
        return [{"pixel_values": x, "labels": y} for x, y in split.loader(size)]

    records, test = batches(data.train[:40], 20), batches(data.test[:40], 40)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        for record in records:
            optimiser.zero_grad()
            model(**record).loss.backward()
            optimiser.step()
    return {"vit": model.eval(), "records": records, "test_records": test}


class GraphNetwork(nn.Module):
    """Two convolutions and a sum over the nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = GCNConv(3, 12), GCNConv(12, 12), nn.Linear(12, 2)

    def forward(self, data: Any) -> Tensor:
        h = self.first(data.x, data.edge_index).relu()
        h = self.second(h, data.edge_index).relu()
        out: Tensor = self.out(global_add_pool(h, data.batch))
        return out


class NodeNetwork(nn.Module):
    """An answer for every node of one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GCNConv(3, 8), GCNConv(8, 2)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x, edge_index).relu(), edge_index)
        return out


def graph(seed: int) -> Data:
    """A ring, or (1) a star, of five to nine nodes with random features."""
    generator = torch.Generator().manual_seed(seed)
    n, kind = 5 + seed % 5, seed % 2
    nodes = torch.arange(n)
    pairs = torch.stack([nodes, (nodes + 1) % n] if kind == 0 else [nodes * 0, nodes])
    x = torch.randn(n, 3, generator=generator)
    return Data(x=x, edge_index=torch.cat([pairs, pairs.flip(0)], 1), y=torch.tensor([kind]))


def graphs() -> Names:
    made = [graph(i) for i in range(60)]
    train, test = GraphLoader(made[:40], 20), GraphLoader(made[40:], 20)
    model = GraphNetwork()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        for batch in train:
            optimiser.zero_grad()
            F.cross_entropy(model(batch), batch.y).backward()
            optimiser.step()
    found = {"gnn": model.eval(), "graph_loader": train, "test_graphs": test}
    return found | {"node_network": NodeNetwork().eval(), "graph": made[1]}


def regression() -> Names:
    """A regression on arrays."""
    data = datasets.diabetes()
    model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 1))
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        F.mse_loss(model(data.train.inputs), data.train.targets).backward()
        optimiser.step()
    named = {"table": data.train.inputs, "targets": data.train.targets}
    named |= {"test_table": data.test.inputs, "test_targets": data.test.targets}
    return {"model": model.eval(), **{k: np.asarray(v) for k, v in named.items()}}


@functools.cache
def _once() -> dict[str, Names]:
    """What is the same each time, and not changed."""
    return {"arrays": arrays(), "vision": vision(), "graphs": graphs()}


def names() -> Names:
    """All of them; what a page may train is new each time."""
    trainer = functools.partial(
        lightning.Trainer, accelerator="cpu", logger=False, enable_progress_bar=False
    )
    out = {"module": Module(), "data": Digits(), "Trainer": trainer, **regression()}
    for found in _once().values():
        out |= found
    return out
