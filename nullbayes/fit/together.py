"""What a fit on several processes needs beside one on one: the same question in each, and its part of the whole."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from nullbayes.common.memory import available_bytes
from nullbayes.common.processes import Processes
from nullbayes.common.writing import json_digest
from nullbayes.constraints.memory_budget import default_budget
from nullbayes.constraints.problem import Problem
from nullbayes.errors import ProcessError
from nullbayes.fit.result import Run, Settings
from nullbayes.model.bits import digest
from nullbayes.model.fingerprint import fingerprint
from nullbayes.model.shares import Share


def processes_of(loader: Iterable[Any]) -> Processes | None:
    """Those that read the other shares of the data."""
    return loader.processes if isinstance(loader, Share) else None


def check_alike(
    problem: Problem, settings: Settings, run: Run | None, processes: Processes
) -> None:
    """Raise `ProcessError` naming the processes whose versions, weights, seed or settings are not those of the rest."""
    facts: dict[str, Any] = {
        "versions": _versions(),
        "weights": json_digest(fingerprint(problem.functional.model))[:16],
        "parameters": (problem.space.total, str(problem.dtype), _chosen(problem)),
        "randomness": problem.randomness,
        "likelihood": _named(problem.likelihood),
        "settings": (
            problem.preserve.describe(),
            problem.directions,
            settings.target.name,
            settings.target.delta,
            _named(settings.solver),
            settings.tolerance,
            settings.row_drift,
        ),
    }
    if run is not None:
        facts |= {"seed": run.seed, "num_samples": run.num_samples, "sample_dtype": run.stored}
        facts |= {"audit": (run.audit, run.patient), "checkpoint": run.checkpoint is not None}
    facts["prior"] = problem.within is not None, problem.prior
    if problem.prior_mean is not None:
        facts["prior_mean"] = digest(problem.prior_mean)
    processes.agree(facts)
    if problem.within is not None:
        _check_within(problem, processes)


def _check_within(problem: Problem, processes: Processes) -> None:
    """Raise `ProcessError` where the layer posterior of `within=` is another one in some process.

    Rounding apart: the same data give the same sums on two machines to that.
    """
    assert problem.within is not None
    everyone = processes.gather(problem.within.sketched())
    close = 1e-8 if problem.dtype == torch.float64 else 1e-4
    other = [
        rank
        for rank, values in enumerate(everyone)
        if any(abs(a - b) > close * abs(b) for a, b in zip(values, everyone[0], strict=True))
    ]
    if other:
        raise ProcessError(
            f"the layer posterior of `within=` in process {', '.join(map(str, other))} of {processes.size} is not that "
            "of process 0. Fit it in a call of all processes, each with all of the data or a `Shard` of them; or in "
            "one process, save it, and `nb.load` it in the others."
        )


def _chosen(problem: Problem) -> str:
    """Digest of which weights take part."""
    slots = [(slot.name, tuple(slot.shape)) for slot in problem.space.slots]
    masks = [(name, digest(mask)) for name, mask in problem.space.masks.items()]
    return hashlib.sha256(repr((slots, masks)).encode()).hexdigest()[:16]


def _named(value: Any) -> str:
    """As it shows itself, without where in memory it is."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _versions() -> str:
    try:
        ours = version("nullbayes")
    except PackageNotFoundError:  # a source tree that is not installed
        ours = "unknown"
    return f"nullbayes {ours}, torch {torch.__version__}, Python {platform.python_version()}"


def own_budget(device: torch.device, processes: Processes | None) -> int:
    """What a fit may take of the memory that is free: its part of it, where several processes share a machine."""
    free = available_bytes(device)
    if processes is not None and device.type == "cpu":
        free //= processes.neighbours
    return default_budget(free)


def any_of(processes: Processes | None, own: Sized) -> bool:
    """Whether any process has something."""
    return bool(len(own) if processes is None else processes.total(len(own))[0])


def gathered_spans(processes: Processes | None, spans: list[slice]) -> list[slice]:
    """Those of all processes."""
    if processes is None:
        return spans
    return [span for part in processes.gather(spans) for span in part]


# -- what checkpoints hold of examples that are left out: those of all processes, in the order of the data -----------


def carried(processes: Processes | None, found: Sequence[Tensor]) -> dict[str, Tensor]:
    """What samples do to examples that were left out, ``(S, k, *out)`` each, under the names in a checkpoint."""
    if processes is not None:
        everyone = processes.gather([c.cpu().clone() for c in found])
        found = [c for part in everyone for c in part]
    return {f"unseen.{i}": c for i, c in enumerate(found)}


def taken(
    processes: Processes | None, there: Mapping[str, Tensor], sizes: Sequence[int]
) -> list[Tensor]:
    """The same of this process's examples from a checkpoint, whoever wrote it and from how many processes.

    Args:
        sizes: of the batches in which this process has them.
    """
    names = sorted((n for n in there if n.startswith("unseen.")), key=lambda n: int(n[7:]))
    before = 0
    if processes is not None:
        before, _ = processes.place(sum(sizes))
    if not names or not sizes:
        return []
    whole = torch.cat([there[name] for name in names], 1)
    return list(whole[:, before : before + sum(sizes)].split(list(sizes), 1))
