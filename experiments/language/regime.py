"""How far samples move the network, and whether its first order still says what they do.

At the prior precision of the evidence, ``α = γ/‖θ̂‖²``, samples of a posterior with few rows on many weights are about
``‖θ̂‖ √(P/γ)`` long: longer than the weights themselves. The library raises ``α`` until samples move training
predictions by no more than 0.005 nats, to first order, and those of examples left out by 0.02.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments import measures
from experiments.language.problem import Problem, nll, parts, unit
from experiments.methods.base import Draws
from nullbayes.certificate.verdict import ALLOWED_DIVERGENCE

CHECKED = 128  # training texts whose predictions are compared
STEP = 10 ** (1 / 3)
STEPS = 24


def regime(posterior: Any, problem: Problem) -> dict[str, Any]:
    """Figures at the evidence's prior precision, at the library's, and where sampled networks meet the same bound."""
    own = float(posterior.prior_precision)
    certificate = posterior.certificate
    evidence = own if certificate.evidence is None else float(certificate.evidence)
    named = {n: p.detach() for n, p in posterior.model.named_parameters()}
    weights = [named[n].double().cpu() for n in posterior.space.by_name]
    size = float(sum(w.square().sum() for w in weights)) ** 0.5
    length = _lengths(posterior, named) * own**0.5 / size
    train = problem.train[:CHECKED]
    out: dict[str, Any] = {
        "weights": certificate.parameters,
        "rank": certificate.rank,
        "length of the weights": size,
        "expected": (certificate.null_dim / max(1, certificate.rank)) ** 0.5,
    }
    units = {
        "test": unit(posterior, problem.test.inputs),
        "train": unit(posterior, train.inputs),
    }
    try:
        found = _bounded(posterior, train.inputs, own, units["train"])
        for name, alpha in (
            ("evidence", evidence),
            ("bounded", own),
            ("bounded, sampled networks", found),
        ):
            posterior.prior_precision = alpha
            out[name] = {"prior_precision": alpha, "length": length * alpha**-0.5}
            for method in ("linearised", "sampled"):
                out[name][method] = _figures(posterior, problem, train.inputs, method, units)
    finally:
        posterior.prior_precision = own
    return out


Units = dict[str, tuple[Tensor, Tensor]]


def _lengths(posterior: Any, named: dict[str, Tensor]) -> float:
    """Mean ``‖Δ‖`` of up to eight samples."""
    found = []
    for state, _ in zip(posterior.sample(), range(8), strict=False):
        change = [
            (state[n] - named[n].to(state[n].device)).double() for n in posterior.space.by_name
        ]
        found.append(float(sum(c.square().sum() for c in change)) ** 0.5)
    return sum(found) / len(found)


def _figures(
    posterior: Any, problem: Problem, train: Tensor, method: str, units: Units
) -> dict[str, float]:
    """Of the posterior at its prior precision: quality on test texts, divergence on training texts."""
    test, known = (
        _draws(posterior, x, method, units[name])
        for name, x in (("test", problem.test.inputs), ("train", train))
    )
    quality = measures.classification(test.probabilities(), problem.test.targets)
    return {
        **{k: quality[k] for k in ("accuracy", "ece")},
        "nll": nll(test, problem.test.targets),
        "divergence": divergence(units["train"][0], known.outputs),
    }


def _draws(posterior: Any, x: Tensor, method: str, unit: tuple[Tensor, Tensor]) -> Draws:
    if method == "linearised":
        point, change = unit
        return Draws(point + change * posterior.prior_precision**-0.5, point)
    found = [posterior.predict(part, method=method).outputs.cpu() for part in parts(x)]
    return Draws(torch.cat(found, 1))


def divergence(point: Tensor, outputs: Tensor) -> float:
    """Mean Kullback-Leibler divergence from the network's prediction ``(N, C)`` to that of one sample ``(S, N, C)``."""
    before, after = (t.double().log_softmax(-1) for t in (point, outputs))
    return float((before.exp() * (before - after)).sum(-1).mean())


def _bounded(posterior: Any, train: Tensor, alpha: float, units: tuple[Tensor, Tensor]) -> float:
    """The first of ``alpha · 10^(k/3)`` at which sampled networks move training predictions by 0.005 nats at most."""
    for _ in range(STEPS):
        posterior.prior_precision = alpha
        drawn = _draws(posterior, train, "sampled", units).outputs
        if divergence(units[0], drawn) <= ALLOWED_DIVERGENCE:
            break
        alpha *= STEP
    return alpha
