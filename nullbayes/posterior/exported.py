"""What modules that leave the library have in common: how they call the network, and how they are traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nullbayes.errors import InputError
from nullbayes.likelihood import Likelihood
from nullbayes.model.batch import Inputs, batch_size, flags_of, plain
from nullbayes.model.functional import Forward, FunctionalModel, as_tensor_output
from nullbayes.model.own_outputs import OwnOutputs


class Exported(nn.Module):
    """A plain module around a copy of the network.

    Attributes:
        output_names: of what it returns, in order; for ``torch.onnx.export(output_names=...)``.
        own_outputs: which tensor of a network of the transformers library the outputs are; None: any other network.
    """

    likelihood: Likelihood
    user_forward: Forward | None
    output_names: tuple[str, ...]
    own_outputs: OwnOutputs | None = None

    def reads_as(self, functional: FunctionalModel) -> None:
        """Read outputs as the posterior does whose network this is a copy of."""
        conventions = functional.conventions
        self.own_outputs = None if conventions is None else conventions.outputs

    def arguments(self, x: Inputs) -> dict[str, Any]:
        """``args``, ``kwargs`` and ``dynamic_shapes`` of `torch.export.export` and `torch.onnx.export`.

        Args:
            x: two inputs or more, so that no axis looks as if it were always one; the graph takes any number.

        Raises:
            InputError: one example alone.
        """
        size = batch_size(x)
        if size < 2:
            raise InputError("`x` holds one example; pass two or more to trace the graph with.")
        axis = {0: torch.export.Dim("batch", min=1)}
        flags = iter(flags_of(x, size))
        shapes = tree_map(
            lambda t: axis if next(flags) and isinstance(t, Tensor) else None, plain(x)
        )
        given = plain(x)
        several = isinstance(given, tuple)
        args = given if several else (given,)
        return {"args": args, "kwargs": {}, "dynamic_shapes": (shapes if several else (shapes,),)}

    def _called(self, model: nn.Module, given: Any) -> Any:
        reading, named = self.likelihood.reading, isinstance(given, Mapping)
        taken = given
        if reading is not None and named:
            taken = {k: v for k, v in given.items() if k not in reading.names}
        if self.user_forward is not None:
            out = self.user_forward(model, taken)
        elif named:
            out = model(**taken)
        else:
            out = model(*taken) if isinstance(taken, tuple) else model(taken)
        if self.likelihood.layouts is not None:
            return out
        found = None if self.own_outputs is None else self.own_outputs(out, taken)
        found = as_tensor_output(out) if found is None else found
        return found if reading is None else reading(found, given)
