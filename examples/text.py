"""Uncertainty of two small transformers on the docstrings of Python's standard library.

    python -m examples.text [--small] [--docs]

1. A Hugging Face DistilBERT, built from its configuration, tells what a docstring is about (five families of modules;
   two more are held out). Batches are mappings with `input_ids`, `attention_mask` and `labels`.
2. A causal language model predicts the next character at 96 positions: outputs (B, 96, 97), padding ignored by its
   label -100. Its posterior keeps the loss of each text: one row, whatever the length.

The first part needs transformers (`pip install 'nullbayes[experiments]'`) and is left out without it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nullbayes as nb
from examples import _common as common
from examples import _texts as texts
from examples import _transformers as models
from examples._transformers import BATCH, IGNORED, LETTERS, Batch, batches
from nullbayes import metrics
from nullbayes.posterior.prediction import make_prediction

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
CHECKED = 200  # training texts that figures are given for


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    train: int = 1000
    validation: int = 150
    test: int = 300  # docstrings for the classifier, and half as many for the language model
    words: int = 48  # of a docstring that the classifier reads
    vocabulary: int = 1500
    letters: int = 96  # of a docstring that the language model reads
    width: int = 64
    layers: int = 2
    classifier_epochs: int = 6
    language_epochs: int = 20
    samples: int = 20
    memory: str = "2GB"


SMALL = Sizes(
    train=40, validation=8, test=12, words=12, vocabulary=60, letters=16, width=16, layers=1,
    classifier_epochs=2, language_epochs=2, samples=4, memory="500MB",
)  # fmt: skip


# -- what both have in common --------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Per token (or per text, for the classifier) of a set of texts; ignored positions are left out.

    ``text``: which text each entry belongs to.
    """

    text: Tensor  # (K,)
    labels: Tensor  # (K,)
    probs: Tensor  # (K, O) predictive mean
    point: Tensor  # (K, O) probabilities of the network alone
    variance: Tensor  # (K,) epistemic variance of the outputs, summed over classes
    epistemic: Tensor  # (K,) mutual information
    deviation: Tensor  # (K,) of the label's log-probability over the samples, to first order

    @staticmethod
    def of(draws: common.Draws, alpha: float) -> Answers:
        parts, seen = [], 0
        for point, moved, labels in draws.at(alpha):
            m = make_prediction(draws.likelihood, point, moved, "linearised")
            text = torch.arange(seen, seen + len(labels)).reshape(-1, *[1] * (labels.ndim - 1))
            text, kept = text.expand_as(labels), labels != IGNORED
            p, change = point.softmax(-1), moved - point
            label = labels.clamp_min(0).unsqueeze(-1).expand(*change.shape[:-1], 1)
            own = change.gather(-1, label).squeeze(-1) - (p * change).sum(-1)
            deviation = own.square().mean(0).sqrt()
            values = (text, labels, m.mean, p, m.variance.sum(-1), m.epistemic, deviation)
            parts.append(tuple(v[kept] for v in values))
            seen += len(labels)
        return Answers(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the entries of each text, ``(N,)``."""
        total = torch.zeros(int(self.text.max()) + 1, dtype=torch.float64)
        count = torch.zeros_like(total).index_add_(0, self.text, torch.ones_like(values).double())
        return total.index_add_(0, self.text, values.double()) / count

    def scores(self, labelled: bool) -> dict[str, Tensor]:
        """Doubt about each text: the network's own (its loss too, where texts are their own labels)."""
        log_p = self.point.clamp_min(1e-30).log()
        out = {
            "1 - confidence": self.mean(1 - self.point.max(-1).values),
            "entropy": self.mean(-(self.point * log_p).sum(-1)),
        }
        if labelled:
            out["loss"] = self.mean(-log_p.gather(-1, self.labels.unsqueeze(-1)).squeeze(-1))
        out["output variance"] = self.mean(self.variance)
        out["mutual information"] = self.mean(self.epistemic)
        return out


def loss_variance(posterior: nb.NullSpacePosterior, data: Batch) -> Tensor:
    """Epistemic variance of each text's mean loss over its letters: one row a text, and 0 on what is kept."""
    parts = []
    for inputs, labels in map(common.parted, batches(data)):
        letters = (labels != IGNORED).sum(1)
        parts.append(posterior.novelty(inputs, score="loss", targets=labels) / letters.square())
    return torch.cat(parts)


def examine(
    posterior: nb.NullSpacePosterior, data: dict[str, Batch], labelled: bool
) -> tuple[dict[str, Any], dict[str, Answers]]:
    """Figures at three prior precisions; answers for the unseen texts at the calibrated one."""
    train = common.Draws(posterior, batches(data["train"], CHECKED))
    test = common.Draws(posterior, batches(data["test"]))
    check = common.LossCheck(train)
    validation = batches(data["validation"])
    table: dict[str, Any] = {}
    for name, alpha in common.scales(posterior, check, validation).items():
        posterior.prior_precision = alpha
        trained, tested = Answers.of(train, alpha), Answers.of(test, alpha)
        table[name] = {
            "prior_precision": alpha,
            "training_loss": check.changes(network=2 * BATCH),
            "train": metrics.classification_metrics(trained.probs, trained.labels),
            "test": metrics.classification_metrics(tested.probs, tested.labels),
        }
    del train, check
    answers, scores = {"test": tested}, {}
    for kind, part in data.items():
        if kind in ("train", "validation"):
            continue
        if kind != "test":
            answers[kind] = Answers.of(common.Draws(posterior, batches(part)), alpha)
        scores[kind] = answers[kind].scores(labelled)
        if labelled:
            scores[kind]["variance of the loss"] = loss_variance(posterior, part)
    return {
        "certificate": posterior.certificate.as_dict(),
        "point": {
            "train": metrics.classification_metrics(trained.point, trained.labels),
            "test": metrics.classification_metrics(tested.point, tested.labels),
        },
        "scales": table,
        "auroc": {
            kind: common.auroc(scores["test"], found)
            for kind, found in scores.items()
            if kind != "test"
        },
    }, answers


# -- data and training ---------------------------------------------------------------------------


def classifier_data(sizes: Sizes) -> dict[str, Batch]:
    pairs = [
        (text, label)
        for label, modules in enumerate(texts.FAMILIES.values())
        for text in texts.docstrings(modules)
    ]
    parts = texts.split(pairs, sizes.train, sizes.validation, sizes.test)
    index = models.vocabulary((text for text, _ in parts["train"]), sizes.vocabulary)
    sets = {name: ([t for t, _ in part], [y for _, y in part]) for name, part in parts.items()}
    for kind, modules in texts.HELD_OUT.items():
        found = texts.in_order(texts.docstrings(modules), seed=1)[: sizes.test]
        if found:  # turtles are not in every installation
            sets[kind] = (found, [0] * len(found))
    return {name: models.encoded_words(*part, index, sizes.words) for name, part in sets.items()}


def train_classifier(data: Batch, sizes: Sizes) -> nn.Module:
    model = models.classifier(
        sizes.vocabulary, sizes.words, sizes.width, sizes.layers, len(texts.FAMILIES)
    )

    def loss(index: Tensor) -> Tensor:
        return model(**{name: values[index] for name, values in data.items()}).loss

    with torch.random.fork_rng(devices=[]):  # dropout
        torch.manual_seed(0)
        return common.trained(
            model,
            loss,
            examples=len(data["labels"]),
            epochs=sizes.classifier_epochs,
            batch_size=16,
            learning_rate=2e-3,
            weight_decay=0.01,
        )


def language_data(sizes: Sizes) -> dict[str, Batch]:
    """Docstrings, and other texts as long as the test's: headers, web pages, and docstrings made unreadable."""
    every = texts.docstrings(" ".join(texts.FAMILIES.values()))
    every = [text[: sizes.letters] for text in every]
    sets = texts.split(every, sizes.train, sizes.validation, sizes.test // 2)
    test = sets["test"]
    lengths = [len(text) for text in test]
    enough = 2 * sum(lengths)
    sets |= {
        "C++ headers": texts.cut(texts.headers(enough), lengths, seed=2),
        "web pages": texts.cut(texts.web_pages(enough), lengths, seed=3),
        "shuffled words": texts.shuffled(test, seed=4, words=True),
        "shuffled letters": texts.shuffled(test, seed=5),
        "five letters repeated": texts.repeated(test),
    }
    return {name: models.encoded_letters(found, sizes.letters) for name, found in sets.items()}


def train_language_model(data: Batch, sizes: Sizes) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.LanguageModel(1 + len(LETTERS), sizes.letters, sizes.width, sizes.layers)

    def loss(index: Tensor) -> Tensor:
        outputs = model(data["input_ids"][index], data["attention_mask"][index])
        return F.cross_entropy(outputs.transpose(1, 2), data["labels"][index])

    return common.trained(
        model,
        loss,
        examples=len(data["labels"]),
        epochs=sizes.language_epochs,
        batch_size=24,
        learning_rate=4e-3,
    )


# -- pictures ------------------------------------------------------------------------------------


def classifier_picture(answers: dict[str, Answers], out: Path, docs: bool) -> Path:
    """How doubt is spread over known and held-out families, by the network and by the posterior."""
    with common.drawing() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(8.4, 2.8), layout="constrained")
        for axis, score in zip(axes, ("1 - confidence", "mutual information"), strict=True):
            for kind, a in answers.items():
                values, order = a.scores(False)[score].clamp_min(1e-6).log10().sort()
                share = torch.linspace(0, 1, len(order))
                axis.plot(
                    values.numpy(),
                    share.numpy(),
                    label="known families" if kind == "test" else kind,
                )
            axis.set(xlabel=f"log10 of {score}", ylabel="share of docstrings below")
            axis.legend(fontsize=8)
        return common.save_picture(figure, "text_classifier", out, docs)


def language_picture(
    data: dict[str, Batch], answers: dict[str, Answers], out: Path, docs: bool
) -> Path:
    """One text of each kind, every letter on the deviation of its log-probability over the samples."""
    from matplotlib import cm, colors

    with common.drawing() as plt:
        length = data["test"]["labels"].shape[1]
        size = (0.115 * length, 0.55 * len(answers) + 0.4)
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        most = max(float(a.deviation[a.text == 1].quantile(0.97)) for a in answers.values())
        scale = cm.ScalarMappable(colors.Normalize(0, most), "YlOrRd")
        for row, (kind, a) in enumerate(answers.items()):
            axis.text(0, 2 * row - 0.9, "docstring" if kind == "test" else kind, fontsize=8)
            mine = a.text == 1
            for column, (token, value) in enumerate(
                zip(a.labels[mine].tolist(), a.deviation[mine].tolist(), strict=True)
            ):
                letter = LETTERS[token - 1].replace("\n", "↵").replace("$", r"\$")
                axis.add_patch(
                    plt.Rectangle((column, 2 * row - 0.55), 1, 1.1, color=scale.to_rgba(value))
                )
                axis.text(
                    column + 0.5,
                    2 * row,
                    letter,
                    fontsize=7,
                    family="monospace",
                    ha="center",
                    va="center",
                )
        axis.set(xlim=(0, length), ylim=(2 * len(answers) - 1, -1.5))
        axis.axis("off")
        bar = figure.colorbar(scale, ax=axis, shrink=0.6, pad=0.01)
        bar.set_label("deviation of log p, nats", fontsize=8)
        return common.save_picture(figure, "text_language", out, docs)


# -- the whole -----------------------------------------------------------------------------------


def fit(model: nn.Module, data: Batch, sizes: Sizes, preserve: str) -> nb.NullSpacePosterior:
    posterior = nb.NullSpacePosterior(model, preserve=preserve, memory=sizes.memory)
    return posterior.fit(batches(data), num_samples=sizes.samples, progress=False)


def run_classifier(sizes: Sizes, out: Path, docs: bool = False) -> dict[str, Any]:
    """Train, fit with each thing to keep, measure, draw."""
    data = classifier_data(sizes)
    seconds: dict[str, float] = {}
    with common.clock(seconds, "training"):
        model = train_classifier(data["train"], sizes)
    found: dict[str, Any] = {"posteriors": {}, "seconds": seconds}
    for preserve in ("predictions", "loss"):
        with common.clock(seconds, f"fit, {preserve}"):
            posterior = fit(model, data["train"], sizes, preserve)
        with common.clock(seconds, f"figures, {preserve}"):
            figures, answers = examine(posterior, data, labelled=False)
        found["posteriors"][f"preserve={preserve!r}"] = figures
        if preserve == "predictions":
            classifier_picture(answers, out, docs)
    return found | described(model, data, len(texts.FAMILIES))


def run_language_model(sizes: Sizes, out: Path, docs: bool = False) -> dict[str, Any]:
    """Train, fit keeping each text's loss, measure, draw."""
    data = language_data(sizes)
    seconds: dict[str, float] = {}
    with common.clock(seconds, "training"):
        model = train_language_model(data["train"], sizes)
    with common.clock(seconds, "fit"):
        posterior = fit(model, data["train"], sizes, "loss")
    with common.clock(seconds, "figures"):
        figures, answers = examine(posterior, data, labelled=True)
    language_picture(data, answers, out, docs)
    found = {"posteriors": {"preserve='loss'": figures}, "seconds": seconds}
    return found | described(model, data, sizes.letters * (1 + len(LETTERS)))


def described(model: nn.Module, data: dict[str, Batch], outputs: int) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "outputs": outputs,
        "texts": {kind: len(part["labels"]) for kind, part in data.items()},
    }


def run(sizes: Sizes, out: Path, docs: bool = False) -> dict[str, Any]:
    """Both parts, or the second alone; the figures also go to ``out/text.json``."""
    figures: dict[str, Any] = {}
    if HAS_TRANSFORMERS:
        figures["classifier"] = run_classifier(sizes, out, docs)
    figures["language model"] = run_language_model(sizes, out, docs)
    common.write_figures("text", figures, out)
    return figures


QUALITY = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}


def summary(figures: dict[str, Any]) -> str:
    """The figures as tables."""
    text = []
    for part, found in figures.items():
        text.append(f"{part}: {found['parameters']:,} weights, {found['outputs']:,} outputs a text")
        for name, p in found["posteriors"].items():
            c = p["certificate"]
            text += [
                f"\n{name}: {c['constraints']:,} rows of {c['examples']:,} texts; generic path: "
                f"{', '.join(c['generic']) or 'not needed'}",
                common.quality_table(p, QUALITY),
                "",
                common.auroc_table(p["auroc"]),
            ]
        text.append("\n" + common.seconds_line(found["seconds"]) + "\n")
    return "\n".join(text)


def main() -> None:
    chosen = common.options(__doc__)
    if not HAS_TRANSFORMERS:
        print(
            "transformers is not installed, so the classifier is left out; to have it, "
            "`pip install 'nullbayes[experiments]'`. The language model does not need it.\n"
        )
    sizes = SMALL if chosen.small else Sizes()
    print(summary(run(sizes, chosen.out, chosen.docs)))


if __name__ == "__main__":
    main()
