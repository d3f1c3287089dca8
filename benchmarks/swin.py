"""28 million weights: a Swin-T whose training losses, or predictions, are kept; time, memory, quality.

    python -m benchmarks.swin [--loss-examples 512] [--prediction-examples 256] [--samples 10]

Swin-T for 32 × 32 images (27.5 M weights; it needs `transformers`), trained on Fashion-MNIST once and kept under
`out/benchmarks`. Each fit is a fresh process, so that its peak memory is its own; the fits at the default `delta`
also predict: test images, images from elsewhere, the prior precision chosen on validation images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nullbayes as nb
from benchmarks import common
from benchmarks.stages import forget_peak, peak_resident, stage_clock
from benchmarks.swin_page import TARGETS, draw, report
from nullbayes import datasets, metrics
from nullbayes.demo.running import Clock
from nullbayes.demo.tasks import ANGLES
from nullbayes.fit.target import DELTA

CACHE = Path(__file__).parent.parent / "out" / "benchmarks"
# Patches of 2 and windows of 2: the last stage has 2 × 2 tokens, so larger windows do not fit the image. Eager
# attention can be differentiated in every mode. Stochastic depth would only slow so short a training.
CONFIG: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "window_size": 2,
    "num_labels": 10,
    "drop_path_rate": 0.0,
    "attn_implementation": "eager",
}
RECIPE: dict[str, Any] = {
    "batch": 32,
    "learning_rate": 5e-4,
    "weight_decay": 0.05,
    "warm_up": 0.1,
    "clip": 1.0,
    "augmentation": "flip",
}
FIT_BATCH = 32
MEAN, SD = 0.2860, 0.3530  # of Fashion-MNIST's pixels


# -- the network ---------------------------------------------------------------------------------


def prepare(images: Tensor) -> Tensor:
    """Images ``(N, 1, 28, 28)`` in [0, 1] as the network takes them: ``(N, 3, 32, 32)``, standardised."""
    resized = datasets.rescaled(images, CONFIG["image_size"])
    return ((resized - MEAN) / SD).repeat(1, 3, 1, 1)


def untrained_swin() -> nn.Module:
    try:
        from transformers import SwinConfig, SwinForImageClassification
    except ImportError as error:
        raise SystemExit(
            "benchmarks.swin needs transformers: pip install 'nullbayes[experiments]'"
        ) from error
    model: nn.Module = SwinForImageClassification(SwinConfig(**CONFIG))
    return model


def logits(model: nn.Module, images: Tensor) -> Tensor:
    out: Tensor = model(pixel_values=images).logits
    return out


def cache_path(images: int, epochs: int, seed: int) -> Path:
    """One file per choice of settings: another choice never finds it."""
    settings = {"images": images, "epochs": epochs, "seed": seed, **CONFIG, **RECIPE}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return CACHE / f"swin-{key}.safetensors"


def trained_swin(images: int, epochs: int, seed: int) -> Path:
    """The file with the weights of a Swin-T trained on the first ``images`` training images; trained if need be."""
    path = cache_path(images, epochs, seed)
    if path.is_file():
        return path
    data = datasets.fashion_mnist(train=images, seed=seed)
    inputs, targets = prepare(data.train.inputs), data.train.targets
    test = prepare(data.validation.inputs[:500]), data.validation.targets[:500]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = untrained_swin()
        optimiser = torch.optim.AdamW(
            model.parameters(),
            lr=RECIPE["learning_rate"],
            weight_decay=RECIPE["weight_decay"],
            fused=True,
        )
        steps = epochs * -(-images // RECIPE["batch"])
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser,
            RECIPE["learning_rate"],
            total_steps=steps,
            pct_start=RECIPE["warm_up"],
            cycle_momentum=False,
        )
        started = time.perf_counter()
        for epoch in range(epochs):
            model.train()
            total = 0.0
            for index in torch.randperm(images).split(RECIPE["batch"]):
                x = inputs[index]
                x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
                optimiser.zero_grad()
                loss = nn.functional.cross_entropy(logits(model, x), targets[index])
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), RECIPE["clip"])
                optimiser.step()
                schedule.step()
                total += float(loss.detach()) * len(index)
            model.eval()
            accuracy = float((forward(model, test[0]).argmax(1) == test[1]).double().mean())
            print(
                f"epoch {epoch + 1}/{epochs}: loss {total / images:.3f}, accuracy {accuracy:.3f}, "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
        seconds = time.perf_counter() - started
    CACHE.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    tensors = {name: t.detach().clone().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, temporary, metadata={"seconds": f"{seconds:.0f}"})
    temporary.replace(path)
    return path


def load_swin(path: str | Path) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = untrained_swin()
    model.load_state_dict(load_file(path))
    return model.eval()


def forward(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([logits(model, part) for part in images.split(64)])


# -- data ----------------------------------------------------------------------------------------


def write_images(path: Path, options: argparse.Namespace) -> dict[str, int]:
    """The images that the fits need, ready for the network, in one file: their peaks hold nothing else."""
    n = options.test_images
    data = datasets.fashion_mnist(train=options.train_images, validation=1000, seed=options.seed)
    # The first validation images were looked at while training.
    val, test = data.validation[-options.validation_images :], data.test[:n]
    fits = max(options.loss_examples, options.prediction_examples)
    few = max(1, n // 2)
    digits = datasets.digits(train=1, validation=0, seed=options.seed).test.inputs[:few]
    turned = data.test.inputs[n : n + max(1, few // len(ANGLES))]
    shifts = {
        "digits": datasets.rescaled(digits, 28),
        "rotated": datasets.rotated(turned, ANGLES),
        "noise": datasets.noise_like(data.test.inputs[:few], seed=options.seed + 2),
    }
    stored = {
        "train": (prepare(data.train.inputs[:fits]), data.train.targets[:fits].clone()),
        "validation": (prepare(val.inputs), val.targets.clone()),
        "test": (prepare(test.inputs), test.targets.clone()),
        "shifts": {key: prepare(images) for key, images in shifts.items()},
    }
    torch.save(stored, path)
    counts = {"validation": len(val), "test": len(test)}
    return counts | {key: len(images) for key, images in shifts.items()}


# -- one fit in a process of its own -------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What is kept of how many training images, and where the null space ends."""

    name: str
    preserve: str
    directions: str | None
    examples: int
    delta: float
    quality: bool  # whether it also predicts


def measure(
    setting: Setting, weights: str, images: str, samples: int, memory: str, tolerance: float
) -> dict[str, Any]:
    """Fit; then, where asked for, choose the prior precision and predict."""
    model, data = load_swin(weights), torch.load(images, weights_only=True)
    x, y = (t[: setting.examples].clone() for t in data["train"])
    posterior = nb.NullSpacePosterior(
        model,
        preserve=setting.preserve,
        directions=setting.directions,
        forward=logits,
        delta=setting.delta,
        tolerance=tolerance,
        memory=memory,
    )
    batches = list(zip(x.split(FIT_BATCH), y.split(FIT_BATCH), strict=True))
    forget_peak()
    with stage_clock() as stages:
        started, cpu = time.perf_counter(), time.process_time()
        posterior.fit(batches, num_samples=samples, progress=False)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    certificate = posterior.certificate
    result: dict[str, Any] = {
        **asdict(setting),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "stages": stages,
        "peak": peak_resident(),
        "certificate": certificate.as_dict(),
    }
    say(setting, f"fitted in {seconds:.0f} s")
    print(certificate, flush=True)
    if setting.quality:
        result |= quality(setting, posterior, model, data)
    return result


def say(setting: Setting, text: str) -> None:
    print(f"{setting.name}, delta = {setting.delta:g}: {text}", flush=True)


def quality(
    setting: Setting, posterior: nb.NullSpacePosterior, model: nn.Module, data: dict[str, Any]
) -> dict[str, Any]:
    """Figures on test images and on images from elsewhere, at the prior precision that validation images choose."""
    clock = Clock()
    validation = zip(*(t.split(FIT_BATCH) for t in data["validation"]), strict=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", nb.errors.NullBayesWarning)
        path = posterior.calibrate(list(validation), progress=False)
    say(setting, f"prior precision {path.start:.3g} -> {posterior.prior_precision:.3g}")
    clock.lap("calibration")
    test, labels = data["test"]
    point = forward(model, test).softmax(-1)
    known = 1 - point.max(-1).values
    methods: dict[str, Any] = {
        "point estimate": metrics.classification_metrics(point, labels)
        | {
            "auroc": {
                key: auroc(known, 1 - forward(model, x).softmax(-1).max(-1).values)
                for key, x in data["shifts"].items()
            }
        }
    }
    clock.lap("point estimate")
    for method in ("linearised", "sampled"):
        probs, inside = predicted(posterior, test, method)
        figures: dict[str, Any] = metrics.classification_metrics(probs, labels)
        figures["auroc"] = {
            key: auroc(inside, predicted(posterior, x, method)[1])
            for key, x in data["shifts"].items()
        }
        methods[method] = figures
        say(setting, f"{method} predictions in {clock.lap(method):.0f} s")
    few = test[:4]
    novelty, drawn = posterior.novelty(few).double(), predicted(posterior, few, "linearised")[1]
    start = min(
        range(len(path.nll)), key=lambda i: abs(math.log(path.prior_precision[i] / path.start))
    )
    return {
        "methods": methods,
        "calibrated": posterior.certificate.as_dict(),
        "calibration": path.as_dict(),
        "validation_nll": {
            "point": path.point["nll"],
            "evidence": path.nll[start],
            "calibrated": path.nll[path.chosen],
        },
        "warnings": [str(w.message) for w in caught],
        "novelty_against_draws": float(((novelty - drawn) / drawn).abs().max()),
        "quality_seconds": clock.seconds,
    }


def predicted(posterior: Any, images: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Mean probabilities, and novelty: what an observation of the logits would tell of the weights, in nats.

    From one set of draws: `posterior.novelty` gives the same figure for linearised draws, at the price of
    another pass over the images.
    """
    weights = sum(float(p.detach().double().square().sum()) for p in posterior.model.parameters())
    widen = posterior.prior_precision * weights / max(1, posterior.certificate.rank)
    means, scores = [], []
    for batch in images.split(FIT_BATCH):
        prediction = posterior.predict(batch, method=method)
        means.append(prediction.mean)
        moved = (prediction.outputs - prediction.point).double()
        moved -= moved.mean(-1, keepdim=True)
        told = torch.einsum("sbo,tbo->bst", moved, moved) * (widen / len(moved))
        scores.append(0.5 * torch.logdet(told + torch.eye(len(moved), dtype=told.dtype)))
    return torch.cat(means), torch.cat(scores)


def auroc(inside: Tensor, outside: Tensor) -> float:
    return metrics.ood_metrics(inside, outside)["auroc"]


# -- running and reporting -----------------------------------------------------------------------


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss-examples", type=int, default=512)
    parser.add_argument("--prediction-examples", type=int, default=256)
    parser.add_argument(
        "--directions", choices=("auto", "all"), default="auto", help="of each prediction"
    )
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--memory", default="11GB", help="beside the process itself, 0.6 GB")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="residual asked for")
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--validation-images", type=int, default=250)
    parser.add_argument("--test-images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("loss", "predictions"), help="one of the two settings")
    parser.add_argument("--no-quality", action="store_true", help="fit only")
    parser.add_argument("--out", default="swin", help="of the files under benchmarks/results")
    return parser.parse_args()


def main() -> None:
    options = asked()
    weights = trained_swin(options.train_images, options.epochs, options.seed)
    directions = "auto" if options.directions == "auto" else None
    kinds = (
        ("loss", "loss", None, options.loss_examples),
        (
            f"predictions, {options.directions}",
            "predictions",
            directions,
            options.prediction_examples,
        ),
    )
    settings = [
        Setting(name, preserve, rows, n, delta, delta > 0 and not options.no_quality)
        for name, preserve, rows, n in kinds
        for delta in (0.0, DELTA)
        if options.only in (None, preserve)
    ]
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.pt"
        counts = write_images(images, options)
        runs = [
            common.fresh_process(
                measure,
                setting,
                str(weights),
                str(images),
                options.samples,
                options.memory,
                options.tolerance,
            )
            for setting in settings
        ]
    table = report(runs, counts, options)
    print(table)
    record = {
        "targets": TARGETS,
        "config": CONFIG,
        "recipe": RECIPE,
        "options": vars(options),
        "images": counts,
        "runs": runs,
        "environment": common.environment(),
    }
    written = common.write_results(options.out, record, table)
    draw(runs, written.with_suffix(".png"))
    print(written)


if __name__ == "__main__":
    main()
