"""The processes that work on one fit: sums, decisions and data between them, by `torch.distributed` alone.

Without an initialised process group nothing here runs. With one, every process makes the same calls in the same order.
Nobody waits without looking: a process that died, stalled or failed ends all others with an error that names it.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nullbayes.common.alike import shortened, told_apart
from nullbayes.common.groups import called, card, keep_for_good
from nullbayes.common.pulse import Pulse
from nullbayes.errors import InputError, NullBayesError, ProcessError

T = TypeVar("T")

# Numbers of a sum that are in float64 at a time.
_CHUNK = 2**22
# Exchanges are watched by us; the limit of the library beneath is only for when we are gone.
_LIMIT = timedelta(hours=48)
# Seconds that are waited without sleeping, and between two looks at whether the others are still there.
_SPIN, _LOOK = 2e-4, 1.0

_made: dict[int, tuple[Any, Processes]] = {}
#: by the name of a group and the processes in it, how many there have been: they are made by all, in one order
_groups_of: dict[tuple[str, ...], int] = {}
#: one thread at a time makes the processes of a group known; threads with different groups do not wait for each other
_making: dict[int, threading.Lock] = {}


class Processes:
    """One process's view of a group of several.

    Attributes:
        rank, size: its number, and how many there are.
        default: whether this is the default group.
        seconds, sent: spent in exchanges so far, and bytes that this process put into them.
    """

    def __init__(self, group: Any, *, default: bool = False) -> None:
        self.default = default
        self._ranks = dist.get_process_group_ranks(group)
        self.rank, self.size = dist.get_rank(group), len(self._ranks)
        self.seconds, self.sent = 0.0, 0
        self._interrupted, self._broken, self._opened, self._neighbours = False, False, 0, 0
        # Two groups may be of the same processes: the beats of one are not those of the other.
        asked = str(getattr(group, "group_name", "")), ",".join(map(str, self._ranks))
        _groups_of[asked] = _groups_of.get(asked, 0) + 1
        self._named = "/".join((*asked, str(_groups_of[asked])))
        #: calls of several threads come one after the other: which thread is in one
        self._turn, self._caller = threading.Lock(), 0
        self.pulse: Pulse
        store = dist.distributed_c10d._get_default_store()
        if hasattr(store, "clone"):
            # A connection of its own: beats must not wait for what the main thread asks of the store.
            with contextlib.suppress(Exception):
                store = store.clone()
        self._store = store
        #: what any process may ask the others about, by a number that it has in each
        self.known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._registered = 0
        self._open()

    def register(self, thing: Any) -> int:
        """A number by which the same thing is known in every process: they make theirs in the same order."""
        self._registered += 1
        self.known[self._registered] = thing
        return self._registered

    def _open(self) -> None:
        """A group of our own over the same processes: nothing of an exchange that failed comes back in it."""
        # Some builds of torch have no distributed package: nothing of it is imported before there is a group.
        from torch.distributed.distributed_c10d import PrefixStore

        before = self.pulse if self._opened else None
        if before is not None:
            before.stop()
        self._opened, self._broken = self._opened + 1, False
        name = f"nullbayes/{self._named}/{self._opened}"
        store = PrefixStore(name, self._store)
        store.set(f"card/{self.rank}", card())
        self.pulse = Pulse(store, self.rank, self.size)
        self.pulse.meet(before)
        cards = {bytes(store.get(f"card/{rank}")) for rank in range(self.size)}
        with called(name):
            self._group = dist.new_group(
                self._ranks,
                timeout=_LIMIT,
                # NCCL refuses two processes on one card, and Gloo takes tensors of a GPU as well.
                backend="cpu:gloo,cuda:nccl" if len(cards - {b""}) == self.size else "gloo",
                use_local_synchronization=True,
            )

    @property
    def neighbours(self) -> int:
        """How many of the processes run on this machine, and share its memory."""
        # (No `cached_property`: until Python 3.12 all objects wait for one lock there, threads of several groups, too.)
        if not self._neighbours:
            host = socket.gethostname()
            self._neighbours = self.gather(host).count(host)
        return self._neighbours

    @property
    def leads(self) -> bool:
        """Whether this process is the one that decides, and that writes files."""
        return self.rank == 0

    # -- one call ------------------------------------------------------------------------------------

    @contextmanager
    def call(self, where: str, asked: dict[str, Any]) -> Iterator[bool]:
        """The length of a call that all processes make. An error in one of them ends it in all.

        Threads take turns, and have to in the same order in every process; those with groups of their own need not.
        (But for making these: torch's client of the store waits for other processes, and lets no other thread in.)

        Args:
            asked: what has to be the same in each, such as arguments.

        Yields:
            whether this is no part of another call.

        Raises:
            ProcessError: one of them makes another call, or this one of something else.
        """
        if self._caller == threading.get_ident():
            yield False
            return
        with self._turn:
            self._caller = threading.get_ident()
            try:
                with self._outermost(where, asked):
                    yield True
            finally:
                self._caller = 0

    @contextmanager
    def _outermost(self, where: str, asked: dict[str, Any]) -> Iterator[None]:
        if self._broken:
            self._open()
        self.pulse.enter(where)
        try:
            self.agree({"call": where, **asked})
            yield
            self.barrier()
        except BaseException as error:
            self._broken = True
            if isinstance(error, ProcessError):
                self.pulse.fail(str(error), relays=True)
                raise
            kind = "it was interrupted." if isinstance(error, KeyboardInterrupt) else _told(error)
            self.pulse.fail(kind)
            if self._ranks[self.rank] == 0:  # which may hold the store
                with contextlib.suppress(ProcessError):
                    self.pulse.linger()
            raise
        finally:
            self.pulse.leave()

    def agree(self, facts: dict[str, Any], kind: type[NullBayesError] = ProcessError) -> None:
        """Raise ``kind`` in every process unless all have the same ``facts``, naming who differs and in what."""
        everyone = self.gather(facts)
        for name in dict.fromkeys(name for each in everyone for name in each):
            values = told_apart([each.get(name) for each in everyone])
            common = max(values, key=lambda v: (values.count(v), -values.index(v)))
            others = [rank for rank, value in enumerate(values) if value != common]
            if others:
                raise kind(
                    f"{'process' if len(others) == 1 else 'processes'} {', '.join(map(str, others))} of {self.size} "
                    f"{'has' if len(others) == 1 else 'have'} other {name} than the rest: "
                    f"{shortened(values[others[0]])} instead of {shortened(common)}. Give every process the same."
                )

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within it Ctrl-C is kept until :meth:`decided` asks, so that all processes end at the same place.

        A second Ctrl-C ends this process at once.
        """
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGINT) if main else None
        if not main or not callable(before):
            yield
            return

        def keep(number: int, frame: Any) -> None:
            if self._interrupted:
                before(number, frame)
            self._interrupted = True

        signal.signal(signal.SIGINT, keep)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            unheard, self._interrupted = self._interrupted, False
        if unheard:  # it came after the last decision
            raise KeyboardInterrupt

    def decided(self, value: int) -> int:
        """The leader's ``value`` (0 or more), on every process.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed in any of the processes.
        """
        told = torch.tensor([value if self.leads else 0, int(self._interrupted)], dtype=torch.int64)
        work = self._begun(dist.all_reduce, told)
        self._finish(work, told.nbytes, "a decision")
        if int(told[1]):
            self._interrupted = False
            raise KeyboardInterrupt
        return int(told[0])

    # -- exchanges -----------------------------------------------------------------------------------

    def sum_(self, values: Tensor) -> Tensor:
        """``values``, of the same shape everywhere, replaced by their sum: the same bits on every process.

        Added in float64; of two float32 numbers the sum is rounded once anyway, so two processes send those.
        """
        flat = values.view(-1)
        wide = values.dtype == torch.float64 or not values.is_floating_point()
        if wide or (self.size == 2 and values.dtype == torch.float32):
            self._reduce(flat)
            return values
        for part in flat.split(_CHUNK):
            double = part.double()
            self._reduce(double)
            part.copy_(double)
        return values

    def _reduce(self, flat: Tensor) -> None:
        if flat.numel():
            work = self._begun(dist.all_reduce, flat)
            self._finish(work, flat.nbytes, f"a sum of {flat.numel()} {_kind(flat)}")

    def total(self, *values: float) -> list[float]:
        """The sum of each number over the processes, in float64."""
        found: list[float] = self.sum_(torch.tensor(values, dtype=torch.float64)).tolist()
        return found

    def largest(self, value: float) -> float:
        """The largest of all processes' numbers."""
        return float(max(self.gather(value)))

    def place(self, count: int) -> tuple[int, int]:
        """Of things of which this process has ``count``: how many the processes before it have, and how many all."""
        counts = self.gather(count)
        return sum(counts[: self.rank]), sum(counts)

    def gather(self, value: T) -> list[T]:
        """Every process's object, in the order of the processes."""
        told = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(told)
        self._reduce(sizes)
        most = int(sizes.max())
        padded = torch.zeros(most, dtype=torch.uint8)
        padded[: len(told)] = told
        everyone = [torch.empty(most, dtype=torch.uint8) for _ in range(self.size)]
        work = self._begun(dist.all_gather, everyone, padded)
        self._finish(work, padded.nbytes, "what each has to tell")
        pairs = zip(everyone, sizes.tolist(), strict=True)
        return [pickle.loads(part[:n].numpy().tobytes()) for part, n in pairs]

    def shared(self, make: Callable[[], T], owner: int = 0) -> T:
        """What ``make`` gives in the process ``owner``, on every process; it runs nowhere else."""
        told = pickle.dumps(make()) if self.rank == owner else b""
        size = torch.tensor([len(told)])
        self.give_(size, owner)
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == owner:
            buffer.copy_(torch.frombuffer(bytearray(told), dtype=torch.uint8))
        self.give_(buffer, owner)
        found: T = pickle.loads(buffer.numpy().tobytes())
        return found

    def give_(self, values: Tensor, owner: int = 0) -> Tensor:
        """``values``, of the same shape everywhere, replaced by those of the process ``owner``."""
        if values.numel():
            source = self._ranks[owner]
            work = self._begun(dist.broadcast, values, source)
            what = f"{values.numel()} {_kind(values)} of process {owner}"
            self._finish(work, values.nbytes if self.rank == owner else 0, what)
        return values

    def joined(self, values: Tensor, dim: int) -> Tensor:
        """The tensors of all processes one after the other along ``dim``, which may be of any length in each."""
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = values.shape[dim]
        self._reduce(lengths)
        rest = list(values.shape)
        parts = []
        for owner, length in enumerate(lengths.tolist()):
            rest[dim] = length
            part = values.contiguous() if owner == self.rank else values.new_empty(rest)
            parts.append(self.give_(part, owner))
        return torch.cat(parts, dim)

    def barrier(self) -> None:
        """Return once every process has come here."""
        self.total(0.0)

    def _begun(self, operation: Callable[..., Any], *args: Any) -> Any:
        """An exchange under way. Raises `ProcessError` where the group was taken down since it was made."""
        try:
            return operation(*args, group=self._group, async_op=True)
        except ValueError as error:  # in the words of torch: not registered, not initialised
            raise ProcessError(
                "the process group has been taken down (`destroy_process_group`), and its processes hold the rows of "
                "the training data between them. Ask before that; or `novelty(x, exact=False)`, which takes the "
                "samples alone; or `save` the posterior and `nb.load(path, model)`."
            ) from error

    def _finish(self, work: Any, nbytes: int, what: str) -> None:
        """Wait for an exchange, looking at the others now and then. Raises `ProcessError` naming who is gone."""
        started = time.perf_counter()
        look = started + _LOOK
        self.pulse.begin(what)
        try:
            while not work.is_completed():
                now = time.perf_counter()
                if now > look:
                    self.pulse.look()
                    look = now + _LOOK
                if now - started > _SPIN:
                    time.sleep(2e-4 if now - started < 0.1 else 2e-3)
            work.wait()
        except BaseException as error:
            self._broken = True
            if not work.is_completed():
                keep_for_good(self._group, work)
            if isinstance(error, RuntimeError) and not isinstance(error, ProcessError):
                raise self.pulse.blame(error) from error
            raise
        finally:
            self.pulse.end()
        self.seconds += time.perf_counter() - started
        self.sent += nbytes


def _kind(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def once(
    processes: Processes | None, work: Callable[[], Sequence[Tensor]], like: Tensor
) -> list[Tensor]:
    """The tensors that ``work`` makes; of several processes the first does it for all.

    Args:
        like: on whose device they belong.
    """
    if processes is None:
        return list(work())
    made = list(work()) if processes.leads else []
    forms = processes.shared(lambda: [(tuple(t.shape), t.dtype) for t in made])
    if not processes.leads:
        made = [torch.empty(shape, dtype=dtype, device=like.device) for shape, dtype in forms]
    return [processes.give_(t.contiguous()) for t in made]


def resolve(asked: Any) -> Processes | None:
    """The processes that a call is made on.

    Args:
        asked: None: the default group where one is initialised; False: this process alone; a group of
            `torch.distributed`, or a device mesh of one dimension.

    Returns:
        None for one process alone.

    Raises:
        InputError: anything else, or a group that this process is no part of.
    """
    if asked is False or (asked is None and not _initialised()):
        return None
    group = _group_of(asked)
    if dist.get_world_size(group) < 2:
        return None
    with _making.setdefault(id(group), threading.Lock()):
        known = _made.get(id(group))
        if known is None or known[0] is not group:
            if asked is None:  # the default group is another one than before
                for old in [key for key, (_, made) in _made.items() if made.default]:
                    _made.pop(old)[1].pulse.stop()
            known = _made[id(group)] = group, Processes(group, default=asked is None)
    return known[1]


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _group_of(asked: Any) -> Any:
    if not _initialised():
        raise InputError(
            f"`process_group` is {asked!r}, but no process group is initialised: call "
            "`torch.distributed.init_process_group()` in every process first (torchrun sets what it needs)."
        )
    if asked is None:
        return dist.group.WORLD
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(asked, DeviceMesh):
        if asked.ndim != 1:
            raise InputError(
                f"`process_group` is a device mesh of {asked.ndim} dimensions; expected one: examples are split over "
                "it. Pass the dimension that is meant, `mesh['data']`."
            )
        return asked.get_group()
    outside = asked is dist.GroupMember.NON_GROUP_MEMBER
    if outside or (isinstance(asked, dist.ProcessGroup) and dist.get_rank(asked) < 0):
        raise InputError(
            "this process is no part of the group that `process_group` names: only its members make the call."
        )
    if isinstance(asked, dist.ProcessGroup):
        return asked
    raise InputError(
        f"`process_group` is {asked!r}; expected None (the default group), False (this process alone), a process "
        "group, or a device mesh of one dimension."
    )


def _told(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"[:1000].rstrip()
    return text if text[-1] in ".!?" else f"{text}."


def spread(count: int, size: int) -> Sequence[range]:
    """``count`` things in their order over ``size`` processes: no two get more than one apart."""
    edges = [count * rank // size for rank in range(size + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]
