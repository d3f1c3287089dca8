"""How public names and calls leave: for two minor versions they work, with a warning that says what to write."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def warn_deprecated(old: str, new: str) -> None:
    """``old`` still works; ``new`` is what to write. Points at the caller's caller."""
    warnings.warn(
        f"{old} is deprecated and will leave with version 0.4; write {new}.",
        DeprecationWarning,
        stacklevel=3,
    )


def formerly_positional(*names: str) -> Callable[[Function], Function]:
    """Decorator: ``names``, keyword-only now, may still be given by position, with a warning."""

    def decorate(function: Function) -> Function:
        kinds = inspect.Parameter
        taken = sum(
            p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
            for p in inspect.signature(function).parameters.values()
        )

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            extra = dict(zip(names, args[taken:], strict=False))
            if extra and len(args) <= taken + len(names):
                shown = ", ".join(f"{n}=..." for n in extra)
                warn_deprecated(f"`{function.__qualname__}` with {list(extra)} by position", shown)
                return function(*args[:taken], **extra, **kwargs)
            return function(*args, **kwargs)

        return cast(Function, run)

    return decorate
