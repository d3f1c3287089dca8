"""A network of which each process has a part: a frozen base in shards, adapters whole."""

from __future__ import annotations

import functools
import gc
import inspect
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes.stage import BATCH, fitted, loader, network, posterior, told
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.data import DataLoader, TensorDataset

import nullbayes as nb

COUNT, LENGTH, WORDS, WIDTH = 9, 3, 11, 8  # two batches in one process, one in the other
KINDS: dict[str, Callable[..., Any]] = {
    "null space": functools.partial(nb.NullSpacePosterior, solver="dual Cholesky"),
    "Laplace": functools.partial(nb.LaplacePosterior, solver="dual Cholesky"),
    "layer": functools.partial(nb.LayerNullSpacePosterior, prior_precision=1.0, delta=0.1),
}


class Block(nn.Module):
    """A layer of a transformer with an adapter behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.1, batch_first=True)
        self.adapter = nn.Sequential(nn.Linear(WIDTH, 2), nn.Tanh(), nn.Linear(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x)

    def read(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x + self.adapter(x)


class Reader(nn.Module):
    """Classes of short texts."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 3)
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.words(x) * self.scale
        first, last = self.blocks
        hidden = last.read(first(hidden))  # type: ignore[operator]
        out: Tensor = self.head(hidden.mean(1))
        return out


def reader() -> Reader:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Reader().double().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("adapter" in name)
    return model


def texts(seed: int = 1) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, WORDS, (COUNT, LENGTH), generator=generator)
    y = torch.randint(0, 3, (COUNT,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


def in_shards(model: nn.Module) -> nn.Module:
    """By FSDP2: each block and the rest, but for the adapters."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if "ignored_params" not in inspect.signature(fully_shard).parameters:  # PyTorch 2.6
        layers = [block.layer for block in model.blocks]  # type: ignore[union-attr]
        for module in (model.words, model.head, *layers):
            fully_shard(module, mesh=mesh)
        return model
    adapters = {p for n, p in model.named_parameters() if "adapter" in n}
    for module in (*model.blocks, model):  # type: ignore[misc]
        fully_shard(module, mesh=mesh, ignored_params=adapters)
    register_fsdp_forward_method(model.blocks[-1], "read")  # type: ignore[index]
    return model


def asked(kind: str, model: nn.Module, path: Path, group: Any = None) -> dict[str, Any]:
    """All that a posterior is asked: a fit, novelty, predictions, scores, calibration; and it goes to a file."""
    made, other = KINDS[kind](model, process_group=group), texts(2)
    if kind == "layer":
        made.fit(texts(), 3, progress=False)
        out = {"unit": torch.cat([t.flatten() for t in next(made.sample(1)).values()])}
    else:
        out = fitted(made, texts(), 3)
    made.save(path)
    asked_of = other.dataset.tensors[0] if kind == "layer" else other  # type: ignore[attr-defined]
    out["novelty"] = made.novelty(asked_of)
    out["mean"] = made.predict(asked_of).mean
    if kind == "Laplace":  # asked less, to take less time
        return out
    out["figures"] = made.evaluate(other, progress=False).as_dict()["figures"]
    out["nll"] = made.calibrate(other, progress=False).nll
    return out


def _made_of(model: nn.Module) -> list[tuple[str, list[str], list[str], int]]:
    """Class, attributes, parameters and hooks of each module."""
    return [
        (
            type(module).__name__,
            sorted(vars(module)),
            [f"{type(p).__name__} {name}" for name, p in module.named_parameters(recurse=False)],
            sum(len(v) for k, v in vars(module).items() if k.endswith("_hooks")),
        )
        for module in model.modules()
    ]


def _of_it(model: nn.Module) -> tuple[list[str], list[str]]:
    """Which parameters are in shards, and of which classes the modules are."""
    parts = [n for n, p in model.named_parameters() if isinstance(p, DTensor)]
    return parts, [type(module).__name__ for module in model.modules()]


def sharded() -> dict[str, Any]:
    """The same as of one process with the plain network, which fits alone here; what is refused."""
    out: dict[str, Any] = {}
    plain, model = reader(), in_shards(reader())
    was = _of_it(model)
    x = next(iter(texts()))[0]
    with torch.no_grad():
        out["outputs"] = model(x), plain(x)  # the outermost module stays unsharded now
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = (Path(folder) / f"{who}.safetensors" for who in ("ours", "theirs"))
            out[kind] = asked(kind, model, ours), asked(kind, plain, theirs, False)
            crossed = nb.load(ours, plain), nb.load(theirs, model)
            out[f"{kind}, loaded"] = tuple(p.predict(x).mean for p in crossed)
    out["kept"] = _of_it(model) == was, len(was[0])
    with torch.no_grad():
        out["outputs after"] = model(x), plain(x)
    return out | _refused(model, x)


def _refused(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Weights in shards that are chosen; a base that changes after the fit."""
    mesh, other = init_device_mesh("cpu", (dist.get_world_size(),)), network()
    first = other[0]  # type: ignore[index]
    first.weight = nn.Parameter(distribute_tensor(first.weight.detach(), mesh, [Shard(0)]))
    out: dict[str, Any] = {"trained": told(lambda: nb.NullSpacePosterior(other))}
    out["named"] = told(lambda: nb.LaplacePosterior(other, parameters=["0.weight", "4.weight"]))
    out["last"] = fitted(posterior(other, parameters="last-layer"), loader(20))["unit"]
    out["last of the plain"] = fitted(posterior(parameters="last-layer"), loader(20))["unit"]
    made = KINDS["null space"](model).fit(texts(), 2, progress=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if isinstance(parameter, DTensor):
                parameter.mul_(1.0)  # written to, and as it was
    made.predict(x)
    out["whole"], out["plain"] = _made_of(made.model), _made_of(reader())
    out["plan"] = made.plan(texts()).advice
    model.train()
    out["training"] = told(lambda: made.predict(x))
    model.eval()
    made.predict(x)
    with torch.no_grad():
        model.words.weight.mul_(2.0)  # type: ignore[operator, union-attr]
    out["changed"] = told(lambda: made.predict(x))
    copy = weakref.ref(made.model)
    made = None
    gc.collect()
    out["dropped"] = copy() is None
    wrapped: nn.Module = nn.parallel.DistributedDataParallel(network())
    out["wrapped"] = fitted(posterior(wrapped), loader(20))["unit"]
    return out | {"mesh": fitted(posterior(process_group=mesh), loader(20))["unit"]}
