"""What a score is given, and what it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from nullbayes.datasets import Split

BATCH = 200
#: Rows of the Jacobian that are written out whole, for rivals that need them: bytes, by kind of device.
ROWS_BYTES = {"cpu": 3 * 10**8, "cuda": 2 * 10**9}


def room_on(x: Tensor) -> int:
    """Bytes for rows where ``x`` is."""
    return ROWS_BYTES.get(x.device.type, ROWS_BYTES["cpu"])


@dataclass(frozen=True)
class Given:
    """A trained network and its training data; all that a score may use.

    Attributes:
        network: in evaluation mode; ends in a linear layer. On an accelerator its inputs are there too.
        train: inputs ``(N, …)`` and targets: integers ``(N,)``, or numbers ``(N, 1)`` of a regression, on the CPU.
        reference: inputs ``(V, …)`` of the training distribution that the network was not trained on; a score that
            needs a scale (``combined``) takes it from these.
        kind: ``"classification"`` or ``"regression"``.
        preserved: how many of the training examples a fit over Jacobian rows has time for; the first so many.
    """

    network: nn.Module
    train: Split
    reference: Tensor
    preserved: int
    kind: str = "classification"
    seed: int = 0

    @cached_property
    def head(self) -> nn.Linear:
        """The last linear layer, whose inputs are the features."""
        found = [m for m in self.network.modules() if isinstance(m, nn.Linear)]
        return found[-1]

    @cached_property
    def head_here(self) -> nn.Linear:
        """The same on the CPU, where features are."""
        weight, bias = self.head.weight.detach().cpu(), self.head.bias
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
        with torch.no_grad():
            made.weight.copy_(weight)
            if bias is not None:
                made.bias.copy_(bias)
        return made

    @cached_property
    def train_features(self) -> Tensor:
        """``(N, D)``."""
        return self.features(self.train.inputs)

    def features(self, x: Tensor) -> Tensor:
        """Inputs ``(B, …)`` of the last linear layer as ``(B, D)``, float32, on the CPU."""
        seen: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.logits(x)
        finally:
            handle.remove()
        return torch.cat(seen).flatten(1).cpu()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """``(B, C)``, on the CPU."""
        return torch.cat([self.network(part) for part in x.split(BATCH)]).cpu()


class Score(ABC):
    """A score of inputs, larger for what is less like the training data.

    Attributes:
        name: of the tables; settings of one score are scores of their own, ``"knn, k=10"``.
        family: which of them stand for one method; the best setting on the tuning problems represents it.
        source: the paper.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    source: ClassVar[str]
    #: False: needs class probabilities, so that regressions are left out.
    any_output: ClassVar[bool] = False
    regression_only: ClassVar[bool] = False

    @classmethod
    def applies(cls, kind: str) -> bool:
        """Whether a network for this kind of task has the score."""
        return not cls.regression_only if kind == "classification" else cls.any_output

    @abstractmethod
    def fit(self, given: Given) -> None:
        """Whatever is computed once."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """``(B, …)`` inputs to ``(B,)`` scores."""


SCORES: dict[str, type[Score]] = {}


def score(cls: type[Score]) -> type[Score]:
    """Enter a class into the registry, in the order of the tables."""
    if cls.name in SCORES:
        raise ValueError(f"two scores are named {cls.name!r}")
    SCORES[cls.name] = cls
    return cls
