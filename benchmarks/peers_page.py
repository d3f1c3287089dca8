"""The page of :mod:`benchmarks.peers`."""

from __future__ import annotations

import statistics
from typing import Any

OUTPUT_SAMPLES = 2_000
WEIGHT_SAMPLES = 20_000
# laplace-torch's default backend multiplies curvlinops' operator with an identity of torch's default
# dtype: unless that is float64, a float64 model's Hessian comes out rounded to float32.
PEERS = ("curvlinops (its default)", "curvlinops, default dtype float64", "BackPACK")
REFERENCE = PEERS[2]


def report(results: dict[str, Any], version: str) -> str:
    """The page, from :func:`benchmarks.peers.compare` of each problem."""
    lines = [
        f"# LaplacePosterior beside laplace-torch {version}, full Laplace, float64",
        "",
        "Same network, data, prior precision and noise. `python -m benchmarks.peers`",
        "",
        *exact_lines(results),
        "",
        *time_lines(results),
        "",
        *sample_lines(results),
    ]
    return "\n".join(lines) + "\n"


def exact_lines(results: dict[str, Any]) -> list[str]:
    lines = [
        "## Without sampling, and the time it takes",
        "",
        "Largest relative difference of an example's output variance, exact on both sides. Laplace-torch's default",
        "backend (curvlinops) rounds the Hessian of a float64 model to float32 unless torch's default dtype is",
        "float64; its difference is that rounding, as the same backend without it shows.",
        "Evidence: slope of laplace-torch's log marginal likelihood at our prior precision, over ‖θ̂‖²/2. Beyond 2,000",
        "rows the dual solver estimates the spectrum by random probes (digits: a prior precision 4 % off), the primal",
        "one never does.",
        "",
        "| problem | weights | rows | stiffest / prior | solver | outputs | variance: BackPACK "
        "| curvlinops | curvlinops, default dtype float64 | evidence |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        for solver, e in r["solvers"].items():
            error = " | ".join(f"{e['variance_error'][p]:.1e}" for p in (REFERENCE, *PEERS[:2]))
            lines.append(
                f"| {name} | {r['weights']} | {r['rows']} | {r['stiffness']:.0e} | {solver} "
                f"| {max(e['mean_difference'].values()):.0e} | {error} | {e['evidence_slope']:.0e} |"
            )
    return lines


def time_lines(results: dict[str, Any]) -> list[str]:
    solvers = list(next(iter(results.values()))["solvers"])
    names = [*solvers, REFERENCE, PEERS[0]]
    lines = [
        "Median seconds, taking turns. Fit: ours with 30 samples and the certificate, theirs with the factor of the",
        'covariance. Variance: exact, at the test points. In bold what `solver="auto"` takes.',
        "",
        "| problem | | " + " | ".join([*solvers, "BackPACK", "curvlinops"]) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for name, r in results.items():
        for what in ("fit", "variance"):
            median = {n: statistics.median(t) for n, t in r[f"{what}_seconds"].items()}
            shown = [
                f"**{median[n]:.3f}**" if n == r["automatic"] else f"{median[n]:.3f}" for n in names
            ]
            lines.append(f"| {name} | {what} | " + " | ".join(shown) + " |")
    return lines


def sample_lines(results: dict[str, Any]) -> list[str]:
    lines = [
        "## With samples",
        "",
        "Deviations in standard errors. Output variances, entries of the output covariances and class",
        "probabilities (the latter against 20,000 Monte-Carlo draws of laplace-torch): the worst of all,",
        f"{OUTPUT_SAMPLES:,} samples. Weights, whitened by laplace-torch's posterior precision, {WEIGHT_SAMPLES:,}",
        "samples: their mean and trace (one number each; the solvers share their noise, so they are not independent),",
        "the worst entry of their covariance (of 50,000, which exact samples bring to about 4.3), and the range of",
        "its eigenvalues beside the range that exact samples keep to (Marchenko-Pastur).",
        "",
        "| problem | solver | variance | covariance | probabilities | mean | trace | worst entry | eigenvalues "
        "| exact samples |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        edge = (r["weights"] / WEIGHT_SAMPLES) ** 0.5
        for solver, e in r["solvers"].items():
            o, w = e["output_scores"], e.get("weight_scores")
            shown = [f"{o['variance']:.1f}", f"{o['covariance']:.1f}"]
            shown.append(f"{e['probability_score']:.1f}" if "probability_score" in e else "")
            if w:
                shown += [f"{w['mean']:+.1f}", f"{w['trace']:+.1f}", f"{w['whitened']:.1f}"]
                shown.append(f"{w['smallest']:.3f} to {w['largest']:.3f}")
                shown.append(f"{(1 - edge) ** 2:.3f} to {(1 + edge) ** 2:.3f}")
            else:
                shown += ["", "", "", "", ""]
            lines.append(f"| {name} | {solver} | " + " | ".join(shown) + " |")
    return lines
