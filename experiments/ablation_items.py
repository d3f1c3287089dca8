"""The ablations themselves: each item yields a label and the figures of one posterior after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import nullbayes as nb
from experiments import measures, networks, tasks
from experiments.classification import case_of
from experiments.methods import Case, Draws
from experiments.methods.base import tune
from experiments.methods.posteriors import (
    DECLARED,
    MORE,
    SHARE,
    fitted,
    natural_precision,
    told,
    unit_draws,
)
from experiments.methods.weights import last_weights
from experiments.tasks import TASKS, Scale, Task
from nullbayes.datasets import Split
from nullbayes.likelihood.softmax import softmax_factor

BATCH = 250
SAMPLES = (5, 10, 20, 30, 50, 100, 200)
SHARES = (0.1, 0.25, 1.0)
TOLERANCES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
DELTAS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FIXED = (0.1, 1.0, 10.0, 100.0, 1000.0)
DIRECTIONS: tuple[Any, ...] = (1, 2, 4, "auto", None)
NORMS = ("none", "batch", "layer", "group", "instance")
SUBSETS = ("all", "without norms", "norms only")

Entry = dict[str, Any]


# -- measuring -------------------------------------------------------------------------------------


def everything(case: Case, draws: Callable[[Tensor], Draws]) -> tuple[dict[str, Any], Any]:
    """Figures of one posterior, and the draws of the test and outside images for those who want other scores."""
    task = case.task
    out: dict[str, Any] = {}

    def of(inputs: Tensor) -> tuple[Tensor, Tensor]:
        parts = [draws(x) for x in inputs.split(BATCH)]
        score = [p.novelty().get(DECLARED, p.novelty()["entropy"]) for p in parts]
        return torch.cat([p.probabilities() for p in parts]), torch.cat(score)

    probs, _ = of(task.measured.inputs)
    point = networks.outputs(case.network, task.measured.inputs).argmax(1)
    hits = [float((p == task.measured.targets).double().mean()) for p in (point, probs.argmax(1))]
    out["train_lost"] = 100 * (hits[0] - hits[1])
    probs, known = of(task.data.test.inputs)
    out |= {
        f"test_{k}": v for k, v in measures.classification(probs, task.data.test.targets).items()
    }
    out["outside"] = {
        name: measures.detection(known, of(x)[1])["auroc"] for name, x in task.outside.items()
    }
    out["auroc"] = sum(out["outside"].values()) / len(out["outside"])
    return out, known


def of_posterior(case: Case, posterior: Any, alpha: float | None = None) -> Entry:
    """Linearised predictions at ``alpha`` (None: the posterior's own prior precision), and its certificate."""
    alpha = float(posterior.prior_precision) if alpha is None else alpha

    figures, _ = everything(case, lambda x: predicted(posterior, x, alpha))
    c = posterior.certificate
    return {
        **figures,
        "prior_precision": alpha,
        "residual": c.residual,
        "kept": 100 * c.prior_share,
        "constraints": c.constraints,
        "iterations": c.iterations,
        "discarded": 100 * c.discarded_trace,
        "seconds": c.seconds,
    }


def predicted(posterior: Any, x: Tensor, alpha: float, count: int | None = None) -> Draws:
    """The first so many draws at a prior precision; scored, as the library does, without regard to it."""
    point, unit = unit_draws(posterior, x)
    unit = unit[:count]
    scores = {DECLARED: told(point, unit, natural_precision(posterior))}
    return Draws(point + unit * alpha**-0.5, point, scores)


def null_space(case: Case, **options: Any) -> Any:
    return fitted(nb.NullSpacePosterior, case, **options)


def point_entry(case: Case) -> Entry:
    figures, _ = everything(case, lambda x: Draws(networks.outputs(case.network, x)[None]))
    return figures


# -- the items: each yields (label, figures) -------------------------------------------------------


def samples(case: Case) -> Iterator[tuple[str, Entry]]:
    """The first so many samples of one fit."""
    scale = replace(case.task.scale, samples=max(SAMPLES))
    posterior = null_space(replace(case, task=replace(case.task, scale=scale)))
    alpha = float(posterior.prior_precision)
    for count in SAMPLES:

        def draws(x: Tensor, few: int = count) -> Draws:
            return predicted(posterior, x, alpha, few)

        yield f"{count} samples", everything(case, draws)[0]


def subset(case: Case) -> Iterator[tuple[str, Entry]]:
    """Predictions preserved on a part of the training data; training accuracy on all that is measured."""
    whole = case.train
    for share in SHARES:
        count = round(share * len(whole))
        posterior = fitted(nb.NullSpacePosterior, case, whole[:count])
        yield f"{100 * share:g} % of the data", of_posterior(case, posterior)


def residual(case: Case) -> Iterator[tuple[str, Entry]]:
    """Conjugate gradients to a tolerance, as ``solver="auto"`` would set them up; and the direct solver."""
    for tolerance in TOLERANCES:
        solver = nb.solvers.ConjugateGradient(tolerance, equilibrate=0.5)
        yield f"tolerance {tolerance:g}", of_posterior(case, null_space(case, solver=solver))
    if len(case.task.constrained) * 9 <= 10_000:
        posterior = null_space(case, solver=nb.solvers.DualCholesky())
        yield "direct", of_posterior(case, posterior)


def delta(case: Case) -> Iterator[tuple[str, Entry]]:
    """Where the null space ends."""
    for value in DELTAS:
        yield f"delta {value:g}", of_posterior(case, null_space(case, delta=value))


def chosen(case: Case, posterior: Any) -> tuple[float, float]:
    """Prior precisions of least NLL and least ECE on validation data."""
    x, y = case.validation.inputs, case.validation.targets
    point, unit = unit_draws(posterior, x)

    def nll(values: list[float]) -> list[float]:
        return [case.nll(Draws(point + unit * a**-0.5, point), y) for a in values]

    def ece(values: list[float]) -> list[float]:
        return [
            measures.calibration_error(
                Draws(point + unit * a**-0.5, point).probabilities(), y, "l1"
            )
            for a in values
        ]

    start = float(posterior.prior_precision)
    return tune(start, nll).value, tune(start, ece).value


def prior(case: Case) -> Iterator[tuple[str, Entry]]:
    """One fit at several prior precisions."""
    posterior = null_space(case)
    by_nll, by_ece = chosen(case, posterior)
    yield "evidence", of_posterior(case, posterior)
    yield "validation, NLL", of_posterior(case, posterior, by_nll)
    yield "validation, ECE", of_posterior(case, posterior, by_ece)
    for alpha in FIXED:
        yield f"fixed, {alpha:g}", of_posterior(case, posterior, alpha)


def directions(case: Case) -> Iterator[tuple[str, Entry]]:
    """Leading directions of each example's output Hessian."""
    for value in DIRECTIONS:
        label = "all" if value is None else str(value)
        yield f"directions {label}", of_posterior(case, null_space(case, directions=value))


def preserve(case: Case) -> Iterator[tuple[str, Entry]]:
    """What is preserved, at the evidence of each."""
    for value in ("predictions", "outputs", "loss"):
        yield value, of_posterior(case, null_space(case, preserve=value))


def scores(case: Case) -> Iterator[tuple[str, Entry]]:
    """Definitions of novelty, from the same samples; exact where there is a factorisation."""
    posterior = null_space(case)
    exact = posterior.certificate.solver in (nb.solvers.DualCholesky.name, nb.solvers.PrimalQR.name)

    def of(inputs: Tensor) -> dict[str, Tensor]:
        parts = []
        for x in inputs.split(BATCH):
            prediction = posterior.predict(x)
            found = {"energy, network alone": -prediction.point.double().logsumexp(-1)}
            found |= novelty_scores(prediction)
            for name in ("variance", "information", "share"):
                found[f"novelty(x, '{name}')"] = posterior.novelty(x, score=name)
            if exact:
                found["variance, exact"] = posterior.novelty(x, score="variance", exact=True)
                found["information, exact"] = posterior.novelty(x, score="information", exact=True)
            parts.append(found)
        return {key: torch.cat([p[key].double() for p in parts]) for key in parts[0]}

    known = of(case.task.data.test.inputs)
    outside = {name: of(x) for name, x in case.task.outside.items()}
    for key, inside in known.items():
        found = {n: measures.detection(inside, o[key])["auroc"] for n, o in outside.items()}
        yield key, {"outside": found, "auroc": sum(found.values()) / len(found)}


def novelty_scores(prediction: Any) -> dict[str, Tensor]:
    """``(B,)`` each, from ``S`` linearised draws around the trained network's outputs."""
    change = (prediction.outputs - prediction.point).double()  # (S, B, O)
    centred = change - change.mean(-1, keepdim=True)  # a softmax does not see a common change
    top = prediction.point.argmax(-1)
    index = torch.arange(len(top))
    runner_up = prediction.point.topk(2, -1).indices[:, 1]
    covariance = torch.einsum("sbi,sbj->bij", centred, centred) / len(centred)
    factor = softmax_factor(prediction.point.double())  # (O - 1, B, O), H = Σ l lᵀ
    eye = torch.eye(change.shape[-1], dtype=torch.float64)
    logdet = torch.logdet(covariance + 1e-6 * eye)
    return {
        "entropy of the mean": prediction.total,
        "mutual information": prediction.epistemic,
        "variance": change.square().mean(0).sum(-1),
        "variance, centred": centred.square().mean(0).sum(-1),
        "variance of the predicted class": change[:, index, top].square().mean(0),
        "variance of the margin": (change[:, index, top] - change[:, index, runner_up])
        .square()
        .mean(0),
        "largest variance of an output": change.square().mean(0).amax(-1),
        "Fisher-weighted variance": torch.einsum("kbo,sbo->ksb", factor, change)
        .square()
        .mean(1)
        .sum(0),
        "log determinant of the covariance": logdet,
        "disagreement of the samples": 1 - (prediction.outputs.argmax(-1) == top).double().mean(0),
    }


# -- normalisation layers --------------------------------------------------------------------------


def norm_layer(kind: str, channels: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    groups = {"layer": 1, "group": 4}[kind]
    return nn.GroupNorm(groups, channels)


def norm_network(kind: str, classes: int, rate: float = 0.0) -> nn.Module:
    """The digits network with a normalisation layer after each convolution; ``layer`` is a group norm of one group."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), norm_layer(kind, 16), nn.Tanh(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), norm_layer(kind, 32), nn.Tanh(),
        nn.Flatten(),
        nn.Linear(512, 64), nn.Tanh(),
        nn.Linear(64, classes),
    )  # fmt: skip


def norm_task(kind: str, seed: int, scale: Scale) -> Task:
    task = tasks.digits_heldout(seed, scale)
    build = functools.partial(norm_network, kind, len(task.data.classes))
    return replace(task, name=f"digits_norm_{kind}", build=build)


TASKS.update({f"digits_norm_{kind}": functools.partial(norm_task, kind) for kind in NORMS})


def norm_weights(network: nn.Module) -> set[str]:
    """Names of the weights of normalisation layers."""
    norms = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)
    return {
        f"{prefix}.{name}"
        for prefix, module in network.named_modules()
        if isinstance(module, norms)
        for name, _ in module.named_parameters(recurse=False)
    }


def norms(case: Case) -> Iterator[tuple[str, Entry]]:
    """Each kind of normalisation, with its weights, without them, and alone."""
    for kind in NORMS:
        other = case_of(tasks.make(f"digits_norm_{kind}", case.seed, case.task.scale))
        mine = norm_weights(other.network)
        yield f"{kind}: point estimate", point_entry(other)
        for which in SUBSETS if mine else ("all",):
            names = {
                n
                for n, _ in other.network.named_parameters()
                if which == "all" or (n in mine) == (which == "norms only")
            }
            posterior = null_space(other, parameters=sorted(names))
            yield f"{kind}: {which}", of_posterior(other, posterior)
            if which == "all":
                best, _ = chosen(other, posterior)
                yield f"{kind}: all, calibrated", of_posterior(other, posterior, best)


# -- which weights ---------------------------------------------------------------------------------


def weights(case: Case) -> Iterator[tuple[str, Entry]]:
    """The fewer weights may move, the more examples can be preserved in the same memory.

    All weights keep all examples here, or are in the table of their task.
    """
    some, whole = case.task.constrained, case.train
    more = whole[: MORE * len(some)]
    plan: dict[str, tuple[list[str] | None, list[Split]]] = {
        "last layer": (last_weights(case.network), [some, more, whole]),
        "last twentieth of the weights": (last_weights(case.network, SHARE), [some, more]),
        "last quarter of the weights": (last_weights(case.network, 0.25), [some, more]),
    }
    if len(some) == len(whole):
        plan["all weights"] = (None, [whole])
    seen: list[list[str] | None] = []
    for label, (names, splits) in plan.items():
        if names in seen:  # of a small network one layer may be as much as the next share
            continue
        seen.append(names)
        for count, split in {len(s): s for s in splits}.items():
            posterior = fitted(nb.NullSpacePosterior, case, split, parameters=names)
            moving = {"weights": posterior.certificate.parameters}
            yield f"{label}, {count:,} examples", {**of_posterior(case, posterior), **moving}


Item = Callable[[Case], Iterator[tuple[str, Entry]]]
ITEMS: dict[str, tuple[str, Item]] = {
    "samples": ("How many samples?", samples),
    "subset": ("How much of the data has to be preserved?", subset),
    "residual": ("How exact is exact enough?", residual),
    "delta": ("Where does the null space end?", delta),
    "prior": ("Which prior precision?", prior),
    "directions": ("How many directions of each prediction?", directions),
    "preserve": ("What is preserved?", preserve),
    "scores": ("Which novelty score?", scores),
    "norms": ("Which normalisation layers, and which weights?", norms),
    "weights": ("Which weights, and how many examples?", weights),
}
