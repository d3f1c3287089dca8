"""Networks of the transformers library beside those of ``architectures.py``: one of each further kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.cases.architectures import (
    BERT,
    LLAMA,
    WORDS,
    Case,
    _named,
    after_first,
    classes,
    images,
    labelled,
    next_tokens,
    normal,
    tags,
    translated,
)

SEEN = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
PAIR = {
    "vocab_size": WORDS,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
ROBERTA = BERT | {"max_position_embeddings": 12, "pad_token_id": 0}


def waves() -> dict[str, Tensor]:
    return {"input_values": normal(3, 400), "labels": torch.arange(3)}


def pictures() -> dict[str, Tensor]:
    return images(torch.arange(3))


def _classes(name: str, **settings: Any) -> Case:
    """Three classes of texts; ``sdpa`` where the library has it."""
    kinds = settings.pop("attention", ("sdpa",))
    make = _named(
        f"{name}ForSequenceClassification", f"{name}Config", num_labels=3, **(BERT | settings)
    )
    return Case(make, classes, attention=kinds)


def _next(name: str, config: str = "", **settings: Any) -> Case:
    kinds = settings.pop("attention", ("sdpa",))
    make = _named(f"{name}ForCausalLM", f"{config or name}Config", **(LLAMA | settings))
    return Case(make, next_tokens, scale=after_first, attention=kinds)


def _pictures(name: str, attention: str = "sdpa", **settings: Any) -> Case:
    own = {"num_labels": 3, **SEEN, **settings}
    make = _named(f"{name}ForImageClassification", f"{name}Config", **own)
    return Case(make, pictures, attention=(attention,))


EAGER = ("eager",)
MORE: dict[str, Case] = {
    "roberta": _classes("Roberta", **ROBERTA),
    "albert, masked words": Case(
        _named(
            "AlbertForMaskedLM",
            "AlbertConfig",
            **(BERT | {"embedding_size": 4, "num_hidden_layers": 2}),  # one layer, used twice
        ),
        lambda: tags(WORDS),
        scale=labelled,
        attention=("sdpa",),
    ),
    "electra": _classes("Electra", embedding_size=4),
    "mpnet": _classes("MPNet", attention=EAGER, **ROBERTA),
    "modernbert": _classes(
        "ModernBert",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        cls_token_id=1,
        sep_token_id=1,
        num_hidden_layers=2,
        local_attention=4,
        global_attn_every_n_layers=2,
    ),
    "xlnet": Case(
        _named(
            "XLNetForSequenceClassification",
            "XLNetConfig",
            vocab_size=WORDS,
            d_model=8,
            n_layer=1,
            n_head=2,
            d_inner=8,
            num_labels=3,
        ),
        classes,
        attention=EAGER,
    ),
    "gemma3": _next("Gemma3", "Gemma3Text", head_dim=4, sliding_window=4, query_pre_attn_scalar=4),
    "phi": _next("Phi"),
    "opt": _next("OPT", ffn_dim=8, word_embed_proj_dim=8),
    "gpt-neox": _next("GPTNeoX"),
    "bloom": _next("Bloom", n_layer=1, n_head=2, attention=EAGER),
    "falcon": _next("Falcon"),
    "mamba": _next("Mamba", state_size=4, expand=2, time_step_rank=2, attention=EAGER),
    "bart": Case(
        _named("BartForConditionalGeneration", "BartConfig", **PAIR),
        translated,
        scale=labelled,
        attention=("sdpa",),
    ),
    "pegasus": Case(
        _named("PegasusForConditionalGeneration", "PegasusConfig", **PAIR),
        translated,
        scale=labelled,
        attention=("sdpa",),
    ),
    "deit": _pictures("DeiT"),
    "beit": _pictures("Beit", use_relative_position_bias=True),
    "dinov2": _pictures("Dinov2"),
    "clip": _pictures(
        "CLIP",
        vision_config=SEEN | {"projection_dim": 4},
        text_config=BERT,
    ),
    "convnext": _pictures(
        "ConvNext", "eager", hidden_sizes=[4, 4], depths=[1, 1], num_stages=2, patch_size=4
    ),
    "wav2vec2": Case(
        _named(
            "Wav2Vec2ForSequenceClassification",
            "Wav2Vec2Config",
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            conv_dim=(8, 8),
            conv_kernel=(10, 4),
            conv_stride=(5, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            num_labels=3,
            classifier_proj_size=8,
        ),
        waves,
        attention=("sdpa",),
    ),
}
