"""Measure every score on every problem; tables of the judging problems, settings chosen on the tuning ones."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.detection import (  # noqa: F401 - they enter their scores
    posteriors,
    processes,
    published,
    rivals,
)
from experiments.detection.base import SCORES
from experiments.detection.families import FAMILIES, JUDGING, Problem, Size
from experiments.devices import device
from experiments.measures import detection
from experiments.networks import identity
from experiments.runner import Job

NAME = "detection"
VERSION = 1


def jobs(
    setting: str, seeds: Sequence[int] | None = None, methods: Sequence[str] | None = None
) -> list[Job]:
    """One piece for each problem and seed, with all scores."""
    from experiments.store import Key

    out = []
    for family in FAMILIES.values():
        size = family.sizes[setting]
        for member, role in family.chosen(setting):
            for seed in seeds or range(family.seeds[setting]):
                if seed >= family.seeds[setting]:
                    continue
                key = Key(NAME, setting, seed, f"{family.name}, {member}")
                config = {"size": size.config(), "version": VERSION, "role": role}
                out.append(Job(key, config, measure_job, (family.name, member, role, seed, size)))
    return out


def measure_job(family: str, member: str, role: str, seed: int, size: Size) -> dict[str, Any]:
    """Every score that applies: AUROC and FPR95 of each set, seconds."""
    started = time.perf_counter()
    problem = FAMILIES[family].make(member, seed, size)
    about = {
        "member": member,
        "role": role,
        "network_seconds": time.perf_counter() - started,
    }
    names = [name for name, cls in SCORES.items() if cls.applies(problem.given.kind)]
    return measured_scores(problem, names, about, family)


def measured_scores(
    problem: Problem, names: Sequence[str], about: dict[str, Any], family: str
) -> dict[str, Any]:
    """The piece of one problem with the scores named."""
    started = time.perf_counter()
    out: dict[str, Any] = {
        "family": family,
        **about,
        "network": identity(problem.given.network),
        "accuracy": problem.accuracy,
        "train": len(problem.given.train),
        "parameters": sum(p.numel() for p in problem.given.network.parameters()),
        "scores": {},
    }
    for name in names:
        out["scores"][name] = measured(SCORES[name], problem)
        seconds = time.perf_counter() - started
        if seconds > 60 or device().type != "cpu":  # pieces of minutes: where they are
            at = f"{family}, {about['member']}, seed {problem.given.seed}: {name}, {seconds:.1f} s"
            print(f"{at}, accuracy {out['accuracy']:.4f}", file=sys.stderr, flush=True)
    return out


def measured(cls: Any, problem: Problem) -> dict[str, Any]:
    """One score on one problem. A method that fails on it has an error instead of figures, and ranks last."""
    started = time.perf_counter()
    made = cls()
    try:
        made.fit(problem.given)
        fitted = time.perf_counter() - started
        known = finite(made(problem.test.inputs))
        seconds = time.perf_counter() - started - fitted
        sets = {
            distance: {name: detection(known, finite(made(x))) for name, x in found.items()}
            for distance, found in (("near", problem.near), ("far", problem.far))
        }
    except (RuntimeError, ValueError, torch.linalg.LinAlgError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    return {
        **sets, "fit_seconds": fitted, "seconds_per_1000": 1000 * seconds / len(problem.test)
    }  # fmt: skip


def finite(scores: Tensor) -> Tensor:
    """float64; raises where a score is not a number."""
    scores = scores.detach().cpu().double()
    if not scores.isfinite().all():
        raise ValueError("scores are not finite")
    return scores


# -- from runs to tables ---------------------------------------------------------------------------


def mean_of(result: dict[str, Any], name: str, distance: str, measure: str = "auroc") -> float:
    """Mean over the sets at one distance; one half, or 1 for FPR95, for a method that failed."""
    found = result["scores"][name]
    if "error" in found:
        return 0.5 if measure == "auroc" else 1.0
    return statistics.fmean(sets[measure] for sets in found[distance].values())


def both(result: dict[str, Any], name: str) -> float:
    """Near and far count alike."""
    return 0.5 * (mean_of(result, name, "near") + mean_of(result, name, "far"))


def by_family(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """In the order of the families; those without results are left out."""
    out = {family: [r for r in results if r["family"] == family] for family in FAMILIES}
    return {family: found for family, found in out.items() if found}


def representatives(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """``{score family: setting}`` with the best mean over the tuning problems, each family of problems alike."""
    tuning = by_family([r for r in results if r["role"] != JUDGING])
    out: dict[str, str] = {}
    best: dict[str, float] = {}
    for name, cls in SCORES.items():
        means = [
            statistics.fmean(both(r, name) for r in found)
            for found in tuning.values()
            if all(name in r["scores"] for r in found)
        ]
        value = statistics.fmean(means) if means else 0.0
        if cls.family not in best or value > best[cls.family]:
            out[cls.family], best[cls.family] = name, value
    return out


def report(setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
    """``detection.md`` and ``.json``; nothing where there are no runs."""
    from experiments.detection.tables import write

    if runs:
        write(setting, runs, folder)
