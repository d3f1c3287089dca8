"""Further networks of the transformers library: rows, audit, and the layer null space, in float64."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch.testing import assert_close

import nullbayes as nb
from tests.cases.architectures import alone, built, normal, own_loss_rows
from tests.cases.dense import QUIET, assert_rows
from tests.cases.more_architectures import EAGER, MORE, WAVES, _named, _next, segmenter
from tests.cases.test_architectures import likelihood_of, standing, two_batches

#: Parameters that the network has for something else than its head.
IDLE = {
    "xlnet": "mask_emb",
    "dinov2": "mask_token",
    "clip": "post_layernorm",
    "wav2vec2": "masked_spec_embed",
    "wav2vec2, frames": "masked_spec_embed",
    "layoutlm": "pooler",
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
        model, likelihood_of(case.likelihood), "loss", delta=0.0, prior_precision=1.0
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
    posterior = nb.LayerNullSpacePosterior(
        model, likelihood_of(case.likelihood), delta=0.0, prior_precision=1.0
    )
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


@pytest.mark.filterwarnings("error::nullbayes.NullBayesWarning")
def test_a_second_heads_loss_is_no_part_of_the_rows() -> None:
    case = segmenter(0.4)
    model, batch = built(case.model, "sdpa"), case.batch()
    posterior = nb.NullSpacePosterior(model, preserve="loss", delta=0.0, prior_precision=1.0)
    posterior.fit([batch], 3, **QUIET)
    one_head = built(segmenter(0.0).model, "sdpa")
    dense = standing(posterior, own_loss_rows(case, one_head, batch)).flatten(0, 1)
    operator = posterior._fit.state.operator
    few = normal(2, dense.shape[1])
    wanted = few @ dense.T @ dense  # of 8,000 weights, all directions would take a gigabyte
    assert_close(operator.rmatvec(operator.matvec(few)), wanted, rtol=1e-5, atol=1e-5)
    assert any("auxiliary_head" in name for name in posterior.space.idle)
    assert model.config.auxiliary_loss_weight == 0.4


def test_labels_that_belong_to_no_position_are_said_to_be_those_of_alignments() -> None:
    make = _named("Wav2Vec2ForCTC", "Wav2Vec2Config", vocab_size=5, pad_token_id=0, **WAVES)
    model, batch = built(make, "sdpa"), MORE["wav2vec2"].batch()
    batch["labels"] = torch.tensor([[1, 2], [3, 1], [2, -100]])
    with pytest.raises(nb.InputError, match=r"Wav2Vec2ForCTC .*alignments \(CTC\).*`loss=`"):
        nb.NullSpacePosterior(model).fit([batch], 2, **QUIET)

    def loss(out: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        chances, kept = out["logits"].log_softmax(-1).transpose(0, 1), labels >= 0
        frames = torch.full((len(labels),), len(chances))
        arguments = (labels.clamp(min=0), frames, kept.sum(1))
        return torch.nn.functional.ctc_loss(chances, *arguments, reduction="none")

    posterior = nb.NullSpacePosterior(
        model, loss=loss, preserve="loss", delta=0.0, prior_precision=1.0
    )
    posterior.fit([batch], 2, **QUIET)
    dense = own_loss_rows(MORE["wav2vec2"], model, batch)
    assert_rows(posterior, standing(posterior, dense), 1e-5)


def test_a_list_of_mappings_is_said_to_want_padding() -> None:
    model, batch = built(MORE["deit"].model, "sdpa"), MORE["deit"].batch()
    batch["labels"] = [{"boxes": torch.rand(2, 4)} for _ in range(3)]
    match = r"list of 3 mappings with keys \['boxes'\].*Pad them .*`loss=`"
    for options in ({}, {"loss": lambda out, _: out["logits"].sum(1), "preserve": "loss"}):
        with pytest.raises(nb.InputError, match=match):
            nb.NullSpacePosterior(model, **options).fit([batch], 2, **QUIET)


def test_a_network_without_gradients_has_a_layer_null_space() -> None:
    """RWKV writes its state in place, so automatic differentiation fails: the layer null space needs none."""
    sizes = {"context_length": 8, "attention_hidden_size": 8, "num_hidden_layers": 2}
    case = _next("Rwkv", attention=EAGER, **sizes)
    model = built(case.model)
    batch = {k: v for k, v in case.batch().items() if k != "attention_mask"}
    with pytest.raises(nb.ModelError, match=r"derivatives .* could not be computed"):
        nb.NullSpacePosterior(model).fit([batch], 2, **QUIET)
    posterior = nb.LayerNullSpacePosterior(model).fit([batch], 2, **QUIET)
    assert posterior.certificate.left_out_divergence is None
    assert posterior.novelty(batch).isfinite().all()


def test_float32_on_the_way_through_a_float64_network_is_rounding() -> None:
    """OLMo's norms are computed in float32, so weights that move in the null space move outputs by its rounding."""
    case = _next("Olmo")
    posterior = nb.LayerNullSpacePosterior(built(case.model, "sdpa"))
    posterior.fit(two_batches(case.batch()), 2, **QUIET)
    assert not any("rule names" in reason for reason in posterior.certificate.fixed.values())
