"""Settings of the whole process that several threads need for a while, put back once by the last of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

Switch = Callable[[], AbstractContextManager[None]]


def switch(setting: Callable[[], AbstractContextManager[Any]]) -> Switch:
    """A context in which ``setting`` is on, whichever thread came first and whichever leaves last.

    Two threads that each save what they find and put it back leave the setting on for good where they overlap.

    Args:
        setting: makes a context that changes something for all threads.
    """
    lock = threading.Lock()
    inside = 0
    entered: list[AbstractContextManager[Any]] = []

    @contextmanager
    def on() -> Iterator[None]:
        nonlocal inside
        with lock:
            if not inside:
                made = setting()
                made.__enter__()
                entered.append(made)
            inside += 1
        try:
            yield
        finally:
            with lock:
                inside -= 1
                if not inside:
                    entered.pop().__exit__(None, None, None)

    return on
