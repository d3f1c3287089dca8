"""A language model that answers multiple-choice questions, and when not to believe it.

    python -m examples.language_choices [--small]

A small GPT-2 from its configuration reads the first words of a docstring of Python's standard library and then says
which family of modules it is from: its answer is one of five tokens. `nb.Choices` makes a classifier of it, with four
constraints a docstring, whatever the vocabulary. Docstrings of modules that it never saw (markup, windows) are the
questions that it should not be confident about; the answer's own confidence and the posterior's novelty are compared.

It needs transformers (`pip install 'nullbayes[experiments]'`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from examples import _common as common
from examples import _texts as texts
from examples._transformers import IGNORED, Batch, batches, vocabulary, words
from nullbayes import metrics


@dataclass(frozen=True)
class Sizes:
    """How much of everything: docstrings, words of each, words known, width and depth, epochs, samples."""

    train: int = 400
    validation: int = 150
    test: int = 300
    words: int = 32
    known: int = 800
    width: int = 48
    layers: int = 2
    epochs: int = 12
    samples: int = 20


SMALL = Sizes(
    train=30, validation=10, test=12, words=8, known=60, width=16, layers=1, epochs=2, samples=4
)


def questions(found: list[tuple[str, int]], index: dict[str, int], sizes: Sizes) -> Batch:
    """Words, the question mark, and the answer: tokens ``(N, words + 2)`` with labels for the answer alone.

    The last tokens of the vocabulary are the question mark and the answers.
    """
    length, ask = sizes.words + 2, sizes.known
    ids = torch.zeros(len(found), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for n, (text, family) in enumerate(found):
        tokens = [index.get(word, 1) for word in words(text)[: sizes.words]]
        tokens += [ask, ask + 1 + family]
        ids[n, : len(tokens)] = torch.tensor(tokens)
        labels[n, len(tokens) - 1] = tokens[-1]
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def prompts(data: Batch) -> Batch:
    """The questions without their answers, as one asks them."""
    mask = data["attention_mask"] * (data["labels"] == IGNORED)
    return {"input_ids": data["input_ids"] * mask, "attention_mask": mask}


def language_model(sizes: Sizes, classes: int) -> nn.Module:
    """GPT-2 from its configuration, with the weights that seed 0 gives it."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise SystemExit(
            "this example needs transformers: pip install 'nullbayes[experiments]'"
        ) from error
    settings: dict[str, Any] = {
        "vocab_size": sizes.known + 1 + classes,
        "n_positions": sizes.words + 2,
        "n_embd": sizes.width,
        "n_layer": sizes.layers,
        "n_head": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = GPT2LMHeadModel(GPT2Config(**settings))
    return model


def data(sizes: Sizes) -> tuple[dict[str, Batch], list[str]]:
    """Questions by part, those about modules that no part has among them, and the names of the families."""
    every = [
        (text, n)
        for n, names in enumerate(texts.FAMILIES.values())
        for text in texts.docstrings(names)
    ]
    parts = texts.split(every, sizes.train, sizes.validation, sizes.test)
    index = vocabulary((text for text, _ in parts["train"]), sizes.known)
    found = {name: questions(part, index, sizes) for name, part in parts.items()}
    for name, modules in texts.HELD_OUT.items():
        strange = texts.in_order(texts.docstrings(modules), seed=0)[: sizes.test]
        if strange:
            found[name] = questions([(text, 0) for text in strange], index, sizes)
    return found, list(texts.FAMILIES)


def run(sizes: Sizes) -> dict[str, Any]:
    """Train, fit, and compare; JSON-able."""
    found, families = data(sizes)
    model, train = language_model(sizes, len(families)), found["train"]

    def loss(index: Tensor) -> Tensor:
        return model(**{k: v[index] for k, v in train.items()}).loss

    common.trained(
        model, loss, examples=sizes.train, epochs=sizes.epochs, batch_size=25, learning_rate=3e-3
    )
    answers = [sizes.known + 1 + n for n in range(len(families))]
    posterior = nb.NullSpacePosterior(model.eval(), nb.Choices(answers))
    posterior.fit(batches(train), num_samples=sizes.samples, progress=False)
    certificate = posterior.certificate
    path = posterior.calibrate(batches(found["validation"]), progress=False)
    right = found["test"]["labels"].amax(1) - answers[0]
    prediction = posterior.predict(prompts(found["test"]))
    point = prediction.point.softmax(1)
    out: dict[str, Any] = {
        "weights": certificate.parameters,
        "constraints": certificate.constraints,
        "held": certificate.held,
        "training accuracy": [certificate.network_score, certificate.posterior_score],
        "prior precision": [path.prior_precision[path.chosen], certificate.prior_precision],
        "network": metrics.classification_metrics(point, right),
        "posterior": metrics.classification_metrics(prediction.mean, right),
        "auroc": {},
    }
    inside = posterior.novelty(prompts(found["test"])), -point.amax(1)
    for name in texts.HELD_OUT:
        if name not in found:
            continue
        asked = prompts(found[name])
        doubt = -posterior.predict(asked).point.softmax(1).amax(1)
        out["auroc"][name] = {
            "novelty": metrics.ood_metrics(inside[0], posterior.novelty(asked))["auroc"],
            "confidence": metrics.ood_metrics(inside[1], doubt)["auroc"],
        }
    return out


def summary(found: dict[str, Any]) -> str:
    """The figures as a few lines."""
    before, after = found["training accuracy"]
    lines = [
        f"{found['weights']:,} weights, {found['constraints']:,} constraints; training accuracy {before:.3f} → "
        f"{after:.3f}, guarantee {'held' if found['held'] else 'weak'}",
        f"{'':12}" + "".join(f"{name:>10}" for name in ("accuracy", "nll", "ece")),
    ]
    for who in ("network", "posterior"):
        row = found[who]
        lines.append(
            f"{who:12}" + "".join(f"{row[name]:10.3f}" for name in ("accuracy", "nll", "ece"))
        )
    for name, scores in found["auroc"].items():
        values = ", ".join(f"by {score} {value:.3f}" for score, value in scores.items())
        lines.append(f"AUROC against {name}: {values}")
    return "\n".join(lines)


def main() -> None:
    options = common.options(__doc__)
    print(summary(run(SMALL if options.small else Sizes())))


if __name__ == "__main__":
    main()
