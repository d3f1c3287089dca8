"""What processes know of each other, with two pulses on one store in one process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from support import says

import nullbayes as nb
from nullbayes.common import pulse
from nullbayes.common.alike import Rounded, told_apart
from nullbayes.common.processes import Processes
from nullbayes.common.pulse import Pulse


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Pulse, Pulse]]:
    for name, seconds in {"BEAT": 0.02, "SILENT": 0.3, "HEARD": 2.0}.items():
        monkeypatch.setattr(pulse, name, seconds)
    store = dist.HashStore()
    two = Pulse(store, 0, 2), Pulse(store, 1, 2)
    for each in two:
        each.meet(None)
        each.enter("fit")
    yield two
    for each in two:
        each.stop()


def looked(each: Pulse, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        each.look()
        time.sleep(0.02)


def test_those_who_wait_for_different_things_are_told(pair: tuple[Pulse, Pulse]) -> None:
    first, second = pair
    for each in pair:
        each.begin("a sum of 3 float64")
    looked(first, 0.2)
    second.end()
    second.begin("a decision")  # the next exchange: the other may be late
    looked(first, 0.2)
    second.begin("a sum of 3 float64")
    second.beat()
    first.end()
    first.begin("what each has to tell")  # where the other was, one exchange before
    with says(nb.ProcessError, "process 0", "process 1", "a decision", "what each has to tell"):
        looked(first, 1.0)


def test_a_failure_is_told_once_and_by_its_own_process(pair: tuple[Pulse, Pulse]) -> None:
    first, second = pair
    first.begin("a decision")
    second.fail("OSError: the disk is gone.")
    with pytest.raises(nb.ProcessError) as told:
        looked(first, 1.0)
    second.enter("fit")
    first.fail(str(told.value), relays=True)
    second.begin("a decision")
    with pytest.raises(nb.ProcessError) as relayed:
        looked(second, 1.0)
    assert str(relayed.value) == str(told.value)


def test_a_process_that_fails_waits_until_that_is_known(pair: tuple[Pulse, Pulse]) -> None:
    first, second = pair
    first.fail("OSError: gone.")
    threading.Timer(0.2, second.leave).start()
    started = time.monotonic()
    first.linger()
    assert 0.15 < time.monotonic() - started < 1.9
    second.enter("fit")
    first.calls = second.calls
    started = time.monotonic()
    first.linger()  # it never hears
    assert time.monotonic() - started < 10.0


def test_one_that_has_ended_is_not_waited_for(pair: tuple[Pulse, Pulse]) -> None:
    first, second = pair
    again = Pulse(dist.HashStore(), 0, 2)
    second.stop()
    try:
        with says(nb.ProcessError, "process 1", "has ended"):
            again.meet(first)
    finally:
        again.stop()


def test_numbers_are_the_same_but_for_rounding() -> None:
    one, near, far = Rounded((1.0, 0.0)), Rounded((1.0 + 1e-9, 1e-12)), Rounded((1.1, 0.0))
    apart = told_apart([one, near, far, Rounded((1.0,))])
    assert apart[0] == apart[1]
    assert len(set(apart)) == 3
    assert len(set(told_apart([1.0, 1.0 + 1e-9, True, "1.0"]))) == 4


def test_ctrl_c_after_the_last_decision_is_not_lost() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    processes = Processes.__new__(Processes)
    processes._interrupted = False
    try:
        with pytest.raises(KeyboardInterrupt), processes.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        with processes.interruptible():  # nobody presses it
            pass
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_group_that_was_taken_down_is_told() -> None:
    processes = Processes.__new__(Processes)
    processes._group = None  # the default one, which is not there any more
    with says(nb.ProcessError, "taken down", "exact=False", "nb.load"):
        processes._reduce(torch.ones(1))
