"""How long each stage of a fit takes, and how much memory the process has held."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nullbayes import solvers
from nullbayes.common.memory import peak_bytes
from nullbayes.fit import pipeline


def forget_peak() -> None:
    """Hand unused memory back and let the peak start anew from here, where the system can (Linux)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """The most memory that this process has held, in bytes; see :func:`forget_peak`.

    Not `getrusage`: its figure outlives `exec`, so a fresh process would start at its parent's peak.
    """
    try:
        with Path("/proc/self/status").open() as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return peak_bytes(torch.device("cpu"))


@contextmanager
def stage_clock(now: Callable[[], float] = time.perf_counter) -> Iterator[dict[str, float]]:
    """Seconds, or whatever ``now`` counts, of each stage of the fits inside, by wrapping the functions that do them."""
    seconds: dict[str, float] = {}
    running: set[str] = set()

    def timed(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if stage in running:  # one class calls the method of another
                return function(*args, **kwargs)
            running.add(stage)
            started = now()
            try:
                return function(*args, **kwargs)
            finally:
                running.discard(stage)
                seconds[stage] = seconds.get(stage, 0.0) + now() - started

        return run

    places: list[tuple[Any, str, str]]
    places = [(pipeline, "capture_training", "rows"), (pipeline, "GuaranteeCheck", "certificate")]
    places += [(c, "prepare", "Gram") for c in subclasses(solvers.Solver)]
    places += [(c, "factorise", "factorisation") for c in subclasses(solvers.State)]
    places += [(c, "project", "projection") for c in subclasses(solvers.State)]
    with ExitStack() as stack:
        for owner, name, stage in places:
            if name in vars(owner):
                function = getattr(owner, name)
                stack.enter_context(mock.patch.object(owner, name, timed(function, stage)))
        yield seconds


def subclasses(base: type) -> Iterator[type]:
    for kind in base.__subclasses__():
        yield kind
        yield from subclasses(kind)
