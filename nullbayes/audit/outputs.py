"""Outputs that look like probabilities where a likelihood takes logits: a softmax that would be applied twice."""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.likelihood import Binary, Classification, Likelihood
from nullbayes.model.batch import Inputs, take
from nullbayes.model.functional import FunctionalModel

# How far the sum of probabilities may be from one.
SUMS = 1e-4
# Examples from which on rows that sum to one are no coincidence.
ENOUGH = 3
# Operations that give probabilities, by the name of their derivative.
_LAST = {"SoftmaxBackward0": "softmax", "SigmoidBackward0": "sigmoid"}
# What only arranges numbers anew.
_ARRANGING = (
    "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Transpose", "Permute", "T", "Select", "Slice",
    "Alias", "Clone", "ToCopy", "Expand", "Unbind", "Split",
)  # fmt: skip
_DEPTH = 10


class Probabilities:
    """Looks at the outputs of all batches.

    Args:
        likelihood: only of classification and binary targets are outputs logits.
    """

    def __init__(self, likelihood: Likelihood) -> None:
        self.expected = isinstance(likelihood, (Classification, Binary))
        self.softmax = isinstance(likelihood, Classification)
        self.rows, self.summing = 0, self.softmax
        self.inside = True
        self.last: str | None = None

    def look(self, functional: FunctionalModel, inputs: Inputs, outputs: Tensor) -> None:
        """One batch, with its outputs ``(B, *out)``."""
        if not self.expected:
            return
        if not self.rows:
            self.last = last_operation(functional, inputs)
        self.rows += len(outputs)
        low, high = torch.stack(outputs.aminmax()).tolist()
        self.inside = self.inside and low >= 0 and high <= 1 + SUMS
        if self.summing:
            sums = outputs.sum(-1)
            self.summing = self.inside and bool(((sums - 1).abs() <= SUMS).all())

    @property
    def note(self) -> str | None:
        """What to say, with the mend; None where outputs may well be logits."""
        summing = self.summing and self.rows >= ENOUGH
        if not self.expected or not self.rows or not (summing or self.last):
            return None
        found = f"the network ends with a {self.last}" if self.last else ""
        if summing:
            found = "its rows lie between 0 and 1 and sum to one" + (
                f", and {found}" if found else ""
            )
        taken = "softmax" if self.softmax else "sigmoid"
        back = "torch.log" if self.softmax and self.last != "sigmoid" else "torch.logit"
        return (
            f"the outputs look like probabilities ({found}), but this likelihood takes logits and applies a {taken} "
            "itself, so that confident predictions come out as doubtful ones. Return what goes into the last layer, or "
            f"pass `forward=lambda model, x: {back}(model(x).clamp(1e-6, 1 - 1e-6))`. If the network was trained like "
            "this, it is right."
        )


def last_operation(functional: FunctionalModel, inputs: Inputs) -> str | None:
    """``"softmax"`` or ``"sigmoid"`` where outputs come straight from one, whatever arranges them after it."""
    weights = functional.weights(requires_grad=True)
    with torch.enable_grad():
        step = functional(weights, take(inputs, 0, 1)).grad_fn
    for _ in range(_DEPTH):
        if step is None:
            return None
        name = step.name()
        if name in _LAST:
            return _LAST[name]
        if not name.rstrip("0123456789").removesuffix("Backward").startswith(_ARRANGING):
            return None
        step = step.next_functions[0][0] if step.next_functions else None
    return None
