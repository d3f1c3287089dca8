"""Two small transformers and their tokens: words for a classifier from Hugging Face, letters for a language model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LETTERS = "\n" + "".join(map(chr, range(32, 127)))  # token 0 is padding and the start of a text
IGNORED = -100
BATCH = 25
Batch = dict[str, Tensor]


def batches(data: Batch, limit: int | None = None) -> list[Batch]:
    """Mappings of ``BATCH`` examples, as a Hugging Face collator makes them."""
    count = len(data["labels"][:limit])
    return [
        {name: values[start : min(start + BATCH, count)] for name, values in data.items()}
        for start in range(0, count, BATCH)
    ]


# -- words and a classifier ----------------------------------------------------------------------


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def vocabulary(texts: Iterable[str], size: int) -> dict[str, int]:
    """The most common words with their tokens: 0 is padding, 1 any other word."""
    counted = Counter(word for text in texts for word in words(text))
    return {word: 2 + i for i, (word, _) in enumerate(counted.most_common(size - 2))}


def encoded_words(
    texts: Sequence[str], labels: Sequence[int], index: dict[str, int], length: int
) -> Batch:
    """``input_ids``, ``attention_mask``, ``position_ids`` (N, T) and ``labels`` (N,), as Hugging Face calls them."""
    ids = torch.zeros(len(texts), length, dtype=torch.int64)
    for n, text in enumerate(texts):
        tokens = [index.get(word, 1) for word in words(text)[:length]]
        ids[n, : len(tokens)] = torch.tensor(tokens)
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        # Given, so that the table of positions is looked up once an example and has a rule.
        "position_ids": torch.arange(length).expand(len(texts), length),
        "labels": torch.tensor(labels),
    }


def classifier(words: int, length: int, width: int, layers: int, classes: int) -> nn.Module:
    """DistilBERT from its configuration, with the weights that seed 0 gives it."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    settings: dict[str, Any] = {
        "vocab_size": words,
        "max_position_embeddings": length,
        "dim": width,
        "n_layers": layers,
        "n_heads": 4,
        "hidden_dim": 2 * width,
        "num_labels": classes,
        "pad_token_id": 0,
        "attn_implementation": "eager",  # the fused kernels have no forward-mode derivative
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DistilBertForSequenceClassification(DistilBertConfig(**settings))


# -- letters and a language model ----------------------------------------------------------------


class Block(nn.Module):
    """Causal attention and a dense layer; attention's packed projection has no rule and takes the generic path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.dense = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        ahead = x.new_full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        seen = self.before(x)
        x = x + self.attention(seen, seen, seen, attn_mask=ahead, need_weights=True)[0]
        return x + self.dense(self.after(x))


class LanguageModel(nn.Module):
    """Logits ``(B, T, V)`` of the next letter; zero, whatever the weights, where a text is over."""

    def __init__(self, letters: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(letters, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, letters)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        place = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        x = self.letter(input_ids) + self.place(place)
        return self.head(self.last(self.blocks(x))) * attention_mask.unsqueeze(-1)


def encoded_letters(texts: Sequence[str], length: int) -> Batch:
    """``input_ids`` and ``attention_mask`` (N, T), and the next letters as ``labels``, -100 after the end."""
    index = {letter: 1 + i for i, letter in enumerate(LETTERS)}
    ids = torch.zeros(len(texts), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for n, text in enumerate(texts):
        tokens = torch.tensor([index.get(letter, index["?"]) for letter in text[:length]])
        labels[n, : len(tokens)] = tokens
        ids[n, 1 : len(tokens)] = tokens[:-1]
    return {"input_ids": ids, "attention_mask": (labels != IGNORED).long(), "labels": labels}
