"""Forward-mode derivatives, by one thread at a time.

PyTorch counts the levels of forward-mode differentiation once for all threads of a process: two that differentiate at
the same time delete each other's, and get errors, wrong derivatives or memory that is freed twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_turn = threading.RLock()


def jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """The derivative of ``function`` at ``primals`` along ``tangents``: that part of what `torch.func.jvp` returns."""
    with _turn:
        return torch.func.jvp(function, primals, tangents)[1]
