"""Networks first, then every group of methods on each: one piece for each way, seed and group."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import measures
from experiments.detection.running import finite
from experiments.devices import device
from experiments.language import causal, encoder
from experiments.language.methods import GROUPS, IN_FULL, PART, SMALL
from experiments.language.problem import SIZES, Problem, Row, Size, nll
from experiments.language.texts import JUDGING, TUNING
from experiments.methods.base import Draws
from experiments.networks import identity
from experiments.runner import Job, Unavailable
from nullbayes.datasets import Split
from nullbayes.errors import NullBayesWarning
from nullbayes.posterior.measuring.records import joint_nll

NAME = "language"
VERSION = 1
CAUSAL = ("choices", "free text", "choices, several")
AFTER_CAUSAL = "last twentieth"  # the group of methods that comes next


def jobs(
    setting: str, seeds: Sequence[int] | None = None, methods: Sequence[str] | None = None
) -> list[Job]:
    """Networks, then groups of methods, then the small causal model."""
    from experiments.store import Key

    size = SIZES[setting]
    chosen = [seed for seed in seeds or range(size.seeds) if seed < size.seeds]
    config: dict[str, Any] = {"size": depends(size), "version": VERSION}
    texts, shape = causal.sized(size)
    small = {"size": depends(texts), "shape": asdict(shape), "version": VERSION}

    def job(seed: int, name: str, function: Any, args: tuple[Any, ...], keep: bool = True) -> Job:
        own = small if function is causal.measure_job else config
        return Job(Key(NAME, setting, seed, name), own, function, args, keep)

    each = [(way, seed) for way in reversed(size.ways) for seed in chosen]
    out = [
        job(seed, f"{way}: networks trained", train_job, (way, seed, size), keep=False)
        for way, seed in each
    ]
    kinds, groups = (CAUSAL[:1], SMALL) if setting == "small" else (CAUSAL, tuple(GROUPS))
    own_model = [
        job(seed, f"GPT-2: {kind}", causal.measure_job, (kind, seed, size))
        for kind in kinds
        for seed in chosen
    ]
    for group in groups:
        if group == AFTER_CAUSAL:
            out += own_model
        out += [
            job(seed, f"{way}: {group}", measure_job, (way, seed, group, size))
            for way, seed in each
            if (
                group not in IN_FULL
                if way == "LoRA"
                else setting != "processor" or group not in PART
            )
        ]
    out += own_model if AFTER_CAUSAL not in groups else []
    return sorted(out, key=_family) if setting == "processor" else out


def _family(job: Job) -> int:
    """One family after the other: what a run that is cut off then has."""
    return ("GPT-2", "full", "LoRA").index(job.key.method.partition(":")[0])


def depends(size: Size) -> dict[str, Any]:
    """What of it a result depends on."""
    return {k: v for k, v in asdict(size).items() if k not in ("seeds", "ways")}


def train_job(way: str, seed: int, size: Size) -> dict[str, Any]:
    """All members, kept for the pieces that follow."""
    problem = Problem(way, seed, size)
    started = time.perf_counter()
    found = [accuracy(problem, problem.member(k), problem.test) for k in range(size.members)]
    return {"accuracy": found, "seconds": time.perf_counter() - started}


def accuracy(problem: Problem, network: encoder.Encoder, split: Split) -> float:
    top = encoder.outputs(network, split.inputs).argmax(1)
    return float((top == split.targets).double().mean())


def measure_job(way: str, seed: int, group: str, size: Size) -> dict[str, Any]:
    """One group on one network; a method that fails says why and stops no other."""
    problem = Problem(way, seed, size)
    network = problem.network
    out: dict[str, Any] = {
        "way": way,
        "group": group,
        "network": identity(network),
        "device": where(),
        "weights": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "all weights": sum(p.numel() for p in network.parameters()),
        "train": len(problem.train),
        "accuracy": accuracy(problem, network, problem.test),
        "training accuracy": accuracy(problem, network, problem.train),
    }
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullBayesWarning)
        try:
            rows = GROUPS[group](problem)
            out["fit_seconds"] = time.perf_counter() - started
            out["rows"] = measured(problem, rows)
        except Unavailable:
            raise
        except Exception as error:
            words = (str(error).splitlines() or [""])[0]
            out["error"] = f"{type(error).__name__}: {words[:300]}"
            out["rows"] = {}
    out["seconds"] = time.perf_counter() - started
    out["peak device memory"] = peak()
    return out


def where() -> str:
    found = device()
    return torch.cuda.get_device_name(found) if found.type == "cuda" else found.type


def peak() -> int | None:
    """Bytes on the device."""
    found = device()
    return torch.cuda.max_memory_allocated(found) if found.type == "cuda" else None


def measured(problem: Problem, rows: dict[str, Row]) -> dict[str, Any]:
    """Quality on test texts, and the AUROC of every score on every set: all sets at once."""
    out: dict[str, Any] = {}
    known: dict[str, dict[str, Tensor]] = {}
    for key, row in rows.items():
        out[key] = {
            "title": row.title,
            "tuned": row.tuned,
            "value": row.value,
            "declared": row.declared,
            "details": row.details,
            "auroc": {},
        }
        started = time.perf_counter()
        draws = None if row.draws is None else row.draws(problem.test.inputs)
        if draws is not None:
            out[key]["quality"] = quality(draws, problem.test)
        known[key] = scores(row, draws, problem.test.inputs)
        seconds = time.perf_counter() - started
        out[key]["seconds_per_1000"] = 1000 * seconds / len(problem.test)
    roles = [JUDGING, TUNING] if all(row.draws is None for row in rows.values()) else [JUDGING]
    for role in roles:
        placed = [(d, n, t) for d, sets in problem.sets(role).items() for n, t in sets.items()]
        sizes = [len(tokens) for _, _, tokens in placed]
        every = torch.cat([tokens for _, _, tokens in placed])  # fewer, fuller batches
        for key, row in rows.items():
            draws = None if row.draws is None else row.draws(every)
            for score, values in scores(row, draws, every).items():
                for (distance, name, _), own in zip(placed, values.split(sizes), strict=True):
                    place = out[key]["auroc"].setdefault(score, {})
                    place = place.setdefault(role, {}).setdefault(distance, {})
                    place[name] = measures.detection(known[key][score], own)["auroc"]
    return out


def scores(row: Row, draws: Draws | None, tokens: Tensor) -> dict[str, Tensor]:
    """By name, float64."""
    found = {} if draws is None else dict(draws.novelty())
    found |= {name: score(tokens) for name, score in row.scores.items()}
    return {name: finite(values) for name, values in found.items()}


def quality(draws: Draws, test: Split) -> dict[str, float]:
    """Accuracy, NLL and ECE, and the joint NLL of groups of ten texts (dyadic sampling)."""
    found = measures.classification(draws.probabilities(), test.targets)
    each = draws.each
    own = each.gather(-1, test.targets[None, :, None].expand(len(each), -1, 1)).squeeze(-1)
    logs = own.clamp_min(torch.finfo(torch.float32).tiny).log()
    kept = {k: found[k] for k in ("accuracy", "ece", "ece_excess")}
    return {**kept, "nll": nll(draws, test.targets), "joint_nll": float(joint_nll(logs).mean())}


def report(setting: str, runs: list[dict[str, Any]], folder: Path) -> None:
    """``language.md`` and ``.json``; nothing where there are no runs."""
    from experiments.language.tables import write

    if runs:
        write(setting, runs, folder)
