"""Whether the other processes are still there: each tells so every second, and who waits looks.

A process that is killed falls silent. One that stalls (a deadlock, a data loader that never returns) still beats, but
uses no processor time; one that computes for an hour while the others wait does. One that failed says what it was.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from nullbayes.errors import InputError, ProcessError

BEAT = 1.0  # seconds between two beats
# A process whose beats stop for so long has died, or its machine has.
SILENT = 15.0
# Seconds of a process that others wait for without processor time: it hangs. NULLBAYES_STALL sets another limit.
STALLED = 45.0
# Processor seconds within that time below which nothing was computed; beats alone take a hundredth of it.
_IDLE = 0.25
# Of so many exchanges it is known what they were.
REMEMBERED = 8
# Seconds that a process which fails waits, at most, for the others to hear of it.
HEARD = 4.0
# Seconds that a process may take to come to a call that the others have made already.
ABSENT = 300.0

_REST = "All processes end; start them anew"
OUTSIDE = ""  # where a process is that is in no call of ours


def stall_limit() -> float:
    """Seconds, from the environment where it says so. Raises `InputError` for what is no positive number."""
    text = os.environ.get("NULLBAYES_STALL", str(STALLED))
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not limit > 0:
        raise InputError(
            f"the environment variable NULLBAYES_STALL is {text!r}; expected a positive number of seconds after "
            "which a process that uses no processor time is taken for stalled."
        )
    return limit


@dataclass
class _Seen:
    """What is known of another process: its last beat, and since when it has not changed."""

    beat: dict[str, Any] = field(default_factory=dict)
    heard: float = 0.0
    processor: float = 0.0
    worked: float = 0.0


class Pulse:
    """The beats of this process, and those of the others.

    Args:
        store: of `torch.distributed`, that all processes reach.
        rank, size: this process's number in the group, and how many there are.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size, self._store = rank, size, store
        self.stalled = stall_limit()
        self.where, self.waiting, self.failed = OUTSIDE, False, ""
        self.relays = False  # whether the failure is that of another process
        self.calls = 0
        #: how many exchanges there were, and what the last of them were
        self.exchanges: tuple[int, tuple[str, ...]] = (0, ())
        self._count, self._lock = 0, threading.Lock()
        self._since = 0.0
        self._seen: dict[int, _Seen] = {}
        self._over = threading.Event()
        self._lost = False  # whether the store has not answered
        self._thread = threading.Thread(target=self._run, name="nullbayes-pulse", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def enter(self, where: str) -> None:
        """This process is now in the call ``where``."""
        self.where, self.calls, self.failed, self.relays = where, self.calls + 1, "", False
        self.beat()

    def leave(self) -> None:
        """It is out of it again."""
        self.where, self.waiting = OUTSIDE, False
        self.beat()

    def fail(self, why: str, *, relays: bool = False) -> None:
        """Tell all others that this process has ended, and why; ``relays``: as another one told it."""
        self.failed, self.relays = why, relays
        self.beat()

    def linger(self) -> None:
        """Return once all others have heard of a failure here, or soon: with this process their store may go."""
        until = time.monotonic() + HEARD
        others = [rank for rank in range(self.size) if rank != self.rank]
        while time.monotonic() < until:
            beats = self._beats()
            inside = (beats[r] for r in others if r in beats and not beats[r]["failed"])
            if not any(b["where"] == self.where and b["calls"] == self.calls for b in inside):
                return
            time.sleep(BEAT / 10)

    def stop(self) -> None:
        """No beats any more."""
        self._over.set()
        self._thread.join(timeout=2 * BEAT)

    def beat(self) -> None:
        """One beat; where the store cannot be reached, others notice the silence."""
        if self._lost:  # it would wait for an answer to what was asked before
            return
        with self._lock, contextlib.suppress(Exception):
            self._count += 1
            told = {
                "count": self._count,
                "processor": time.process_time(),
                "where": self.where,
                "calls": self.calls,
                "waiting": self.waiting,
                "exchanges": self.exchanges,
                "failed": self.failed,
                "relays": self.relays,
                "who": f"{socket.gethostname()}, pid {os.getpid()}",
            }
            self._store.set(f"beat/{self.rank}", json.dumps(told))

    def _run(self) -> None:
        while not self._over.wait(BEAT):
            self.beat()

    # -- the others --------------------------------------------------------------------------------

    def meet(self, before: Pulse | None) -> None:
        """Return once all processes have a pulse. Raises `ProcessError` naming those that do not come.

        Args:
            before: the pulse that this process had, and those who have not come yet still have.
        """
        self.beat()
        until, missing = time.monotonic() + ABSENT, list(range(self.size))
        look = time.monotonic() + BEAT
        if before is not None:
            before.begin("")
        while missing:
            missing = [rank for rank in missing if not self._store.check([f"beat/{rank}"])]
            if missing and before is not None and time.monotonic() > look:
                before.listen(missing)
                look = time.monotonic() + BEAT
            if missing and time.monotonic() > until:
                raise ProcessError(
                    f"of the {self.size} processes of the group, number {', '.join(map(str, missing))} did not come "
                    f"within {ABSENT:.0f} seconds. Every process makes the same call; for one alone pass "
                    "`process_group=False`."
                )
            time.sleep(0.01)

    def begin(self, what: str) -> None:
        """This process waits for the others from now on, in the exchange ``what``."""
        number, last = self.exchanges
        self.exchanges = number + 1, (*last, what)[-REMEMBERED:]
        self._since, self._seen, self.waiting = time.monotonic(), {}, True

    def end(self) -> None:
        """It no longer does."""
        self.waiting = False

    def look(self) -> None:
        """Raise `ProcessError` naming a process that is not worth waiting for."""
        beats, now = self._beats(), time.monotonic()
        for rank in range(self.size):
            if rank != self.rank:
                self._judge(rank, self._hear(rank, beats.get(rank), now), now)

    def listen(self, ranks: list[int]) -> None:
        """Raise `ProcessError` naming one of ``ranks`` of which nothing is heard any more."""
        beats, now = self._beats(), time.monotonic()
        for rank in ranks:
            self._judge_silence(rank, self._hear(rank, beats.get(rank), now), now)

    def _judge_silence(self, rank: int, seen: _Seen, now: float) -> None:
        if seen.beat and now - seen.heard > SILENT:
            raise ProcessError(
                f"{_who(rank, seen)} has not been heard of for {now - seen.heard:.0f} seconds: it was killed (out of "
                f"memory?) or has ended, or its machine cannot be reached. {_REST}; a `checkpoint=` is gone on from."
            )

    def _beats(self) -> dict[int, dict[str, Any]]:
        """The last beat of each of the others that has begun to.

        A store behind a broken link does not answer, and waits for half an hour: so a thread asks it.
        """
        found: dict[int, dict[str, Any]] = {}
        failed: list[Exception] = []

        def ask() -> None:
            try:
                for rank in range(self.size):
                    if rank != self.rank and self._store.check([f"beat/{rank}"]):
                        found[rank] = json.loads(self._store.get(f"beat/{rank}"))
            except Exception as error:  # whatever a store raises whose server has gone
                failed.append(error)

        asking = threading.Thread(target=ask, name="nullbayes-look", daemon=True)
        asking.start()
        asking.join(SILENT)
        if asking.is_alive():
            self._lost = True
            raise ProcessError(
                f"the store of the process group has not answered for {SILENT:.0f} seconds: the machine of the process "
                "that holds it (number 0, or the launcher) cannot be reached. Look at the network, then start all anew."
            )
        if failed:
            raise ProcessError(
                "the store of the process group cannot be reached, so the process that holds it (number 0, or the "
                f"launcher) has ended: {type(failed[0]).__name__}. Look at its output, then start all anew."
            ) from failed[0]
        return found

    def _hear(self, rank: int, beat: dict[str, Any] | None, now: float) -> _Seen:
        seen = self._seen.setdefault(rank, _Seen(heard=now, worked=now))
        if beat is None:
            return seen
        if beat["count"] != seen.beat.get("count"):
            seen.beat, seen.heard = beat, now
        if beat["waiting"] or beat["processor"] - seen.processor > _IDLE:
            seen.worked, seen.processor = now, beat["processor"]
        return seen

    def _judge(self, rank: int, seen: _Seen, now: float) -> None:
        who = _who(rank, seen)
        if seen.beat.get("relays"):
            raise ProcessError(seen.beat["failed"])
        if seen.beat.get("failed"):
            raise ProcessError(f"{who} ended with an error: {seen.beat['failed']} {_REST}.")
        self._judge_silence(rank, seen, now)
        self._compare(who, seen)
        inside = seen.beat and seen.beat["where"] == self.where and seen.beat["calls"] == self.calls
        if inside and now - seen.worked > self.stalled:
            raise ProcessError(
                f"{who} stalls in `{self.where}`: it has used no processor time for {now - seen.worked:.0f} seconds "
                "while the others wait for it. Look for a data set or loader that does not return, or a forward pass "
                "that waits for the other processes, which have other numbers of batches; where it is only slow, set "
                f"the environment variable NULLBAYES_STALL to more seconds. {_REST}."
            )
        if not inside and now - self._since > ABSENT:
            there = f"is in `{seen.beat['where']}`" if seen.beat.get("where") else "has not come"
            raise ProcessError(
                f"process {self.rank} waits in `{self.where}` for {who}, which {there} after {ABSENT:.0f} seconds. "
                f"Every process of the group calls `{self.where}`; for one alone pass `process_group=False`."
            )

    def _compare(self, who: str, seen: _Seen) -> None:
        """Raise where the other waits, or waited, for something else in the same place of the sequence of exchanges.

        One of the two would never get what it waits for.
        """
        own, mine = self.exchanges
        number, theirs = seen.beat.get("exchanges", (0, ()))
        first = max(number - len(theirs), own - len(mine)) + 1
        for place in range(first, min(number, own) + 1):
            one, other = mine[place - own - 1], theirs[place - number - 1]
            if one != other:
                raise ProcessError(
                    f"process {self.rank} and {who} do not do the same in `{self.where}`: one waits for {one}, the "
                    f"other for {other}. Every process makes the same calls, with the same arguments and data; one "
                    f"that works alone says `process_group=False`. {_REST}."
                )

    def blame(self, error: BaseException) -> ProcessError:
        """What to say after a collective operation has failed: who is gone, once that can be told."""
        until = time.monotonic() + SILENT + 5 * BEAT
        while time.monotonic() < until:
            try:
                self.look()
            except ProcessError as found:
                return found
            time.sleep(BEAT / 2)
        return ProcessError(
            f"an exchange between the processes failed in `{self.where}`, and all of them still answer: {error}. Look "
            "at the network, then start all anew."
        )


def _who(rank: int, seen: _Seen) -> str:
    return f"process {rank}" + (f" ({seen.beat['who']})" if seen.beat else "")
