"""What a posterior says about a batch of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import torch
from torch import Tensor

from nullbayes.common.processes import Processes
from nullbayes.common.shapes import merged
from nullbayes.errors import InputError, NonFiniteError
from nullbayes.likelihood import Likelihood
from nullbayes.likelihood.helpers import mirrored, require_samples
from nullbayes.model.structure import tensors_in

METHODS = ("linearised", "sampled")
SHOWN = 10  # examples of a prediction shown in a notebook


@dataclass(frozen=True, repr=False)
class Prediction:
    """A Bayesian prediction for ``B`` examples from ``S`` samples.

    Attributes:
        mean: ``(B, *out)`` predictive mean: class probabilities, or the regression mean. Linearised, it and the
            uncertainties are averages over the samples and their mirror images about ``point``.
        outputs: ``(S, B, *out)`` raw outputs (logits) of each sample; sample ``s`` is the same function
            for every batch, so samples can be followed across batches.
        point: ``(B, *out)`` raw outputs of the trained network.
        variance: ``(B, *out)`` epistemic variance of the raw outputs.
        total, aleatoric, epistemic: uncertainty of the prediction and its two parts. Classification:
            entropies in nats, ``(B,)`` (``epistemic`` is the mutual information). Regression:
            variances ``(B, *out)``.
        method: ``"linearised"`` (Immer et al. 2021) or ``"sampled"``.
        covariance: ``(B, D, D)``, epistemic, of the ``D`` raw outputs of each example: linearised, from the
            factorisation where there is one; otherwise from the samples. Computed when it is first asked for.

    With a callable loss, and a model that returns several tensors, each of these (but ``method``) has the structure
    of what the model returns, with tensors of the shapes above in it; ``covariance`` is that of all of them laid end to
    end.
    """

    mean: Any
    outputs: Any
    point: Any
    variance: Any
    total: Any
    aleatoric: Any
    epistemic: Any
    method: str
    #: the covariance, or what computes it; None: from the samples
    _covariance: Any = field(default=None, repr=False, compare=False)

    @property
    def covariance(self) -> Tensor:
        found = self._covariance
        if callable(found):
            found = found()
        elif found is None:
            if not isinstance(self.outputs, Tensor):
                raise InputError(
                    "the covariance of several outputs is not stored with this prediction; use `posterior.joint(x)`."
                )
            mean = self.point if self.method == METHODS[0] else None
            found = of_samples(self.outputs, mean)
        object.__setattr__(self, "_covariance", found)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files hold the covariance itself, not the posterior that it would be computed from."""
        state = dict(vars(self))
        if callable(state["_covariance"]):
            state["_covariance"] = self.covariance
        return state

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


def of_samples(outputs: Tensor, mean: Tensor | None) -> Tensor:
    """Covariance ``(B, D, D)`` of samples ``(S, B, *out)``: about a mean that is known, or (None) about their own."""
    require_samples(outputs, 2 if mean is None else 1)
    flat = outputs.reshape(*outputs.shape[:2], -1)
    centre = flat.mean(0) if mean is None else mean.reshape(flat.shape[1:])
    change = (flat - centre).double()
    count = len(flat) - (mean is None)
    return (torch.einsum("sbi,sbj->bij", change, change) / count).to(outputs.dtype)


def make_prediction(
    likelihood: Likelihood,
    point: Tensor,
    outputs: Tensor,
    method: str,
    *,
    differentiable: bool = False,
    temperature: float = 1.0,
) -> Prediction:
    """Turn samples ``(S, B, *out)`` around ``point (B, *out)`` into a :class:`Prediction`.

    Args:
        temperature: what outputs are divided by before they become probabilities; as outputs they stay.
    """
    if not bool(outputs.isfinite().all()):
        bad = int(merged(~outputs.isfinite(), 2).any(2).any(0).nonzero()[0])
        raise NonFiniteError(
            f"the predicted outputs hold NaN or infinity, first for example {bad} of the batch; "
            "check that its inputs are finite and scaled as in training."
        )
    with torch.set_grad_enabled(differentiable):
        linear = method == METHODS[0]
        values = mirrored(outputs, point) if linear else outputs
        centre = point
        if temperature != 1:
            values, centre = values / temperature, point / temperature
        m = likelihood.moments(values, centre, linearised=linear)
        if temperature != 1:
            m = replace(m, variance=temperature**2 * m.variance)
    return Prediction(m.mean, outputs, point, m.variance, m.total, m.aleatoric, m.epistemic, method)


def gathered(parts: Sequence[Prediction]) -> Prediction:
    """One prediction of several batches, which have outputs of one shape.

    Raises:
        InputError: outputs of different shapes.
    """
    shapes = {tuple(part.point.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise InputError(
            f"batches have outputs of the shapes {sorted(shapes)}: they cannot be put together. Predict them one by "
            "one."
        )
    names = ("mean", "point", "variance", "total", "aleatoric", "epistemic")
    fields = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    outputs = torch.cat([part.outputs for part in parts], dim=1)
    return Prediction(
        **fields,
        outputs=outputs,
        method=parts[0].method,
        _covariance=lambda: torch.cat([part.covariance for part in parts]),
    )


def everyones(parts: Sequence[Prediction], processes: Processes) -> list[Prediction]:
    """The predictions of all processes in the order of the data. Their covariances are those of the samples."""
    return [
        part
        for each in processes.gather([replace(part, _covariance=None) for part in parts])
        for part in each
    ]


def structured(prediction: Prediction, likelihood: Likelihood) -> Prediction:
    """The same prediction with each field in the structure of what the model returns."""
    fields = {
        n: v for n, v in vars(prediction).items() if isinstance(v, Tensor) and n != "_covariance"
    }
    return replace(prediction, **{n: likelihood.structured(v) for n, v in fields.items()})


def _shown(values: Tensor) -> str:
    """A few numbers of one example."""
    flat = values.flatten().tolist()
    text = ", ".join(f"{v:.3g}" for v in flat[:SHOWN])
    return escape(text + (" …" if len(flat) > SHOWN else ""))


def per_example(values: Tensor) -> Tensor:
    """Sum over all axes but the first: ``(B, ...)`` -> ``(B,)``."""
    return values.reshape(len(values), -1).sum(1)
