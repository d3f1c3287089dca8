"""Checks of arguments that several rooms share: each says what was found and what is expected."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, cast

import torch

from nullbayes.errors import InputError

PriorPrecision = str | float | Mapping[str, float]
CheckedPrior = str | float | dict[str, float]


_SMALL_RANGE = "Float16 has too small a range: changes of weights are often below 6e-8."
#: one prior precision for each layer, found by the evidence
BY_LAYER = "evidence-by-layer"


def check_prior(value: PriorPrecision) -> CheckedPrior:
    """``"evidence"``, ``"evidence-by-layer"``, a positive number, or one per parameter tensor."""
    if isinstance(value, Mapping):
        return {
            str(name): check_positive(number, f"prior_precision[{name!r}]")
            for name, number in value.items()
        }
    if isinstance(value, str):
        if value in ("evidence", BY_LAYER):
            return value
        raise InputError(
            f"`prior_precision` is {value!r}; expected 'evidence', {BY_LAYER!r}, a positive number, or one per "
            "parameter tensor ({name: value})."
        )
    return check_positive(value, "prior_precision")


def check_positive(value: float, name: str) -> float:
    """A positive, finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise InputError(f"`{name}` is {value!r}; expected a positive, finite number.")
    return float(value)


def check_delta(value: float) -> float:
    """Where a null space ends: finite, 0 or more."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise InputError(f"`delta` is {value!r}; expected a number, 0 (exact) or more.")
    return float(value)


def check_count(value: int, name: str, least: int = 1) -> int:
    """A whole number, NumPy's included, of at least ``least``."""
    try:
        count = operator.index(value)
    except TypeError:
        count = least - 1
    if isinstance(value, bool) or count < least:
        raise InputError(f"`{name}` is {value!r}; expected a whole number, {least} or more.")
    if count >= 2**63:  # what a tensor's sizes and a generator's seed may be
        raise InputError(f"`{name}` is {value!r}; expected a whole number below 2**63.")
    return count


def check_choice(value: str, allowed: tuple[str, ...], name: str) -> str:
    """``value`` if it is one of ``allowed``."""
    if value not in allowed:
        raise InputError(f"`{name}` is {value!r}; expected one of {', '.join(map(repr, allowed))}.")
    return value


def check_stored_dtype(value: Any, working: torch.dtype) -> torch.dtype:
    """What samples may be made narrower to. Raises `InputError` for any other dtype."""
    if value in (torch.int8, torch.bfloat16, working):
        return cast("torch.dtype", value)
    raise InputError(
        f"`dtype` is {value!r}; expected None, torch.bfloat16 or torch.int8. {_SMALL_RANGE}"
    )


def check_sample_dtype(value: Any, working: torch.dtype) -> torch.dtype | None:
    """None for the working precision itself. Raises `InputError` for a dtype that samples cannot be stored in."""
    if value is None or value == working:
        return None
    if value is not torch.bfloat16:
        mend = _SMALL_RANGE
        if value is torch.int8:
            mend = "For samples in 8 bits call `compact(dtype=torch.int8)` after the fit."
        raise InputError(
            f"`sample_dtype` is {value!r}; expected None ({working}) or torch.bfloat16. {mend}"
        )
    return value
