"""How far samples move the network, and whether its first order still says what they do.

At the prior precision of the evidence, ``α = γ/‖θ̂‖²``, samples of a posterior with few rows on many weights are about
``‖θ̂‖ √(P/γ)`` long: longer than the weights themselves. The library raises ``α`` until samples move training
predictions by no more than 0.005 nats, to first order, and those of examples left out by 0.02.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from experiments import measures
from experiments.language.problem import Problem, nll, parts, unit
from experiments.methods.base import Draws
from nullbayes.certificate.verdict import ALLOWED_DIVERGENCE

CHECKED = 128  # training texts whose predictions are compared at most; eight for each sample
STEP = 10 ** (1 / 3)
STEPS = 24


def regime(posterior: Any, problem: Problem) -> dict[str, Any]:
    """Figures at the evidence's prior precision, at the library's, and where sampled networks meet the same bound."""
    own = float(posterior.prior_precision)
    certificate = posterior.certificate
    evidence = own if certificate.evidence is None else float(certificate.evidence)
    moved = Moved(posterior)
    train = problem.train[: min(CHECKED, 8 * problem.size.samples)]
    out: dict[str, Any] = {
        "weights": certificate.parameters,
        "rank": certificate.rank,
        "length of the weights": moved.size,
        "expected": (certificate.null_dim / max(1, certificate.rank)) ** 0.5,
    }
    units = {
        "test": unit(posterior, problem.test.inputs),
        "train": unit(posterior, train.inputs),
    }
    found = _bounded(moved, train.inputs, own, units["train"][0])
    for name, alpha in (
        ("evidence", evidence),
        ("bounded", own),
        ("bounded, sampled networks", found),
    ):
        out[name] = {"prior_precision": alpha, "length": moved.length * alpha**-0.5}
        for method in ("linearised", "sampled"):
            out[name][method] = _figures(moved, problem, train.inputs, method, alpha, units)
    return out


Units = dict[str, tuple[Tensor, Tensor]]


class Moved:
    """The re-weighted networks at any prior precision: changes scale with ``α^{-1/2}``.

    Attributes:
        size: length of the weights that move.
        length: mean length of the changes at prior precision one, over that of the weights.
    """

    def __init__(self, posterior: Any) -> None:
        self.model = posterior.model
        named = {n: p.detach() for n, p in self.model.named_parameters()}
        self.weights = {n: named[n] for n in posterior.space.by_name}
        scale = float(posterior.prior_precision) ** 0.5
        self.changes = [
            {n: (state[n].to(w.device) - w) * scale for n, w in self.weights.items()}
            for state in posterior.sample()
        ]
        lengths = [_length(change) for change in self.changes]
        self.size = _length(self.weights)
        self.length = sum(lengths) / len(lengths) / self.size

    @torch.no_grad()
    def outputs(self, x: Tensor, alpha: float) -> Tensor:
        """``(S, N, C)`` on the processor."""
        found = []
        for change in self.changes:
            weights = {n: w + alpha**-0.5 * change[n] for n, w in self.weights.items()}
            each = [functional_call(self.model, weights, (part,)).cpu() for part in parts(x)]
            found.append(torch.cat(each))
        return torch.stack(found)


def _length(tensors: dict[str, Tensor]) -> float:
    return float(sum(float(t.double().square().sum()) for t in tensors.values())) ** 0.5


def _figures(
    moved: Moved, problem: Problem, train: Tensor, method: str, alpha: float, units: Units
) -> dict[str, float]:
    """At one prior precision: quality on test texts, divergence on training texts."""
    test, known = (
        _draws(moved, x, method, alpha, units[name])
        for name, x in (("test", problem.test.inputs), ("train", train))
    )
    quality = measures.classification(test.probabilities(), problem.test.targets)
    return {
        **{k: quality[k] for k in ("accuracy", "ece")},
        "nll": nll(test, problem.test.targets),
        "divergence": divergence(units["train"][0], known.outputs),
    }


def _draws(
    moved: Moved, x: Tensor, method: str, alpha: float, unit: tuple[Tensor, Tensor]
) -> Draws:
    if method == "linearised":
        point, change = unit
        return Draws(point + change * alpha**-0.5, point)
    return Draws(moved.outputs(x, alpha))


def divergence(point: Tensor, outputs: Tensor) -> float:
    """Mean Kullback-Leibler divergence from the network's prediction ``(N, C)`` to that of one sample ``(S, N, C)``."""
    before, after = (t.double().log_softmax(-1) for t in (point, outputs))
    return float((before.exp() * (before - after)).sum(-1).mean())


def _bounded(moved: Moved, train: Tensor, alpha: float, point: Tensor) -> float:
    """The first of ``alpha · 10^(k/3)`` at which sampled networks move training predictions by 0.005 nats at most."""
    for _ in range(STEPS):
        if divergence(point, moved.outputs(train, alpha)) <= ALLOWED_DIVERGENCE:
            break
        alpha *= STEP
    return alpha
