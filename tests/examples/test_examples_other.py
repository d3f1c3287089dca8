"""The examples for segmentation and text, and the benchmark of output sizes, at tiny sizes."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import nullbayes as nb
from examples import _common as common
from examples import _texts as texts
from examples import _transformers as models
from examples import segmentation, text
from nullbayes import datasets
from nullbayes.errors import InputError

CHANGES = {"mean_loss", "first_order", "samples", "predictive", "network"}
SCALES = ["fitted", "loss kept", "calibrated"]


def check_posterior(found: dict[str, Any]) -> None:
    """What every posterior's figures have to hold, whatever the network is worth."""
    assert list(found["scales"]) == SCALES
    for at in found["scales"].values():
        assert set(at["training_loss"]) == CHANGES
        assert all(math.isfinite(v) for v in at["training_loss"].values())
    kept = found["scales"]["loss kept"]
    assert abs(kept["training_loss"]["samples"]) <= common.ALLOWED
    assert kept["prior_precision"] >= found["scales"]["fitted"]["prior_precision"]


def check_files(out: Path, names: set[str]) -> None:
    assert {path.name for path in out.iterdir()} == names
    assert all((out / n).stat().st_size < common.LARGEST_PICTURE for n in names if "png" in n)


# -- segmentation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fashion() -> None:
    try:
        datasets.find_fashion_mnist()
    except InputError:
        pytest.skip("Fashion-MNIST's files are not installed")


def test_a_scene_is_its_digits_on_its_background() -> None:
    digits = datasets.Split(torch.ones(2, 1, 8, 8), torch.tensor([3, 5]))
    backgrounds = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    before = backgrounds.clone()
    scenes = segmentation.compose(digits, backgrounds, 12, seed=1)
    again = segmentation.compose(digits, backgrounds, 12, seed=1)
    assert torch.equal(scenes.images, again.images) and torch.equal(backgrounds, before)
    assert set(scenes.masks.unique().tolist()) == {0, 4, 6}  # background, and labels from one
    ink = scenes.masks > 0
    assert_close(scenes.images[:, 0][ink], torch.ones(int(ink.sum())))
    assert (scenes.images[:, 0][~ink] <= 0.7).all()
    sizes = ink.flatten(1).sum(1)
    assert (sizes >= 12 * 12).all() and (sizes <= 2 * 16 * 16).all()


@pytest.fixture(scope="module")
def segmented(fashion: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("segmentation")
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():  # a network of three epochs may have nothing to calibrate
        warnings.simplefilter("ignore", nb.NullBayesWarning)
        figures = segmentation.run(segmentation.SMALL, out)
    assert torch.equal(state, torch.random.get_rng_state())
    return figures, out


def test_segmentation_keeps_what_it_says(segmented: tuple[dict, Path]) -> None:
    figures, out = segmented
    check_files(out, {"segmentation.json", "segmentation.png"})
    assert json.loads((out / "segmentation.json").read_text()) == figures
    assert figures["outputs"] == 9 * 8 * 8
    by_loss, by_two, by_auto = figures["posteriors"].values()
    for found in (by_loss, by_two, by_auto):
        check_posterior(found)
        for kind in ("held-out digits", "shoes and bags", "noise"):
            assert all(0 <= v <= 1 for v in found["auroc"]["scenes"][kind].values())
    assert by_loss["certificate"]["constraints"] == 24  # one row an image, 576 outputs
    assert by_two["certificate"]["constraints"] == 48
    # All that "auto" keeps of one untrained image: nearly its 8 · 64 directions.
    assert 100 < by_auto["certificate"]["constraints"] <= 512
    assert (
        by_auto["certificate"]["discarded_trace"] <= 1e-3 < by_two["certificate"]["discarded_trace"]
    )
    assert by_loss["scales"]["fitted"]["training_loss"]["first_order"] < common.ALLOWED
    moved = by_auto["scales"]["fitted"]["training_loss"]
    assert abs(moved["samples"]) < common.ALLOWED


def test_segmentation_prints_every_posterior(segmented: tuple[dict, Path]) -> None:
    said = segmentation.summary(segmented[0])
    for words in (
        "preserve='loss'",
        "directions=2",
        "directions='auto'",
        "mIoU",
        "held-out digits",
    ):
        assert words in said


# -- text ----------------------------------------------------------------------------------------


def test_docstrings_come_once_and_without_imports() -> None:
    found = texts.docstrings("fractions statistics")
    assert len(found) == len(set(found)) > 30
    assert all(len(t) >= texts.SHORTEST for t in found)
    assert any("Fraction" in t for t in found) and texts.docstrings("no_such_module") == []


def test_other_texts_are_as_long_as_they_should_be() -> None:
    found = ["the cat sat on the mat", "one two three"]
    letters, words = texts.shuffled(found, seed=0), texts.shuffled(found, seed=0, words=True)
    assert [sorted(t) for t in letters] == [sorted(t) for t in found] and letters != found
    assert [sorted(t.split()) for t in words] == [sorted(t.split()) for t in found]
    assert texts.repeated(found, 4) == ["the the the the the th", "one one one o"]
    for source in (texts.headers, texts.web_pages):
        assert [len(t) for t in texts.cut(source(2000), [30, 7], seed=1)] == [30, 7]


def test_letters_are_shifted_and_padding_is_ignored() -> None:
    batch = models.encoded_letters(["ab", "abcd", "é"], 3)
    a, b, c = (1 + models.LETTERS.index(letter) for letter in "abc")
    other = 1 + models.LETTERS.index("?")
    assert batch["labels"].tolist() == [[a, b, -100], [a, b, c], [other, -100, -100]]
    assert batch["input_ids"].tolist() == [[0, a, 0], [0, a, b], [0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]


def test_the_language_model_sees_no_later_letter_and_says_nothing_after_the_end() -> None:
    torch.manual_seed(0)
    model = models.LanguageModel(97, 6, 16, 2).eval()
    ids, mask = torch.randint(97, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    outputs = model(ids, mask)
    other = ids.clone()
    other[:, 3:] = (other[:, 3:] + 1) % 97
    assert_close(model(other, mask)[:, :3], outputs[:, :3])
    assert not torch.allclose(model(other, mask)[0, 3], outputs[0, 3])
    assert (outputs[1, 4:] == 0).all() and (outputs[1, 3] != 0).any()


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("text")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nb.NullBayesWarning)
        return text.run_language_model(text.SMALL, out), out


def test_a_language_model_costs_one_row_a_text(language: tuple[dict, Path]) -> None:
    found, out = language
    check_files(out, {"text_language.png"})
    posterior = found["posteriors"]["preserve='loss'"]
    check_posterior(posterior)
    assert found["outputs"] == 16 * 97
    assert posterior["certificate"]["constraints"] == text.SMALL.train
    assert any("in_proj_weight" in name for name in posterior["certificate"]["generic"])
    assert not any("dense" in name for name in posterior["certificate"]["generic"])
    assert posterior["scales"]["fitted"]["training_loss"]["first_order"] < common.ALLOWED
    assert set(posterior["auroc"]) == {
        "C++ headers", "web pages", "shuffled words", "shuffled letters", "five letters repeated",
    }  # fmt: skip
    assert {"loss", "variance of the loss"} < set(posterior["auroc"]["web pages"])


def test_kept_losses_have_no_variance() -> None:
    sizes = dataclasses.replace(text.SMALL, language_epochs=1)
    data = text.language_data(sizes)
    posterior = text.fit(
        text.train_language_model(data["train"], sizes), data["train"], sizes, "loss"
    )
    kept, new = (text.loss_variance(posterior, data[kind]) for kind in ("train", "test"))
    assert kept.max() < 1e-3 * new.min()


def test_a_classifier_from_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="in the extra nullbayes[experiments]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nb.NullBayesWarning)
        found = text.run_classifier(text.SMALL, tmp_path)
    check_files(tmp_path, {"text_classifier.png"})
    predictions, loss = found["posteriors"].values()
    for posterior, rows in ((predictions, 4), (loss, 1)):
        check_posterior(posterior)
        assert posterior["certificate"]["constraints"] == rows * text.SMALL.train
        assert posterior["certificate"]["generic"] == []  # every layer of DistilBERT has a rule
        assert "markup and codecs" in posterior["auroc"]
    assert set(loss["point"]["test"]) >= {"accuracy", "nll", "ece"}


def test_without_transformers_it_says_so_and_does_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text, "HAS_TRANSFORMERS", False)
    monkeypatch.setattr(text, "run_language_model", lambda *_: {"figures": 1})
    monkeypatch.setattr(text, "summary", json.dumps)
    monkeypatch.setattr("sys.argv", ["text", "--small", "--out", str(tmp_path)])
    text.main()
    said = capsys.readouterr().out
    assert "transformers is not installed" in said and "nullbayes[experiments]" in said
    assert json.loads((tmp_path / "text.json").read_text()) == {"language model": {"figures": 1}}


# -- what they share -----------------------------------------------------------------------------


def test_changes_of_the_loss_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 20), torch.nn.Tanh(), torch.nn.Linear(20, 4))
    batches = [(torch.randn(5, 3), torch.randint(4, (5,))) for _ in range(2)]
    posterior = nb.NullSpacePosterior(model.eval().double(), preserve="loss", prior_precision=3.0)
    batches = [(x.double(), y) for x, y in batches]
    posterior.fit(batches, num_samples=6, progress=False)
    check = common.LossCheck(common.Draws(posterior, batches))
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        before = torch.nn.functional.cross_entropy(model(x), y)
        prediction = posterior.predict(x)
        draws = torch.cat([prediction.outputs, 2 * prediction.point - prediction.outputs])
        after = torch.stack([torch.nn.functional.cross_entropy(d, y) for d in draws]).mean()
        mean = posterior.predict(x).mean.gather(1, y[:, None]).log().mean()
    found = check.changes()
    assert found["mean_loss"] == pytest.approx(float(before), rel=1e-6)
    assert found["samples"] == pytest.approx(float(after / before - 1), rel=1e-5)
    assert found["predictive"] == pytest.approx(float(-mean / before - 1), rel=1e-5)
    assert found["first_order"] < 1e-3 and abs(found["network"]) > 1e-3
    precision = check.least_precision(3.0)
    posterior.prior_precision = precision
    assert 0.8e-3 < check.changes()["samples"] <= 1e-3


def test_a_picture_too_large_for_the_documentation_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "DOCS", tmp_path / "docs")
    with common.drawing() as plt:
        figure = plt.figure(figsize=(1, 1))
        common.save_picture(figure, "one", tmp_path / "out", docs=True)
        assert (tmp_path / "docs" / "one.png").exists()
        monkeypatch.setattr(common, "LARGEST_PICTURE", 10)
        with pytest.raises(ValueError, match="draw less"):
            common.save_picture(plt.figure(), "two", tmp_path / "out", docs=True)
    assert [p.name for p in (tmp_path / "docs").iterdir()] == ["one.png"]


# -- the benchmark -------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["upsampled", "coordinates"])
def test_weights_do_not_depend_on_the_output(network: str) -> None:
    from benchmarks import outputs

    shapes = set()
    for side in (4, 16):
        model, [(x, y)] = outputs.built(outputs.Problem(network, side))
        assert model(x).shape == y.shape == (outputs.EXAMPLES, 1, side, side)
        shapes.add(tuple(p.shape for p in model.parameters()))
    assert len(shapes) == 1


def test_the_benchmark_counts_passes_and_finds_exponents() -> None:
    from benchmarks import outputs

    run = outputs.measure(outputs.Problem("coordinates", 4))
    assert run["outputs"] == 16 and run["constraints"] == outputs.EXAMPLES
    # The audit differentiates a few examples more, along samples and along the prior.
    assert outputs.SAMPLES <= run["passes"]["tangent"] <= outputs.SAMPLES + 2
    assert 0 < run["own_seconds"] < run["seconds"]
    points = [
        dict.fromkeys(outputs.LAWS, 3.0 * o**0.5) | {"outputs": o, "excess_memory": 64 - o}
        for o in (16, 32, 64, 128)
    ]
    laws = outputs.laws(points)
    assert laws["seconds"]["slope"] == pytest.approx(0.5)
    assert laws["excess_memory"]["points"] == 2  # sizes with nothing left have no logarithm
