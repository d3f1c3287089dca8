"""Run what is not there yet, each piece in a process of its own, and say how long the rest will take."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments.store import Key, Store
from nullbayes.common.memory import peak_bytes
from nullbayes.common.writing import write_text

PRELOAD = ["experiments.preload"]
PRELOAD_ALL = [*PRELOAD, "experiments.preload_all"]  # where several experiments are run


@dataclass(frozen=True)
class Job:
    """One piece of work: ``function(*args)`` returns a dictionary that JSON can hold."""

    key: Key
    config: dict[str, Any]  # everything that the result depends on
    function: Callable[..., dict[str, Any]]
    args: tuple[Any, ...] = ()
    keep: bool = True  # False: made for later jobs (a trained network), no row of a table
    after: Key | None = None  # a job that makes what this one needs too (a trained network)


@dataclass
class Outcome:
    """What a run of several jobs came to."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)  # for want of time


class Unavailable(Exception):
    """A method needs a package that is not installed; the message says how to get it."""


class OutOfTime(Exception):
    """A job was ended, or not begun, because the time of the run was over."""


def run(
    jobs: Sequence[Job],
    store: Store,
    *,
    console: Console | None = None,
    fresh: bool = True,
    resume: bool = True,
    workers: int = 1,
    seconds: float | None = None,
    ended: Callable[[Job], None] = lambda job: None,
) -> Outcome:
    """Do ``jobs`` in order; what ``store`` holds already is taken from there.

    A job that fails is reported at the end and does not stop the others; it is tried anew by the next run.

    Args:
        fresh: a process for each job, so that its peak memory is its own. False: here, one after the other.
        resume: False: do everything again.
        workers: processes at a time. A job begins when what it needs is made, see :func:`needs`.
        seconds: how long the run may take. What is then at work is ended, and done by the next run.
        ended: told of every job that is over, whatever came of it, in the caller's thread; other jobs go on meanwhile.
    """
    console = console or Console(stderr=True)
    outcome, clock = Outcome(), Clock(jobs, store)
    until = None if seconds is None else time.monotonic() + seconds

    def one(number: int, job: Job) -> None:
        record = store.get(job.key, job.config) if resume else None
        if record is None and until is not None and time.monotonic() > until:
            outcome.stopped.append(str(job.key))
            return
        where = f"[{number + 1}/{len(jobs)}] {job.key}"
        started, spent = time.perf_counter(), 0.0
        if record is None:
            say(console, f"{where} … {clock.left(number, workers)} left")
            try:
                result = made(job, fresh, until)
            except OutOfTime:
                outcome.stopped.append(str(job.key))
                return
            except Unavailable as missing:
                outcome.skipped[job.key.method] = str(missing)
                say(console, f"{where}: skipped. {missing}")
            except Exception as error:
                say(console, f"{where}: FAILED. {failed(outcome, store, job, error)}")
            else:
                spent = time.perf_counter() - started
                record = store.put(job.key, job.config, result, spent)
                say(console, f"{where}: {words(spent)}")
        clock.done(number, spent)
        if record is not None and job.keep:
            outcome.runs.append(record)

    if not fresh or workers == 1:
        for number, job in enumerate(jobs):
            one(number, job)
            ended(job)
    else:
        spread(jobs, one, workers, ended)
        outcome.runs.sort(key=lambda run: (run["seed"], run["method"]))
    if outcome.stopped:
        say(console, f"time is over: {len(outcome.stopped)} pieces are left to the next run")
    return outcome


def made(job: Job, fresh: bool, until: float | None) -> dict[str, Any]:
    """What a job measures, in a process of its own where that is ``fresh``."""
    if fresh:
        return isolated(job.function, *job.args, until=until)
    return job.function(*job.args)


def failed(outcome: Outcome, store: Store, job: Job, error: Exception) -> str:
    """Enter it, with the whole error in a file beside the missing piece; what to say."""
    outcome.failures[str(job.key)] = str(error)
    trace = store.path(job.key).with_suffix(".error.txt")
    write_text(trace, f"{error}\n")
    return f"{str(error).splitlines()[0]} See {trace}"


def spread(
    jobs: Sequence[Job],
    one: Callable[[int, Job], None],
    workers: int,
    ended: Callable[[Job], None],
) -> None:
    """``one`` for every job, ``workers`` at a time, each as early as it can begin; else in order."""
    wanted = needs(jobs)
    waiting, finished = list(range(len(jobs))), set[int]()
    told: list[Job] = []
    at_work: dict[Future[None], int] = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            while waiting or at_work or told:
                ready = [i for i in waiting if wanted[i] <= finished]
                for i in ready[: workers - len(at_work)]:
                    waiting.remove(i)
                    at_work[pool.submit(one, i, jobs[i])] = i
                for job in told:
                    ended(job)
                told.clear()
                for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                    number = at_work.pop(future)
                    finished.add(number)
                    told.append(jobs[number])
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def needs(jobs: Sequence[Job]) -> list[set[int]]:
    """By job, which jobs come first: the one it names, and the networks of its experiment and seed that are listed
    before it. A failed one counts as made: who needs it tries again."""
    numbers = {job.key: number for number, job in enumerate(jobs)}
    networks: dict[tuple[str, str, int], set[int]] = {}
    out: list[set[int]] = []
    for number, job in enumerate(jobs):
        whose = job.key.experiment, job.key.setting, job.key.seed
        first = set(networks.get(whose, ())) if job.keep else set()
        named = numbers.get(job.after, number) if job.after is not None else number
        out.append(first | ({named} if named < number else set()))
        if not job.keep:
            networks.setdefault(whose, set()).add(number)
    return out


class Clock:
    """Seconds left, by what the same work took before, or another seed of it, or the mean of all."""

    def __init__(self, jobs: Sequence[Job], store: Store) -> None:
        self.jobs = list(jobs)
        self.before = [store.seconds(job.key) for job in jobs]
        self.took: list[float | None] = [None] * len(jobs)
        self.finished = [store.get(job.key, job.config) is not None for job in jobs]

    def done(self, index: int, seconds: float) -> None:
        self.took[index], self.finished[index] = seconds, True

    def left(self, start: int, workers: int = 1) -> str:
        remaining = [i for i in range(start, len(self.jobs)) if not self.finished[i]]
        known = [t for t in self.took if t] + [t for t in self.before if t]
        if not known:
            return "unknown time"
        mean = sum(known) / len(known)
        return "about " + words(sum(self._guess(i) or mean for i in remaining) / workers)

    def _guess(self, index: int) -> float | None:
        if (before := self.before[index]) is not None:
            return before
        key = self.jobs[index].key
        alike = [
            took
            for job, took in zip(self.jobs, self.took, strict=True)
            if took and (job.key.experiment, job.key.method) == (key.experiment, key.method)
        ]
        return sum(alike) / len(alike) if alike else None


def words(seconds: float) -> str:
    """``83`` -> ``"1 min 23 s"``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def say(console: Console, text: str) -> None:
    """Print as it is: no markup, no colours by guess."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


# -- processes -----------------------------------------------------------------------------------


def isolated(
    function: Callable[..., dict[str, Any]], *args: Any, until: float | None = None
) -> dict[str, Any]:
    """Run in a process that holds nothing but the imported packages.

    Args:
        until: when it is ended, by ``time.monotonic()``; None: never.

    Raises:
        OutOfTime: it is not finished by then.
        Unavailable: as the function did.
        RuntimeError: the function failed, with its traceback; or its process was killed.
    """
    methods = multiprocessing.get_all_start_methods()
    if until is not None and time.monotonic() > until:
        raise OutOfTime
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:  # packages are imported once, before any thread is started
        context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, torch.get_num_threads(), function, args))
    process.start()
    sender.close()
    try:
        if until is not None and not receiver.poll(max(0.0, until - time.monotonic())):
            raise OutOfTime
        kind, value = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"its process ended with exit code {process.exitcode} and no result (killed for want of memory?)"
        ) from None
    except BaseException:  # Ctrl-C: the child must not go on alone
        process.terminate()
        process.join()
        raise
    process.join()
    if kind == "missing":
        raise Unavailable(value)
    if kind == "error":
        raise RuntimeError(value)
    return value


def _child(sender: Any, threads: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    try:
        answer = ("result", function(*args))
    except Unavailable as missing:
        answer = ("missing", str(missing))
    except Exception as error:
        answer = ("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    sender.send(answer)
    sender.close()


def forget_peak() -> int:
    """Let the peak of this process start anew, where the system can (Linux); returns what is held now, in bytes."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(torch.device("cpu"))
