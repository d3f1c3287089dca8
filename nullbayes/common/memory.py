"""How much memory there is, how much was used, and sizes as people write them."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from nullbayes.errors import InputError, MemoryBudgetError, NullBayesError

# Bytes that the temporaries of one product or one capture may take where no budget says less.
WORKING_BYTES = 2**29
_WORKING: ContextVar[int | None] = ContextVar("working", default=None)
# The share of an accelerator's memory that takes the place of `WORKING_BYTES`, and the most that pieces grow by.
ACCELERATOR_SHARE, MOST_TIMES = 1 / 20, 16

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(value: int | float | str) -> int:
    """``"8GB"``, ``"500 MiB"`` or a number of bytes, as an integer (1 GB = 2**30 bytes here)."""
    number = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+|[0-9.]+e\+[0-9]+"  # also as Python writes a large float
    match = re.fullmatch(rf"\s*({number})\s*([kmgt]?)i?b?\s*", str(value).lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise InputError(
            f"`memory` is {value!r}; expected a positive number of bytes or text like '8GB'."
        )
    return size


def format_bytes(count: float) -> str:
    """``1536`` -> ``"1.5 kB"``, for messages."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


def available_bytes(device: torch.device) -> int:
    """Memory that new tensors on ``device`` may take now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with Path("/proc/meminfo").open() as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _all_memory() // 2


def _all_memory() -> int:
    """Bytes of the machine's memory; where it does not say, of a small one."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 16 * 2**30


@functools.cache
def times_on(device: torch.device) -> int:
    """How many times the pieces that suit a CPU are made on ``device``: 1 on the CPU.

    A CPU is fast where a piece stays in its cache. An accelerator waits for each operation that it is sent, so there
    the fewest and largest pieces win, up to a share of its memory.
    """
    if device.type == "cpu":
        return 1
    whole = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else _all_memory()
    return max(1, min(MOST_TIMES, int(ACCELERATOR_SHARE * whole / WORKING_BYTES)))


def working_bytes(device: torch.device | None = None) -> int:
    """Bytes that the temporaries of one product, or of one capture, on ``device`` (None: the CPU) may take now."""
    most = WORKING_BYTES * (1 if device is None else times_on(device))
    given = _WORKING.get()
    return most if given is None else min(given, most)


def bounded(device: torch.device | None = None) -> bool:
    """Whether a budget leaves the temporaries on ``device`` (None: the CPU) less than they take without one."""
    given = _WORKING.get()
    return given is not None and given < WORKING_BYTES * (1 if device is None else times_on(device))


@contextmanager
def working_within(nbytes: int) -> Iterator[None]:
    """Products and captures in this thread cut their work so that its temporaries take about ``nbytes``."""
    token = _WORKING.set(max(1, nbytes))
    try:
        yield
    finally:
        _WORKING.reset(token)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """The C library's ``malloc_trim``, which only that of GNU has."""
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return found


def give_back() -> None:
    """Return freed memory to the system.

    The C library keeps blocks of up to 32 MB that were freed, for those to come; others do not fit into the holes, and
    a process then holds a multiple of what it uses (measured: 55 MB beside a Gram matrix of as much).
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@contextmanager
def explained_out_of_memory(budget: int) -> Iterator[None]:
    """Turn an error of Python or torch that says there is no memory left into one that names the knob.

    Raises:
        MemoryBudgetError: in place of such an error; any other passes through.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
            "can't allocate memory" in text or "out of memory" in text
        )
        if isinstance(error, NullBayesError) or not lacking:
            raise
        raise MemoryBudgetError(
            f"the machine ran out of memory although the fit was planned within {format_bytes(budget)}: "
            "lower `memory=` (rows then go to disk), or `num_samples=` (more can be drawn later)."
        ) from error


def peak_bytes(device: torch.device) -> int:
    """The most memory this process (or, on an accelerator, its tensors) has held so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:  # the kernel's other figure, ru_maxrss, begins at what the parent process had reached
        with Path("/proc/self/status").open() as lines:
            for line in lines:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
