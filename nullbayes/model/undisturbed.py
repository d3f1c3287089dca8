"""Calls that leave global random state, autocast and modes of differentiation as they were."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

from nullbayes.common.chance import chance_kept


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Derivatives whatever mode the caller is in (autocast rounds), and global random state put back at the end.

    A model that draws random numbers is refused, but has drawn by then; a shuffling loader draws too.
    """
    cuda = [device] if device.type == "cuda" else []
    with (
        torch.inference_mode(False),
        torch.random.fork_rng(devices=cuda),
        torch.autocast(device.type, enabled=False),
    ):
        yield


Method = TypeVar("Method", bound=Callable[..., Any])


def undisturbed_method(method: Method) -> Method:
    """Decorator: run a method of an object with a ``functional`` inside :func:`undisturbed`."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with undisturbed(self.functional.device):
            return method(self, *args, **kwargs)

    return cast(Method, run)


def reading_method(method: Method) -> Method:
    """The same for a method that reads data: the loader may draw numbers of Python and NumPy too.

    One frame, as there, so that warnings point at the caller.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with chance_kept(), undisturbed(self.functional.device):
            return method(self, *args, **kwargs)

    return cast(Method, run)
