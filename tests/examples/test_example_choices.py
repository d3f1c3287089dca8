"""Multiple choice at a tiny size: four constraints a question, prompts without their answers, and what is compared."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from examples import language_choices as example


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_choices_run() -> None:
    found = example.run(example.SMALL)
    assert found["constraints"] == 4 * example.SMALL.train
    assert found["held"]
    assert {"network", "posterior", "auroc"} <= set(found)
    assert "markup and codecs" in found["auroc"]
    assert "AUROC against markup and codecs" in example.summary(found)


def test_prompts_are_the_questions_without_answers() -> None:
    data = example.questions(
        [("one two three", 1), ("one", 4)], {"one": 2, "two": 3}, example.SMALL
    )
    ask = example.SMALL.known
    assert data["input_ids"][0].tolist() == [2, 3, 1, ask, ask + 2, 0, 0, 0, 0, 0]
    assert data["labels"][1].tolist() == [-100, -100, ask + 5, *[-100] * 7]
    asked = example.prompts(data)
    assert asked["input_ids"][0].tolist() == [2, 3, 1, ask, 0, 0, 0, 0, 0, 0]
    assert torch.equal(asked["attention_mask"].sum(1), torch.tensor([4, 2]))
