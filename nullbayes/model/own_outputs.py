"""Which tensor in what a network of the transformers library returned its own loss is computed from.

Apart from the network itself, so that modules which leave this library can take it along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from nullbayes.model.batch import plain
from nullbayes.model.own_loss import Kind, entry, scored_outputs


@dataclass(frozen=True)
class OwnOutputs:
    """Reads outputs.

    Attributes:
        kind: what the network predicts; None: not known yet.
        size: what logits of a segmenter are resized to: that of the inputs, or ``(height, width)``.
        parameters: names of the arguments of its forward pass, in order.
    """

    kind: Kind | None
    size: Literal["inputs"] | tuple[int, int] | None
    parameters: tuple[str, ...]

    def __call__(self, value: Any, inputs: Any) -> Tensor | None:
        """None: not known here."""
        logits = scored_outputs(value)
        if logits is None:
            start, end = entry(value, "start_logits"), entry(value, "end_logits")
            first = value[0] if isinstance(value, tuple) and value else None
            if isinstance(value, tuple) and self.kind == "questions":
                start, end = value[:2]
            if start is not None and end is not None:
                return torch.stack([start, end], 1)
            logits = first if isinstance(first, Tensor) else None
        if logits is None or self.size is None:
            return logits
        size = self.image_size(inputs) if self.size == "inputs" else self.size
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)

    def image_size(self, inputs: Any) -> tuple[int, int] | None:
        """Height and width of the images among ``inputs``."""
        image = self.by_name(plain(inputs)).get("pixel_values")
        return (image.shape[-2], image.shape[-1]) if isinstance(image, Tensor) else None

    def by_name(self, inputs: Any) -> Mapping[str, Any]:
        """Inputs by the names of the arguments."""
        if isinstance(inputs, Mapping):
            return inputs
        several = inputs if isinstance(inputs, tuple) else (inputs,)
        return dict(zip(self.parameters, several, strict=False))
