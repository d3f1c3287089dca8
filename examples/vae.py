"""A variational autoencoder on Fashion-MNIST that knows which pixels, samples and images it is unsure of.

    python -m examples.vae [--small] [--docs]

A convolutional encoder and decoder (1.7 million weights), the Bernoulli ELBO as the loss, the latent noise drawn in
the forward pass. The posterior keeps the loss of every training image, one row each, with the noise frozen. Shown:
uncertainty of reconstructions pixel by pixel, of images decoded from the prior, and along interpolations; and novelty
by the epistemic variance of the ELBO, against the ELBO itself, which takes some images of other kinds for its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.regression import spearman_corrcoef

import nullbayes as nb
from examples import _common as common
from examples._mosaic import grey, heat, mosaic
from examples._networks import Vae, negative_elbo
from nullbayes import datasets, metrics

GROWTH = 1e-3  # of the mean training loss under linearised samples: sets the prior precision


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    train: int = 4000
    test: int = 500
    kind: int = 200  # images of each unseen kind
    decoded: int = 200  # images from the prior
    pairs: int = 40
    width: int = 32
    hidden: int = 256
    latent: int = 16
    epochs: int = 40
    samples: int = 16
    memory: str = "3GB"


SMALL = Sizes(24, 12, 8, 20, 3, 4, 12, 3, 2, 4, "1GB")


# -- data and training -----------------------------------------------------------------------------


def make_data(sizes: Sizes, data_dir: str | None = None) -> dict[str, Tensor]:
    """Training and test images, and seven kinds that training never saw."""
    cloth = datasets.fashion_mnist(data_dir, train=sizes.train, test=sizes.test)
    digits, test = datasets.digits().test.inputs, cloth.test.inputs
    few = test[: sizes.kind]
    return {
        "train": cloth.train.inputs,
        "test": test,
        "digits": datasets.rescaled(digits[: sizes.kind], 28),
        "rotated 90°": datasets.rotated(few, 90),
        "upside down": few.flip(2),
        "shuffled": shuffled(few, seed=3),
        "inverted": 1 - few,
        "noise": datasets.noise_like(few, seed=4),
        "dimmed": 0.4 * few,
    }


def shuffled(images: Tensor, seed: int) -> Tensor:
    """Each image with its sixteen patches of 7 × 7 in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    patches = F.unfold(images, 7, stride=7)  # (N, 49, 16)
    order = torch.rand(len(images), 16, generator=generator).argsort(1)
    patches = patches.gather(2, order[:, None].expand_as(patches))
    return F.fold(patches, 28, 7, stride=7)


def train(images: Tensor, sizes: Sizes) -> Vae:
    """The autoencoder, trained on ``images``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Vae(sizes.width, sizes.hidden, sizes.latent)
        common.trained(
            model,
            lambda index: negative_elbo(model(images[index]), images[index]).mean(),
            examples=len(images),
            epochs=sizes.epochs,
            batch_size=100,
            learning_rate=2e-3,
            weight_decay=1e-3,
        )
    return model


def fit(model: Vae, images: Tensor, sizes: Sizes) -> nb.NullSpacePosterior:
    """Keeps the loss of every training image; the prior precision at which the losses of samples stand too."""
    posterior = nb.NullSpacePosterior(
        model, loss=negative_elbo, preserve="loss", randomness="frozen", memory=sizes.memory
    )
    posterior.fit(list(images.split(100)), num_samples=sizes.samples, progress=False)
    for _ in range(4):  # the growth is second order, so inverse to the prior precision
        growth = posterior.certificate.score_loss / abs(posterior.certificate.network_score)
        if growth <= GROWTH:
            break
        posterior.prior_precision *= 1.05 * growth / GROWTH
    return posterior


# -- figures -----------------------------------------------------------------------------------------


def draw_losses(posterior: nb.Posterior, x: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Losses of the trained network ``(B,)`` and of the samples ``(S, B)``, a piece at a time."""
    point, moved = [], []
    for piece in x.split(100):
        prediction = posterior.predict(piece, method=method)
        point.append(negative_elbo(prediction.point, piece))
        draws = range(posterior.num_samples)
        out = prediction.outputs
        moved.append(
            torch.stack([negative_elbo({k: v[s] for k, v in out.items()}, piece) for s in draws])
        )
    return torch.cat(point).double(), torch.cat(moved, dim=1).double()


def preserved(posterior: nb.Posterior, images: Tensor) -> dict[str, float]:
    """How far samples move losses, relative to each: linearised and in the network itself."""
    certificate = posterior.certificate
    point, linearised = draw_losses(posterior, images, "linearised")
    _, sampled = draw_losses(posterior, images, "sampled")
    return {
        "mean": float(point.mean()),
        "first_order": certificate.drift / certificate.network_score,
        "linearised": float(linearised.mean() / point.mean() - 1),
        "linearised_worst": float((linearised.mean(0) / point - 1).abs().max()),
        "sampled": float(sampled.mean() / point.mean() - 1),
        "sampled_rms": float((sampled / point - 1).square().mean().sqrt()),
    }


def pixel_deviation(logits: Tensor) -> Tensor:
    """Standard deviation of the pixels' probabilities over draws ``(S, B, 1, 28, 28)``."""
    return logits.sigmoid().std(0)


def scores(posterior: nb.Posterior, x: Tensor) -> dict[str, Tensor]:
    """What may tell unseen kinds of images: ``(B,)`` each, larger is stranger."""
    found: dict[str, list[Tensor]] = {"ELBO": [], "pixel variance": [], "ELBO variance": []}
    for piece in x.split(100):
        prediction = posterior.predict(piece)
        found["ELBO"].append(negative_elbo(prediction.point, piece))
        variance = pixel_deviation(prediction.outputs["logits"]).square()
        found["pixel variance"].append(variance.flatten(1).sum(1))
        found["ELBO variance"].append(posterior.novelty(piece, score="loss"))
    return {name: torch.cat(values) for name, values in found.items()}


def detection(posterior: nb.Posterior, data: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """AUROC of every score for every unseen kind."""
    known = scores(posterior, data["test"])
    out: dict[str, dict[str, float]] = {}
    for kind, images in data.items():
        if kind in ("train", "test"):
            continue
        strange = scores(posterior, images)
        out[kind] = {n: metrics.ood_metrics(known[n], strange[n])["auroc"] for n in known}
    return out


@dataclass(frozen=True)
class Decoded:
    """Images from codes: probabilities and their standard deviation (N, 28, 28), and one figure each (N,)."""

    images: Tensor
    deviation: Tensor

    @property
    def doubt(self) -> Tensor:
        return self.deviation.square().flatten(1).sum(1)


def decoded(posterior: nb.Posterior, codes: Tensor) -> Decoded:
    """Decode ``codes (N, latent)`` under the linearised posterior."""
    parts = [posterior.predict({"z": piece}) for piece in codes.split(100)]
    images = torch.cat([p.point["logits"].sigmoid() for p in parts])
    deviation = torch.cat([pixel_deviation(p.outputs["logits"]) for p in parts])
    return Decoded(images[:, 0], deviation[:, 0])


def from_prior(
    posterior: nb.Posterior, sizes: Sizes, train: Tensor
) -> tuple[dict[str, float], Decoded]:
    """Images decoded from the prior, in the order of their uncertainty, and whether that order means something."""
    generator = torch.Generator().manual_seed(7)
    made = decoded(posterior, torch.randn(sizes.decoded, sizes.latent, generator=generator))
    order = made.doubt.argsort()
    made = Decoded(made.images[order], made.deviation[order])
    distance = torch.cdist(made.images.flatten(1), train.flatten(1)).min(1).values
    # To compare with: grey pixels can move further than black or white ones, bright images lie further from all others.
    controls = {
        "greyness": (made.images * (1 - made.images)).flatten(1).sum(1),
        "brightness": made.images.flatten(1).sum(1),
    }
    few = max(1, len(order) // 5)
    return {
        "rank_correlation": float(spearman_corrcoef(made.doubt, distance)),
        **{f"{k}_correlation": float(spearman_corrcoef(v, distance)) for k, v in controls.items()},
        "distance_most_certain": float(distance[:few].mean()),
        "distance_least_certain": float(distance[-few:].mean()),
    }, made


def interpolated(
    posterior: nb.Posterior, test: Tensor, pairs: int
) -> tuple[dict[str, Any], Decoded]:
    """Straight lines through the codes of pairs of test images: between them (0 to 1) and beyond."""
    mean = posterior.predict(test[: 2 * pairs]).point["mean"]
    a, b = mean[:pairs], mean[pairs : 2 * pairs]
    t = torch.linspace(-1, 2, 13)
    made = decoded(posterior, (a[:, None] + (b - a)[:, None] * t[:, None]).flatten(0, 1))
    along = made.doubt.reshape(-1, len(t))
    along = along / (0.5 * (along[:, 4:5] + along[:, 8:9]))  # 1 at the test images themselves
    return {
        "position": t.tolist(),
        "variance": along.median(0).values.tolist(),
        "quartiles": along.quantile(torch.tensor([0.25, 0.75]), dim=0).tolist(),
        "beyond_above_between": float(
            (0.5 * (along[:, 0] + along[:, -1]) > along[:, 6]).double().mean()
        ),
    }, made


# -- pictures ----------------------------------------------------------------------------------------


def reconstructions(
    posterior: nb.Posterior, data: dict[str, Tensor], out: Path, docs: bool
) -> None:
    """Of each kind three images: what goes in, what comes out, and the standard deviation of each pixel."""
    kinds = [kind for kind in data if kind != "train"]
    predicted = [posterior.predict(data[kind][:3]) for kind in kinds]
    maps = [pixel_deviation(p.outputs["logits"])[:, 0] for p in predicted]
    brightest = float(torch.cat(maps).quantile(0.999))
    rows = []
    for kind, prediction, deviation in zip(kinds, predicted, maps, strict=True):
        inside, outside = data[kind][:3, 0], prediction.point["logits"][:, 0].sigmoid()
        tiles = [grey(inside), grey(outside), heat(deviation, brightest)]
        rows.append(torch.stack(tiles, dim=1).flatten(0, 1))
    heads = ["image", "decoded", "deviation"] * 3
    mosaic(rows, kinds, heads, "vae_reconstructions", out, docs)


def strips(
    made: Decoded,
    chosen: dict[str, list[int]],
    heads: list[str],
    name: str,
    out: Path,
    docs: bool,
) -> None:
    """Rows of images by label, each above a row of their standard deviations."""
    shown = torch.tensor([i for row in chosen.values() for i in row])
    brightest = float(made.deviation[shown].quantile(0.999))
    rows, labels = [], []
    for label, row in chosen.items():
        rows += [grey(made.images[row]), heat(made.deviation[row], brightest)]
        labels += [label, "deviation"]
    mosaic(rows, labels, heads, name, out, docs)


def bars(auroc: dict[str, dict[str, float]], out: Path, docs: bool) -> None:
    """AUROC by kind and score."""
    with common.drawing() as plt:
        figure, axis = plt.subplots(figsize=(7.5, 2.8), layout="constrained")
        names = list(next(iter(auroc.values())))
        for i, (name, colour) in enumerate(
            zip(names, ("#888888", "#d0a040", "#2060a0"), strict=True)
        ):
            at = [k + 0.27 * (i - 1) for k in range(len(auroc))]
            axis.bar(at, [v[name] for v in auroc.values()], 0.25, label=name, color=colour)
        axis.axhline(0.5, color="black", linewidth=0.6, linestyle=":")
        axis.set(ylabel="AUROC", ylim=(0, 1), xticks=range(len(auroc)))
        axis.set_xticklabels(list(auroc), fontsize=8)
        axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        common.save_picture(figure, "vae_novelty", out, docs)


# -- the whole ---------------------------------------------------------------------------------------


def run(sizes: Sizes, out: Path, docs: bool = False) -> dict[str, Any]:
    """Train, fit, measure, draw; the figures also go to ``out/vae.json``."""
    seconds: dict[str, float] = {}
    data = make_data(sizes)
    with common.clock(seconds, "training"):
        model = train(data["train"], sizes)
    with common.clock(seconds, "fit"):
        posterior = fit(model, data["train"], sizes)
    with common.clock(seconds, "figures"):
        auroc = detection(posterior, data)
        prior, made = from_prior(posterior, sizes, data["train"])
        between, path = interpolated(posterior, data["test"], sizes.pairs)
        figures: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "outputs": 28 * 28 + 2 * sizes.latent,
            "certificate": posterior.certificate.as_dict(),
            "training_loss": preserved(posterior, data["train"][: 4 * sizes.kind]),
            "test_elbo": preserved(posterior, data["test"]),
            "auroc": auroc,
            "mean_auroc": {
                n: math.fsum(v[n] for v in auroc.values()) / len(auroc)
                for n in next(iter(auroc.values()))
            },
            "from_prior": prior,
            "interpolation": between,
        }
    with common.clock(seconds, "pictures"):
        reconstructions(posterior, data, out, docs)
        last = len(made.images)
        ends = {"most certain": range(10), "least certain": range(last - 10, last)}
        strips(made, {k: list(v) for k, v in ends.items()}, [], "vae_samples", out, docs)
        heads = [f"{t:g}" for t in between["position"]]
        lines = {
            f"pair {i + 1}": list(range(i * len(heads), (i + 1) * len(heads)))
            for i in range(min(3, sizes.pairs))
        }
        strips(path, lines, heads, "vae_interpolation", out, docs)
        bars(auroc, out, docs)
    figures["seconds"] = seconds
    common.write_figures("vae", figures, out)
    return figures


def summary(figures: dict[str, Any]) -> str:
    """The figures as tables."""
    c, train, test = figures["certificate"], figures["training_loss"], figures["test_elbo"]
    rows = [["", "-ELBO", "first order", "linearised", "worst image", "sampled network"]]
    for name, v in (("train", train), ("test", test)):
        first = f"{v['first_order']:.1e}" if name == "train" else ""
        changes = [f"{v[k]:+.1e}" for k in ("linearised", "linearised_worst", "sampled")]
        rows.append([name, f"{v['mean']:.2f}", first, *changes])
    names = list(figures["mean_auroc"])
    auroc = [["AUROC", *names]]
    auroc += [[k, *(f"{v[n]:.3f}" for n in names)] for k, v in figures["auroc"].items()]
    auroc.append(["mean", *(f"{figures['mean_auroc'][n]:.3f}" for n in names)])
    prior, between = figures["from_prior"], figures["interpolation"]
    return "\n".join(
        [
            f"VAE, {figures['parameters']:,} weights; {c['constraints']:,} rows, residual {c['residual']:.1e}, prior "
            f"precision {c['prior_precision']:.3g}",
            "relative change of the loss under the posterior:",
            common.table(rows),
            "",
            common.table(auroc),
            "",
            "decoded from the prior: distance to the nearest training image "
            f"{prior['distance_most_certain']:.2f} for the most certain fifth, "
            f"{prior['distance_least_certain']:.2f} for the least certain; rank correlation "
            f"{prior['rank_correlation']:.2f} (of greyness {prior['greyness_correlation']:.2f}, of brightness "
            f"{prior['brightness_correlation']:.2f})",
            "along lines through two test images, variance relative to theirs: "
            + ", ".join(
                f"{t:g}: {v:.2f}"
                for t, v in zip(between["position"], between["variance"], strict=True)
                if t in (-1, -0.5, 0, 0.5, 1, 1.5, 2)
            ),
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
