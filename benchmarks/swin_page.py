"""The page and the figure of :mod:`benchmarks.swin`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import common

TARGETS = {"residual": 1e-3, "minutes": 15.0, "gigabytes": 12.0}


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
        "| preserves | N | delta | M | rank | residual | target | minutes | target | peak GB | target |",
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
        f"| preserves | delta | {' | '.join(stages)} | other | CPU, all threads | solver | iterations |",
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
        "choose. Drifts are RMS changes of what is preserved: linearised, of a row, and of the re-weighted network.",
        "",
        "| preserves | delta | prior precision | training accuracy | drift | row drift | sampled drift "
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
        f"| preserves | predictions | accuracy | NLL | ECE | {' | '.join(f'AUROC {s}' for s in shifts)} |",
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
        "| preserves | validation NLL: point estimate | evidence | chosen |",
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
        common.save_figure(figure, path, 130)


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
    bars += [(f"preserves {r['name']}: novelty", r["methods"]["linearised"]) for r in runs]
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
