"""`nb.Choices`, and free text by sequence and by token, against dense float64 rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import nullbayes as nb
from tests.cases.architectures import (
    BERT,
    CASES,
    GPT2,
    alone,
    built,
    next_tokens,
    numbers,
    own_loss_rows,
    text,
)
from tests.cases.dense import QUIET, assert_rows, rows

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

TOKENS = (4, 7, 9)
EXACT: dict[str, Any] = {"delta": 0.0, "prior_precision": 1.0}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def gpt2(words: int = 11) -> nn.Module:
    config = transformers.GPT2Config(**(GPT2 | {"vocab_size": words, "n_embd": 4}))
    return built(lambda _: transformers.GPT2LMHeadModel(config))


def last(mask: Tensor) -> Tensor:
    """The last position with a 1, written another way than the library does."""
    return torch.tensor([max(i for i, m in enumerate(row) if m) for row in mask.tolist()])


def picked(model: nn.Module, batch: dict[str, Tensor], at: Tensor) -> Tensor:
    logits = model(**batch).logits
    return torch.stack([row[int(p)][list(TOKENS)] for row, p in zip(logits, at, strict=True)])


def fisher(model: nn.Module, batch: dict[str, Tensor], at: Tensor) -> Tensor:
    """``Σ_n J_nᵀ (diag p - p pᵀ) J_n`` by autograd, one example alone."""
    total = torch.zeros(())
    for n in range(len(at)):
        jacobian = rows(model, [alone(batch, n)], lambda m, x, n=n: picked(m, x, at[n : n + 1]))[0]
        p = picked(model, alone(batch, n), at[n : n + 1]).detach()[0].softmax(0)
        total = total + jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
    return total


def gauss_newton(posterior: nb.NullSpacePosterior) -> Tensor:
    operator = posterior._fit.state.operator
    unit = torch.eye(operator.shape[1], dtype=operator.dtype)
    return operator.rmatvec(operator.matvec(unit))


PLACES = torch.tensor([0, 2, 1, 1, 0])


@pytest.mark.parametrize("words", [11, 300])
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_of_choices(words: int, side: str) -> None:
    model, batch = gpt2(words), text()
    if side == "left":
        batch = {k: v.flip(1) for k, v in batch.items()}
    posterior = nb.NullSpacePosterior(model, nb.Choices(TOKENS), **EXACT)
    posterior.fit([batch | {"labels": PLACES}], 3, **QUIET)
    at = last(batch["attention_mask"])
    assert posterior.certificate.constraints == 5 * 2  # whatever the vocabulary
    wanted = fisher(model, batch, at)
    assert_close(gauss_newton(posterior), wanted, rtol=1e-8, atol=1e-9 * float(wanted.abs().max()))
    prediction = posterior.predict(batch)
    assert_close(prediction.point, picked(model, batch, at).detach())
    hits = picked(model, batch, at).argmax(1) == PLACES
    assert posterior.certificate.network_score == float(hits.double().mean())
    assert posterior.certificate.audit.passed


def answered(shift: int) -> tuple[dict[str, Tensor], Tensor]:
    """Texts whose answers stand in the middle, with labels for them alone; and where the answers are read."""
    batch, at = text(), torch.tensor([3, 2, 4, 3, 1])
    labels = torch.full_like(batch["input_ids"], -100)
    for n, p in enumerate(at):
        labels[n, p] = TOKENS[int(PLACES[n])]
    if shift:
        batch["input_ids"] = torch.where(labels == -100, batch["input_ids"], labels)
    return batch | {"labels": labels}, at - shift


@pytest.mark.parametrize("shift", [1, 0], ids=["causal", "masked"])
def test_labels_of_tokens_say_where_the_answer_is(shift: int) -> None:
    masked = built(lambda _: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)))
    model = gpt2() if shift else masked
    batch, at = answered(shift)
    posterior = nb.NullSpacePosterior(model, nb.Choices(TOKENS), **EXACT)
    posterior.fit([batch], 3, **QUIET)
    told = [posterior.predict(x).point for x in (batch, iter([batch]))]
    labels = batch.pop("labels")
    for point in told:  # as `evaluate` and `calibrate` read them
        assert_close(point, picked(model, batch, at).detach())
    other = posterior.predict(batch | {"labels": labels.clamp(max=3)}).point  # none of the choices
    assert_close(other, posterior.predict(batch).point)
    wanted = fisher(model, batch, at)
    assert_close(gauss_newton(posterior), wanted, rtol=1e-8, atol=1e-9 * float(wanted.abs().max()))
    # The same by a position of each example under a name of the user's own.
    named = nb.NullSpacePosterior(model, nb.Choices(TOKENS, position="where"), **EXACT)
    named.fit([batch | {"where": at, "labels": PLACES}], 3, **QUIET)
    assert_close(gauss_newton(named), wanted, rtol=1e-8, atol=1e-9 * float(wanted.abs().max()))
    found = named.predict(batch | {"where": at}).point
    assert_close(found, picked(model, batch, at).detach())


def test_choices_of_an_encoder_and_decoder() -> None:
    model, batch = built(CASES["t5"].model), text()
    labels = torch.tensor([[4, 1], [9, 1], [7, 1], [7, 1], [4, 1]])  # the answer, and an end
    posterior = nb.NullSpacePosterior(model, nb.Choices(TOKENS), **EXACT)
    posterior.fit([batch | {"labels": labels}], 3, **QUIET)
    start = torch.zeros(5, 1, dtype=torch.int64)
    found = posterior.predict(batch | {"decoder_input_ids": start}).point
    with torch.no_grad():
        wanted = model(**batch, decoder_input_ids=start).logits[:, 0, list(TOKENS)]
    assert_close(found, wanted)
    assert posterior.certificate.constraints == 10


def test_numbers_of_numpy_are_tokens() -> None:
    assert nb.Choices(numpy.array([7, 9])).token_ids == (7, 9)
    assert nb.Choices([numpy.int64(7), 9]).token_ids == (7, 9)


def test_choices_saved_calibrated_and_scored(tmp_path: Path) -> None:
    model, batch = gpt2(), text()
    data = [batch | {"labels": PLACES}]
    posterior = nb.NullSpacePosterior(model, nb.Choices(TOKENS, position=-1)).fit(data, 4, **QUIET)
    posterior.calibrate(data, **QUIET)
    posterior.save(tmp_path / "choices.safetensors")
    again = nb.load(tmp_path / "choices.safetensors", model)
    assert again.likelihood.token_ids == TOKENS
    for method in ("linearised", "sampled"):
        one, two = (p.predict(batch, method=method) for p in (posterior, again))
        assert_close(one.mean, two.mean)
        assert_close(one.mean.sum(1), torch.ones(5, dtype=torch.float64))
    assert_close(posterior.novelty(batch, exact=False), again.novelty(batch))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nb.Choices([3]), "two or more"),
        (lambda: nb.Choices([3, 3]), "different token numbers"),
        (lambda: nb.Choices([3, -1]), "0 or more"),
        (lambda: nb.Choices(TOKENS, position=1.5), "'last', a whole number"),
    ],
)
def test_arguments(make: Any, message: str) -> None:
    with pytest.raises(nb.InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("labels", "likelihood", "message"),
    [
        (torch.full((5,), 7), nb.Choices(TOKENS), "expected the places of the answers"),
        (torch.full((5, 6), -100), nb.Choices(TOKENS), "no label that is not -100"),
        (torch.full((5, 6), 3), nb.Choices(TOKENS), "which is none of `token_ids`"),
        (torch.full((5, 6), 4), nb.Choices(TOKENS), "stands first"),
        (PLACES, nb.Choices((4, 500)), "not in the vocabulary of 11"),
        (PLACES, nb.Choices(TOKENS, position=8), "positions from 8 to 8 of outputs with 6"),
        (PLACES, nb.Choices(TOKENS, position="where"), "none of that name"),
    ],
)
def test_data_that_do_not_fit(labels: Tensor, likelihood: Any, message: str) -> None:
    posterior = nb.NullSpacePosterior(gpt2(), likelihood)
    with pytest.raises(nb.InputError, match=message):
        posterior.fit([text() | {"labels": labels}], 2, **QUIET)


# -- free text -------------------------------------------------------------------------------------


def token_rows(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Gradients ``(tokens, P)`` of the loss of each label, by autograd, one text alone."""
    found = []
    for n in range(5):
        one = alone(batch, n)
        labels = one.pop("labels")[0, 1:]

        def losses(model: nn.Module, x: Any, labels: Tensor = labels) -> Tensor:
            return F.cross_entropy(model(**x).logits[0, :-1], labels, reduction="none")

        found.append(rows(model, [one], losses)[0][labels != -100])
    return torch.cat(found)


def test_token_rows_and_sequence_rows() -> None:
    model, batch = gpt2(), next_tokens()
    dense = token_rows(model, batch)
    assert len(dense) == int((batch["labels"][:, 1:] != -100).sum())
    tokens = nb.NullSpacePosterior(model, preserve="token-loss", **EXACT).fit([batch], 3, **QUIET)
    assert_rows(tokens, dense.unsqueeze(1))
    assert tokens.certificate.audit.passed
    sequence = nb.NullSpacePosterior(model, preserve="loss", **EXACT).fit([batch], 3, **QUIET)
    assert_rows(sequence, own_loss_rows(CASES["gpt2, next tokens"], model, batch), 1e-5)
    # What each keeps, to first order: the loss of every token, or the sum of each text alone.
    moved = {
        name: (dense @ posterior._samples().T).square().mean().sqrt()
        for name, posterior in (("tokens", tokens), ("sequence", sequence))
    }
    assert float(moved["tokens"]) < 1e-6 < 0.01 < float(moved["sequence"])
    assert tokens.certificate.drift < 1e-6
    own = own_loss_rows(CASES["gpt2, next tokens"], model, batch)[:, 0]
    for posterior in (tokens, sequence):
        assert float((own @ posterior._samples().T).abs().max()) < 1e-4


def test_token_rows_of_other_classifiers_and_of_none() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2))).double()
    x, y = numbers(6, 3).double() + 0.5, numbers(6, 2)
    posterior = nb.NullSpacePosterior(model, preserve="token-loss", **EXACT).fit(
        [(x, y)], 2, **QUIET
    )
    assert posterior.certificate.constraints == 12
    with pytest.raises(nb.InputError, match="one loss an example, and none for each position"):
        nb.NullSpacePosterior(model, "binary", preserve="token-loss").fit(
            [(x, numbers(6, 2, 2))], 2, **QUIET
        )
