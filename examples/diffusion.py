"""A denoising diffusion model of handwritten digits that says which of its images to trust.

    python -m examples.diffusion [--small] [--docs]

A small U-Net with attention learns to predict the noise in scikit-learn's 8 × 8 digits; its forward pass draws a time
step and the noise for each image, so that the training loss is a function of the image alone. The posterior over all
weights keeps that loss for several frozen draws of each training image. Shown: how much the pixels of a generated
image change between networks that all keep the training losses, and that images ranked by their epistemic uncertainty
are also ranked by how much they look like digits to a classifier that the posterior knows nothing of.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.regression import spearman_corrcoef

import nullbayes as nb
from examples import _common as common
from examples._mosaic import grey, heat, mosaic
from examples._networks import Denoiser, denoising_loss, generate
from nullbayes import datasets, metrics

GROWTH = 1e-3  # of the mean training loss under linearised samples: sets the prior precision


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    train: int = 1000
    draws: int = 3  # time steps and noises for which each image's loss is kept
    generated: int = 300
    steps: int = 25  # of the reverse process
    scored: int = 8  # draws over which a generated image's uncertainty is averaged
    networks: int = 8  # sampled networks that draw the same images
    width: int = 24
    epochs: int = 100
    classifier_epochs: int = 40
    samples: int = 16
    memory: str = "3GB"


SMALL = Sizes(24, 2, 12, 4, 2, 3, 8, 2, 2, 4, "1GB")


# -- data and training -----------------------------------------------------------------------------


def train(images: Tensor, sizes: Sizes) -> Denoiser:
    """The denoiser, trained on ``images`` in [-1, 1]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Denoiser(sizes.width)
        common.trained(
            model,
            lambda index: denoising_loss(model(images[index]), images[index]).mean(),
            examples=len(images),
            epochs=sizes.epochs,
            batch_size=64,
            learning_rate=2e-3,
        )
    return model


def judge(digits: datasets.Dataset, epochs: int) -> nn.Module:
    """A classifier of digits, to look at generated ones."""
    images, labels = digits.train.inputs, digits.train.targets
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10),
        )  # fmt: skip
        common.trained(
            model,
            lambda index: F.cross_entropy(model(images[index]), labels[index]),
            examples=len(images),
            epochs=epochs,
            batch_size=64,
            learning_rate=3e-3,
            weight_decay=1e-2,
        )
    return model


def fit(model: Denoiser, images: Tensor, sizes: Sizes) -> nb.NullSpacePosterior:
    """Keeps the loss of every training image; the prior precision at which the losses of samples stand too."""
    posterior = nb.NullSpacePosterior(
        model,
        loss=denoising_loss,
        preserve="loss",
        randomness="frozen",
        draws=sizes.draws,
        memory=sizes.memory,
    )
    posterior.fit(list(images.split(100)), num_samples=sizes.samples, progress=False)
    for _ in range(4):  # the growth is second order, so inverse to the prior precision
        growth = posterior.certificate.score_loss / abs(posterior.certificate.network_score)
        if growth <= GROWTH:
            break
        posterior.prior_precision *= 1.05 * growth / GROWTH
    return posterior


# -- figures -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generated:
    """Images from the same noise by the trained network and by others; ``spread`` is the ranking."""

    images: Tensor  # (N, 1, 8, 8)
    others: Tensor  # (K, N, 1, 8, 8)
    start: Tensor  # (N, 1, 8, 8)

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of each pixel, (N, 1, 8, 8)."""
        return self.others.std(0)

    @property
    def spread(self) -> Tensor:
        """Variance of an image over the networks, summed over its pixels: ``(N,)``."""
        return self.others.var(0).flatten(1).sum(1)


def redrawn(model: Denoiser, weights: list[dict[str, Tensor]], start: Tensor, steps: int) -> Tensor:
    """The images that networks with other ``weights`` make of the same noise."""
    other, images = copy.deepcopy(model), []
    for state in weights:
        other.load_state_dict(state)
        images.append(generate(other, start, steps))
    return torch.stack(images)


def unprojected(posterior: nb.Posterior, model: Denoiser, count: int) -> list[dict[str, Tensor]]:
    """Networks drawn from the prior around the trained one: the same scale, nothing kept."""
    generator = torch.Generator().manual_seed(1)
    deviation = posterior.prior_precision**-0.5
    states = []
    for _ in range(count):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        for name, _ in model.named_parameters():
            state[name] += deviation * torch.randn(state[name].shape, generator=generator)
        states.append(state)
    return states


def own_loss(posterior: nb.Posterior, images: Tensor, draws: int) -> Tensor:
    """The denoising loss of ``images`` in [-1, 1] by the trained network, over frozen draws: ``(N,)``."""
    return torch.stack(
        [denoising_loss(posterior.predict(images, draw=d).point, images) for d in range(draws)]
    ).mean(0)


def quality(images: Tensor, classifier: nn.Module, train: Tensor) -> dict[str, Tensor]:
    """How much generated images look like digits: the classifier's doubt, and how far the nearest one is."""
    with torch.no_grad():
        log_p = classifier(images).log_softmax(1)
    distance = torch.cdist(images.flatten(1), train.flatten(1)).min(1).values
    return {
        "entropy": -(log_p * log_p.exp()).sum(1),
        "confidence": log_p.exp().max(1).values,
        "distance": distance,
    }


def ranking(score: Tensor, looks: dict[str, Tensor]) -> dict[str, float]:
    """Does an image with a low score look like a digit? Fifths of the ranking, and rank correlations."""
    order, few = score.argsort(), max(1, len(score) // 5)
    best, worst = order[:few], order[-few:]
    doubtful = looks["confidence"] < 0.8
    several = 0 < int(doubtful.sum()) < len(doubtful)
    found = metrics.ood_metrics(score[~doubtful], score[doubtful])["auroc"] if several else math.nan
    return {
        "entropy_correlation": float(spearman_corrcoef(score.double(), looks["entropy"].double())),
        "distance_correlation": float(
            spearman_corrcoef(score.double(), looks["distance"].double())
        ),
        "doubtful_auroc": found,
        "confidence_best": float(looks["confidence"][best].mean()),
        "confidence_worst": float(looks["confidence"][worst].mean()),
        "distance_best": float(looks["distance"][best].mean()),
        "distance_worst": float(looks["distance"][worst].mean()),
    }


def sampled_loss(posterior: nb.Posterior, images: Tensor) -> float:
    """Relative change of the mean loss of ``images``, for the sampled networks themselves."""
    prediction = posterior.predict(images, method="sampled")
    before = denoising_loss(prediction.point, images).double().mean()
    draws = range(posterior.num_samples)
    out = prediction.outputs
    after = [denoising_loss({k: v[s] for k, v in out.items()}, images) for s in draws]
    return float(torch.stack(after).double().mean() / before - 1)


# -- pictures ----------------------------------------------------------------------------------------


def ranked(made: Generated, out: Path, docs: bool, few: int = 14) -> None:
    """The most and the least certain images, with the standard deviation of each pixel."""
    order = made.spread.argsort()
    few = min(few, len(order) // 2)
    brightest = float(made.deviation[order[-few:]].quantile(0.995))
    rows = []
    for index in (order[:few], order[-few:]):
        rows += [grey(made.images[index, 0]), heat(made.deviation[index, 0], brightest)]
    labels = ["most certain", "deviation", "least certain", "deviation"]
    mosaic(rows, labels, [], "diffusion_ranked", out, docs, size=0.55)


def scatter(made: Generated, looks: dict[str, Tensor], out: Path, docs: bool) -> None:
    """Uncertainty against both measures of quality, image by image."""
    with common.drawing() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.9), layout="constrained")
        words = {
            "distance": "distance to the nearest training image",
            "entropy": "entropy of the classifier (nats)",
        }
        for axis, (name, label) in zip(axes, words.items(), strict=True):
            axis.scatter(made.spread, looks[name], s=6, alpha=0.5, color="#2060a0", linewidths=0)
            axis.set(xscale="log", xlabel="variance over sampled networks", ylabel=label)
        common.save_picture(figure, "diffusion_scatter", out, docs)


# -- the whole ---------------------------------------------------------------------------------------


def run(sizes: Sizes, out: Path, docs: bool = False) -> dict[str, Any]:
    """Train, fit, generate, measure, draw; the figures also go to ``out/diffusion.json``."""
    seconds: dict[str, float] = {}
    digits = datasets.digits(train=sizes.train, validation=100)
    images, test = digits.train.inputs * 2 - 1, digits.test.inputs * 2 - 1
    with common.clock(seconds, "training"):
        model, classifier = train(images, sizes), judge(digits, sizes.classifier_epochs)
    with common.clock(seconds, "fit"):
        posterior = fit(model, images, sizes)
    with common.clock(seconds, "generation"):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(sizes.generated, 1, 8, 8, generator=generator)
        made = Generated(
            generate(model, start, sizes.steps),
            redrawn(model, list(posterior.sample(sizes.networks)), start, sizes.steps),
            start,
        )
        free = unprojected(posterior, model, sizes.networks)
        loose = Generated(made.images, redrawn(model, free, start, sizes.steps), start)
    with common.clock(seconds, "figures"):
        looks = quality(made.images, classifier, digits.train.inputs)
        own = own_loss(posterior, made.images * 2 - 1, sizes.scored)
        known = quality(digits.test.inputs, classifier, digits.train.inputs)
        right = classifier(digits.test.inputs).argmax(1) == digits.test.targets
        certificate = posterior.certificate
        few = images[: min(len(images), 200)]
        figures: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "draws": sizes.draws,
            "certificate": certificate.as_dict(),
            "training_loss": {
                "mean": certificate.network_score,
                "first_order": certificate.drift / certificate.network_score,
                "linearised": certificate.score_loss / certificate.network_score,
                "sampled": sampled_loss(posterior, few),
            },
            "test_loss": {
                "mean": float(own_loss(posterior, test, sizes.draws).mean()),
                "sampled": sampled_loss(posterior, test[:200]),
            },
            "spread": {"posterior": float(made.spread.mean()), "prior": float(loose.spread.mean())},
            "ranking": {
                "variance over sampled networks": ranking(made.spread, looks),
                "the same, unprojected": ranking(loose.spread, looks),
                "the network's own loss": ranking(own, looks),
            },
            "classifier": {
                "test_accuracy": float(right.double().mean()),
                "test_confidence": float(known["confidence"].mean()),
                "test_distance": float(known["distance"].mean()),
                "generated_confidence": float(looks["confidence"].mean()),
                "generated_distance": float(looks["distance"].mean()),
            },
        }
    with common.clock(seconds, "pictures"):
        ranked(made, out, docs)
        scatter(made, looks, out, docs)
    figures["seconds"] = seconds
    common.write_figures("diffusion", figures, out)
    return figures


def summary(figures: dict[str, Any]) -> str:
    """The figures as tables."""
    c, loss, spread = figures["certificate"], figures["training_loss"], figures["spread"]
    rows = [["ranked by", "distance", "entropy", "AUROC", "confidence", "nearest digit"]]
    for name, r in figures["ranking"].items():
        correlations = [f"{r[k]:.2f}" for k in ("distance_correlation", "entropy_correlation")]
        fifths = [
            f"{r[f'{k}_best']:.2f} / {r[f'{k}_worst']:.2f}" for k in ("confidence", "distance")
        ]
        rows.append([name, *correlations, f"{r['doubtful_auroc']:.2f}", *fifths])
    judge = figures["classifier"]
    return "\n".join(
        [
            f"U-Net, {figures['parameters']:,} weights; {c['constraints']:,} rows ({figures['draws']} draws an image), "
            f"residual {c['residual']:.1e}, prior precision {c['prior_precision']:.3g}",
            f"training loss {loss['mean']:.3f}; relative change: first order {loss['first_order']:.1e}, linearised "
            f"{loss['linearised']:+.1e}, sampled networks {loss['sampled']:+.1e} "
            f"(test {figures['test_loss']['sampled']:+.1e})",
            f"variance of an image over networks {spread['posterior']:.2g}; unprojected {spread['prior']:.2g}",
            "",
            "rank correlations with distance and entropy; AUROC for images below 0.8 confidence; best / worst fifth:",
            common.table(rows),
            f"(test digits: confidence {judge['test_confidence']:.2f}, distance {judge['test_distance']:.2f}; all "
            f"generated: {judge['generated_confidence']:.2f}, {judge['generated_distance']:.2f})",
            "seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in figures["seconds"].items()),
        ]
    )


def main() -> None:
    """The command line."""
    chosen = common.options(__doc__)
    sizes = SMALL if chosen.small else Sizes()
    print(summary(run(sizes, chosen.out, chosen.docs)))


if __name__ == "__main__":
    main()
