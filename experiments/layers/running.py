"""Measure every method on every problem: one piece for each problem, seed and group of methods, so that runs go on."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments import measures
from experiments.detection import running as detection
from experiments.detection.base import SCORES
from experiments.layers.problems import MARKS, VALIDATION, Problem, Size, families
from experiments.methods import METHODS, Case, Draws, Method
from experiments.methods.ensemble import DeepEnsemble
from experiments.methods.peer_laplace import DiagonalLaplace, KroneckerLaplace, PeerLaplace
from experiments.methods.posteriors import FullLaplace, fitted, slim
from experiments.networks import identity
from experiments.runner import Job, Unavailable
from experiments.tasks import Recipe, Scale, Task
from nullbayes.datasets import Dataset, Split
from nullbayes.posterior.measuring.records import joint_nll

NAME = "layers"
VERSION = 2
#: Weights up to which the full Laplace posterior is fitted: each prior precision of its path is a fit of its own.
FULL_WEIGHTS = 12_000


@dataclass(frozen=True)
class Ensembled(Task):
    """A task of which further networks are trained by the problem's own recipe."""

    again: Callable[[int], nn.Module] | None = None


class Ensemble(DeepEnsemble):
    """Five networks; how the others are trained is the problem's."""

    def build(self, case: Case) -> float:
        again = cast("Ensembled", case.task).again
        assert again is not None
        more = [again(case.seed + 1000 * k) for k in range(1, case.task.scale.members)]
        self.members = [case.network, *more]
        return 0.0


class SmallLaplace(FullLaplace):
    """The full posterior, where that is small."""

    def build(self, case: Case) -> None:
        count = sum(p.numel() for p in case.network.parameters())
        if count > FULL_WEIGHTS:
            raise ValueError(f"{count} weights: a fit for every prior precision takes too long")
        self.posterior = slim(fitted_full(case))
        self.details = {}


class Linearised(PeerLaplace):
    """Without the path of sampled networks, of which no row is shown."""

    def _sampled_nll(self, case: Case, values: list[float]) -> list[float]:
        return [0.0] * len(values)


class Diagonal(Linearised, DiagonalLaplace):
    """The diagonal."""


class Kronecker(Linearised, KroneckerLaplace):
    """Kronecker factors."""


def fitted_full(case: Case) -> Any:
    """`nb.LaplacePosterior` by evidence."""
    import nullbayes as nb

    return fitted(nb.LaplacePosterior, case)


#: group -> methods and scores of single networks; each group is a piece.
GROUPS: dict[str, tuple[str, ...]] = {
    "features": (
        "max-softmax", "energy", "Mahalanobis", "KNN, k=1", "KNN, k=10", "KNN, k=50", "ViM, half the directions",
        "ViM, a quarter", "DDU", "nearest input",
    ),
    "layers": ("layers",),
    "networks": ("point", "temperature", "ensemble"),
    "Laplace": ("laplace_diag", "laplace_kron", "laplace_last", "laplace_full"),
    "rows": ("null_predictions",),
}  # fmt: skip
OWN: dict[str, type[Method]] = {
    "ensemble": Ensemble, "laplace_diag": Diagonal, "laplace_kron": Kronecker, "laplace_full": SmallLaplace,
}  # fmt: skip
#: Each Laplace posterior stands with the prior precision of least validation NLL; by evidence most are far too wide.
LEFT_OUT = (
    "laplace_full_tempered", "laplace_full_evidence", "laplace_diag_evidence", "laplace_kron_evidence",
    "laplace_last_evidence",
)  # fmt: skip


def jobs(
    setting: str, seeds: Sequence[int] | None = None, methods: Sequence[str] | None = None
) -> list[Job]:
    """Of one problem and seed after the other, cheap families first."""
    from experiments.store import Key

    out = []
    for family in families(setting).values():
        size = family.sizes[setting]
        for member, role in family.chosen(setting):
            for seed in seeds or range(family.seeds[setting]):
                if seed >= family.seeds[setting]:
                    continue
                for group, names in GROUPS.items():
                    if methods and not set(methods) & set(names):
                        continue
                    key = Key(NAME, setting, seed, f"{family.name}, {member}: {group}")
                    versions = {n: METHODS[n].version for n in names if n in METHODS}
                    config = {
                        "size": size.config(), "role": role, "version": VERSION, "methods": versions,
                        **MARKS.get(family.name, {}),
                    }  # fmt: skip
                    where = (setting, family.name, member, seed)
                    # One group trains the network, the others find it.
                    after = Key(NAME, setting, seed, f"{family.name}, {member}: features")
                    args = (where, role, group, size)
                    out.append(Job(key, config, measure_job, args, after=after))
    return out


def measure_job(
    where: tuple[str, str, str, int], role: str, group: str, size: Size
) -> dict[str, Any]:
    """For the runner: one group of methods on one problem."""
    setting, name, member, seed = where
    problem = families(setting)[name].make(member, seed, size)
    out: dict[str, Any] = {
        "family": name,
        "member": member,
        "role": role,
        "group": group,
        "kind": problem.given.kind,
        "network": identity(problem.given.network),
        "accuracy": problem.accuracy,
        "train": len(problem.given.train),
        "parameters": sum(p.numel() for p in problem.given.network.parameters()),
        "rows": {},
    }
    for method in GROUPS[group]:
        if method in SCORES:
            if SCORES[method].applies(problem.given.kind):
                out["rows"][method] = by_score(method, problem)
        else:
            out["rows"] |= by_method(method, problem, size)
    return out


def by_score(name: str, problem: Problem) -> dict[str, Any]:
    """Of one score: it predicts nothing."""
    found = detection.measured(SCORES[name], problem)
    if "error" in found:
        return found
    near, far = found.pop("near"), found.pop("far")
    return {**found, "title": name, "scores": {name: {"near": near, "far": far}}, "declared": name}


def by_method(name: str, problem: Problem, size: Size) -> dict[str, Any]:
    """By variant of one method; one that cannot be had on this network says why."""
    method = OWN.get(name, METHODS.get(name, FullLaplace))()
    case = case_of(problem, size)
    try:
        method.fit(case)
        shown = [key for key in method.variants if key not in LEFT_OUT and shown_of(key)]
        rows = {key: figures(method, key, case, problem) for key in shown}
    except Unavailable:
        raise
    except Exception as error:
        words = (str(error).splitlines() or [""])[0]
        return {name: {"title": name, "error": f"{type(error).__name__}: {words[:200]}"}}
    for row in rows.values():
        row |= {"fit_seconds": method.seconds["fit"], "details": method.details}
    return rows


def shown_of(key: str) -> bool:
    """Sampled networks of linearised posteriors are no rows here; of the layers they are what is predicted."""
    return not key.endswith(("_sampled", "_sampled_evidence"))


def figures(method: Method, key: str, case: Case, problem: Problem) -> dict[str, Any]:
    """Quality on test inputs, and AUROC of every score on every set."""
    variant = method.variants[key]
    started = time.perf_counter()
    draws = method.draws(problem.test.inputs, [key])[key]
    seconds = time.perf_counter() - started
    known = scores_of(draws, problem.given.kind)
    scores: dict[str, dict[str, dict[str, Any]]] = {n: {"near": {}, "far": {}} for n in known}
    for distance, sets in (("near", problem.near), ("far", problem.far)):
        for name, inputs in sets.items():
            found = scores_of(method.draws(inputs, [key])[key], problem.given.kind)
            for score, values in found.items():
                both = detection.finite(known[score]), detection.finite(values)
                scores[score][distance][name] = measures.detection(*both)
    return {
        "title": variant.title,
        "tuned": variant.tuned,
        "value": variant.value,
        "declared": variant.declared,
        "quality": quality(case, draws, problem.test),
        "scores": scores,
        "seconds_per_1000": 1000 * seconds / len(problem.test),
    }


def scores_of(draws: Draws, kind: str) -> Mapping[str, Tensor]:
    """Of a regression those that need no class probabilities."""
    found = draws.novelty()
    if kind == "classification":
        return found
    without = {"entropy", "mutual_information", "energy"}
    return {name: values for name, values in found.items() if name not in without}


def quality(case: Case, draws: Draws, test: Split) -> dict[str, float]:
    """Accuracy or RMSE, NLL, ECE or interval error, and the joint NLL of groups of ten inputs (dyadic sampling)."""
    if case.task.kind == "classification":
        found = measures.classification(draws.probabilities(), test.targets)
        each = draws.each.gather(-1, test.targets[None, :, None].expand(len(draws.each), -1, 1))
        logs = each.squeeze(-1).clamp_min(torch.finfo(torch.float32).tiny).log()
        keep = ("accuracy", "nll", "ece", "ece_excess")
    else:
        assert case.noise is not None
        noise = case.noise * draws.temperature
        found = measures.regression(draws.mean, case.total(draws), test.targets)
        gaps = (draws.outputs.double() - test.targets).square()
        constant = torch.log(torch.tensor(2 * torch.pi * noise, dtype=torch.float64))
        logs = (-0.5 * (gaps / noise + constant)).sum(-1)
        keep = ("rmse", "nll", "interval_error")
    out = {k: found[k] for k in keep}
    out["joint_nll"] = float(joint_nll(logs).mean())
    return out


def case_of(problem: Problem, size: Size) -> Case:
    """What methods are given; nothing is tuned on more than 150 validation examples."""
    given, validation = problem.given, problem.validation
    assert validation is not None
    some = validation[:VALIDATION]
    scale = Scale(
        seeds=1, train=None, validation=len(some), test=None, shifted=0, outside=0, measured=0,
        recipe=Recipe(0, 0, 0.0), samples=20, members=5, memory="4GB", constrained=size.preserved,
    )  # fmt: skip
    data = Dataset("problem", given.train, some, problem.test)
    task = Ensembled(
        "problem",
        given.kind,
        given.seed,
        scale,
        data,
        functools.partial(_never),
        {},
        again=problem.again,
    )
    noise = None
    if given.kind == "regression":
        gap = given.logits(given.train.inputs) - given.train.targets
        noise = float(gap.double().square().mean())
    return Case(task, given.network, given.train, some, given.seed, noise)


def _never(_: float) -> nn.Module:
    raise AssertionError("networks are trained by the problem")


def report(setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
    """``layers.md`` and ``.json``; nothing where there are no runs."""
    from experiments.layers.tables import write

    if runs:
        write(setting, runs, folder)
