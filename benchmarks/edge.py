"""Where the null space should end: quality against ``delta``, the evidence for its default.

    python -m benchmarks.edge [--seeds 3]

The digits network of the demonstration, trained without two of the classes, for several pairs and seeds.
Everything at the prior precision that the evidence gives: no validation data is used.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import nullbayes as nb
from benchmarks import common
from nullbayes.demo.evaluation import evaluate, point_method, posterior_method
from nullbayes.demo.tasks import Settings, make_task
from nullbayes.demo.training import Recipe, train

DELTAS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = ((0, 4), (1, 7), (2, 5), (3, 6), (8, 9))
COLUMNS = (
    "residual",
    "drift",
    "prior kept",
    "lost",
    "train",
    "test",
    "NLL",
    "ECE",
    "held",
    "rotated",
    "noise",
)


def measure(method: Any, task: Any, certificate: nb.Certificate | None) -> dict[str, float]:
    figures, _ = evaluate(method, task.measured, task.shifts)
    return {
        "residual": certificate.residual if certificate else 0.0,
        "drift": certificate.drift if certificate else 0.0,
        "prior kept": certificate.prior_share if certificate else 0.0,
        "lost": certificate.score_loss * certificate.checked_examples if certificate else 0.0,
        "train": figures["train_accuracy"],
        "test": figures["test_accuracy"],
        "NLL": figures["nll"],
        "ECE": figures["ece"],
        "held": figures["auroc"]["held_out"],
        "rotated": figures["auroc"]["rotated"],
        "noise": figures["auroc"]["noise"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--deltas", type=float, nargs="+", default=DELTAS)
    parser.add_argument("--name", default="edge", help="of the files under benchmarks/results")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.first, options.first + options.seeds):
        for pair in HELD_OUT:
            task = make_task(Settings(seed=seed, held_out=pair))
            model = trained(task, seed)
            loader = task.measured.train.loader(64)
            runs.setdefault("point estimate", []).append(measure(point_method(model), task, None))
            for delta in options.deltas:
                posterior = nb.NullSpacePosterior(model, delta=delta)
                posterior.fit(loader, num_samples=30, seed=seed, progress=False)
                row = measure(posterior_method("", posterior), task, posterior.certificate)
                runs.setdefault(f"delta = {delta:g}", []).append(row)
            laplace = nb.LaplacePosterior(model).fit(loader, 30, seed, progress=False)
            row = measure(posterior_method("", laplace), task, laplace.certificate)
            runs.setdefault("full Laplace", []).append(row)
            print(f"seed {seed}, held out {pair}: done", flush=True)
    command = "python -m benchmarks.edge"
    for key, value in vars(options).items():
        if value != parser.get_default(key):
            shown = " ".join(f"{v:g}" for v in value) if key == "deltas" else value
            command += f" --{key} {shown}"
    report(runs, options.name, command)


def trained(task: Any, seed: int) -> Any:
    train(
        task.model,
        task.data.train,
        Recipe(task.epochs, task.batch_size, task.learning_rate),
        seed=seed,
    )
    return task.model.eval()


def report(runs: dict[str, list[dict[str, float]]], name: str, command: str) -> None:
    count = len(next(iter(runs.values())))
    mean = {
        name: {c: statistics.fmean(r[c] for r in rows) for c in COLUMNS}
        for name, rows in runs.items()
    }
    point = runs["point estimate"]
    wins = {
        name: {
            c: sum(
                (r[c] >= p[c]) == (c in ("held", "rotated", "noise")) or r[c] == p[c]
                for r, p in zip(rows, point, strict=True)
            )
            for c in ("NLL", "ECE", "held", "rotated", "noise")
        }
        for name, rows in runs.items()
    }
    lines = [
        f"# Where the null space ends: digits, mean of {count} networks (pairs of held-out classes × seeds)",
        "",
        "At the evidence's prior precision. `lost`: training examples that change to a wrong class, summed over all",
        f"networks. Behind each figure: on how many of the {count} networks it is no worse than the point estimate's.",
        f"`{command}`",
        "",
        "| | residual | drift | prior preserved | lost | train acc. | test acc. | NLL | ECE "
        "| AUROC held-out | rotated | noise |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, m in mean.items():
        lost = round(sum(r["lost"] for r in runs[method]))
        cells = [f"{m[c]:.4f} ({wins[method][c]})" for c in ("NLL", "ECE")]
        cells += [f"{m[c]:.3f} ({wins[method][c]})" for c in ("held", "rotated", "noise")]
        lines.append(
            f"| {method} | {m['residual']:.1e} | {m['drift']:.1e} | {100 * m['prior kept']:.0f} % | {lost} "
            f"| {m['train']:.4f} | {m['test']:.4f} | {' | '.join(cells)} |"
        )
    table = "\n".join(lines) + "\n"
    print(table)
    common.write_results(
        name, {"runs": runs, "mean": mean, "environment": common.environment()}, table
    )


if __name__ == "__main__":
    main()
