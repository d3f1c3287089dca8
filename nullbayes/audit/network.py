"""The user's network by itself: a deep copy that is called as anyone would call it, with weights written into it.

Rows are computed through `FunctionalModel`, which puts other weights in place of the network's own. Here nothing of
that is used, so that a mistake in it would show.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nullbayes.model.batch import Inputs, batch_size, plain
from nullbayes.model.functional import FunctionalModel, as_tensor_output


class NetworkCopy:
    """A copy of the network, in its own precision or another; the user's is never written to.

    Args:
        dtype: what its floating-point tensors become; None: they stay.

    Raises:
        Exception: whatever copying this network raises; some networks cannot be copied.
    """

    def __init__(self, functional: FunctionalModel, dtype: torch.dtype | None = None) -> None:
        self.functional, self.dtype = functional, dtype
        self.model = copy.deepcopy(functional.model)
        if dtype is not None:
            self.model.to(dtype)
        named = dict(self.model.named_parameters())
        self._parameters = [named[name] for name in functional.space.names]
        self._trained = [p.detach().clone() for p in self._parameters]

    def outputs(self, inputs: Inputs, delta: Tensor | None = None) -> Tensor:
        """``f(θ̂ + Δ, x) (B, *out)`` for ``delta (P,)``; at the trained weights without one."""
        given = plain(inputs)
        if self.dtype is not None:
            given = tree_map(lambda t: as_floating(t, self.dtype), given)
        self._write(delta)
        try:
            with torch.no_grad(), self.functional.drawing(inputs):
                out = self._called(given)
        finally:
            self._write(None)
        layouts = self.functional.layouts
        if layouts is None:
            return as_tensor_output(out).detach()
        return layouts.flatten(out, batch_size(inputs)).detach()

    def _called(self, given: Any) -> Any:
        forward = self.functional.user_forward
        if forward is not None:
            return forward(self.model, given)
        if isinstance(given, Mapping):
            return self.model(**given)
        return self.model(*given) if isinstance(given, tuple) else self.model(given)

    def _write(self, delta: Tensor | None) -> None:
        slots = self.functional.space.slots
        with torch.no_grad():
            for slot, parameter, trained in zip(
                slots, self._parameters, self._trained, strict=True
            ):
                parameter.copy_(trained)
                if delta is not None:
                    parameter.add_(delta[slot.start : slot.stop].reshape(slot.shape).to(parameter))


def as_floating(leaf: Any, dtype: torch.dtype | None) -> Any:
    """Floating-point tensors in ``dtype``, anything else as it is."""
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
