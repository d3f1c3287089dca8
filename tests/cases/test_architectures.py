"""Networks of the transformers library against their own losses and dense Jacobians, one example alone, in float64."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from tests.cases.architectures import CASES, alone, built, own_loss_rows
from tests.cases.dense import QUIET, assert_rows, rows

VARIANTS = [(name, kind) for name, case in CASES.items() for kind in case.attention]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def two_batches(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]


def likelihood_of(name: str) -> Any:
    return nb.Regression(noise_variance=1.0) if name == "regression" else name


def standing(posterior: nb.NullSpacePosterior, dense: Tensor) -> Tensor:
    """Dense rows without the coordinates that no sample moves: vectors of padding, tied to an output layer or not."""
    dense = dense.clone()
    dense[..., posterior.space.fixed] = 0
    return dense


def logits(model: nn.Module, x: Any) -> Tensor:
    out = model(**x)
    return (
        torch.stack([out.start_logits, out.end_logits], 1) if "start_logits" in out else out.logits
    )


@pytest.mark.filterwarnings("error::nullbayes.NullBayesWarning")
@pytest.mark.filterwarnings("ignore:lazy_load")
@pytest.mark.parametrize(("name", "attention"), VARIANTS, ids=str)
def test_loss_rows_are_gradients_of_the_own_loss(name: str, attention: str) -> None:
    case = CASES[name]
    model, batch = built(case.model, attention), case.batch()
    posterior = nb.NullSpacePosterior(
        model, likelihood_of(case.likelihood), "loss", delta=0.0, prior_precision=1.0
    ).fit(two_batches(batch), 3, **QUIET)
    # The library computes some of its losses in float32.
    assert_rows(posterior, standing(posterior, own_loss_rows(case, model, batch)), 1e-5)
    assert posterior.certificate.audit is not None
    assert posterior.certificate.audit.passed


OUTPUTS = [n for n in CASES if n not in ("segformer", "bert, classes", "mistral, classes", "qwen2")]
# Their norms are computed in float32, whatever the network is in.
ROUNDED = ("llama, tied", "qwen3", "mixtral", "t5")


def other(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two examples that no posterior was fitted to."""
    ids, pixels = batch.get("input_ids"), batch.get("pixel_values")
    some = {k: v[:2] for k, v in batch.items()}
    if ids is not None:
        some["input_ids"] = ids[:2].flip(0).where(some["attention_mask"] == 1, 0).roll(1, 0)
        some["input_ids"][0] = ids[0].flip(0)
    elif pixels is not None:
        some["pixel_values"] = pixels[:2].flip(1)
    else:
        some["input_features"] = batch["input_features"][:2].flip(2)
    return some


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OUTPUTS)
def test_output_rows_are_the_jacobian(name: str) -> None:
    case = CASES[name]
    model, batch = built(case.model, case.attention[-1]), case.batch()
    posterior = nb.NullSpacePosterior(
        model, likelihood_of(case.likelihood), "outputs", delta=0.0, prior_precision=1.0
    ).fit(two_batches(batch), 2, audit=2, **QUIET)
    as_called = posterior.functional.as_called
    count = len(batch.get("labels", batch.get("start_positions")))
    dense = rows(model, [alone(as_called(batch), n) for n in range(count)], logits)
    assert_rows(posterior, standing(posterior, dense))
    some = other(batch)
    prediction = posterior.predict(some)
    dense = rows(model, [alone(as_called(some), n) for n in range(2)], logits)
    change = torch.einsum("nop,sp->sno", dense, posterior._samples())
    assert float(change.norm()) > 0.01
    wanted, tolerance = prediction.point.flatten(1) + change, 1e-8
    if name in ROUNDED:
        tolerance = 1e-5 * float(wanted.abs().max())
    assert_close(prediction.outputs.flatten(2), wanted, rtol=1e-8, atol=tolerance)
