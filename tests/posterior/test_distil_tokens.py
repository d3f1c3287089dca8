"""A distilled encoder of texts: batches with masks, padding, and a graph for onnxruntime."""

from __future__ import annotations

import io
import warnings
from typing import Any

import onnxruntime
import pytest
import torch
from scipy.stats import spearmanr
from support import unchanged
from torch import Tensor, nn
from torch.testing import assert_close

import nullbayes as nb
from nullbayes.posterior import heads
from nullbayes.posterior.distilling import _tapped
from nullbayes.posterior.novelty import Scorer, information_and_variance
from nullbayes.posterior.predicting import scores_of

transformers = pytest.importorskip("transformers")


def texts(count: int, seed: int) -> dict[str, Tensor]:
    """Each of one of three topics, which are ranges of tokens; padded to twelve."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.arange(count) % 3
    ids = torch.randint(0, 20, (count, 12), generator=generator) + 5 + 20 * topic[:, None]
    lengths = torch.randint(4, 13, (count, 1), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": topic}


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k != "labels"}


@pytest.fixture(scope="module")
def posterior() -> Any:
    config = transformers.BertConfig(
        vocab_size=80, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3,
        intermediate_size=32, max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        batch = texts(120, 0)
        for _ in range(25):
            optimiser.zero_grad()
            model(**batch).loss.backward()
            optimiser.step()
    train = [{k: v[i : i + 20] for k, v in texts(40, 0).items()} for i in (0, 20)]
    return nb.NullSpacePosterior(model.eval()).fit(train, 20, progress=False)


@pytest.fixture(scope="module")
def module(posterior: Any) -> Any:
    many = texts(240, 1)
    loader = [{k: v[i : i + 40] for k, v in many.items()} for i in range(0, 240, 40)]
    with unchanged(posterior.model):
        return posterior.distil(loader)


def test_outputs_and_novelty_of_padded_texts(posterior: Any, module: Any) -> None:
    new = without_labels(texts(80, 2))
    outputs, novelty, _ = module(**new)
    assert_close(outputs, posterior.model(**new).logits.detach())
    assert spearmanr(novelty, posterior.novelty(new)).statistic > 0.6
    assert module.fidelity.faithful
    assert set(module.fidelity.auroc) == {"shuffled", "inverted"}
    # What stands where the mask is zero does not count.
    other = new | {"input_ids": torch.where(new["attention_mask"] == 1, new["input_ids"], 3)}
    assert_close(module(**other)[1], novelty)


def test_it_looks_at_the_mean_of_the_first_tokens_and_at_the_last_vectors(
    posterior: Any, module: Any
) -> None:
    some = without_labels(texts(4, 3))
    first = "bert.encoder.layer.0.attention.self.query"
    assert _tapped(module, some) == ([first, "bert.pooler.dense", "classifier"], True)
    assert isinstance(module.head, heads.KernelHead)
    with torch.no_grad():
        mean, last, *_ = module.features(some)[1]
        hidden = posterior.model.bert.embeddings(some["input_ids"])
        after = posterior.model.bert(**some).last_hidden_state
    lengths = some["attention_mask"].sum(1)
    wanted = torch.stack([h[:n].mean(0) for h, n in zip(hidden, lengths, strict=True)])
    assert_close(mean, wanted)
    assert_close(last, after[:, 0])


def test_both_scores_come_from_the_same_rows(posterior: Any) -> None:
    new = without_labels(texts(10, 4))
    wanted = torch.stack([posterior.novelty(new), posterior.novelty(new, score="variance")], 1)
    assert_close(scores_of(posterior, posterior._inputs(new, None)), wanted, rtol=1e-3, atol=1e-5)
    prepared = posterior._inputs(new, None)
    for exact in (True, False):
        scorer = Scorer(posterior._fitted(), posterior._capture_plan(prepared), exact)
        found = information_and_variance(scorer, prepared)
        for ours, score in zip(found.T, ("information", "variance"), strict=True):
            assert_close(
                ours, posterior.novelty(new, score=score, exact=exact), rtol=1e-3, atol=1e-5
            )


def test_both_scores_of_a_regression_in_the_units_of_each() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 3)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).eval()
    likelihood = nb.Regression(noise_variance=0.25)
    posterior = nb.NullSpacePosterior(model, likelihood=likelihood)
    posterior.fit((x, torch.randn(12, 2)), 5, progress=False)
    new = torch.randn(4, 3)
    found = scores_of(posterior, posterior._inputs(new, None))
    assert_close(found[:, 0], posterior.novelty(new))
    assert_close(found[:, 1], posterior.novelty(new, score="variance"))


def test_onnx_runtime_takes_any_number_of_texts(module: Any) -> None:
    some = without_labels(texts(3, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # By itself `torch.onnx.export` would take a mapping at the end of the arguments for named ones.
        exported = torch.export.export(module, **module.arguments(some))
        program = torch.onnx.export(
            exported, input_names=list(some), output_names=module.output_names, verbose=False
        )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for count in (1, 7):
        new = without_labels(texts(count, 6))
        given = {i.name: new[i.name].numpy() for i in session.get_inputs()}
        for ours, theirs in zip(session.run(None, given), module(**new), strict=True):
            assert_close(torch.tensor(ours), theirs, rtol=1e-3, atol=1e-5)
