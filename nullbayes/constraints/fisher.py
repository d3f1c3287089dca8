"""Rows from gradients of losses instead of the output Hessian: the empirical Fisher matrix and the sampled one.

Both estimate the same matrix as the rows of ``preserve="predictions"`` from one row, or a few, an example. The
empirical Fisher takes the gradient at the label that an example has, which is no estimate of the Gauss-Newton matrix
where the network is wrong or certain (Kunstner, Balles & Hennig, *Limitations of the empirical Fisher approximation*,
2019). The sampled Fisher takes it at labels drawn from the network's own prediction, and is right on average.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nullbayes.common.arguments import check_count
from nullbayes.constraints.directions import Cotangents, Directions, trace_of
from nullbayes.constraints.preserve import (
    Predictions,
    Preserve,
    register_preserve,
    resolve_preserve,
)
from nullbayes.errors import InputError
from nullbayes.likelihood.base import Likelihood
from nullbayes.likelihood.helpers import check_finite

GAUSS_NEWTON = "gauss-newton"


@register_preserve
class EmpiricalFisher(Predictions):
    """One row an example: the gradient of its loss at the label that it has."""

    name = "empirical-fisher"
    takes_directions = False

    def num_rows(self, likelihood: Likelihood, output_shape: tuple[int, ...]) -> int:
        return 1

    def build(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
        return likelihood.loss_gradient(outputs, targets).unsqueeze(0)

    def describe(self) -> str:
        return "the training predictions along the gradient of each example's loss"


@register_preserve
class SampledFisher(Predictions):
    """``samples`` rows an example: gradients at labels drawn from the prediction, over the root of their number.

    Args:
        samples: labels drawn for each example.
        seed: the labels of example ``n`` of the training data depend on ``(seed, n)`` and its outputs alone.
    """

    name = "sampled-fisher"
    takes_directions = False
    numbered = True

    def __init__(self, samples: int = 1, seed: int = 0) -> None:
        self.samples = check_count(samples, "samples")
        self.seed = check_count(seed, "seed", 0)

    def num_rows(self, likelihood: Likelihood, output_shape: tuple[int, ...]) -> int:
        return self.samples

    def build(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.drawn(likelihood, outputs, targets, torch.arange(len(outputs)))

    def drawn(
        self, likelihood: Likelihood, outputs: Tensor, targets: Tensor, numbers: Tensor
    ) -> Tensor:
        """Cotangents ``(samples, B, *out)`` of the examples with these ``numbers (B,)`` in the training data."""
        shape = (self.samples, *outputs.shape[1:])
        each = [np.random.default_rng([self.seed, n]).random(shape) for n in numbers.tolist()]
        uniform = torch.from_numpy(np.stack(each, 1))
        rows = [
            likelihood.sampled_gradient(outputs, targets, u) for u in uniform.to(outputs.device)
        ]
        return torch.stack(rows) / self.samples**0.5

    def numbered_cotangents(
        self, likelihood: Likelihood, outputs: Tensor, targets: Tensor, numbers: Tensor
    ) -> Cotangents:
        outputs = outputs.detach()
        values = self.drawn(likelihood, outputs, targets, numbers).detach()
        check_finite(
            values.movedim(1, 0),
            "the gradients at sampled labels",
            "Check the outputs, and your own likelihood's `sampled_gradient`.",
        )
        trace = trace_of(values)
        return Cotangents(values, torch.zeros_like(trace), trace)

    def describe(self) -> str:
        return "the training predictions along gradients at sampled labels"


def with_curvature(
    preserve: str | Preserve, curvature: str | Preserve, directions: Directions
) -> str | Preserve:
    """What to preserve, with rows that stand for the output Hessian in the way that ``curvature`` says.

    Raises:
        InputError: a name that is not known; another curvature beside something else than predictions.
    """
    names = (GAUSS_NEWTON, EmpiricalFisher.name, SampledFisher.name)
    if isinstance(curvature, str) and curvature == GAUSS_NEWTON:
        return preserve
    fisher = isinstance(curvature, (EmpiricalFisher, SampledFisher))
    if not fisher and curvature not in names:
        raise InputError(
            f"`curvature` is {curvature!r}; expected one of {', '.join(map(repr, names))}, or "
            "`nb.SampledFisher(samples=...)`."
        )
    if preserve != "predictions" or directions is not None:
        raise InputError(
            f"`curvature` is {curvature!r} beside preserve={preserve!r} and directions={directions!r}: it replaces the "
            "rows of preserve='predictions' with all directions. Leave these two out, or `curvature`."
        )
    return resolve_preserve(curvature)
