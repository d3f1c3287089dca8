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
from benchmarks.scaling import forget_peak, peak_resident, stage_clock
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
TARGETS = {"residual": 1e-3, "minutes": 15.0, "gigabytes": 12.0}
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


def main() -> None:
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
    options = parser.parse_args()
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


def against(value: float, text: str, target: float) -> str:
    return f"{text} | ≤ {target:g} {'met' if value <= target else 'missed'}"


def report(runs: list[dict[str, Any]], counts: dict[str, int], options: argparse.Namespace) -> str:
    parameters = runs[0]["certificate"]["parameters"]
    cores = common.environment()["cores"]
    lines = [
        f"# Swin-T, {parameters:,} weights, S = {options.samples}",
        "",
        f"Fashion-MNIST at 32 × 32 pixels; trained on {options.train_images:,} images, {options.epochs} epochs.",
        f"Each row is a fresh process on {cores} CPU cores, float32, `memory='{options.memory}'`, residual asked for",
        f"{options.tolerance:g}; the residual is the certificate's, recomputed from the rows, and the peak is the",
        "whole process's up to the end of the fit, certificate included. `python -m benchmarks.swin`",
        "",
        "| keeps | N | delta | M | rank | residual | target | minutes | target | peak GB | target |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        c, minutes, gigabytes = r["certificate"], r["seconds"] / 60, r["peak"] / 2**30
        lines.append(
            f"| {r['name']} | {r['examples']} | {r['delta']:g} | {c['constraints']:,} | {c['rank']:,} "
            f"| {against(c['residual'], format(c['residual'], '.1e'), TARGETS['residual'])} "
            f"| {against(minutes, format(minutes, '.1f'), TARGETS['minutes'])} "
            f"| {against(gigabytes, format(gigabytes, '.1f'), TARGETS['gigabytes'])} |"
        )
    stages = ("rows", "Gram", "factorisation", "projection", "certificate")
    lines += [
        "",
        "Where the time went, in seconds:",
        "",
        f"| keeps | delta | {' | '.join(stages)} | other | CPU, all threads | solver | iterations |",
        "|---" * (len(stages) + 6) + "|",
    ]
    for r in runs:
        parts = [r["stages"].get(stage, 0.0) for stage in stages]
        cells = " | ".join(
            f"{v:.1f}" for v in [*parts, r["seconds"] - sum(parts), r["cpu_seconds"]]
        )
        c = r["certificate"]
        lines.append(
            f"| {r['name']} | {r['delta']:g} | {cells} | {c['solver']} | {c['iterations']} |"
        )
    lines += [
        "",
        "What the certificate says, at the prior precision of the evidence and at the one that validation images",
        "choose. Drifts are RMS changes of what is kept: linearised, of a row, and of the re-weighted network itself.",
        "",
        "| keeps | delta | prior precision | training accuracy | drift | row drift | sampled drift "
        "| trace left out | held |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        for which in ("certificate", "calibrated"):
            if which in r:
                lines.append(certificate_row(r, r[which], which == "calibrated"))
    measured = [r for r in runs if "methods" in r]
    if measured:
        lines += quality_lines(measured, counts)
    return "\n".join(lines) + "\n"


def certificate_row(run: dict[str, Any], c: dict[str, Any], calibrated: bool) -> str:
    how = "validation" if calibrated else "evidence"
    return (
        f"| {run['name']} | {run['delta']:g} | {c['prior_precision']:.3g} ({how}) "
        f"| {c['network_score']:.4f} → {c['posterior_score']:.4f} | {c['drift']:.2g} "
        f"| {c['row_drift']:.2g} | {c['sampled_drift']:.2g} | {100 * c['discarded_trace']:.3f} % "
        f"| {'yes' if c['held'] else 'no'} |"
    )


def quality_lines(runs: list[dict[str, Any]], counts: dict[str, int]) -> list[str]:
    shifts = list(runs[0]["methods"]["point estimate"]["auroc"])
    numbers = ", ".join(f"{counts[key]} {key}" for key in shifts)
    lines = [
        "",
        f"Quality: {counts['test']} test images; prior precision chosen on {counts['validation']} validation images.",
        f"AUROC against {numbers}: of 1 − confidence for the point estimate, of novelty otherwise.",
        "",
        f"| keeps | predictions | accuracy | NLL | ECE | {' | '.join(f'AUROC {s}' for s in shifts)} |",
        "|---" * (len(shifts) + 5) + "|",
    ]
    first = runs[0]["methods"]["point estimate"]
    rows = [("–", "point estimate", first)]
    rows += [(r["name"], m, r["methods"][m]) for r in runs for m in ("linearised", "sampled")]
    for name, method, f in rows:
        cells = " | ".join(f"{f['auroc'][s]:.3f}" for s in shifts)
        lines.append(
            f"| {name} | {method} | {f['accuracy']:.3f} | {f['nll']:.4f} | {f['ece']:.4f} | {cells} |"
        )
    lines += [
        "",
        "| keeps | validation NLL: point estimate | evidence | chosen |",
        "|---|---|---|---|",
    ]
    for r in runs:
        v = r["validation_nll"]
        lines.append(
            f"| {r['name']} | {v['point']:.4f} | {v['evidence']:.4g} | {v['calibrated']:.4f} |"
        )
    notes = [f"- {r['name']}: {text}" for r in runs for text in r["warnings"]]
    if notes:
        lines += ["", "Warnings while the prior precision was chosen:", "", *notes]
    return lines


COLOURS = ("#1f6feb", "#8250b8", "#d1641a", "#2a9d5c", "#c2a300", "#9a9a9a")


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Left: where the time went. Right: AUROC of the point estimate and of novelty."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": "#e3e3e3",
        "legend.frameon": False,
    }
    measured = [r for r in runs if "methods" in r]
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            1,
            2 if measured else 1,
            figsize=(11 if measured else 6, 4),
            squeeze=False,
            layout="constrained",
        )
        draw_stages(axes[0, 0], runs)
        if measured:
            draw_auroc(axes[0, 1], measured)
        temporary = path.with_suffix(".tmp.png")
        figure.savefig(temporary, dpi=130)
        plt.close(figure)
    temporary.replace(path)


def draw_stages(axis: Any, runs: list[dict[str, Any]]) -> None:
    names = [f"{r['name']}\nN = {r['examples']}, delta = {r['delta']:g}" for r in runs]
    left = [0.0] * len(runs)
    stages = ("rows", "Gram", "factorisation", "projection", "certificate", "other")
    for stage, colour in zip(stages, COLOURS, strict=True):
        widths = [
            (
                r["stages"].get(stage, 0.0)
                if stage != "other"
                else r["seconds"] - sum(r["stages"].values())
            )
            / 60
            for r in runs
        ]
        axis.barh(names, widths, left=left, color=colour, label=stage, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.axvline(TARGETS["minutes"], color="#555555", linestyle="--", linewidth=1)
    axis.text(TARGETS["minutes"], -0.62, "target", ha="right", va="center", color="#555555")
    axis.invert_yaxis()
    axis.grid(axis="x")
    axis.set_xlabel("minutes")
    axis.set_title("A fit, by stage", loc="left", weight="bold", pad=34)
    axis.legend(ncols=3, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def draw_auroc(axis: Any, runs: list[dict[str, Any]]) -> None:
    shifts = list(runs[0]["methods"]["point estimate"]["auroc"])
    bars = [("point estimate, confidence", runs[0]["methods"]["point estimate"])]
    bars += [(f"keeps {r['name']}: novelty", r["methods"]["linearised"]) for r in runs]
    width = 0.8 / len(bars)
    for k, ((name, figures), colour) in enumerate(zip(bars, ("#9a9a9a", *COLOURS), strict=False)):
        at = [i + (k - (len(bars) - 1) / 2) * width for i in range(len(shifts))]
        values = [figures["auroc"][s] for s in shifts]
        axis.bar(at, values, width * 0.92, color=colour, label=name)
        for x, value in zip(at, values, strict=True):
            axis.text(x, value + 0.01, f"{value:.2f}", ha="center", fontsize=8)
    axis.axhline(0.5, color="#555555", linestyle="--", linewidth=1)
    axis.set_xticks(range(len(shifts)), shifts)
    axis.set_ylim(0, 1.08)
    axis.grid(axis="y")
    axis.set_ylabel("AUROC")
    axis.set_title("Told from the test images", loc="left", weight="bold", pad=34)
    axis.legend(ncols=2, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


if __name__ == "__main__":
    main()
