"""Language models of the transformers library, where that is installed: batches of one, and batches after them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nullbayes as nb
from tests.cases.dense import assert_rows, rows

transformers = pytest.importorskip("transformers")


def gpt2() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            n_layer=1,
            n_head=2,
            n_embd=4,
            vocab_size=8,
            n_positions=6,
            num_labels=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
        model: nn.Module = transformers.GPT2ForSequenceClassification(config).double().eval()
    return model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("sizes", [(6,), (1, 5), (1, 1, 4)], ids=str)
def test_gpt2_from_batches_of_one(sizes: tuple[int, ...]) -> None:
    model = gpt2()
    ids = torch.randint(2, 8, (6, 5), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 2
    loader: list[Any] = [
        {"input_ids": some, "labels": y}
        for some, y in zip(ids.split(sizes), labels.split(sizes), strict=True)
    ]
    posterior = nb.NullSpacePosterior(
        model, preserve="outputs", delta=0.0, prior_precision=1.0
    ).fit(loader, 3, progress=False)
    dense = rows(model, ids.split(1), lambda m, x: m(input_ids=x).logits)
    assert_rows(posterior, dense)
    samples = posterior._samples()
    for count in (6, 1, 3):
        found = posterior.predict({"input_ids": ids[:count]})
        change = torch.einsum("nop,sp->sno", dense[:count], samples)
        torch.testing.assert_close(found.outputs, found.point + change, rtol=1e-8, atol=1e-9)
