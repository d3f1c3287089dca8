"""Labels, batches and outputs of the transformers library: as its own losses take them, or a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader

import nullbayes as nb
from nullbayes.model.own_loss import fitting
from tests.cases.architectures import BERT, CASES, GPT2, built, classes, masks, next_tokens, text
from tests.cases.dense import QUIET

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def counting() -> nn.Module:
    """A causal language model whose next token follows from the last one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(**(GPT2 | {"vocab_size": 12, "n_embd": 16}))
        model = transformers.GPT2LMHeadModel(config).eval()
    optimiser = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(120):
        optimiser.zero_grad()
        model(input_ids=counted(), labels=counted()).loss.backward()
        optimiser.step()
    return model


def counted() -> Tensor:
    return torch.stack([(torch.arange(6) * 5 + k) % 12 for k in range(12)])


def batch_of(labels: Tensor, **more: Any) -> dict[str, Any]:
    return {
        "input_ids": counted(),
        "attention_mask": torch.ones(12, 6).long(),
        "labels": labels,
    } | more


def shifted() -> Tensor:
    return F.pad(counted()[:, 1:], (0, 1), value=-100)


@pytest.fixture()
def strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", nb.NullBayesWarning)
        yield


# -- causal language models ------------------------------------------------------------------------


@pytest.mark.parametrize("preserve", ["predictions", "loss"])
def test_labels_are_shifted_as_the_network_shifts_them(counting: nn.Module, preserve: str) -> None:
    posterior = nb.NullSpacePosterior(counting, preserve=preserve)
    with warnings.catch_warnings():
        warnings.simplefilter("error", nb.NullBayesWarning)
        posterior.fit([batch_of(counted())], 4, **QUIET)
    assert posterior.certificate.held
    assert posterior.certificate.network_score == 1.0
    with pytest.warns(nb.NullBayesWarning, match="the posterior adds nothing"):
        path = posterior.calibrate([batch_of(counted())], **QUIET)
    own = counting(input_ids=counted(), labels=counted()).loss
    assert path.point["nll"] / 5 == pytest.approx(float(own), rel=1e-4)  # five labels a text


def test_labels_beside_a_score_are_shifted_too(counting: nn.Module) -> None:
    tokens = {"input_ids": counted()}
    posterior = nb.NullSpacePosterior(counting, preserve="loss").fit(
        [batch_of(counted())], 4, **QUIET
    )

    def logits(model: nn.Module, inputs: Any) -> Tensor:
        return model(**inputs).logits

    by_hand = nb.NullSpacePosterior(counting, preserve="loss", forward=logits)
    by_hand.fit([tokens | {"labels": shifted()}], 4, **QUIET)
    new, scores = {"input_ids": counted().flip(1)}, []
    for each, labels in ((posterior, counted()), (by_hand, shifted())):
        with warnings.catch_warnings():  # of labels that are not the tokens
            warnings.simplefilter("ignore", nb.NullBayesWarning)
            scores.append(each.novelty(new, score="loss", targets=labels))
    assert_close(*scores)


def test_validation_data_without_a_label_are_refused(counting: nn.Module) -> None:
    posterior = nb.NullSpacePosterior(counting, preserve="loss").fit(
        [batch_of(counted())], 2, **QUIET
    )
    empty = batch_of(counted()) | {"labels": torch.full_like(counted(), -100)}
    with pytest.raises(nb.InputError, match="every label of its 12 examples is one to be ignored"):
        posterior.calibrate([empty], **QUIET)


def test_a_pair_of_tokens_and_labels_is_shifted_too(counting: nn.Module, strict: None) -> None:
    posterior = nb.NullSpacePosterior(counting, preserve="loss")
    posterior.fit([(counted(), counted())], 2, **QUIET)
    assert posterior.certificate.network_score == 1.0


def test_labels_shifted_by_hand_stay(counting: nn.Module) -> None:
    posterior = nb.NullSpacePosterior(counting, preserve="loss")
    with pytest.warns(nb.NullBayesWarning, match="hold the next token at each position already"):
        posterior.fit([batch_of(shifted())], 2, **QUIET)
    assert posterior.certificate.network_score == 1.0
    with pytest.raises(nb.InputError, match=r"val_loader, batch 0: labels of earlier batches"):
        posterior.calibrate([batch_of(counted())], **QUIET)


def test_labels_of_padding_are_ignored(counting: nn.Module) -> None:
    mask = torch.ones(12, 6).long()
    mask[::2, 4:] = 0
    posterior = nb.NullSpacePosterior(counting, preserve="loss")
    with pytest.warns(
        nb.NullBayesWarning, match="12 labels of the first such batch belong to padding"
    ):
        posterior.fit([batch_of(counted(), attention_mask=mask)], 2, **QUIET)
    assert posterior.certificate.network_score == 1.0
    inputs = posterior.functional.as_called(batch_of(counted(), attention_mask=mask))
    _, targets = posterior.functional.targets_for(inputs, counted(), "here")
    assert int((targets[0] != -100).sum()) == 3
    assert int((targets[1] != -100).sum()) == 5


def test_with_forward_labels_stay_and_a_warning_says_so(counting: nn.Module) -> None:
    def logits(model: nn.Module, inputs: Any) -> Tensor:
        return model(**inputs).logits

    posterior = nb.NullSpacePosterior(counting, preserve="loss", forward=logits)
    with pytest.warns(nb.NullBayesWarning, match="Leave `forward` out, or shift the labels"):
        posterior.fit([batch_of(counted())], 2, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("error", nb.NullBayesWarning)
        other = nb.NullSpacePosterior(counting, preserve="loss", forward=logits)
        other.fit([batch_of(shifted())], 2, **QUIET)
    assert other.certificate.network_score == 1.0


def test_a_loss_that_is_not_known_is_a_warning() -> None:
    class Weighted(transformers.GPT2LMHeadModel):
        def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            if labels is not None:
                out.loss = out.logits.square().mean()
            return out

    model = built(lambda _: Weighted(transformers.GPT2Config(**GPT2)))
    posterior = nb.NullSpacePosterior(model, preserve="loss")
    with pytest.warns(nb.NullBayesWarning, match=r"own loss of Weighted .* shifted .* unshifted"):
        posterior.fit([next_tokens()], 2, **QUIET)


def test_two_meanings_that_are_near_each_other_are_told_apart() -> None:
    """As of networks that know little, whatever their class is called."""
    found = {"shifted": 2.7666184, "unshifted": 2.7682224}
    assert fitting(found, 2.7666187, 1e-3) == {"shifted"}
    assert fitting(found, 2.7682220, 1e-3) == {"unshifted"}
    assert fitting(found, 2.7675, 1e-3) == set(found)
    assert fitting(found, 3.0, 1e-3) == set()
    equal = dict.fromkeys(found, 2.5)
    assert fitting(equal, 2.5, 1e-3) == set(found)

    class Answers(transformers.GPT2LMHeadModel):  # a name that says nothing
        pass

    model = built(lambda _: Answers(transformers.GPT2Config(**GPT2)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e-3)  # both losses are that of a uniform guess
    with pytest.warns(nb.NullBayesWarning, match="does not tell whether it shifts labels"):
        nb.NullSpacePosterior(model, preserve="loss").fit([next_tokens()], 2, **QUIET)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    batch = next_tokens()
    losses = [model(**batch).loss, model(**batch | {"labels": batch["labels"].roll(1, 1)}).loss]
    assert float((losses[0] - losses[1]).abs()) < 1e-3 * float(losses[0])
    posterior = nb.NullSpacePosterior(model, preserve="loss").fit([batch], 2, **QUIET)
    assert posterior.functional.conventions is not None
    assert posterior.functional.conventions.shifts


def test_a_likelihood_that_ignores_nothing_is_told(counting: nn.Module) -> None:
    likelihood = nb.Classification(ignore_index=None)
    posterior = nb.NullSpacePosterior(counting, likelihood, "loss")
    with pytest.raises(nb.InputError, match="the last position of a causal language model"):
        posterior.fit([batch_of(counted())], 2, **QUIET)


# -- other heads -----------------------------------------------------------------------------------


def test_a_regression_is_not_taken_for_classes() -> None:
    case = CASES["distilbert, regression"]
    model = built(case.model)
    before = model.config.problem_type
    posterior = nb.NullSpacePosterior(model)
    with pytest.raises(nb.InputError, match="Pass likelihood='regression'"):
        posterior.fit([case.batch()], 2, **QUIET)
    assert model.config.problem_type == before  # asked for its loss, the network would settle it


def test_another_likelihood_than_the_networks_own_is_a_warning() -> None:
    case = CASES["deberta-v2, several labels"]
    posterior = nb.NullSpacePosterior(built(case.model), nb.Regression(noise_variance=1.0))
    with pytest.warns(nb.NullBayesWarning, match="which is likelihood='binary'"):
        posterior.fit([case.batch()], 2, **QUIET)


def test_keys_that_the_network_does_not_take_are_left_out() -> None:
    model = built(CASES["bert, classes"].model)
    batch = classes() | {"text": torch.arange(5), "label_ids": torch.arange(5) % 3}
    del batch["labels"]
    posterior = nb.NullSpacePosterior(model)
    with pytest.warns(
        nb.NullBayesWarning, match=r"\['text'\], which BertForSequenceClassification"
    ):
        posterior.fit([batch], 2, **QUIET)
    assert posterior.certificate.constraints == 10


def test_a_cache_among_the_inputs_is_named(counting: nn.Module) -> None:
    cached = batch_of(counted(), past_key_values=transformers.DynamicCache())
    with pytest.raises(nb.InputError, match="`past_key_values`, a cache that the network writes"):
        nb.NullSpacePosterior(counting, preserve="loss").fit([cached], 2, **QUIET)


def test_items_that_hold_lists_are_told(counting: nn.Module) -> None:
    items: Any = [{k: v[n].tolist() for k, v in batch_of(counted()).items()} for n in range(4)]
    data = DataLoader(items, 2)
    told = r"\] are lists of tensors.*set_format"
    with pytest.raises(nb.InputError, match="'targets'" + told):
        nb.NullSpacePosterior(counting, preserve="loss").fit(data, 2, **QUIET)
    some = ({k: v for k, v in batch.items() if k != "labels"} for batch in data)
    posterior = nb.NullSpacePosterior(counting, preserve="loss").fit(
        [batch_of(counted())], 2, **QUIET
    )
    with pytest.raises(nb.InputError, match="'input_ids', .*" + told):
        posterior.predict(some)


def test_labels_of_another_integer(counting: nn.Module, strict: None) -> None:
    batch = {k: v.int() for k, v in batch_of(counted()).items()}
    posterior = nb.NullSpacePosterior(counting, preserve="loss").fit([batch], 2, **QUIET)
    assert posterior.certificate.network_score == 1.0


def test_tuples_for_outputs(strict: None) -> None:
    model = built(CASES["bert, classes"].model)
    model.config.return_dict = False
    posterior = nb.NullSpacePosterior(model).fit([classes()], 2, **QUIET)
    with torch.no_grad():
        assert_close(posterior.predict(text()).point, model(**text())[0])


def test_masks_smaller_than_images(tmp_path: Path, strict: None) -> None:
    model, batch = built(CASES["segformer"].model), masks()
    batch["labels"] = batch["labels"][:, ::2, ::2]
    posterior = nb.NullSpacePosterior(model, preserve="loss").fit([batch], 2, **QUIET)
    with torch.no_grad():
        wanted = F.interpolate(model(batch["pixel_values"]).logits, (8, 8), mode="bilinear")
    posterior.save(tmp_path / "posterior.safetensors")
    again = nb.load(tmp_path / "posterior.safetensors", model)
    for each in (posterior, again):
        assert_close(each.predict({"pixel_values": batch["pixel_values"]}).point, wanted)


def test_a_decoder_without_inputs_is_an_error_and_with_labels_none(strict: None) -> None:
    case = CASES["t5"]
    model, batch = built(case.model), case.batch()
    posterior = nb.NullSpacePosterior(model, preserve="loss").fit([batch], 2, **QUIET)
    with torch.no_grad():
        wanted = model(**batch).logits
    assert_close(posterior.predict(batch).point, wanted)
    assert_close(posterior.predict(iter([batch])).point, wanted)
    with pytest.raises(nb.InputError, match="decoder_input"):
        posterior.predict(text())


def test_a_trainer_and_its_loader(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = built(
        lambda _: transformers.BertForSequenceClassification(
            transformers.BertConfig(num_labels=3, **BERT)
        )
    ).float()
    batch = classes()
    data = [{k: v[n] for k, v in batch.items()} for n in range(5)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    posterior = nb.NullSpacePosterior(trainer.model.eval())
    posterior.fit(trainer.get_train_dataloader(), 2, **QUIET)
    assert posterior.certificate.constraints == 10
    assert posterior.certificate.held


def test_the_layer_posterior_scores_shifted_labels_and_choices(counting: nn.Module) -> None:
    posterior = nb.LayerNullSpacePosterior(counting)
    posterior.fit([batch_of(counted())], 2, **QUIET)
    assert posterior.certificate.network_score == 1.0
    last = nb.LayerNullSpacePosterior(counting, nb.Choices([0, 1, 2], position=-2))
    hits = torch.isin(counted()[:, -1], torch.arange(3)).nonzero()[:, 0]
    some = {k: v[hits] for k, v in batch_of(counted()).items()}
    last.fit([some | {"labels": counted()[hits, -1]}], 2, **QUIET)
    assert last.certificate.network_score == 1.0
    assert last.predict({k: v for k, v in some.items() if k != "labels"}).mean.shape == (3, 3)
