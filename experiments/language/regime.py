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
from experiments.language.problem import Problem, nll, parts
from experiments.methods.base import Draws
from nullbayes.certificate.verdict import ALLOWED_DIVERGENCE

BATCH = 128
CHECKED = 256  # training texts whose predictions are compared
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
    unit = _lengths(posterior, named) * own**0.5
    train = problem.train[:CHECKED]
    out: dict[str, Any] = {
        "weights": certificate.parameters,
        "rank": certificate.rank,
        "length of the weights": size,
        "expected": (certificate.null_dim / max(1, certificate.rank)) ** 0.5,
    }
    try:
        for name, alpha in (("evidence", evidence), ("bounded", own)):
            out[name] = _figures(posterior, problem, train.inputs, alpha, unit / size)
        alpha = _bounded(posterior, train.inputs, own)
        out["bounded, sampled networks"] = _figures(
            posterior, problem, train.inputs, alpha, unit / size
        )
    finally:
        posterior.prior_precision = own
    return out


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
    posterior: Any, problem: Problem, train: Tensor, alpha: float, unit: float
) -> dict[str, Any]:
    posterior.prior_precision = alpha
    out: dict[str, Any] = {"prior_precision": alpha, "length": unit * alpha**-0.5}
    for method in ("linearised", "sampled"):
        test = _draws(posterior, problem.test.inputs, method)
        quality = measures.classification(test.probabilities(), problem.test.targets)
        found = {k: quality[k] for k in ("accuracy", "ece")}
        found["nll"] = nll(test, problem.test.targets)
        found["divergence"] = divergence(posterior, train, method)
        out[method] = found
    return out


def _draws(posterior: Any, x: Tensor, method: str) -> Draws:
    found = [posterior.predict(part, method=method) for part in parts(x, BATCH)]
    outputs = torch.cat([p.outputs.cpu() for p in found], 1)
    if method == "sampled":
        return Draws(outputs)
    return Draws(outputs, torch.cat([p.point.cpu() for p in found]))


def divergence(posterior: Any, x: Tensor, method: str) -> float:
    """Mean Kullback-Leibler divergence from the network's prediction to that of one sample, nats a text."""
    total = 0.0
    for part in parts(x, BATCH):
        found = posterior.predict(part, method=method)
        before = found.point.double().log_softmax(-1)
        after = found.outputs.double().log_softmax(-1)
        total += float((before.exp() * (before - after)).sum(-1).mean(0).sum())
    return total / len(x)


def _bounded(posterior: Any, train: Tensor, alpha: float) -> float:
    """The first of ``alpha · 10^(k/3)`` at which sampled networks move training predictions by 0.005 nats at most."""
    for _ in range(STEPS):
        posterior.prior_precision = alpha
        if divergence(posterior, train, "sampled") <= ALLOWED_DIVERGENCE:
            break
        alpha *= STEP
    return alpha
