"""A pretrained sentence encoder (MiniLM, 22.7 million weights), fine-tuned by LoRA to tell the topics of texts.

Texts are docstrings of Python's standard library by what its modules are for, and C++ headers that come with torch.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples import _minilm, _texts

LENGTH = 48
TOPICS = ("internet", "files", "numbers", "development")
OTHER_TOPIC, OTHER_LANGUAGE = "another topic", "C++"


def folder() -> Path:
    """Where the package keeps its model. Exits where it is missing."""
    try:
        return _minilm.folder()
    except ModuleNotFoundError as error:
        raise SystemExit(str(error)) from error


def texts(count: int) -> dict[str, dict[str, Tensor]]:
    """Batches of ``count`` texts at most of each topic (``"labels"`` among them), of another topic, and of C++."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)

    def batch(some: list[str]) -> dict[str, Tensor]:
        found = tokenizer.encode_batch(some)
        ids, mask = (
            torch.tensor([getattr(f, k) for f in found]) for k in ("ids", "attention_mask")
        )
        return {"input_ids": ids, "attention_mask": mask}

    def topic(modules: str) -> list[str]:
        return _texts.in_order(_texts.docstrings(modules), 0)[:count]

    each = [topic(_texts.FAMILIES[name]) for name in TOPICS]
    labels = torch.tensor([k for k, some in enumerate(each) for _ in some])
    code = _texts.cut(_texts.headers(200_000), [200] * count, 0)
    return {
        "topics": {**batch([text for some in each for text in some]), "labels": labels},
        OTHER_TOPIC: batch(topic(_texts.FAMILIES["concurrency"])),
        OTHER_LANGUAGE: batch(code),
    }


def part(batch: dict[str, Tensor], index: Any) -> dict[str, Tensor]:
    """Some examples."""
    return {name: values[index] for name, values in batch.items()}


def pretrained() -> nn.Module:
    """With LoRA adapters on queries and values, and a fresh head for the topics."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    settings, state = _minilm.pretrained()
    config = BertConfig(**settings, num_labels=len(TOPICS), attn_implementation="eager")
    model = BertForSequenceClassification(config)
    missing, _ = model.bert.load_state_dict(state, strict=False)
    if missing:
        raise SystemExit(f"the pretrained weights lack {missing[:4]}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(task_type="SEQ_CLS", **_minilm.LORA)
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def fine_tuned(train: dict[str, Tensor], seed: int, epochs: int) -> nn.Module:
    """In evaluation mode."""
    torch.manual_seed(seed)
    model = pretrained()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, 2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(train["labels"])).split(16):
            optimiser.zero_grad()
            model(**part(train, index)).loss.backward()
            optimiser.step()
    return model.eval()
