"""What the processes ask of `torch.distributed` beneath it: groups of their own, and such as are never taken down."""

from __future__ import annotations

import ctypes
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from nullbayes.common.switch import switch

_thread = threading.local()


@contextmanager
def _named_by_thread() -> Iterator[None]:
    own = dist.distributed_c10d._process_group_name

    def name(*args: Any, **kwargs: Any) -> str:
        mine: str | None = getattr(_thread, "name", None)
        return own(*args, **kwargs) if mine is None else mine

    dist.distributed_c10d._process_group_name = name  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.distributed_c10d._process_group_name = own


_names_are_ours = switch(_named_by_thread)


@contextmanager
def called(name: str) -> Iterator[None]:
    """Groups that this thread makes within have this name. Torch's own name for a group that only its members make
    counts the groups of the process: where one process is in more of them than another, each would wait for ever.
    """
    with _names_are_ours():
        _thread.name = name
        try:
            yield
        finally:
            del _thread.name


def keep_for_good(*things: Any) -> None:
    """See that a group is never taken down, in which an exchange waits that may never end; nor that exchange.

    Gloo's threads are waited for where a group is taken down, at the end of the program if not before: a process that
    waited for one that hangs would hang itself, after its error. Nor may such a thread be the last to hold a tensor.
    """
    if sys.implementation.name == "cpython":
        for thing in things:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def card() -> str:
    """Which GPU this process computes on (``torch.cuda.set_device``) by a name of its own; empty without NCCL."""
    if not (dist.is_nccl_available() and torch.cuda.is_available()):
        return ""
    current = torch.cuda.current_device()
    known = getattr(torch.cuda.get_device_properties(current), "uuid", current)
    return f"{socket.gethostname()} {known}"
