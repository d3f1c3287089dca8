"""One safetensors file per posterior: samples, settings as JSON, a fingerprint of the model, a checksum over all."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nullbayes.certificate import Certificate
from nullbayes.common.eight_bits import ALIGNED, Packed, Piece, packed_in
from nullbayes.constraints.problem import Problem
from nullbayes.errors import ModelError, NullBayesError, NullBayesWarning, StorageError
from nullbayes.fit.result import Fit
from nullbayes.fit.target import Target
from nullbayes.likelihood import Likelihood, likelihood_from_config
from nullbayes.model.adapters import ACTIVE, MERGED, active_adapters
from nullbayes.model.fingerprint import fingerprint
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.parameters import HALF, WRAPPED, ParameterSpace
from nullbayes.model.probe import Probe
from nullbayes.posterior.calibration_path import CalibrationPath
from nullbayes.posterior.description import DescriptionError, check_settings, parsed
from nullbayes.posterior.posterior_file import (
    PLAIN,
    SPECIAL,
    VERSION,
    check_format,
    check_whole,
    description,
    write_file,
)

# What a file may hold beside the samples: vectors of P numbers.
BESIDE = ("prior_mean", "mask")
# What belongs to samples in 8 bits: their scales, and the columns that are not packed.
SCALES, REST, FILLED = "sample_scales", "sample_rest", "filled"


def write_posterior(path: str | os.PathLike[str], fit: Fit, settings: dict[str, Any]) -> None:
    """Write one safetensors file, whole or not at all. Raises `StorageError`."""
    problem, samples = fit.problem, fit.stored
    space, beside = problem.space, _beside(problem)
    version = _version(problem, samples, special=bool(beside))
    meta = description(fit.fingerprint, space, samples.dtype, version, settings)
    packed = packed_in(samples)
    if packed is not None:
        meta["each"] = [packed.each(slot.start) for slot in space.slots]
    write_file(Path(path), meta, {**_in_tensors(samples), **beside}, _save)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Samples in 8 bits begin where the kernel that reads them can load from, mapped or not."""
    if SCALES not in tensors:
        save_file(tensors, path, metadata=metadata)
        return
    save_file(tensors, path, metadata={**metadata, FILLED: ""})
    away = -_begins(path, "samples") % ALIGNED
    if away:  # a description that is longer by so much moves them by as much
        save_file(tensors, path, metadata={**metadata, FILLED: " " * away})


def _begins(path: Path, name: str) -> int:
    """At which byte of a safetensors file a tensor begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return 8 + length + int(header[name]["data_offsets"][0])


def _version(problem: Problem, samples: Tensor, *, special: bool) -> int:
    """The earliest that has a place for all of it."""
    if packed_in(samples) is not None:
        return VERSION
    return SPECIAL if special or problem.layers else PLAIN


def _in_tensors(samples: Tensor) -> dict[str, Tensor]:
    """Samples as a file holds them."""
    packed = packed_in(samples)
    if packed is None:
        return {"samples": samples.detach().cpu().contiguous()}
    parts = {"samples": packed.values, SCALES: packed.scales, REST: packed.plain}
    return {name: part.cpu().contiguous() for name, part in parts.items()}


def _beside(problem: Problem) -> dict[str, Tensor]:
    """Vectors ``(P,)`` that say which weights take part, and what the prior is centred on, where that is special."""
    out, space = {}, problem.space
    if problem.prior_mean is not None:
        out["prior_mean"] = problem.prior_mean.cpu().contiguous()
    if space.masks:
        ones = torch.ones(space.total, device=space.device)
        out["mask"] = space.masked_(ones).bool().to(torch.uint8).cpu()
    return out


def described(fit: Fit, target: Target, calibration: CalibrationPath | None) -> dict[str, Any]:
    """The settings and figures of a fit that a file holds beside its samples; JSON-able."""
    problem, frozen = fit.problem, fit.problem.randomness
    conventions = problem.functional.conventions
    return {
        "likelihood": problem.likelihood.config(),
        "preserve": problem.preserve.name,
        "directions": problem.directions,
        "options": target.options(),
        "prior": problem.prior,
        **({} if problem.layers is None else {"layers": problem.layers}),
        **({} if problem.plain_prior else {"within": True}),
        "randomness": None if frozen is None else frozen.config(),
        "prior_precision": fit.alpha,
        "seed": fit.seed,
        "certificate": fit.certificate.as_dict(),
        "calibration": None if calibration is None else calibration.as_dict(),
        "conventions": None if conventions is None else conventions.config(),
        "probe": problem.functional.probe and problem.functional.probe.as_dict(),
    }


def restored(
    problem: Problem, samples: Tensor, settings: dict[str, Any], prints: dict[str, str]
) -> tuple[Fit, CalibrationPath | None]:
    """The inverse of :func:`described`, around the problem's model with the fingerprint ``prints``.

    Raises:
        KeyError, TypeError, ValueError: settings that nobody wrote.
    """
    path = settings["calibration"]
    if settings.get("layers"):
        problem = replace(problem, layers=dict(settings["layers"]))
    if settings.get("within"):
        problem = replace(problem, without=True)
    conventions, found = problem.functional.conventions, settings.get("conventions")
    if conventions is not None and found:  # files of earlier versions have none
        conventions.restore(found)
    fit = Fit(
        problem,
        samples,
        float(settings["prior_precision"]),
        int(settings["seed"]),
        Certificate.from_dict(settings["certificate"]),
        prints,
    )
    return fit, None if path is None else CalibrationPath(**path)


def check_function(path: Path, functional: FunctionalModel, settings: dict[str, Any]) -> None:
    """Raise `StorageError` where a network with the right weights is another function than the file was written for."""
    functional.probe = Probe.from_dict(settings.get("probe"))  # files of earlier versions have none
    try:
        functional.check_same()
    except ModelError as error:
        raise StorageError(f"{path} does not belong to this network: {error}") from error


@dataclass(frozen=True)
class Stored:
    """The contents of a posterior file."""

    path: Path
    meta: dict[str, Any]
    tensor: Tensor
    beside: dict[str, Tensor] = field(default_factory=dict)
    #: whether the samples are still in the file, of which they are read when they are used
    mapped: bool = False

    @property
    def names(self) -> list[str]:
        return list(self.meta["names"])

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.meta["settings"])

    def parameters(self) -> list[str] | dict[str, Tensor]:
        """Names of the tensors that take part, or which of their entries."""
        mask = self.beside.get("mask")
        return self.names if mask is None else self._by_name(mask.bool())

    def prior_mean(self) -> dict[str, Tensor] | None:
        """What the prior is centred on, by name; None: zero."""
        mean = self.beside.get("prior_mean")
        return None if mean is None else self._by_name(mean)

    def _by_name(self, vector: Tensor) -> dict[str, Tensor]:
        shapes = self.meta["shapes"]
        parts = vector.split([math.prod(shape) for shape in shapes])
        return {n: v.reshape(s) for n, v, s in zip(self.names, parts, shapes, strict=True)}

    def likelihood(self) -> Likelihood:
        """Rebuilt from its settings. Raises `StorageError` or, for a name that is not known here, `InputError`."""
        try:
            return likelihood_from_config(self.settings["likelihood"])
        except NullBayesError:
            raise
        except Exception as error:
            # Of a class, maybe the user's own, about values that it never wrote.
            raise StorageError(
                f"{self.path} holds settings of its likelihood that cannot be used ({type(error).__name__}: {error}); "
                "it was written by another version of nullbayes or changed since. Fit and save it again."
            ) from error

    def plain(self, model: nn.Module) -> Stored:
        """With the names of ``model`` where version 0.1 wrote those of a data-parallel wrapper around it."""
        known = dict(model.named_parameters())
        if any(n in known or n.removeprefix(WRAPPED) not in known for n in self.names):
            return self
        settings = self.settings
        if isinstance(settings["prior"], dict):
            settings["prior"] = {n.removeprefix(WRAPPED): v for n, v in settings["prior"].items()}
        prints = {n.removeprefix(WRAPPED): v for n, v in self.meta["fingerprint"].items()}
        names = [n.removeprefix(WRAPPED) for n in self.names]
        meta = {**self.meta, "names": names, "fingerprint": prints, "settings": settings}
        return replace(self, meta=meta)

    def check_model(self, model: nn.Module) -> dict[str, str]:
        """The fingerprint of ``model``. Raises :class:`StorageError` unless the file was written for that model."""
        named = dict(model.named_parameters())
        wanted = dict(zip(self.names, self.meta["shapes"], strict=True))
        missing = sorted(set(wanted) - set(named))
        if missing:
            here = active_adapters(model)
            mend = MERGED
            if here is not None:
                mend = (
                    f"Its adapter is called {here!r} here: load it under the name that stands in these names "
                    "(`adapter_name=` of `PeftModel.from_pretrained`)."
                )
            raise StorageError(
                f"{self.path} belongs to a model with parameters {missing[:4]}, which this "
                f"{type(model).__name__} does not have. Build the same architecture. {mend}"
            )
        shapes = [n for n, shape in wanted.items() if list(named[n].shape) != shape]
        if shapes:
            n = shapes[0]
            raise StorageError(
                f"{self.path}: parameter {n!r} has shape {tuple(named[n].shape)} here and "
                f"{tuple(wanted[n])} in the file. Build the same architecture."
            )
        found = fingerprint(model)
        ours, theirs = dict(found), dict(self.meta["fingerprint"])
        active = ours.pop(ACTIVE, None)
        # Files of version 0.1 do not say which adapters were active.
        if theirs.get(ACTIVE, active) != active:
            raise StorageError(
                f"{self.path} was fitted with {theirs[ACTIVE]!r} as the active adapters; here they are {active!r}. "
                "Call `model.set_adapter`, or leave `model.disable_adapter()`."
            )
        theirs.pop(ACTIVE, None)
        other = sorted(n for n in set(ours) | set(theirs) if ours.get(n) != theirs.get(n))
        if other:
            raise StorageError(
                f"{self.path} was fitted around other weights: {len(other)} tensors differ, first "
                f"{other[:3]}. Load the checkpoint that the posterior was fitted for "
                "(`model.load_state_dict`), or fit anew."
            )
        return found

    def samples(self, space: ParameterSpace) -> Tensor:
        """Samples ``(S, P)`` on the model's device and in its dtype."""
        if self.tensor.dtype not in (space.dtype, torch.int8, *HALF):
            warnings.warn(
                f"{self.path} holds {self.meta['dtype']} samples, the model is {space.dtype}: they are "
                "converted, and the certificate speaks of the original.",
                NullBayesWarning,
                stacklevel=3,
            )
        if SCALES in self.beside:
            return self._packed(space).as_samples
        tensor, shape = self.tensor, tuple(self.tensor.shape)
        if len(shape) != 2 or shape[0] < 1 or shape[1] != space.total:
            raise StorageError(
                f"{self.path} holds samples of shape {shape}, expected (S, {space.total}) with at least "
                "one sample. The file is damaged; save it again."
            )
        if not self.mapped and not bool(tensor.isfinite().all()):
            raise StorageError(
                f"{self.path} holds NaN or infinity in its samples. The file is damaged; save it again."
            )
        if self.names != list(space.names):  # the same tensors, registered in another order
            sizes = [math.prod(shape) for shape in self.meta["shapes"]]
            parts = dict(zip(self.names, tensor.split(sizes, dim=1), strict=True))
            tensor = torch.cat([parts[name] for name in space.names], dim=1)
        # Samples that were asked for in half precision stay so; any other dtype follows the model's.
        dtype = tensor.dtype if tensor.dtype in HALF else space.dtype
        return tensor.to(device=space.device, dtype=dtype)

    def _packed(self, space: ParameterSpace) -> Packed:
        """Samples in 8 bits, whose tensors may be registered in another order by now."""
        shapes: list[list[int]] = self.meta["shapes"]
        each: Any = self.meta.get("each")
        sane = isinstance(each, list) and len(each) == len(shapes)
        most = [shape[0] if len(shape) > 1 else 0 for shape in shapes]
        sane = sane and all(type(e) is int and 0 <= e <= m for e, m in zip(each, most, strict=True))
        if not sane:
            raise StorageError(
                f"{self.path} does not say how its samples in 8 bits are laid out. The file is damaged; save it again."
            )
        columns = zip(self.names, shapes, each, strict=True)
        pieces = [Piece.of(space.by_name[n].start, shape, e) for n, shape, e in columns]
        scales, rest = self.beside[SCALES], self.beside[REST]
        count = len(rest)
        packed = sum(p.chunks * p.chunk for p in pieces)
        sizes = packed * count, sum(p.chunks for p in pieces) * count
        left = sum(p.numel for p in pieces if not p.each)
        if (self.tensor.shape, scales.shape, rest.shape) != (
            (sizes[0],),
            (sizes[1],),
            (count, left),
        ):
            raise StorageError(
                f"{self.path} holds samples in 8 bits of other sizes than its description says. The file is damaged; "
                "save it again."
            )
        if not bool(scales.isfinite().all() and rest.isfinite().all()):
            raise StorageError(
                f"{self.path} holds NaN or infinity in its samples. The file is damaged; save it again."
            )
        return Packed(pieces, self.tensor, scales, rest).placed(space.device)


def read_posterior(path: str | os.PathLike[str], *, mapped: bool = False) -> Stored:
    """Read a posterior file whole; or, ``mapped``, its description, the samples as they are used, and no checksum.

    Raises:
        StorageError: missing, truncated, not a safetensors file, not ours, or of a newer version.
    """
    source = Path(path)
    try:
        if not source.is_file():
            raise StorageError(f"there is no file {source}; write one with `posterior.save(path)`.")
        tensors, metadata = _contents(source, mapped=mapped)
    except (SafetensorError, OSError, ValueError, KeyError, MemoryError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"{source} cannot be read: {error}. It is truncated or not a posterior file; save it again."
        ) from error
    text = metadata.get("nullbayes")
    if text is None:
        raise StorageError(
            f"{source} is a safetensors file, but not one that `posterior.save` wrote."
        )
    meta = _description(source, text)
    told = metadata.get("checksum")
    known = meta["version"] > 1 or told is not None
    if known and not mapped:
        check_whole(source, told, text, tensors)
    beside = {name: t for name, t in tensors.items() if name in BESIDE}
    count = sum(math.prod(shape) for shape in meta["shapes"])
    whole = all(t.shape == (count,) for t in beside.values()) and meta["version"] >= (
        SPECIAL if beside else 0
    )
    packed = {SCALES, REST} if meta["dtype"] == "torch.int8" else set()
    expected = {"samples", *beside, *packed}
    if set(tensors) != expected or not whole or str(tensors["samples"].dtype) != meta["dtype"]:
        raise StorageError(
            f"{source} holds {sorted(tensors)[:4]}, expected 'samples' of {meta['dtype']}. The file is damaged; "
            "save it again."
        )
    beside |= {name: tensors[name] for name in packed}
    return Stored(source, meta, tensors["samples"], beside, mapped)


def _contents(source: Path, *, mapped: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(str(source), framework="pt") as file:
        if mapped:
            return {n: file.get_tensor(n) for n in file.keys()}, file.metadata() or {}  # noqa: SIM118
        # Where a file's bytes happen to begin changes the rounding of products: copy them to a
        # place of their own, aligned as those of a fit are.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def _description(source: Path, text: str) -> dict[str, Any]:
    """Checked as a whole: nothing that a file can hold may fail later on, in the middle of something."""
    try:
        meta = parsed(text)
    except DescriptionError as error:
        raise StorageError(
            f"{source} cannot be read: its description is not one that `posterior.save` wrote: {error}."
        ) from error
    check_format(source, meta)
    try:
        check_settings(meta["settings"])
    except (KeyError, DescriptionError) as error:
        raise StorageError(
            f"{source} lacks, or does not understand, a setting ({error}); it was written by another version of "
            "nullbayes or changed since. Fit and save it again."
        ) from error
    return meta
