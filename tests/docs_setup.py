"""What a page of the documentation starts from: "a trained model and a loader", as hidden setups.

A page names one in a comment that readers do not see, ``<!-- setup: classifier -->``, and its blocks find the names
that the function of that name returns. Models are tiny and trained once; a page that changes one changes its own copy.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nullbayes import datasets

Names = dict[str, Any]


def trained(
    model: nn.Module, split: datasets.Split, loss: Callable[[Tensor, Tensor], Tensor], steps: int
) -> nn.Module:
    """Full-batch Adam: as few kernel calls as possible."""
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model(split.inputs), split.targets).backward()
        optimiser.step()
    return model.eval()


def seeded(*layers: Callable[[], nn.Module]) -> nn.Module:
    """A network whose weights do not depend on what ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(layer() for layer in layers))


@functools.cache
def _digits() -> tuple[nn.Module, datasets.Dataset]:
    data = datasets.digits(train=60, validation=60, held_out=(0, 4))
    model = seeded(
        nn.Flatten,
        functools.partial(nn.Linear, 64, 24),
        nn.Tanh,
        functools.partial(nn.Linear, 24, 8),
    )
    return trained(model, data.train, F.cross_entropy, 200), data


def classifier() -> Names:
    """A small network on 60 digits; two classes are held out."""
    model, data = _digits()
    assert data.held_out is not None
    return {
        "model": copy.deepcopy(model),
        "train_loader": data.train.loader(20),
        "val_loader": data.validation.loader(60),
        "x": data.test.inputs[:16],
        "y": data.test.targets[:16],
        "test_inputs": data.test.inputs[:200],
        "test_labels": data.test.targets[:200],
        "other_inputs": data.held_out.inputs[:200],
    }


@functools.cache
def _diabetes() -> tuple[nn.Module, datasets.Dataset]:
    data = datasets.diabetes()
    model = seeded(
        functools.partial(nn.Linear, 10, 64), nn.Tanh, functools.partial(nn.Linear, 64, 1)
    )
    return trained(model, data.train, F.mse_loss, 200), data


def regressor() -> Names:
    """A small network on the diabetes data: ten inputs, one standardised target."""
    model, data = _diabetes()
    return {
        "model": copy.deepcopy(model),
        "train_loader": data.train.loader(64),
        "val_loader": data.validation.loader(64),
        "x": data.test.inputs,
        "y": data.test.targets,
    }


@functools.cache
def _segmenter() -> tuple[nn.Module, datasets.Split]:
    images = datasets.digits(train=32, validation=24).train.inputs
    masks = (images[:, 0] > 0.5).long() + (images[:, 0] > 0.9).long()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    split = datasets.Split((images + 0.15 * noise).clamp(0, 1), masks)
    conv = functools.partial(nn.Conv2d, padding=1)
    model = seeded(functools.partial(conv, 1, 16, 3), nn.Tanh, functools.partial(conv, 16, 3, 3))
    return trained(model, split[:8], F.cross_entropy, 250), split


def segmenter() -> Names:
    """A small network that gives each pixel of eight noisy digits one of three classes: outputs (B, 3, 8, 8)."""
    model, split = _segmenter()
    return {
        "model": copy.deepcopy(model),
        "train_loader": split[:8].loader(4),
        "val_loader": split[8:24].loader(8),
        "x": split.inputs[24:28],
    }


def surrogate() -> Names:
    """A network of twelve values of a function on the unit square, in double precision."""
    pytest.importorskip("botorch")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 2, generator=generator, dtype=torch.float64)
    y = (torch.sin(5 * x[:, :1]) + x[:, 1:].square()) / 0.7
    layers = (functools.partial(nn.Linear, 2, 16), nn.Tanh, functools.partial(nn.Linear, 16, 1))
    model = trained(seeded(*layers).double(), datasets.Split(x, y), F.mse_loss, 200)
    return {"model": model, "x": x, "y": y}


def foreign() -> Names:
    """Networks of other libraries, trained for a moment: skorch, Lightning, Hugging Face, PyTorch Geometric, arrays."""
    for name in ("skorch", "lightning.pytorch", "transformers", "torch_geometric"):
        pytest.importorskip(name)
    # Of the libraries: few workers, few steps, what they use of a newer torch.
    for kind in (UserWarning, DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=kind)
    import docs_foreign

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return docs_foreign.names()


def language() -> Names:
    """A tiny BERT with three classes, from its configuration, and twelve texts; peft is needed, too."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    texts = {
        "input_ids": torch.randint(2, 50, (12, 8)),
        "attention_mask": torch.ones(12, 8, dtype=torch.long),
        "labels": torch.arange(12) % 3,
    }
    return {
        "model": transformers.BertForSequenceClassification(config).eval(),
        "texts": texts,
    }


SETUPS: dict[str, Callable[[], Names]] = {
    function.__name__: function
    for function in (classifier, regressor, segmenter, surrogate, foreign, language)
}
