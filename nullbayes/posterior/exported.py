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
from nullbayes.model.functional import Forward, as_tensor_output


class Exported(nn.Module):
    """A plain module around a copy of the network.

    Attributes:
        output_names: of what it returns, in order; for ``torch.onnx.export(output_names=...)``.
    """

    likelihood: Likelihood
    user_forward: Forward | None
    output_names: tuple[str, ...]

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
        if self.user_forward is not None:
            out = self.user_forward(model, given)
        elif isinstance(given, Mapping):
            out = model(**given)
        else:
            out = model(*given) if isinstance(given, tuple) else model(given)
        return out if self.likelihood.layouts is not None else as_tensor_output(out)
