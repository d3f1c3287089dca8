"""The description in a posterior's file: what each entry may be, and how large the whole."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nullbayes.certificate.certificate import Certificate
from nullbayes.posterior.calibration_path import CalibrationPath

# Far above what a posterior writes (a megabyte for ten thousand tensors), far below what a reader could choke on.
MAX_CHARACTERS = 2**28
MAX_DEPTH = 24
MAX_ENTRIES = 10_000_000
DTYPES = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16", "torch.int8")


class DescriptionError(ValueError):
    """An entry that cannot be what was written; the message says which and why. Never leaves `storage`."""


def parsed(text: str) -> dict[str, Any]:
    """The description of a posterior's file, with every entry of the type and in the range that it was written with.

    Raises:
        DescriptionError: it is not JSON, is too large, too deep, says an entry twice, or holds what cannot be.
    """
    value = parsed_json(text)
    if not isinstance(value, dict):
        raise DescriptionError("the description is no mapping")
    missing = [key for key in _TOP if key not in value]
    if missing:
        raise DescriptionError(f"the description lacks {', '.join(missing)}")
    for key, check in _TOP.items():
        _check(check, value[key], key)
    if len(value["names"]) != len(value["shapes"]) or len(set(value["names"])) != len(
        value["names"]
    ):
        raise DescriptionError("names and shapes of the tensors do not go together")
    return value


def check_settings(settings: dict[str, Any]) -> None:
    """Raise `KeyError` for a setting that lacks, `DescriptionError` for one that cannot be what was written."""
    for key, check in _SETTINGS.items():
        _check(check, settings[key], key)
    _check(_likelihood, settings["likelihood"], "likelihood")
    if settings.get("randomness") is not None:
        _check(_randomness, settings["randomness"], "randomness")
    if settings.get("layers") is not None:
        _check(_prior, settings["layers"], "layers")
    check_fields(Certificate, settings["certificate"], "certificate")
    if settings["calibration"] is not None:
        check_fields(CalibrationPath, settings["calibration"], "calibration")


def parsed_json(text: str) -> Any:
    """JSON within bounds. Raises `DescriptionError`."""
    if len(text) > MAX_CHARACTERS:
        raise DescriptionError(f"it has {len(text):,} characters, more than {MAX_CHARACTERS:,}")
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError, OverflowError) as error:
        raise DescriptionError(f"it is not JSON ({error})") from error
    level, entries = [value], 0
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, (dict, list)):
                inner.extend(item.values() if isinstance(item, dict) else item)
        entries += len(inner)
        if entries > MAX_ENTRIES:
            raise DescriptionError(f"it has more than {MAX_ENTRIES:,} entries")
        if not inner:
            return value
        level = inner
    raise DescriptionError(f"it is nested more than {MAX_DEPTH} deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("an entry is there twice")
    return out


# -- entries -------------------------------------------------------------------------------------

Check = Callable[[Any], bool]


def _check(check: Check, value: Any, name: str) -> None:
    if not check(value):
        raise DescriptionError(f"{name!r} is {_short(value)}, which cannot be")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _whole(value: Any, low: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**63


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _positive(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value > 0 and (isinstance(value, float) or value < 2**63) and math.isfinite(value)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _shapes(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    sizes = all(isinstance(s, list) and len(s) <= 64 and all(map(_whole, s)) for s in value)
    return sizes and sum(math.prod(s) for s in value) < 2**63


def _fingerprint(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _options(value: Any) -> bool:
    return isinstance(value, dict) and (
        "delta" not in value or value["delta"] == 0 or _positive(value["delta"])
    )


def _prior(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_scaling, value.values()))
    return value is None or isinstance(value, str) or _scaling(value)


def _randomness(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_whole, value.values()))


def _scaling(value: Any) -> bool:
    """Samples are multiplied by its root, which has to fit single precision."""
    return _positive(value) and 1e-70 < value < 1e70


def _likelihood(value: dict[str, Any]) -> bool:
    """The settings of our own; what other classes store is theirs to judge."""
    checks = _LIKELIHOODS.get(value["name"], {})
    return all(check(value.get(key)) for key, check in checks.items())


def _numbers(value: Any) -> bool:
    """None, a finite number, or nested lists of such."""
    if isinstance(value, list):
        return all(item is not None and _numbers(item) for item in value)
    return value is None or (is_of(value, float) and math.isfinite(value))


def _axes(value: Any) -> bool:
    """Class axes by number of output axes, as `Classification` saw them."""
    if value is None:
        return True
    return isinstance(value, dict) and all(
        k.isdecimal() and len(k) < 3 and _whole(v, 1) and v < int(k) for k, v in value.items()
    )


_LIKELIHOODS: dict[str, dict[str, Check]] = {
    "classification": {
        "class_axis": lambda v: v is None or _integer(v),
        "ignore_index": lambda v: v is None or _integer(v),
        "weight": _numbers,
        "seen_axes": _axes,
    },
    "regression": {"noise_variance": _numbers, "fitted_noise_variance": _numbers},
}
_TOP: dict[str, Check] = {
    "format": lambda v: isinstance(v, str),
    "version": _whole,
    "names": _names,
    "shapes": _shapes,
    "dtype": lambda v: v in DTYPES,
    "fingerprint": _fingerprint,
    "settings": lambda v: isinstance(v, dict),
}
_SETTINGS: dict[str, Check] = {
    "class": lambda v: isinstance(v, str),
    "likelihood": lambda v: isinstance(v, dict) and isinstance(v.get("name"), str),
    "preserve": lambda v: isinstance(v, str),
    "directions": lambda v: v is None or v == "auto" or _whole(v, 1),
    "options": _options,
    "prior": _prior,
    "prior_precision": _scaling,
    "seed": _whole,
    "certificate": lambda v: isinstance(v, dict),
    "calibration": lambda v: v is None or isinstance(v, dict),
}


# -- fields of dataclasses -----------------------------------------------------------------------


def check_fields(kind: type, values: dict[str, Any], name: str) -> None:
    """Raise `DescriptionError` where an entry is not of the type of the field of that name; others are left alone."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in values and not is_of(values[field.name], hints[field.name]):
            found = _short(values[field.name])
            raise DescriptionError(f"{name}: {field.name!r} is {found}, which cannot be")


def is_of(value: Any, hint: Any) -> bool:
    """Whether JSON's ``value`` may stand for something of the type ``hint``."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(is_of(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, tuple):
        kinds = [one for one in inner if one is not Ellipsis]
        if not isinstance(value, (list, tuple)):
            return False
        if origin is tuple and Ellipsis not in inner:
            return len(kinds) == len(value) and all(map(is_of, value, kinds))
        return all(is_of(item, kinds[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(is_of(item, inner[1]) for item in value.values())
    if hint is float:
        return isinstance(value, float) or _integer(value)
    if hint is int:
        return _integer(value)
    if hint in (str, bool):
        return isinstance(value, hint)
    if hint is type(None):
        return value is None
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return isinstance(value, dict) and all(
            is_of(v, hints[k]) for k, v in value.items() if k in hints
        )
    return True
