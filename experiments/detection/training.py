"""Networks of the problems, trained once and kept as safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.devices import device
from experiments.networks import FOLDER, kept
from nullbayes.common.files import atomic_file
from nullbayes.datasets import Split
from nullbayes.demo.models import seeded
from nullbayes.demo.training import Recipe, train

Build = Callable[..., nn.Module]


@dataclass(frozen=True)
class OneCycle(Recipe):
    """SGD with Nesterov's momentum, the learning rate up to its value and down again (Smith, Topin, 2018).

    For all images: the data stay on one device, in half precision where that is an accelerator.
    """


def trained(
    name: tuple[str, str],
    build: Build,
    split: Split,
    recipe: Recipe,
    seed: int,
    *,
    kind: str = "classification",
    augmented: bool = False,
) -> nn.Module:
    """The network of one problem, in evaluation mode."""
    settings: dict[str, Any] = {
        "name": name, "recipe": asdict(recipe), "seed": seed, "examples": len(split), "augmented": augmented,
        "data": float(split.inputs.double().sum()),
    }  # fmt: skip
    if isinstance(recipe, OneCycle):
        made = seeded(build, 0.0, seed=seed)  # type: ignore[arg-type]
        settings |= {"one cycle": True, "weights": sum(p.numel() for p in made.parameters())}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = FOLDER / f"detection-{name[0]}-{key}.safetensors"
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    if kind == "regression":
        loss = F.mse_loss

    def trained_as_asked(network: nn.Module) -> None:
        if isinstance(recipe, OneCycle):
            one_cycle(network, split, recipe, seed, device(), path.with_suffix(".unfinished"))
            return
        model = _Augmented(network, seed) if augmented else network
        train(model, split, recipe, loss=loss, seed=seed)

    return kept(path, seeded(build, 0.0, seed=seed), trained_as_asked)  # type: ignore[arg-type]


def layout(place: torch.device) -> torch.memory_format:
    """Channels last is faster on accelerators; processors without AVX-512 crash in its backward pass (torch 2.13)."""
    return torch.contiguous_format if place.type == "cpu" else torch.channels_last


def one_cycle(
    network: nn.Module,
    split: Split,
    recipe: OneCycle,
    seed: int,
    place: torch.device,
    unfinished: Path | None = None,
) -> None:
    """Train a network of images in place, with mirror images and moves; it ends on the CPU.

    Each epoch ends in the file ``unfinished``; where it is there, training goes on from it and ends as it would have
    without a break.
    """
    network.to(place, memory_format=layout(place))
    model = _Augmented(network, seed, place).train()
    x, y = split.inputs.to(place), split.targets.to(place)
    steps = recipe.epochs * (len(split) // recipe.batch_size or 1)
    optimiser = torch.optim.SGD(
        network.parameters(),
        recipe.learning_rate,
        momentum=0.9,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.learning_rate, total_steps=steps, pct_start=0.2
    )
    half = torch.autocast(place.type, torch.bfloat16, enabled=place.type != "cpu")
    order = torch.Generator(place).manual_seed(seed)
    state = _State((network, optimiser, schedule), (order, model.generator))
    done = state.read(unfinished)
    while done < steps:
        for index in torch.randperm(len(split), generator=order, device=place).split(
            recipe.batch_size
        ):
            if done == steps or (len(index) < recipe.batch_size <= len(split)):
                break  # BatchNorm's statistics are of whole batches
            optimiser.zero_grad(set_to_none=True)
            with half:
                outputs = model(x[index])
            F.cross_entropy(outputs.float(), y[index]).backward()
            optimiser.step()
            schedule.step()
            done += 1
        state.write(unfinished, done)
    network.to("cpu", memory_format=torch.contiguous_format).eval()
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)


@dataclass(frozen=True)
class _State:
    """All that a training changes, with the number of its steps, in a file."""

    parts: tuple[Any, ...]  # each with a ``state_dict``
    generators: tuple[torch.Generator, ...]

    def read(self, path: Path | None) -> int:
        """How many steps were made before; 0 where there is no file."""
        if path is None or not path.is_file():
            return 0
        found = torch.load(path, map_location="cpu", weights_only=True)
        for part, state in zip(self.parts, found["parts"], strict=True):
            part.load_state_dict(state)
        for generator, state in zip(self.generators, found["generators"], strict=True):
            generator.set_state(state)
        return int(found["done"])

    def write(self, path: Path | None, done: int) -> None:
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        states = [generator.get_state() for generator in self.generators]
        with atomic_file(path) as part:
            torch.save(
                {"done": done, "parts": [p.state_dict() for p in self.parts], "generators": states},
                part,
            )


class _Augmented(nn.Module):
    """In training, each batch is mirrored or not and moved by up to two pixels, by a generator of its own."""

    def __init__(self, network: nn.Module, seed: int, place: torch.device | None = None) -> None:
        super().__init__()
        self.network = network
        self.generator = torch.Generator(place or torch.device("cpu")).manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self._moved(x)
        found: Tensor = self.network(x)
        return found

    def _moved(self, x: Tensor) -> Tensor:
        (n, _, height, width), place = x.shape, x.device
        mirror = torch.rand(n, generator=self.generator, device=place) < 0.5
        x = torch.where(mirror[:, None, None, None], x.flip(3), x)
        padded = F.pad(x, (2, 2, 2, 2))
        down, right = torch.randint(0, 5, (2, n), generator=self.generator, device=place)
        rows = down[:, None] + torch.arange(height, device=place)
        columns = right[:, None] + torch.arange(width, device=place)
        which = torch.arange(n, device=place)[:, None, None]
        moved = padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return moved.clone(memory_format=layout(place))  # images of one channel pass for either
