"""What a posterior says about a batch of inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape
from typing import Any

import torch
from torch import Tensor

from nullbayes.errors import NonFiniteError
from nullbayes.likelihood import Likelihood
from nullbayes.likelihood.helpers import mirrored
from nullbayes.model.structure import tensors_in

METHODS = ("linearised", "sampled")
SHOWN = 10  # examples of a prediction shown in a notebook


@dataclass(frozen=True, repr=False)
class Prediction:
    """A Bayesian prediction for ``B`` examples from ``S`` function draws.

    Attributes:
        mean: ``(B, *out)`` predictive mean: class probabilities, or the regression mean. Linearised, it and the
            uncertainties are averages over the draws and their mirror images about ``point``.
        outputs: ``(S, B, *out)`` raw outputs (logits) of each draw; draw ``s`` is the same function
            for every batch, so draws can be followed across batches.
        point: ``(B, *out)`` raw outputs of the trained network.
        variance: ``(B, *out)`` epistemic variance of the raw outputs.
        total, aleatoric, epistemic: uncertainty of the prediction and its two parts. Classification:
            entropies in nats, ``(B,)`` (``epistemic`` is the mutual information). Regression:
            variances ``(B, *out)``.
        method: ``"linearised"`` (Immer et al. 2021) or ``"sampled"``.

    With a callable loss, and a model that returns several tensors, each of these (but ``method``) has the structure
    of what the model returns, with tensors of the shapes above in it.
    """

    mean: Any
    outputs: Any
    point: Any
    variance: Any
    total: Any
    aleatoric: Any
    epistemic: Any
    method: str

    def __len__(self) -> int:
        return len(next(tensors_in(self.point)))

    def __repr__(self) -> str:
        shapes = [tuple(t.shape[1:]) for t in tensors_in(self.point)]
        of = shapes[0] if len(shapes) == 1 else shapes
        samples = len(next(tensors_in(self.outputs)))
        return f"Prediction({len(self)} examples, outputs {of}, {samples} samples, {self.method})"

    def _repr_html_(self) -> str:
        """The first examples as a table: what is predicted, and how uncertain that is."""
        mean, total, epistemic = (
            next(tensors_in(v)) for v in (self.mean, self.total, self.epistemic)
        )
        rows = [
            (str(i), _shown(mean[i]), _shown(total[i]), _shown(epistemic[i]))
            for i in range(min(len(self), SHOWN))
        ]
        head = ("example", "mean", "total uncertainty", "epistemic part")
        cells = "".join(f"<th>{h}</th>" for h in head)
        body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
        more = len(self) - len(rows)
        text = f"{escape(repr(self))}{f'; {more} more examples' if more else ''}"
        return f"<table><caption>{text}</caption><tr>{cells}</tr>{body}</table>"


def make_prediction(
    likelihood: Likelihood, point: Tensor, outputs: Tensor, method: str
) -> Prediction:
    """Turn draws ``(S, B, *out)`` around ``point (B, *out)`` into a :class:`Prediction`."""
    if not bool(outputs.isfinite().all()):
        bad = int((~outputs.isfinite()).flatten(2).any(2).any(0).nonzero()[0])
        raise NonFiniteError(
            f"the predicted outputs hold NaN or infinity, first for example {bad} of the batch; "
            "check that its inputs are finite and scaled as in training."
        )
    with torch.no_grad():
        linear = method == METHODS[0]
        values = mirrored(outputs, point) if linear else outputs
        m = likelihood.moments(values, point, linearised=linear)
    return Prediction(m.mean, outputs, point, m.variance, m.total, m.aleatoric, m.epistemic, method)


def structured(prediction: Prediction, likelihood: Likelihood) -> Prediction:
    """The same prediction with each field in the structure of what the model returns."""
    fields = {n: v for n, v in vars(prediction).items() if isinstance(v, Tensor)}
    return replace(prediction, **{n: likelihood.structured(v) for n, v in fields.items()})


def _shown(values: Tensor) -> str:
    """A few numbers of one example."""
    flat = values.flatten().tolist()
    text = ", ".join(f"{v:.3g}" for v in flat[:SHOWN])
    return escape(text + (" …" if len(flat) > SHOWN else ""))


def per_example(values: Tensor) -> Tensor:
    """Sum over all axes but the first: ``(B, ...)`` -> ``(B,)``."""
    return values.reshape(len(values), -1).sum(1)
