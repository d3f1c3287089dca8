"""Per-pixel uncertainty of a U-Net that finds handwritten digits pasted on pictures of clothing.

    python -m examples.segmentation [--small] [--docs]

scikit-learn's digits (0 to 7; 8 and 9 are held out) lie on Fashion-MNIST's shirts, trousers, dresses and coats (shoes
and bags are held out). Every pixel is background or the class of its digit: outputs (B, 9, 28, 28). Three posteriors
are fitted: one keeps every image's loss, one the leading directions of every image's prediction, and one all
directions that matter (`directions="auto"`) of a few images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_jaccard_index

import nullbayes as nb
from examples import _common as common
from nullbayes import datasets, metrics
from nullbayes.posterior.prediction import make_prediction

HELD_OUT_DIGITS = (8, 9)
CLOTHING = (0, 1, 2, 3, 4, 6)  # Fashion-MNIST's classes that training has as backgrounds
SHOES_AND_BAGS = (5, 7, 8, 9)
CLASSES = 11 - len(HELD_OUT_DIGITS)  # background and the digits that stay
INK = 0.35  # a pixel belongs to a digit from this brightness on


BATCH = 20
CHECKED = 100  # training images that figures are given for


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    side: int = 28  # of the images
    train: int = 1000
    directions: int = 2
    few: int = 6  # images with all the directions that "auto" asks for, some 300 each
    validation: int = 48
    test: int = 150
    width: int = 40
    epochs: int = 30
    samples: int = 20
    memory: str = "2GB"


SMALL = Sizes(
    side=8, train=24, few=1, validation=8, test=12, width=8, epochs=3, samples=4, memory="500MB"
)


# -- data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenes:
    """Images (N, 1, H, W) in [0, 1] and the class of every pixel (N, H, W); 0 is background."""

    images: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int, limit: int | None = None) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self.images[:limit].split(size), self.masks[:limit].split(size), strict=True)
        return list(pairs)


def compose(digits: datasets.Split, backgrounds: Tensor, count: int, seed: int) -> Scenes:
    """``count`` scenes of two digits (labels from 0) on ``backgrounds`` (N, 1, H, W), each a bit under half as wide."""
    generator = torch.Generator().manual_seed(seed)
    side = backgrounds.shape[-1]
    smallest, sizes = 3 * side // 7, side // 7 + 1

    def chosen(high: int, size: int = 1) -> list[int]:
        return torch.randint(high, (size,), generator=generator).tolist()

    images, masks = torch.empty(count, 1, side, side), torch.zeros(count, side, side).long()
    for n in range(count):
        canvas = 0.7 * backgrounds[chosen(len(backgrounds))[0]]
        for which in chosen(len(digits), 2):
            size = smallest + chosen(sizes)[0]
            digit = datasets.rescaled(digits.inputs[which : which + 1], size)[0, 0]
            row, column = chosen(side - size + 1, 2)
            place = slice(row, row + size), slice(column, column + size)
            below = canvas[0][place]
            canvas[0][place] = below + digit * (1 - below)
            masks[n][place] = torch.where(digit > INK, digits.targets[which] + 1, masks[n][place])
        images[n] = canvas
    return Scenes(images, masks)


def make_data(sizes: Sizes, data_dir: str | None = None) -> dict[str, Scenes]:
    """Training, validation and test scenes, and three kinds that training never saw."""
    digits = datasets.digits(train=800, validation=200, held_out=HELD_OUT_DIGITS)
    cloth = datasets.fashion_mnist(data_dir, train=10_000)
    assert digits.held_out is not None

    def of(split: datasets.Split, classes: tuple[int, ...]) -> Tensor:
        return datasets.rescaled(
            split.inputs[torch.isin(split.targets, torch.tensor(classes))], sizes.side
        )

    known, unknown = of(cloth.test, CLOTHING), of(cloth.test, SHOES_AND_BAGS)
    strangers = datasets.Split(digits.held_out.inputs, digits.held_out.targets * 0)  # no class
    noise = datasets.noise_like(known[:200], seed=5)
    parts = {
        "train": (digits.train, of(cloth.train, CLOTHING), sizes.train),
        "validation": (digits.validation, of(cloth.validation, CLOTHING), sizes.validation),
        "test": (digits.test, known, sizes.test),
        "held-out digits": (strangers, known, sizes.test),
        "shoes and bags": (digits.test, unknown, sizes.test),
        "noise": (digits.test, noise, sizes.test),
    }
    return {name: compose(*part, seed=i) for i, (name, part) in enumerate(parts.items())}


# -- the network ---------------------------------------------------------------------------------


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """Three resolutions, each half the one before; 244,000 weights at width 40, few of them at full resolution."""

    def __init__(self, width: int, classes: int = CLASSES) -> None:
        super().__init__()
        half = width // 2
        self.stem = nn.Sequential(nn.Conv2d(1, half, 3, padding=1), nn.SiLU())
        self.down = nn.Conv2d(half, width, 2, stride=2)
        self.middle = block(width, width)
        self.deeper = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.bottom = block(2 * width, 2 * width)
        self.rise = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge = block(2 * width, width)
        self.up = nn.ConvTranspose2d(width, half, 2, stride=2)
        self.last = nn.Sequential(nn.Conv2d(2 * half, half, 3, padding=1), nn.SiLU())
        self.head = nn.Conv2d(half, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        full = self.stem(x)
        middle = self.middle(self.down(full))
        bottom = self.bottom(F.silu(self.deeper(middle)))
        merged = self.merge(torch.cat([self.rise(bottom), middle], 1))
        return self.head(self.last(torch.cat([self.up(merged), full], 1)))


def train(scenes: Scenes, sizes: Sizes) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet(sizes.width)

    def loss(index: Tensor) -> Tensor:
        return F.cross_entropy(model(scenes.images[index]), scenes.masks[index])

    return common.trained(
        model, loss, examples=len(scenes), epochs=sizes.epochs, batch_size=12, learning_rate=4e-3
    )


# -- figures -------------------------------------------------------------------------------------


def quality(probs: Tensor, masks: Tensor) -> dict[str, float]:
    """Mean IoU, and accuracy, NLL and ECE of pixels, from probabilities ``(B, O, H, W)``."""
    found = metrics.classification_metrics(probs.movedim(1, -1).flatten(0, -2), masks.flatten())
    iou = multiclass_jaccard_index(probs.argmax(1), masks, num_classes=probs.shape[1])
    return {"miou": float(iou), **{key: found[key] for key in ("accuracy", "nll", "ece", "brier")}}


@dataclass(frozen=True)
class Answers:
    """What a posterior, and the network alone, say of the same scenes at one prior precision."""

    probs: Tensor  # (N, O, H, W) predictive mean
    point: Tensor  # (N, O, H, W) probabilities of the network alone
    variance: Tensor  # (N, H, W) epistemic variance of the outputs, summed over classes
    total: Tensor  # (N, H, W) entropy of the predictive mean
    epistemic: Tensor  # (N, H, W) mutual information of label and weights

    @staticmethod
    def of(draws: common.Draws, alpha: float) -> Answers:
        parts = []
        for point, moved, _ in draws.at(alpha):
            m = make_prediction(draws.likelihood, point, moved, "linearised")
            parts.append((m.mean, point.softmax(1), m.variance.sum(1), m.total, m.epistemic))
        return Answers(*(torch.cat(column) for column in zip(*parts, strict=True)))


def scene_scores(a: Answers) -> dict[str, Tensor]:
    """Doubt about each scene ``(N,)``: three of the network's own, two of the posterior's."""
    entropy = -(a.point * a.point.clamp_min(1e-30).log()).sum(1)
    doubt = 1 - a.point.max(1).values
    # What the network takes for a digit: the many sure background pixels do not count here.
    digit = (a.point.argmax(1) > 0).flatten(1)
    return {
        "1 - confidence": doubt.flatten(1).mean(1),
        "entropy": entropy.flatten(1).mean(1),
        "1 - confidence, digits": (doubt.flatten(1) * digit).sum(1) / digit.sum(1).clamp_min(1),
        "output variance": a.variance.flatten(1).sum(1),
        "mutual information": a.epistemic.flatten(1).mean(1),
    }


def pixel_scores(a: Answers, where: Tensor) -> dict[str, Tensor]:
    """Doubt about each of the pixels ``where (N, H, W)`` holds."""
    doubt = 1 - a.point.max(1).values
    every = {"1 - confidence": doubt, "predictive entropy": a.total}
    every |= {"output variance": a.variance, "mutual information": a.epistemic}
    return {name: score[where] for name, score in every.items()}


def detection(kinds: dict[str, Answers], data: dict[str, Scenes]) -> dict[str, Any]:
    """AUROC of every score: unseen scenes, pixels of unknown digits, pixels that are wrong."""
    test, truth = kinds["test"], data["test"].masks
    wrong = test.point.argmax(1) != truth
    ink = data["held-out digits"].masks > 0
    outside = {kind: a for kind, a in kinds.items() if kind != "test"}
    return {
        "scenes": {
            k: common.auroc(scene_scores(test), scene_scores(a)) for k, a in outside.items()
        },
        "pixels": {
            "unknown digits": common.auroc(
                pixel_scores(test, truth > 0), pixel_scores(kinds["held-out digits"], ink)
            ),
            "errors": common.auroc(pixel_scores(test, ~wrong), pixel_scores(test, wrong)),
        },
    }


@dataclass(frozen=True)
class Kept:
    """One posterior to fit: what is kept, of how many training images."""

    preserve: str
    directions: int | Literal["auto"] | None
    images: int

    @property
    def name(self) -> str:
        some = "" if self.directions is None else f", directions={self.directions!r}"
        return f"preserve={self.preserve!r}{some}"


def fit(model: nn.Module, train: Scenes, kept: Kept, sizes: Sizes) -> nb.NullSpacePosterior:
    posterior = nb.NullSpacePosterior(
        model, preserve=kept.preserve, directions=kept.directions, memory=sizes.memory
    )
    batches = train.batches(BATCH, kept.images)
    return posterior.fit(batches, num_samples=sizes.samples, progress=False)


def examine(
    posterior: nb.NullSpacePosterior, data: dict[str, Scenes], constrained: int
) -> tuple[dict[str, Any], dict[str, Answers]]:
    """Every figure of one posterior; answers for the unseen scenes at the calibrated scale."""
    shown = min(constrained, CHECKED)
    train = common.Draws(posterior, data["train"].batches(BATCH, shown))
    check = common.LossCheck(train)
    seen = common.Draws(posterior, data["test"].batches(BATCH))
    table = {}
    for name, alpha in common.scales(posterior, check, data["validation"].batches(BATCH)).items():
        posterior.prior_precision = alpha
        trained, test = Answers.of(train, alpha), Answers.of(seen, alpha)
        table[name] = {
            "prior_precision": alpha,
            "training_loss": check.changes(network=2 * BATCH),
            "train": quality(trained.probs, data["train"].masks[:shown]),
            "test": quality(test.probs, data["test"].masks),
        }
    answers = {"test": test}
    for kind in ("held-out digits", "shoes and bags", "noise"):
        draws = common.Draws(posterior, data[kind].batches(BATCH))
        answers[kind] = Answers.of(draws, alpha)
    point = {
        "train": quality(trained.point, data["train"].masks[:shown]),
        "test": quality(test.point, data["test"].masks),
    }
    figures = {
        "constrained": constrained,
        "checked": shown,
        "certificate": posterior.certificate.as_dict(),
        "point": point,
        "scales": table,
        "auroc": detection(answers, data),
    }
    return figures, answers


# -- pictures ------------------------------------------------------------------------------------


def picture(data: dict[str, Scenes], kinds: dict[str, Answers], out: Path, docs: bool) -> Path:
    """Two scenes of each kind: image, truth, prediction, the network's doubt, mutual information."""
    titles = ("image", "truth", "prediction", "1 - confidence", "mutual information")
    with common.drawing() as plt:
        figure, axes = plt.subplots(
            2 * len(kinds), len(titles), figsize=(7.6, 2.9 * len(kinds)), layout="constrained"
        )
        most = max(float(a.epistemic[:2].max()) for a in kinds.values())
        classes = {"cmap": "tab10", "vmin": 0, "vmax": 9, "interpolation": "nearest"}
        for k, (kind, a) in enumerate(kinds.items()):
            scenes = data[kind]
            for i in range(2):
                row = axes[2 * k + i]
                truth = scenes.masks[i].clone()
                if kind == "held-out digits":
                    truth[truth > 0] = 7  # grey: no class of the network's
                row[0].imshow(scenes.images[i, 0].numpy(), cmap="gray", vmin=0, vmax=1)
                row[1].imshow(truth.numpy(), **classes)
                row[2].imshow(a.point[i].argmax(0).numpy(), **classes)
                row[3].imshow(1 - a.point[i].max(0).values.numpy(), cmap="magma", vmin=0, vmax=0.8)
                row[4].imshow(a.epistemic[i].numpy(), cmap="magma", vmin=0, vmax=most)
                for axis in row:
                    axis.set(xticks=[], yticks=[])
            axes[2 * k][0].set_ylabel(kind)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, fontsize=9)
        return common.save_picture(figure, "segmentation", out, docs, dpi=80)


# -- the whole -----------------------------------------------------------------------------------


def run(sizes: Sizes, out: Path, docs: bool = False) -> dict[str, Any]:
    """Train, fit, measure, draw; the figures also go to ``out/segmentation.json``."""
    seconds: dict[str, float] = {}
    data = make_data(sizes)
    with common.clock(seconds, "training"):
        model = train(data["train"], sizes)
    figures: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "outputs": CLASSES * sizes.side**2,
        "images": {kind: len(scenes) for kind, scenes in data.items()},
        "posteriors": {},
    }
    for kept in (
        Kept("loss", None, sizes.train),
        Kept("predictions", sizes.directions, sizes.train),
        Kept("predictions", "auto", sizes.few),
    ):
        with common.clock(seconds, f"fit, {kept.name}"):
            posterior = fit(model, data["train"], kept, sizes)
        with common.clock(seconds, f"figures, {kept.name}"):
            found, answers = examine(posterior, data, kept.images)
        figures["posteriors"][kept.name] = found
        if kept.preserve == "loss":
            picture(data, answers, out, docs)
        del posterior  # and its rows, before the next
    figures["seconds"] = seconds
    common.write_figures("segmentation", figures, out)
    return figures


QUALITY = {"miou": "mIoU", "accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}


def summary(figures: dict[str, Any]) -> str:
    """The figures as tables."""
    text = [f"U-Net, {figures['parameters']:,} weights, {figures['outputs']:,} outputs an image"]
    for name, p in figures["posteriors"].items():
        c = p["certificate"]
        text += [
            f"\n{name}: {c['constraints']:,} rows of {p['constrained']} images, "
            f"{c['discarded_trace']:.1%} of the Hessians' trace left out",
            common.quality_table(p, QUALITY),
            "",
            common.auroc_table({**p["auroc"]["scenes"]}),
            "",
            common.auroc_table(p["auroc"]["pixels"]),
        ]
    return "\n".join([*text, "\n" + common.seconds_line(figures["seconds"])])


def main() -> None:
    chosen = common.options(__doc__)
    sizes = SMALL if chosen.small else Sizes()
    print(summary(run(sizes, chosen.out, chosen.docs)))


if __name__ == "__main__":
    main()
