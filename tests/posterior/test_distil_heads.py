"""Distilled modules of language models' other heads: tokens, spans, choices, a decoder; texts of several lengths."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.posterior.corruptions import JUDGING, TEACHING_TOKENS, corrupted, teaching
from tests.cases.architectures import BERT, CASES, WORDS, built, numbers
from tests.cases.dense import QUIET

transformers = pytest.importorskip("transformers")

ANY = {"least_correlation": -1.0, "most_auroc_lost": 1.0}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of which nothing is asked here, for those that take seconds."""

    def scores(posterior: nb.NullSpacePosterior, x: Any) -> Tensor:
        size = posterior.functional.outputs(x).flatten(1).square().mean(1) + 1e-3
        return torch.stack([size, 2 * size], 1)

    monkeypatch.setattr("nullbayes.posterior.distilling.scores_of", scores)


def texts(count: int, length: int, seed: int) -> dict[str, Tensor]:
    ids, mask = numbers(count, length, seed=seed, low=2, high=WORDS), torch.ones(count, length)
    mask[::3, length - 2 :] = 0
    return {"input_ids": ids * mask.long(), "attention_mask": mask.long()}


def tagged(length: int, seed: int) -> dict[str, Tensor]:
    batch = texts(20, length, seed)
    labels = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    return batch | {"labels": labels}


def spans(length: int, seed: int) -> dict[str, Tensor]:
    start = torch.arange(20) % 3
    return texts(20, length, seed) | {"start_positions": start, "end_positions": start + 1}


def answered(length: int, seed: int) -> dict[str, Tensor]:
    """The answer is one of two tokens at the place but one; what follows is no part of it."""
    batch = texts(20, length, seed)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, length - 3] = torch.where(torch.arange(20) % 2 == 0, 7, 9)
    return batch | {"labels": labels}


def translated(length: int, seed: int) -> dict[str, Tensor]:
    return texts(20, length, seed) | {"labels": numbers(20, 4, seed=seed, low=2, high=WORDS)}


def bert(head: str, labels: int) -> nn.Module:
    config = transformers.BertConfig(num_labels=labels, **BERT)
    return built(lambda _: getattr(transformers, head)(config)).float()


KINDS: dict[str, Any] = {
    "tags": (lambda: bert("BertForTokenClassification", 3), tagged, "classification"),
    "spans": (lambda: bert("BertForQuestionAnswering", 2), spans, "classification"),
    "choices": (
        lambda: built(CASES["llama, tied"].model).float(),
        answered,
        nb.Choices([7, 9]),
    ),
    "decoder": (lambda: built(CASES["t5"].model).float(), translated, "classification"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_posterior_at_any_length(kind: str) -> None:
    make, batch, likelihood = KINDS[kind]
    data = [batch(length, seed) for seed, length in enumerate((6, 5))]
    preserve = "outputs" if kind == "choices" else "loss"
    posterior = nb.NullSpacePosterior(make(), likelihood, preserve).fit(
        data, 3, max_examples=4, audit=1, **QUIET
    )
    module = posterior.distil(data, **ANY)
    new = texts(3, 4, 9)
    if kind == "decoder":
        new["decoder_input_ids"] = numbers(3, 4, seed=9, high=WORDS)
    outputs, novelty, variance = module(**new)
    assert_close(outputs, posterior.predict(new).point)
    assert novelty.shape == variance.shape == (3,)
    assert bool((novelty > 0).all())
    other = new | {"input_ids": torch.where(new["attention_mask"] == 1, new["input_ids"], 3)}
    if kind in ("tags", "choices"):  # what stands where the mask is zero does not count
        assert_close(module(**other)[1], novelty, rtol=1e-3, atol=1e-6)


def test_choices_become_a_graph() -> None:
    make, batch, likelihood = KINDS["choices"]
    data = [batch(6, seed) for seed in range(2)]
    posterior = nb.NullSpacePosterior(make(), likelihood, "outputs").fit(
        data, 3, max_examples=4, audit=1, **QUIET
    )
    module = posterior.distil(data, **ANY)
    new = texts(3, 6, 9)
    graph = torch.export.export(module, (), dict(new)).module()
    assert_close(graph(**new)[1], module(**new)[1])
    shorter = {k: v * (torch.arange(6) < 3) for k, v in new.items()}
    assert_close(graph(**shorter)[0], posterior.predict(shorter).point)


def test_the_first_use_of_a_file_in_half_precision(tmp_path: Path) -> None:
    model = bert("BertForSequenceClassification", 2).bfloat16()
    data = [texts(20, 6, seed) | {"labels": torch.arange(20) % 2} for seed in range(2)]
    posterior = nb.NullSpacePosterior(model).fit(data, 3, max_examples=4, audit=1, **QUIET)
    posterior.save(tmp_path / "posterior.safetensors")
    module = nb.load(tmp_path / "posterior.safetensors", model).distil(data, **ANY)
    new = texts(3, 6, 9)
    assert_close(module(**new)[0], posterior.predict(new).point)


def test_masks_and_places_are_not_shifted() -> None:
    batch = texts(20, 6, 0)
    batch |= {
        "where": torch.arange(20) % 6,
        "position_ids": torch.arange(6).expand(20, 6).clone(),
        "attention_mask": batch["attention_mask"].float(),
    }
    assert teaching(batch) == TEACHING_TOKENS
    for kind in (*TEACHING_TOKENS, *JUDGING):
        shifted = corrupted(batch, kind, torch.Generator().manual_seed(0))
        for name, tensor in batch.items():
            assert bool((shifted[name] == tensor).all()) == (name != "input_ids")
    alone = corrupted({"which": batch["where"]}, "inverted", torch.Generator().manual_seed(0))
    assert not torch.equal(alone["which"], batch["where"])  # there is nothing else
