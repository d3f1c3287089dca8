"""Tiny networks of the transformers library, one for each architecture and kind of head, with labels for its own loss.

The judge of rows is that loss: its gradient for one example alone, by plain automatic differentiation.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

WORDS = 11
BERT = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
}
LLAMA = BERT | {
    "num_key_value_heads": 1,  # grouped queries
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GPT2 = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 8,
    "vocab_size": WORDS,
    "n_positions": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def numbers(*shape: int, seed: int = 0, low: int = 0, high: int = 2) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def text() -> dict[str, Tensor]:
    """Five texts of up to six tokens, two of them padded."""
    ids, mask = numbers(5, 6, low=2, high=WORDS), torch.ones(5, 6, dtype=torch.int64)
    mask[1, 4:], mask[3, 5:] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def next_tokens() -> dict[str, Tensor]:
    batch = text()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[2, :3] = -100  # a prompt
    return batch | {"labels": labels}


def tags(classes: int = 3) -> dict[str, Tensor]:
    batch = text()
    labels = numbers(5, 6, seed=3, high=classes).masked_fill(batch["attention_mask"] == 0, -100)
    return batch | {"labels": labels}


def classes(count: int = 3) -> dict[str, Tensor]:
    return text() | {"labels": torch.arange(5) % count}


def answers() -> dict[str, Tensor]:
    start = torch.tensor([0, 1, 2, 6, 3])  # one beyond the text, which the loss ignores
    return text() | {"start_positions": start, "end_positions": torch.tensor([2, 3, 4, 5, 4])}


def translated() -> dict[str, Tensor]:
    labels = numbers(5, 4, seed=3, low=2, high=WORDS)
    labels[1, 2:] = -100
    return text() | {"labels": labels}


def spoken() -> dict[str, Tensor]:
    return {"input_features": normal(4, 4, 12), "labels": translated()["labels"][:4]}


def images(labels: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": normal(len(labels), 3, 16, 16), "labels": labels}


def masks() -> dict[str, Tensor]:
    labels = numbers(3, 16, 16, seed=3)
    labels[0, :4] = 255  # background, which a segmenter's loss ignores
    return images(labels)


@dataclass(frozen=True)
class Case:
    """A network, a batch as the library's collators make it, and what its loss is.

    Attributes:
        scale: ``scale(labels)`` times the network's own loss of an example is the sum that a likelihood has.
    """

    model: Callable[..., nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    likelihood: str = "classification"
    scale: Callable[[dict[str, Tensor]], float] = lambda batch: 1.0
    attention: tuple[str, ...] = ("eager", "sdpa")


def labelled(batch: dict[str, Tensor]) -> float:
    """How many labels count: the loss is their mean."""
    return float((batch["labels"] != -100).sum())


def after_first(batch: dict[str, Tensor]) -> float:
    """The first label of a text has no position before it."""
    return float((batch["labels"][:, 1:] != -100).sum())


def _named(name: str, config: str, **settings: Any) -> Callable[..., nn.Module]:
    def make(attention: str = "eager") -> nn.Module:
        options = settings | {"attn_implementation": attention}
        return getattr(transformers, name)(getattr(transformers, config)(**options))

    return make


CASES: dict[str, Case] = {
    "bert, classes": Case(
        _named("BertForSequenceClassification", "BertConfig", num_labels=3, **BERT), classes
    ),
    "bert, tags": Case(
        _named("BertForTokenClassification", "BertConfig", num_labels=3, **BERT),
        tags,
        scale=labelled,
    ),
    "bert, answers": Case(
        _named("BertForQuestionAnswering", "BertConfig", **BERT),
        answers,
        scale=lambda b: 2.0,
    ),
    "bert, masked words": Case(
        _named("BertForMaskedLM", "BertConfig", **BERT), lambda: tags(WORDS), scale=labelled
    ),
    "distilbert, regression": Case(
        _named(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=WORDS,
            dim=8,
            n_layers=1,
            n_heads=2,
            hidden_dim=8,
            max_position_embeddings=8,
            num_labels=1,
        ),
        lambda: text() | {"labels": normal(5)},
        likelihood="regression",
        scale=lambda b: 0.5,
    ),
    "deberta-v2, several labels": Case(
        _named(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            num_labels=3,
            problem_type="multi_label_classification",
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=4,
            **BERT,
        ),
        lambda: text() | {"labels": numbers(5, 3).double()},
        likelihood="binary",
        scale=lambda b: 3.0,
        attention=("eager",),
    ),
    "gpt2, next tokens": Case(
        _named("GPT2LMHeadModel", "GPT2Config", **GPT2), next_tokens, scale=after_first
    ),
    "gpt2, classes": Case(
        _named("GPT2ForSequenceClassification", "GPT2Config", num_labels=3, **GPT2), classes
    ),
    "llama, tied": Case(
        _named("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True, **LLAMA),
        next_tokens,
        scale=after_first,
    ),
    "qwen2": Case(
        _named("Qwen2ForCausalLM", "Qwen2Config", **LLAMA), next_tokens, scale=after_first
    ),
    "qwen3": Case(
        _named("Qwen3ForCausalLM", "Qwen3Config", head_dim=4, **LLAMA),
        next_tokens,
        scale=after_first,
        attention=("sdpa",),
    ),
    "mistral, classes": Case(
        _named("MistralForSequenceClassification", "MistralConfig", num_labels=3, **LLAMA), classes
    ),
    "mixtral": Case(
        _named(
            "MixtralForCausalLM",
            "MixtralConfig",
            num_local_experts=3,
            num_experts_per_tok=2,
            experts_implementation="eager",  # the grouped products exist in float32 alone
            **LLAMA,
        ),
        next_tokens,
        scale=after_first,
        attention=("eager",),
    ),
    "t5": Case(
        _named(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=WORDS,
            d_model=8,
            d_kv=4,
            d_ff=8,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        translated,
        scale=labelled,
        attention=("eager",),
    ),
    "whisper": Case(
        _named(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=WORDS,
            num_mel_bins=4,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            d_model=8,
            max_source_positions=6,
            max_target_positions=6,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            decoder_start_token_id=1,
        ),
        spoken,
        scale=labelled,
    ),
    "vit": Case(
        _named(
            "ViTForImageClassification",
            "ViTConfig",
            image_size=16,
            patch_size=8,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            num_labels=3,
        ),
        lambda: images(torch.arange(3)),
    ),
    "swin": Case(
        _named(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=16,
            patch_size=4,
            embed_dim=4,
            depths=[2, 1],
            num_heads=[2, 2],
            window_size=2,
            num_labels=3,
        ),
        lambda: images(torch.arange(3)),
    ),
    "convnextv2": Case(
        _named(
            "ConvNextV2ForImageClassification",
            "ConvNextV2Config",
            image_size=16,
            patch_size=4,
            hidden_sizes=[4, 4],
            depths=[1, 1],
            num_stages=2,
            num_labels=3,
        ),
        lambda: images(torch.arange(3)),
        attention=("eager",),
    ),
    "segformer": Case(
        _named(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[4, 8],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[1, 1],
            decoder_hidden_size=4,
            num_labels=2,
        ),
        masks,
        scale=lambda b: float((b["labels"] != 255).sum()),
        attention=("eager",),
    ),
}


def built(make: Callable[..., nn.Module], attention: str = "eager") -> nn.Module:
    """In float64, with weights large enough for attention to attend; biases and scales are not their usual 0 and 1."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        with contextlib.redirect_stderr(None):
            model = make(attention).double().eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 1 or not bool(p.any()):
                    p.add_(0.1 * torch.randn_like(p))
                else:
                    p.mul_(5)
    return model


def alone(batch: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    return {k: v[n : n + 1] for k, v in batch.items()}


def own_loss_rows(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Gradient ``(N, 1, P)`` of each example's own loss, alone, times how many labels it is the mean of."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for n in range(len(next(iter(batch.values())))):
        one = alone(batch, n)
        loss = model(**one).loss * case.scale(one)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = [
            torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)
        ]
        found.append(torch.cat([g.reshape(-1) for g in flat]))
    return torch.stack(found).unsqueeze(1)
