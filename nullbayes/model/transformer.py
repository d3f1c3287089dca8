"""Transformer encoders as they run in deployment: padded positions come out as zeros.

Without gradients `nn.TransformerEncoder` packs its input into nested tensors and fills padded positions with zeros at
the end; with gradients it computes something there. What is deployed runs without gradients, so derivatives are
those of a network that gives zeros there, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def has_nested(model: nn.Module) -> bool:
    """Whether a model has an encoder that may pack its input into nested tensors."""
    return any(is_nested(module) for module in model.modules())


def is_nested(module: nn.Module) -> bool:
    """Whether a module is an encoder that packs padded batches; subclasses have a forward pass of their own."""
    return type(module) is nn.TransformerEncoder and bool(
        getattr(module, "use_nested_tensor", False)
    )


class PaddedEncoder(nn.TransformerEncoder):
    """Stands in for an encoder in a private copy of a model; its state is the encoder's."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Any:
        """Layers without nested tensors, zeros at padded positions, and the final norm of those."""
        # A private module, of this call alone: its attributes may change.
        norm, self.norm = self.norm, None
        self.use_nested_tensor = False
        out = super().forward(src, mask, src_key_padding_mask, is_causal)
        if src_key_padding_mask is not None:
            out = out.masked_fill(_padding(src_key_padding_mask).unsqueeze(-1), 0.0)
        return out if norm is None else norm(out)


def _padding(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != 0
