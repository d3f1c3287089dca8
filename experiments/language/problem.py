"""A fine-tuned encoder with its texts, and what every group of methods is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.detection.base import Given
from experiments.devices import device
from experiments.language import encoder
from experiments.language.texts import JUDGING
from experiments.methods.base import Draws
from experiments.store import OUT
from nullbayes.datasets import Split

#: Texts of a batch whose outputs are linearised with all samples at once, and of one whose rows are captured; by
#: kind of device.
PREDICTED, FITTED = {"cpu": 64, "cuda": 150}, {"cpu": 32, "cuda": 128}
NETWORKS = OUT / "networks" / "language"


@dataclass(frozen=True)
class Size:
    """How much of everything; ``limit`` texts of a class and of a set, ``tokens`` of a text, ``samples`` of weights.

    Attributes:
        preserved: training texts that the rows of all 22.6 million weights are kept of.
        epochs: None: those of :data:`encoder.TUNINGS`.
    """

    limit: int | None = None
    sets: int = 150
    test: int | None = 400
    tokens: int = 32
    samples: int = 20
    members: int = 5
    preserved: int = 400
    seeds: int = 3
    ways: tuple[str, ...] = encoder.WAYS
    epochs: int | None = None
    validation: int = 200


SIZES = {
    "small": Size(30, 10, 32, 16, 4, 2, 24, 1, ("LoRA",), epochs=3, validation=30),
    "full": Size(),
    # Everything, three seeds, in an hour of one processor.
    "processor": Size(80, 8, 64, 16, 6, 2, 40, 3, epochs=8, validation=60),
}


@dataclass(frozen=True)
class OnDevice(Given):
    """As any other score is given it: the network is asked where it is, features and logits are on the processor."""

    encoder: nn.Module = field(default_factory=nn.Identity)

    @cached_property
    def head(self) -> nn.Linear:
        own: Any = self.encoder.head
        copied = nn.Linear(own.in_features, own.out_features)
        copied.load_state_dict({k: v.cpu() for k, v in own.state_dict().items()})
        return copied

    def features(self, x: Tensor) -> Tensor:
        return encoder.features(self.encoder, x)  # type: ignore[arg-type]

    def logits(self, x: Tensor) -> Tensor:
        return encoder.outputs(self.encoder, x)


@dataclass(frozen=True)
class Problem:
    """One fine-tuned encoder; ``near`` and ``far`` are judged, ``tuning`` sets choose settings of rivals."""

    way: str
    seed: int
    size: Size

    @cached_property
    def splits(self) -> tuple[Split, Split, Split]:
        """Training, validation and test texts."""
        parts = encoder.texts().parts(self.seed, self.size.limit)
        train, validation, test = (
            Split(p.inputs[:, : self.size.tokens], p.targets, p.name) for p in parts
        )
        return train, validation[: self.size.validation], test[: self.size.test]

    @property
    def train(self) -> Split:
        return self.splits[0]

    @property
    def validation(self) -> Split:
        return self.splits[1]

    @property
    def test(self) -> Split:
        return self.splits[2]

    def sets(self, role: str = JUDGING) -> dict[str, dict[str, Tensor]]:
        """``{"near" or "far": {name: tokens}}``."""
        near, far = encoder.texts().sets(role, self.size.sets)
        cut = self.size.tokens
        return {
            "near": {n: t[:, :cut] for n, t in near.items()},
            "far": {n: t[:, :cut] for n, t in far.items()},
        }

    def member(self, number: int) -> encoder.Encoder:
        """The network (0), and others of the same recipe from other heads, orders of texts and adapters."""
        seed = 1000 * (self.seed + 1) + number
        return encoder.fine_tuned(self.train, self.way, seed, self.path(number), self.size.epochs)

    def path(self, number: int, folder: Path = NETWORKS) -> Path:
        """One file for each choice of recipe, size, seed and member."""
        choice = {**asdict(self.size), "recipe": asdict(encoder.TUNINGS[self.way])}
        key = hashlib.sha256(json.dumps(choice, sort_keys=True).encode()).hexdigest()[:10]
        return folder / f"{self.way}-seed{self.seed}-{number}-{key}.safetensors"

    @cached_property
    def network(self) -> encoder.Encoder:
        return self.member(0)

    @cached_property
    def given(self) -> OnDevice:
        return OnDevice(
            self.network, self.train, self.validation.inputs, self.size.preserved, "classification",
            self.seed, encoder=self.network,
        )  # fmt: skip

    def batches(self, split: Split) -> list[tuple[Tensor, Tensor]]:
        """On the device."""
        where = device()
        batch = FITTED[where.type]
        pairs = zip(split.inputs.split(batch), split.targets.split(batch), strict=True)
        return [(x.to(where), y.to(where)) for x, y in pairs]


@dataclass
class Row:
    """One way of predicting or scoring: a row of the tables.

    Attributes:
        draws: of tokens on the processor; on the processor. None: a score alone.
        scores: novelty by name, of the same tokens.
        tuned: what was chosen on validation texts.
        declared: the score that stands for it.
    """

    title: str
    draws: Callable[[Tensor], Draws] | None
    scores: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    tuned: str = "nothing"
    value: float | None = None
    declared: str = "entropy"
    details: dict[str, Any] = field(default_factory=dict)


def parts(x: Tensor) -> Sequence[Tensor]:
    """Batches on the device."""
    return [part.to(device()) for part in x.split(PREDICTED[device().type])]


def remembered(draws: Callable[[Tensor], Draws]) -> Callable[[Tensor], Draws]:
    """Rows of one method are asked for the same texts, one after the other: computed once."""
    last: list[Any] = []

    def found(x: Tensor) -> Draws:
        if not last or last[0] is not x:
            last[:] = [x, draws(x)]
        out: Draws = last[1]
        return out

    return found


def nll(draws: Draws, targets: Tensor) -> float:
    """Mean negative log likelihood, nats a text."""
    picked = draws.probabilities().gather(1, targets[:, None])
    return float(-picked.clamp_min(torch.finfo(torch.float32).tiny).log().mean())


def unit(posterior: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """``f(θ̂, x) (N, C)``, and linearised changes at prior precision one ``(S, N, C)``; on the processor."""
    found = [posterior.predict(part) for part in parts(x)]
    point = torch.cat([p.point.cpu() for p in found])
    change = torch.cat([(p.outputs - p.point).cpu() for p in found], 1)
    return point, change * posterior.prior_precision**0.5
