"""``job.py``: a file that defines ``model`` and ``train`` and, where it likes, more."""

from __future__ import annotations

import difflib
import inspect
import sys
import traceback
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nullbayes.errors import InputError
from nullbayes.posterior import LaplacePosterior, NullSpacePosterior
from nullbayes.posterior.layers import LayerNullSpacePosterior

#: any posterior that a job may ask for
Fitted = NullSpacePosterior | LaplacePosterior | LayerNullSpacePosterior

DATA = ("train", "validation", "test")
KINDS: dict[
    str, type[NullSpacePosterior] | type[LaplacePosterior] | type[LayerNullSpacePosterior]
] = {
    "null-space": NullSpacePosterior,
    "laplace": LaplacePosterior,
    "layer-null-space": LayerNullSpacePosterior,
}
#: options that are neither of a constructor nor of `fit`
OWN = {"posterior": "null-space", "calibrate": True}
_FIT = ("num_samples", "seed", "max_examples", "checkpoint_every")
_FIT_OF_LAYERS = _FIT[:2]  # one pass over all the data: nothing to cut short or to resume
_NOT_OPTIONS = ("self", "model", "likelihood", "loss", "drift")


@dataclass(frozen=True)
class Job:
    """What a job file defines.

    Attributes:
        path: the file.
        model: the trained network.
        train, validation, test: data; None where the file does not define them.
        shifted: ``{name: data}``.
        likelihood: its name, an object, or a callable loss; None: classification.
        slices, show, title: see `nullbayes.Posterior.report`.
        constructor, fit: what ``options`` says of either.
        kind: a key of `KINDS`; calibrate: whether to, where there are validation data.
    """

    path: Path
    model: nn.Module
    train: Any
    validation: Any
    test: Any
    shifted: Mapping[str, Any]
    likelihood: Any
    slices: Mapping[str, Any] | None
    show: Any
    title: str | None
    constructor: dict[str, Any]
    fit: dict[str, Any]
    kind: str
    calibrate: bool

    def posterior(self) -> Fitted:
        """The posterior that the file asks for, not fitted; its constructor's errors name the file."""
        with self.blamed("`options`"):
            likelihood = "classification" if self.likelihood is None else self.likelihood
            return KINDS[self.kind](self.model, likelihood, **self.constructor)

    def need(self, name: str, command: str) -> Any:
        """Data called ``name``. Raises `InputError` where the file has none."""
        value = getattr(self, name)
        if value is None:
            raise InputError(
                f"{self.path.name} defines no `{name}`, which `nullbayes {command}` needs."
            )
        return value

    @contextmanager
    def blamed(self, what: str) -> Iterator[None]:
        """Within it, an `InputError` says that it comes from ``what`` of the file."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.path.name}, {what}: {error}") from error


def read_job(path: Path) -> Job:
    """Run the file and take what it defines.

    The model and the data may also be functions without arguments that return them.

    Raises:
        InputError: the file cannot be read, fails, or lacks or misuses a name; the message says which, and where.
    """
    names = _run(path)
    where = path.name
    model = _made(names, "model", where)
    if model is None:
        raise InputError(f"{where} defines no `model`{_near('model', names)}.")
    if isinstance(model, type) or not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise InputError(f"{where}: `model` is {found}, expected a trained torch.nn.Module.")
    data = {name: _made(names, name, where) for name in DATA}
    if data["train"] is None:
        raise InputError(f"{where} defines no `train`{_near('train', names)}.")
    shifted = _mapping(names, "shifted", where) or {}
    shifted = {str(k): _called(v, f"shifted[{k!r}]", where) for k, v in shifted.items()}
    options = _mapping(names, "options", where) or {}
    kind = options.get("posterior", OWN["posterior"])
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(
            f"{where}: options['posterior'] is {kind!r}; expected {' or '.join(map(repr, KINDS))}."
        )
    constructor, fit = _sorted(options, kind, where)
    title, calibrate = names.get("title"), options.get("calibrate", OWN["calibrate"])
    if not isinstance(title, (str, type(None))):
        raise InputError(f"{where}: `title` is {type(title).__name__}, expected a string.")
    if not isinstance(calibrate, bool):
        raise InputError(f"{where}: options['calibrate'] is {calibrate!r}; expected True or False.")
    return Job(
        path,
        model,
        data["train"],
        data["validation"],
        data["test"],
        shifted,
        names.get("likelihood"),
        _mapping(names, "slices", where),
        names.get("show"),
        title,
        constructor,
        fit,
        kind,
        calibrate,
    )


def _run(path: Path) -> dict[str, Any]:
    """The names that the file leaves, run with its own folder at the head of the import path."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # a mark of the encoding is no code
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(f"the job file {path} cannot be read: {said}.") from error
    module = types.ModuleType("nullbayes_job")
    module.__file__ = str(path)
    folder = str(path.resolve().parent)
    before = sys.modules.get(module.__name__)
    sys.path.insert(0, folder)
    sys.modules[module.__name__] = module  # pickling and dataclasses look there
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except KeyboardInterrupt:
        raise
    except SyntaxError as error:
        at = "" if error.lineno is None else f", line {error.lineno}"
        raise InputError(f"{path.name}{at}: {error.msg}.") from error
    except (Exception, SystemExit) as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        line = f", line {lines[-1]}" if lines else ""
        raise InputError(f"{path.name}{line}: {type(error).__name__}: {error}") from error
    finally:
        if folder in sys.path:  # the file may have changed it
            sys.path.remove(folder)
        if before is not None:
            sys.modules[module.__name__] = before
    return module.__dict__


def _made(names: Mapping[str, Any], name: str, where: str) -> Any:
    return _called(names.get(name), name, where)


def _called(value: Any, name: str, where: str) -> Any:
    """``value``, or what it returns where it is a plain function."""
    if not isinstance(value, types.FunctionType):
        return value
    try:
        return value()
    except (Exception, SystemExit) as error:
        raise InputError(f"{where}: `{name}()` failed: {type(error).__name__}: {error}") from error


def _mapping(names: Mapping[str, Any], name: str, where: str) -> dict[str, Any] | None:
    value = names.get(name)
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: `{name}` is {type(value).__name__}, expected a dictionary.")
    return dict(value)


def _sorted(
    options: Mapping[str, Any], kind: str, where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the constructor, and of `fit`. Raises `InputError` for any other."""
    accepted = [
        name
        for name in inspect.signature(KINDS[kind].__init__).parameters
        if name not in _NOT_OPTIONS
    ]
    fit = _FIT_OF_LAYERS if KINDS[kind] is LayerNullSpacePosterior else _FIT
    known = [*accepted, *fit, *OWN]
    for name in options:
        if name not in known:
            if name in ("likelihood", "loss"):
                mend = "Define it in the file itself, as `likelihood = ...`."
            else:
                near = difflib.get_close_matches(str(name), known, 1)
                mend = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known)}."
            raise InputError(f"{where}: `options` has no {name!r}. {mend}")
    constructor = {name: options[name] for name in accepted if name in options}
    return constructor, {name: options[name] for name in fit if name in options}


def _near(name: str, names: Mapping[str, Any]) -> str:
    """What the author may have called it instead."""
    own = [n for n in names if not n.startswith("_")]
    near = difflib.get_close_matches(name, own, 1, 0.6)
    return f" (there is `{near[0]}`)" if near else ""
