"""Tables whose rows are looked up: rows that training data read are fixed, the others are free.

Unlike for derivatives, the row at ``padding_idx`` counts: the forward pass reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from nullbayes.moments.rule import InputRule, Layout, Read, Seen, argument, register


@register(nn.Embedding, nn.EmbeddingBag)
class EmbeddingInputs(InputRule):
    """``weight (V, d)``. Of a bag, every row in it is fixed: enough for the bag's sum, mean or maximum to stand."""

    def reads(self, module: Any) -> tuple[Read, ...]:
        layout = Layout(1, module.num_embeddings, module.embedding_dim)
        return (Read("weight", layout, table=True),)

    def inputs(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Iterator[Seen]:
        yield Seen("weight", index=argument(args, kwargs, 0, "input"))
