"""What networks with an encoder and a decoder make of labels: the decoder's inputs.

Nothing here imports transformers: a network that comes from it has it loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from nullbayes.errors import InputError, ModelError

# Heads that read one text, or an answer in it: such a network makes the decoder's inputs from those of the encoder.
_READ = ("Classification", "QuestionAnswering")


# Where a network keeps what it made of the tokens before.
CACHE = "past_key_values"


def check_no_cache(inputs: Mapping[Any, Any]) -> None:
    """Raise `InputError` where a batch holds a cache, which makes a second pass another one."""
    if inputs.get(CACHE) is not None:
        raise InputError(
            f"the batch holds `{CACHE}`, a cache that the network writes to at every forward pass, so that the next "
            "one on the same batch is another. Leave it out, and pass whole texts."
        )


def generates(base: Any, parameters: Collection[str]) -> bool:
    """Whether a network of the transformers library decodes a text of its own, which its labels say.

    Args:
        parameters: names of its forward pass's arguments.
    """
    pair = bool(getattr(base.config, "is_encoder_decoder", False))
    # A bare one (`BartModel`) has no labels; whoever calls it gives both texts.
    headed = "For" in type(base).__name__ or hasattr(base, "prepare_decoder_input_ids_from_labels")
    asks = "decoder_input_ids" in parameters
    return pair and headed and asks and not type(base).__name__.endswith(_READ)


def decoder_inputs(base: Any, labels: Tensor) -> Tensor:
    """Labels ``(B, T)`` shifted to the right, as the network does it.

    Raises `ModelError` where that is not known.
    """
    make = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if make is not None:
        shifted: Tensor = make(labels=labels)
        return shifted
    shift = getattr(sys.modules[type(base).__module__], "shift_tokens_right", None)
    if shift is None:
        raise ModelError(
            f"{type(base).__name__} needs `decoder_input_ids`, and how it makes them of labels is not known here. Put "
            "them into the batches."
        )
    found: Tensor = shift(labels, base.config.pad_token_id, base.config.decoder_start_token_id)
    return found
