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
    masks,
    next_tokens,
    normal,
    numbers,
    tags,
    text,
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


def frames() -> dict[str, Tensor]:
    """One label in one-hot form for each of 19 frames."""
    labels = torch.nn.functional.one_hot(numbers(3, 19, seed=1, high=3), 3)
    return {"input_values": normal(3, 400), "labels": labels}


def alternatives() -> dict[str, Tensor]:
    """Three texts for each example, one of which is right; some are padded."""
    ids, mask = numbers(5, 3, 6, low=2, high=WORDS), torch.ones(5, 3, 6, dtype=torch.int64)
    mask[1, :, 4:], mask[3, 1, 5:] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.arange(5) % 3}


def pages() -> dict[str, Tensor]:
    """Tagged words with boxes on a page."""
    return tags() | {"bbox": numbers(5, 6, 4, seed=4, high=7).sort(-1).values}


def series() -> dict[str, Tensor]:
    return {"past_values": normal(4, 12, 2), "target_values": torch.arange(4) % 3}


def forecast() -> dict[str, Tensor]:
    return {"past_values": normal(4, 12, 2), "future_values": normal(4, 3, 2, seed=1)}


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
WAVES = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 4),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}
PATCHES = {
    "num_input_channels": 2,
    "context_length": 12,
    "patch_length": 3,
    "patch_stride": 3,
    "num_hidden_layers": 1,
    "d_model": 8,
    "num_attention_heads": 2,
    "ffn_dim": 8,
}
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
            num_labels=3,
            **WAVES,
        ),
        waves,
        attention=("sdpa",),
    ),
    "longformer": _classes("Longformer", attention=EAGER, attention_window=4, **ROBERTA),
    "fnet": Case(  # takes no mask
        _named("FNetForSequenceClassification", "FNetConfig", num_labels=3, **BERT),
        lambda: {k: v for k, v in classes().items() if k != "attention_mask"},
        attention=EAGER,
    ),
    "bert, multiple choice": Case(
        _named("BertForMultipleChoice", "BertConfig", **BERT), alternatives, attention=("sdpa",)
    ),
    "bert, next sentence": Case(
        _named("BertForNextSentencePrediction", "BertConfig", **BERT),
        lambda: text() | {"labels": torch.arange(5) % 2},
        attention=("sdpa",),
    ),
    "layoutlm": Case(
        _named(
            "LayoutLMForTokenClassification",
            "LayoutLMConfig",
            num_labels=3,
            max_2d_position_embeddings=16,
            **BERT,
        ),
        pages,
        scale=labelled,
        attention=EAGER,
    ),
    "marian": Case(  # an encoder and a decoder, by another name
        _named("MarianMTModel", "MarianConfig", **(PAIR | {"decoder_vocab_size": WORDS})),
        translated,
        scale=labelled,
        attention=("sdpa",),
    ),
    "resnet": Case(
        _named(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=4,
            hidden_sizes=[4, 8],
            depths=[1, 1],
            layer_type="basic",
            num_labels=3,
        ),
        pictures,
        attention=EAGER,
    ),
    "wav2vec2, frames": Case(
        _named("Wav2Vec2ForAudioFrameClassification", "Wav2Vec2Config", num_labels=3, **WAVES),
        frames,
        scale=lambda b: 19.0,
        attention=("sdpa",),
    ),
    "patchtst, classes": Case(
        _named(
            "PatchTSTForClassification",
            "PatchTSTConfig",
            num_targets=3,
            use_cls_token=True,
            **PATCHES,
        ),
        series,
        attention=("sdpa",),
    ),
    "patchtst, forecast": Case(
        _named(
            "PatchTSTForPrediction", "PatchTSTConfig", prediction_length=3, loss="mse", **PATCHES
        ),
        forecast,
        "regression",
        scale=lambda b: 3.0,  # half of six squares, of which the loss is the mean
        attention=("sdpa",),
    ),
}


def segmenter(beside: float) -> Case:
    """A second head's loss beside that of the outputs, ``beside`` times."""
    make = _named(
        "BeitForSemanticSegmentation",
        "BeitConfig",
        num_labels=2,
        out_indices=[1, 2, 3, 4],
        pool_scales=[1],
        auxiliary_channels=2,
        auxiliary_loss_weight=beside,
        **(SEEN | {"num_hidden_layers": 4}),
    )
    return Case(make, masks, scale=lambda b: float((b["labels"] != 255).sum()), attention=("sdpa",))
