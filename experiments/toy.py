"""Pictures in one and two dimensions: bands over a gap in the data, and maps around two moons.

Point estimate, full Laplace and null-space posterior on the same networks; beside them numbers for the same pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nullbayes as nb
from experiments import measures
from experiments.figures import drawing
from experiments.runner import Job
from experiments.store import Key
from experiments.tables import Column, Figures, Page, Row, at
from nullbayes.datasets import Split, in_between, in_between_truth
from nullbayes.demo.models import curve_net, seeded
from nullbayes.demo.training import Recipe, train

NAME = "toy"
TITLE = "One and two dimensions, as pictures"
SEEDS = {"small": 1, "full": 10}
CURVE: dict[str, Any] = {
    "points": 16,
    "noise": 0.05,
    "width": 50,
    "epochs": 1500,
    "weight_decay": 0.1,
    "samples": 200,
    "reach": 3.0,
    "gap": 0.6,
}
MOONS: dict[str, Any] = {
    "points": 200,
    "noise": 0.12,
    "width": 32,
    "epochs": 300,
    "weight_decay": 0.01,
    "samples": 200,
    "grid": 61,
}
TASKS = ("curve", "moons")
KINDS: dict[str, Any] = {
    "Laplace": nb.LaplacePosterior,
    "null-space": nb.NullSpacePosterior,
}


def jobs(
    setting: str, seeds: Sequence[int] | None = None, methods: Sequence[str] | None = None
) -> list[Job]:
    """``methods`` does not apply: a picture is one piece."""
    functions = {"curve": (curve_job, CURVE), "moons": (moons_job, MOONS)}
    return [
        Job(Key(NAME, setting, seed, task), functions[task][1], functions[task][0], (seed,))
        for seed in seeds or range(SEEDS[setting])
        for task in TASKS
    ]


# -- a curve with a gap ----------------------------------------------------------------------------


def curve_job(seed: int) -> dict[str, Any]:
    """For the runner: two groups of points, a gap between them, and what each posterior says of it."""
    c = CURVE
    data = in_between(c["points"], noise=c["noise"], seed=seed, dtype=torch.float64)
    network = seeded(curve_net, c["width"], seed=seed).double()
    train(
        network,
        data,
        Recipe(c["epochs"], len(data), 1e-2, c["weight_decay"]),
        loss=F.mse_loss,
        seed=seed,
    )
    reach = torch.linspace(-c["reach"], c["reach"], 241, dtype=torch.float64)[:, None]
    places = {
        "near": in_between(400, noise=c["noise"], seed=seed + 1000, dtype=torch.float64),
        "gap": _noisy(torch.linspace(-c["gap"], c["gap"], 200, dtype=torch.float64), seed + 2000),
        "outside": _noisy(_outside(c["reach"]), seed + 3000),
    }
    noise = c["noise"] ** 2  # known here, and the same for all
    with torch.no_grad():
        point = network(reach)
    out: dict[str, Any] = {
        "x": reach.flatten().tolist(),
        "truth": in_between_truth(reach).flatten().tolist(),
        "train": {"x": data.inputs.flatten().tolist(), "y": data.targets.flatten().tolist()},
        "methods": {
            "point estimate": {
                "mean": point.flatten().tolist(),
                "sd": [0.0] * len(reach),
                "draws": [],
                "noise_sd": noise**0.5,
                **_curve_figures(network, None, data, places, noise),
            }
        },
    }
    for name, kind in KINDS.items():
        # QR of the rows, because a Gram matrix would square their condition number.
        posterior = kind(network, nb.Regression(noise), solver=nb.solvers.PrimalQR())
        posterior.fit([(data.inputs, data.targets)], c["samples"], seed, progress=False)
        prediction = posterior.predict(reach)
        out["methods"][name] = {
            "mean": prediction.mean.flatten().tolist(),
            "sd": prediction.variance.sqrt().flatten().tolist(),
            "draws": prediction.outputs[:6, :, 0].tolist(),
            "noise_sd": noise**0.5,
            "prior_precision": posterior.prior_precision,
            **_curve_figures(network, posterior, data, places, noise),
        }
    return out


def _noisy(x: Tensor, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    x = x[:, None]
    noise = CURVE["noise"] * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return Split(x, in_between_truth(x) + noise)


def _outside(reach: float) -> Tensor:
    side = torch.linspace(2.1, reach, 100, dtype=torch.float64)
    return torch.cat([-side.flip(0), side])


def _curve_figures(
    network: nn.Module,
    posterior: Any,
    data: Split,
    places: dict[str, Split],
    noise: float,
) -> dict[str, Any]:
    """RMSE of training, mean sd and NLL by place."""
    out: dict[str, Any] = {}
    for name, split in {"train": data, **places}.items():
        if posterior is None:
            with torch.no_grad():
                mean = network(split.inputs)
            variance = torch.zeros_like(mean)
        else:
            prediction = posterior.predict(split.inputs)
            mean, variance = prediction.mean, prediction.variance
        found = measures.regression(mean, variance + noise, split.targets)
        out[name] = {
            "rmse": found["rmse"],
            "nll": found["nll"],
            "coverage_95": found["coverage_95"],
            "sd": float(variance.mean().sqrt()),
        }
    return out


# -- two moons -------------------------------------------------------------------------------------


def moons(seed: int, count: int) -> Split:
    """scikit-learn's two moons, moved to the middle of the picture."""
    from sklearn.datasets import make_moons

    x, y = make_moons(count, noise=MOONS["noise"], random_state=seed)
    inputs = torch.from_numpy(x).double() - torch.tensor([0.5, 0.25], dtype=torch.float64)
    return Split(inputs, torch.from_numpy(y).long())


def moons_network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
    ).double()


def moons_job(seed: int) -> dict[str, Any]:
    """For the runner: confidence and novelty around two moons."""
    c = MOONS
    data, test = moons(seed, c["points"]), moons(seed + 1000, 1000)
    network = seeded(moons_network, c["width"], seed=seed)
    train(
        network,
        data,
        Recipe(c["epochs"], 50, 1e-2, c["weight_decay"]),
        seed=seed,
    )
    side = torch.linspace(-4, 4, c["grid"], dtype=torch.float64)
    yy, xx = torch.meshgrid(side, side, indexing="ij")
    grid = torch.stack([xx.flatten(), yy.flatten()], 1)
    # What is far from every training point is new; near ones are left out, for nobody can say.
    far = grid[torch.cdist(grid, data.inputs).amin(1) > 1.0]
    out: dict[str, Any] = {
        "side": side.tolist(),
        "train": {"x": data.inputs.tolist(), "y": data.targets.tolist()},
        "methods": {},
    }
    with torch.no_grad():
        probs = {n: network(x).softmax(-1) for n, x in _parts(data, test, grid, far).items()}
    score = {n: measures.entropy(p) for n, p in probs.items()}
    out["methods"]["point estimate"] = _moons_figures(probs, score, data, test)
    for name, kind in KINDS.items():
        posterior = kind(network).fit(data.loader(64), c["samples"], seed, progress=False)
        parts = _parts(data, test, grid, far)
        predictions = {n: posterior.predict(x) for n, x in parts.items()}
        probs = {n: p.mean for n, p in predictions.items()}
        score = {n: posterior.novelty(x) for n, x in parts.items()}
        out["methods"][name] = {
            **_moons_figures(probs, score, data, test),
            "prior_precision": posterior.prior_precision,
        }
    return out


def _parts(data: Split, test: Split, grid: Tensor, far: Tensor) -> dict[str, Tensor]:
    return {"train": data.inputs, "test": test.inputs, "grid": grid, "far": far}


def _moons_figures(
    probs: dict[str, Tensor], score: dict[str, Tensor], data: Split, test: Split
) -> dict[str, Any]:
    found = measures.classification(probs["test"], test.targets)
    train_found = measures.classification(probs["train"], data.targets)
    return {
        "train_accuracy": train_found["accuracy"],
        "test": {k: found[k] for k in ("accuracy", "nll", "ece")},
        "far_confidence": float(probs["far"].amax(1).mean()),
        "auroc": measures.detection(score["test"], score["far"])["auroc"],
        "map": {
            "probability": probs["grid"][:, 1].tolist(),
            "novelty": score["grid"].tolist(),
        },
    }


# -- report ----------------------------------------------------------------------------------------

CURVE_COLUMNS = (
    Column("training RMSE", at("train", "rmse"), 0, 4),
    Column("sd at the training points", at("train", "sd"), 0, 4),
    Column("sd in the gap", at("gap", "sd"), 0, 3),
    Column("sd outside", at("outside", "sd"), 0, 3),
    Column("NLL near", at("near", "nll"), -1, 2),
    Column("NLL in the gap", at("gap", "nll"), -1, 2),
    Column("NLL outside", at("outside", "nll"), -1, 2),
    Column("95 % interval in the gap", at("gap", "coverage_95"), 0, 2),
)
MOONS_COLUMNS = (
    Column("training accuracy", at("train_accuracy"), 0, 4),
    Column("accuracy", at("test", "accuracy"), 1, 4),
    Column("NLL", at("test", "nll"), -1, 4),
    Column("ECE", at("test", "ece"), -1, 4),
    Column("confidence far away", at("far_confidence"), -1, 3),
    Column("AUROC far away", at("auroc"), 1, 3),
)


def report(setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
    if not runs:
        return
    page = Page(NAME, f"{TITLE} ({setting})")
    page.say(
        "Both posteriors at the prior precision of their evidence; no validation data. Mean ± standard error over "
        f"seeds. `python -m experiments {NAME} --setting {setting}`"
    )
    found = {
        task: [r["result"] for r in sorted(runs, key=lambda r: r["seed"]) if r["method"] == task]
        for task in TASKS
    }
    if found["curve"]:
        page.table(
            "A curve with a gap",
            _rows(found["curve"]),
            CURVE_COLUMNS,
            f"{CURVE['points']} points in two groups, network 1–{CURVE['width']}–{CURVE['width']}–1, tanh, float64; "
            "the noise is known. `near`: new points where the data are; `gap`: between the groups; "
            "`outside`: beyond them.",
            "method",
        )
        draw_curve(found["curve"][0], folder / f"{NAME}-curve.png")
        page.picture(f"{NAME}-curve.png", "Bands of two standard deviations over a gap in the data")
    if found["moons"]:
        page.table(
            "Two moons",
            _rows(found["moons"]),
            MOONS_COLUMNS,
            f"{MOONS['points']} points, network 2–{MOONS['width']}–{MOONS['width']}–2, tanh, float64. Far away: "
            "points of the map more than one unit from every training point; by novelty, the point "
            "estimate by entropy.",
            "method",
        )
        draw_moons(found["moons"][0], folder / f"{NAME}-moons.png")
        page.picture(f"{NAME}-moons.png", "Probability and novelty around two moons")
    page.write(folder, [_without_maps(run) for run in runs])


def _rows(results: Sequence[Figures]) -> list[Row]:
    return [Row(name, [r["methods"][name] for r in results]) for name in results[0]["methods"]]


def _without_maps(run: dict[str, Any]) -> dict[str, Any]:
    """What is drawn is in the picture; the numbers of the tables stay."""
    drawn = ("map", "mean", "sd", "draws")
    kept = {
        name: {k: v for k, v in m.items() if k not in drawn}
        for name, m in run["result"]["methods"].items()
    }
    return {**run, "partial": True, "result": {"methods": kept}}


def draw_curve(result: dict[str, Any], path: Path) -> None:
    x = result["x"]
    with drawing(path, 1, len(result["methods"]), (12, 3.6)) as axes:
        for axis, (name, m) in zip(axes[0], result["methods"].items(), strict=True):
            mean, total = m["mean"], [(s**2 + m["noise_sd"] ** 2) ** 0.5 for s in m["sd"]]
            for values, alpha in ((total, 0.18), (m["sd"], 0.25)):
                low = [a - 2 * b for a, b in zip(mean, values, strict=True)]
                high = [a + 2 * b for a, b in zip(mean, values, strict=True)]
                axis.fill_between(x, low, high, color="#1f6feb", alpha=alpha, lw=0)
            for draw in m["draws"]:
                axis.plot(x, draw, color="#1f6feb", lw=0.6, alpha=0.6)
            axis.plot(x, result["truth"], color="#555555", ls=":", lw=1)
            axis.plot(x, mean, color="#0b3d91", lw=1.6)
            axis.plot(result["train"]["x"], result["train"]["y"], "k.", ms=5)
            axis.set_ylim(-3.2, 3.2)
            axis.set_title(name, loc="left", weight="bold")
        axes[0, 0].text(
            0.02, 0.02, "bands: 2 sd, without and with noise; dotted: truth", fontsize=7,
            transform=axes[0, 0].transAxes,
        )  # fmt: skip


def draw_moons(result: dict[str, Any], path: Path) -> None:
    side = result["side"]
    extent = (side[0], side[-1], side[0], side[-1])
    points, labels = torch.tensor(result["train"]["x"]), torch.tensor(result["train"]["y"])
    with drawing(path, 2, len(result["methods"]), (11, 7)) as axes:
        for column, (name, m) in enumerate(result["methods"].items()):
            shape = (len(side), len(side))
            probability = torch.tensor(m["map"]["probability"]).reshape(shape)
            novelty = torch.tensor(m["map"]["novelty"]).clamp_min(1e-9).log10().reshape(shape)
            options: dict[str, Any] = {"origin": "lower", "extent": extent, "aspect": "auto"}
            axes[0, column].imshow(probability, vmin=0, vmax=1, cmap="RdBu_r", **options)
            axes[0, column].contour(side, side, probability, levels=[0.5], colors="k", linewidths=1)
            low = float(novelty.quantile(0.02))
            axes[1, column].imshow(novelty, cmap="viridis", vmin=low, **options)
            for axis in axes[:, column]:
                for label, colour in ((0, "#08306b"), (1, "#99000d")):
                    some = points[labels == label]
                    axis.plot(some[:, 0], some[:, 1], ".", ms=3, color=colour)
                axis.grid(visible=False)
            axes[0, column].set_title(name, loc="left", weight="bold")
            what = "log10 entropy" if name == "point estimate" else "log10 novelty"
            axes[1, column].set_title(what, loc="left", fontsize=8)
        axes[0, 0].set_ylabel("probability of a class")
