"""What a method is: it is fitted around a trained network, is tuned by one rule, and gives draws of the outputs."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from experiments import measures, networks
from experiments.runner import forget_peak
from experiments.tasks import Scale, Task
from nullbayes.common.memory import peak_bytes
from nullbayes.datasets import Split
from nullbayes.likelihood.helpers import mirrored

# The rule: validation NLL along a path of whole decades around a starting value, then thirds of a decade around the
# best. Its upper end is the trained network itself, so a method can always fall back to that.
DECADES = tuple(range(-4, 9))
THIRDS = (-2 / 3, -1 / 3, 1 / 3, 2 / 3)
BATCH = 100


@dataclass(frozen=True)
class Draws:
    """Raw outputs for a batch.

    Attributes:
        outputs: ``(S, B, O)`` draws of the raw outputs; S = 1 for a single network.
        centre: ``(B, O)`` what the draws lie around, where that is known exactly (linearised draws).
        scores: ``(B,)`` each; novelty scores beyond those that follow from the draws.
        temperature: divides logits; multiplies the noise of a regression.
    """

    outputs: Tensor
    centre: Tensor | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    temperature: float = 1.0

    @property
    def mean(self) -> Tensor:
        return self.outputs.mean(0) if self.centre is None else self.centre

    @property
    def variance(self) -> Tensor:
        """``(B, O)``, of the raw outputs; zero for a single draw."""
        if len(self.outputs) == 1:
            return torch.zeros_like(self.outputs[0])
        if self.centre is None:
            return self.outputs.var(0)
        return (self.outputs - self.centre).square().mean(0)

    @property
    def centred_variance(self) -> Tensor:
        """``(B,)`` float64, summed over outputs; of what is not common to all logits, which no softmax sees."""
        squares = self.around.square().sum(-1)
        return squares.mean(0) if self.centre is not None else squares.sum(0) / (len(squares) - 1)

    @property
    def around(self) -> Tensor:
        """``(S, B, O)`` float64: what the draws add to their centre, without what is common to all logits."""
        around = (self.outputs - self.mean).double()
        return around - around.mean(-1, keepdim=True) if around.shape[-1] > 1 else around

    @property
    def each(self) -> Tensor:
        """Class probabilities of every draw, float64; linearised draws with their mirror images, whosever they are."""
        both = self.outputs if self.centre is None else mirrored(self.outputs, self.centre)
        return (both.double() / self.temperature).softmax(-1)

    def probabilities(self) -> Tensor:
        """``(B, O)`` mean class probabilities, float64."""
        return self.each.mean(0)

    def plain(self) -> Tensor:
        """``(B, O)``: the same of the draws alone, as most use them."""
        return (self.outputs.double() / self.temperature).softmax(-1).mean(0)

    def novelty(self) -> dict[str, Tensor]:
        """All scores ``(B,)``, larger for what is new.

        ``entropy`` of the mean prediction; for several draws ``mutual_information``, ``variance`` (of the raw outputs,
        summed) and ``information``; for a single one ``energy`` (Liu, Wang, Owens, Li, *Energy-based
        out-of-distribution detection*, NeurIPS 2020).
        """
        probs = self.probabilities()
        total = measures.entropy(probs)
        scores = {"entropy": total}
        if len(self.outputs) > 1:
            scores["mutual_information"] = total - measures.entropy(self.each).mean(0)
            scores["variance"] = self.centred_variance
            scores["information"] = information(self.around)
        else:
            scores["energy"] = -self.outputs[0].double().logsumexp(-1)
        return {**scores, **self.scores}


def information(changes: Tensor) -> Tensor:
    """``½ log det(I + C) (B,)``, ``C`` the covariance of changes ``(S, B, O)``, float64.

    What an observation of the outputs with noise of variance one would tell of the weights, in nats (MacKay,
    *Information-based objective functions for active data selection*, 1992).
    """
    samples, _, outputs = changes.shape
    between = "sbo,tbo->bst" if samples < outputs else "sbo,sbp->bop"
    covariance = torch.einsum(between, changes, changes) / samples
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return 0.5 * torch.logdet(eye + covariance)


def joined(parts: Sequence[Draws]) -> Draws:
    """Draws of consecutive batches as one."""
    first = parts[0]
    return Draws(
        torch.cat([p.outputs for p in parts], 1),
        None if first.centre is None else torch.cat([p.mean for p in parts]),
        {key: torch.cat([p.scores[key] for p in parts]) for key in first.scores},
        first.temperature,
    )


@dataclass(frozen=True)
class Variant:
    """One way of predicting with a fitted method: a row of the tables."""

    title: str
    tuned: str  # what was chosen on validation data, or how it was set without
    value: float | None = None  # of what was tuned
    declared: str = (
        ""  # the novelty score that stands for it, named beforehand; "": its best one in hindsight
    )
    headline: bool = False  # the variant that stands for the method
    path: dict[str, list[float]] | None = None  # values tried and their validation NLL


@dataclass(frozen=True)
class Case:
    """What a method is given: the trained network, the data, and the seed."""

    task: Task
    network: nn.Module
    train: Split
    validation: Split
    seed: int
    noise: float | None = None  # variance, for regression: the mean squared residual of training

    @property
    def samples(self) -> int:
        return self.task.scale.samples

    def nll(self, draws: Draws, targets: Tensor) -> float:
        """Mean negative log predictive density: what every method is tuned by and measured with."""
        if self.task.kind == "classification":
            picked = draws.probabilities().gather(1, targets[:, None])
            return float(-picked.clamp_min(torch.finfo(torch.float32).tiny).log().mean())
        total = self.total(draws)
        squares = (targets.double() - draws.mean.double()).square() / total
        return float(0.5 * (squares + total.log() + math.log(2 * math.pi)).mean())

    def total(self, draws: Draws) -> Tensor:
        """Predictive variance of a regression, noise included: ``(B, O)``, float64."""
        assert self.noise is not None
        return draws.variance.double() + self.noise * draws.temperature


@dataclass(frozen=True)
class Tuned:
    """Where the rule ended."""

    value: float
    path: dict[str, list[float]]


def tune(
    start: float,
    nll: Callable[[list[float]], list[float]],
    exponents: Sequence[float] = DECADES,
    refine: Sequence[float] = THIRDS,
) -> Tuned:
    """The ``start · 10^e`` of least validation NLL: over ``exponents``, then with ``refine`` added to the best."""
    tried = [float(e) for e in exponents]
    values = _finite(nll([start * 10**e for e in tried]))
    best = tried[values.index(min(values))]
    if refine:
        finer = [best + r for r in refine]
        tried += finer
        values += _finite(nll([start * 10**e for e in finer]))
    order = sorted(range(len(tried)), key=tried.__getitem__)
    chosen = min(order, key=lambda i: values[i])
    path = {"value": [start * 10 ** tried[i] for i in order], "nll": [values[i] for i in order]}
    return Tuned(start * 10 ** tried[chosen], path)


def _finite(values: list[float]) -> list[float]:
    return [v if math.isfinite(v) else 1e30 for v in values]


class Method(ABC):
    """A method of the comparison; subclasses say how it is built, tuned and asked.

    After :meth:`fit`: ``variants`` by key, ``seconds`` of ``fit`` and ``tune`` (``training`` of further networks is in
    ``fit``), ``peaks`` in bytes, and whatever ``details`` a table may want.
    """

    name: ClassVar[str]
    version: ClassVar[int] = (
        1  # raised when what it measures changes: finished pieces of another one are not reused
    )
    single_network: ClassVar[bool] = True

    def __init__(self) -> None:
        self.variants: dict[str, Variant] = {}
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.details: dict[str, Any] = {}

    @classmethod
    def required(cls, scale: Scale) -> tuple[str, ...]:
        """Trained networks that it needs beside the first."""
        return ()

    def fit(self, case: Case) -> None:
        """Build the method, then tune it on validation data."""
        self.case = case
        self.peaks["base"] = forget_peak()
        started = time.perf_counter()
        extra = self.build(case) or 0.0
        self.seconds["fit"] = time.perf_counter() - started + extra
        self.peaks["fit"] = peak_bytes(torch.device("cpu"))
        started = time.perf_counter()
        self.variants = self.tune(case)
        self.seconds["tune"] = time.perf_counter() - started

    @abstractmethod
    def build(self, case: Case) -> float | None:
        """Everything but tuning. Returns seconds spent before, in the training of further networks."""

    @abstractmethod
    def tune(self, case: Case) -> dict[str, Variant]:
        """Choose on ``case.validation``; the variants, by key."""

    @abstractmethod
    def batch(self, x: Tensor, only: Sequence[str]) -> dict[str, Draws]:
        """Draws of the variants ``only`` for one batch ``(B, …)``."""

    def draws(self, x: Tensor, only: Sequence[str] | None = None) -> dict[str, Draws]:
        """Draws of every variant (or ``only`` some) for ``(N, …)``, a batch at a time."""
        keys = list(self.variants) if only is None else list(only)
        parts: dict[str, list[Draws]] = {key: [] for key in keys}
        for piece in x.split(BATCH):
            for key, value in self.batch(piece, keys).items():
                parts[key].append(value)
        return {key: joined(value) for key, value in parts.items()}


def network_outputs(network: nn.Module, x: Tensor) -> Tensor:
    """``(N, O)`` in evaluation mode."""
    return networks.outputs(network, x)
