"""Between data and network: what is passed to it, what of its outputs is asked about, what they are scored against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from nullbayes.errors import ModelError
from nullbayes.model.batch import Inputs, batch_size, plain
from nullbayes.model.huggingface import HuggingFace
from nullbayes.model.own_loss import IGNORED
from nullbayes.model.structure import Layouts


class Reading(Protocol):
    """Picks the outputs that are asked about.

    Attributes:
        names: inputs that are for this alone, and not for the network.
    """

    names: tuple[str, ...]

    def __call__(self, outputs: Tensor, inputs: Any) -> Tensor:
        """``(B, *out)`` of what a network returned for ``inputs``."""

    def prepared(
        self, inputs: Any, targets: Tensor, where: str, shifts: bool | None
    ) -> tuple[Any, Tensor]:
        """Inputs and targets of one batch of data; ``shifts``: what the network does with labels of tokens."""

    def placed(self, inputs: Any, labels: Any, shifts: bool | None) -> Any:
        """Inputs with what labels beside them say of where outputs are read, as far as they do."""


class Reads:
    """How a network's inputs and outputs are read.

    Attributes:
        layouts: where outputs may be several tensors.
        conventions: what a network of the transformers library does around its forward pass; None for any other.
        reading: which part of the outputs is asked about, `nb.Choices`; None: all of them.
    """

    layouts: Layouts | None = None
    conventions: HuggingFace | None = None
    reading: Reading | None = None

    def serve(self, likelihood: Any) -> None:
        """Read outputs and targets as ``likelihood`` (a `nullbayes.Likelihood`) takes them."""
        self.reading = likelihood.reading
        if self.conventions is not None:
            self.conventions.likelihood = likelihood.name
            self.conventions.ignore = getattr(likelihood, "ignore_index", IGNORED)

    def taken(self, given: Any) -> Any:
        """Inputs without those that are not for the network but for :attr:`reading`."""
        if self.reading is None or not isinstance(given, Mapping):
            return given
        return {k: v for k, v in given.items() if k not in self.reading.names}

    def read(self, out: Any, inputs: Inputs) -> Tensor:
        """The outputs ``(B, *out)`` that are asked about, in what the network returned for ``inputs``."""
        if self.layouts is not None:
            return self.layouts.flatten(out, batch_size(inputs))
        found = None if self.conventions is None else self.conventions.output(out, inputs)
        found = as_tensor_output(out) if found is None else found
        return found if self.reading is None else self.reading(found, plain(inputs))

    def as_called(self, inputs: Any, labels: Any = None) -> Any:
        """``inputs`` as the network takes them, where its library is known to do something to a batch first."""
        if self.conventions is None:
            return inputs
        names = () if self.reading is None else self.reading.names
        given = self.conventions.inputs(inputs, labels, names)
        if self.reading is None or not isinstance(given, Mapping):
            return given
        beside = labels if labels is not None else self.conventions.labels_of(inputs)
        return self.reading.placed(given, beside, self.conventions.shifts)

    def targets_for(self, inputs: Any, targets: Any, where: str) -> tuple[Any, Any]:
        """Inputs, and ``targets`` as the outputs are scored against, of one batch of data."""
        if self.layouts is not None or targets is inputs:
            return inputs, targets
        if self.reading is not None and isinstance(targets, Tensor):
            known = None if self.conventions is None else self.conventions.shifting(inputs, targets)
            return self.reading.prepared(inputs, targets, where, known)
        if self.conventions is None:
            return inputs, targets
        return inputs, self.conventions.prepared(inputs, targets, where)


def as_tensor_output(value: Any) -> Tensor:
    """The tensor in what a model returned: itself, or ``logits`` of a mapping or an object."""
    if isinstance(value, Tensor):
        return _dense(value)
    logits = value.get("logits") if isinstance(value, Mapping) else getattr(value, "logits", None)
    if isinstance(logits, Tensor):
        return _dense(logits)
    raise ModelError(
        f"the model returned {type(value).__name__}, expected a tensor or an object with `.logits`."
        " Pass `forward=lambda model, inputs: ...` that returns the tensor to be trusted, or `loss=`, a"
        " callable that takes whatever the model returns."
    )


def _dense(outputs: Tensor) -> Tensor:
    if outputs.layout == torch.strided and not outputs.is_nested:
        return outputs
    kind, mend = "sparse", "`.to_dense()`"
    if outputs.is_nested:
        kind, mend = "nested", "`torch.nested.to_padded_tensor(out, 0.0)`"
    raise ModelError(
        f"the model returned a {kind} tensor ({outputs.layout}), whose examples cannot be taken out. Return a dense "
        f"one, {mend}, or pass `forward=` that does."
    )
