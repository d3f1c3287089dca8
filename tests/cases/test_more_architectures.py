"""Further networks of the transformers library: rows, audit, and the layer null space, in float64."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest
import torch

import nullbayes as nb
from tests.cases.architectures import alone, built, own_loss_rows
from tests.cases.dense import QUIET, assert_rows
from tests.cases.more_architectures import MORE
from tests.cases.test_architectures import standing, two_batches

#: Parameters that the network has for something else than its head.
IDLE = {
    "xlnet": "mask_emb",
    "dinov2": "mask_token",
    "clip": "post_layernorm",
    "wav2vec2": "masked_spec_embed",
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("error::nullbayes.NullBayesWarning")
@pytest.mark.filterwarnings("ignore:lazy_load")
@pytest.mark.parametrize("name", MORE)
def test_loss_rows_are_gradients_of_the_own_loss(name: str) -> None:
    case = MORE[name]
    model, batch = built(case.model, case.attention[0]), case.batch()
    posterior = nb.NullSpacePosterior(
        model, case.likelihood, "loss", delta=0.0, prior_precision=1.0
    ).fit(two_batches(batch), 3, **QUIET)
    # Some of these networks compute norms in float32, whatever they are in.
    assert_rows(posterior, standing(posterior, own_loss_rows(case, model, batch)), 1e-5)
    assert posterior.certificate.audit is not None
    assert posterior.certificate.audit.passed
    idle = IDLE.get(name)
    assert any(idle is not None and idle in n for n in posterior.space.idle) == (idle is not None)


@pytest.mark.parametrize("name", MORE)
def test_layer_samples_leave_the_outputs_of_an_example(name: str) -> None:
    """One example: a layer of eight inputs has a null space only under few of them."""
    case = MORE[name]
    model, batch = built(case.model, case.attention[0]), alone(case.batch(), 0)
    posterior = nb.LayerNullSpacePosterior(model, case.likelihood, delta=0.0, prior_precision=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior.fit([batch], 2, **QUIET)
    prediction = posterior.predict(batch)
    change = (prediction.outputs - prediction.point).abs().max()
    # A direction whose inputs are 1e-7 of the largest is told from none by sums of squares no more.
    assert float(change) <= 1e-6 * float(prediction.point.abs().max())
    moved = [
        n for n, w in next(iter(posterior.sample())).items()
        if n in posterior.space.by_name and not torch.equal(w, model.get_parameter(n))
    ]  # fmt: skip
    assert moved
