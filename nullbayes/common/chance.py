"""Global random state of Python and NumPy, put back after what may draw from it: a loader, or a network to be refused.

PyTorch's is put back around every call (:func:`nullbayes.model.functional.undisturbed`); these two take a fifth of a
millisecond to read, so only calls that read data do it.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np

Method = TypeVar("Method", bound=Callable[..., Any])


@contextmanager
def chance_kept() -> Iterator[None]:
    """Within it, Python's `random` and NumPy's global numbers may be drawn; afterwards they are where they were."""
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state that is kept
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002


def keeping_chance(method: Method) -> Method:
    """Decorator: run a function within :func:`chance_kept`."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with chance_kept():
            return method(*args, **kwargs)

    return cast(Method, run)
