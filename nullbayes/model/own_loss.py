"""What a network's own loss may mean: the same figure computed from its outputs and labels, one way and another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

# The label that losses ignore, unless they say otherwise.
IGNORED = -100

Kind = Literal["tokens", "sequence", "segmentation", "questions", "values", "frames", "alignments"]
# What the outputs are called that a loss is computed from: of most networks, and of those for time series.
OUTPUTS = ("logits", "prediction_logits", "prediction_outputs", "regression_outputs")
# Weights of what is added to a loss beside the one of outputs and labels: a second head's, a router's, an adapter's.
_BESIDE = ("auxiliary_loss_weight", "router_aux_loss_coef", "orth_reg_weight")
# By how much nearer one of several figures has to be; and how far apart, relative, rounding puts two that are the same.
NEARER, ROUNDED = 10.0, 1e-6
# What a network that computes its loss finds out and writes down.
_WRITTEN = "problem_type"


def entry(value: Any, name: str) -> Tensor | None:
    """A tensor among what a network returned, by its name."""
    found = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    return found if isinstance(found, Tensor) else None


def scored_outputs(value: Any) -> Tensor | None:
    """What a network returned for its loss, by the names that it may have."""
    found = (entry(value, name) for name in OUTPUTS)
    return next((f for f in found if f is not None), None)


@contextmanager
def main_loss_alone(*holders: Any) -> Iterator[None]:
    """While it lasts, a network's own loss is the one of its outputs and labels alone, and nothing is written down.

    Args:
        holders: of settings: a network, its configuration, that of its adapter; all are as before afterwards.
    """
    there = [
        (h, n) for h in holders for n in (*_BESIDE, _WRITTEN) if n in getattr(h, "__dict__", {})
    ]
    before = [(h, n, getattr(h, n)) for h, n in there]
    try:
        for holder, name, value in before:
            if name != _WRITTEN and value is not None:
                setattr(holder, name, 0.0)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def kind_of(value: Any, logits: Tensor, labels: Tensor) -> Kind | None:
    """What a network predicts, by the shapes of its outputs and labels; None: not known here."""
    if entry(value, "start_logits") is not None:
        return "questions"
    if logits.ndim == 3 and labels.ndim == 2:
        return "tokens"
    if logits.ndim == 4 and labels.ndim == 3:
        return "segmentation"
    if logits.ndim >= 3 and logits.shape == labels.shape:
        return "values"
    return "sequence" if logits.ndim == 2 else None


def candidates(
    kind: Kind | None, logits: Tensor, labels: Tensor, problem: str | None, background: int
) -> dict[str, float]:
    """Mean losses by what distinguishes them; empty where shapes do not fit.

    Args:
        logits: in float64, as the network returned them (start and end of an answer: ``(B, 2, T)``).
        problem: the kind of problem of a sequence, by the library's name.
        background: the label that a segmenter ignores.
    """
    if kind == "tokens":
        if labels.shape != logits.shape[:2]:
            return {}
        return {
            "shifted": _entropy(logits[:, :-1].movedim(-1, 1), labels[:, 1:], IGNORED),
            "unshifted": _entropy(logits.movedim(-1, 1), labels, IGNORED),
        }
    if kind == "questions":
        limit = logits.shape[-1]
        sides = zip(logits.unbind(1), labels.clamp(0, limit).unbind(1), strict=True)
        return {"spans": sum(_entropy(f, y, limit) for f, y in sides) / 2}
    if kind == "segmentation":
        resized = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear")
        return {"resized": _entropy(resized, labels, background)}
    if kind == "values":
        found = {"squares": float(F.mse_loss(logits, labels.double()))}
        return found | {"one-hot": _entropy(logits.movedim(-1, 1), labels.argmax(-1), IGNORED)}
    if problem is None and labels.is_floating_point() and labels.shape == logits.shape:
        problem = "regression"
    if problem == "regression":
        return {"squares": float(F.mse_loss(logits.reshape(labels.shape), labels.double()))}
    if problem == "multi_label_classification":
        return {"labels": float(F.binary_cross_entropy_with_logits(logits, labels.double()))}
    if labels.numel() != len(logits):
        return {}
    return {"classes": _entropy(logits, labels.reshape(-1), IGNORED)}


def fitting(found: Mapping[str, float], loss: float, same: float) -> set[str]:
    """Which of several figures a network's own loss may be: the same to a share of ``same``.

    Two meanings may come near each other by chance, as those of a network that knows little do; so where one is much
    nearer than all others, it is that one.
    """
    away = {name: abs(value - loss) for name, value in found.items()}
    fits = {name for name, far in away.items() if far <= same * abs(loss) + 1e-6}
    least = ROUNDED * abs(loss)
    clear = {n for n in fits if all(NEARER * max(away[n], least) < away[m] for m in fits - {n})}
    return clear or fits


def undecided(name: str, loss: float, found: Mapping[str, float]) -> str:
    """What to say of a network ``name`` whose loss fits labels shifted and as they are."""
    return (
        f"the own loss of {name} on the first examples, {loss:.7g}, does not tell whether it shifts labels "
        f"({_listed(found, 7)}); they stay. Give a first batch with more labels, or pass `forward=` and labels that "
        "stand where they are scored."
    )


def unknown(name: str, loss: float, found: Mapping[str, float]) -> str:
    """What to say of a network ``name`` whose loss is none of those that are known."""
    return (
        f"the own loss of {name} on the first examples is {loss:.4g}; computed here it is "
        f"{_listed(found, 4) or 'unknown'}. What it does with labels is not known: compare `certificate.network_score` "
        "with the score of your training, or pass `forward=` and targets that fit its outputs."
    )


def _listed(found: Mapping[str, float], digits: int) -> str:
    return ", ".join(f"{name} {value:.{digits}g}" for name, value in found.items())


def _entropy(logits: Tensor, labels: Tensor, ignored: int) -> float:
    return float(F.cross_entropy(logits, labels.long(), ignore_index=ignored))
