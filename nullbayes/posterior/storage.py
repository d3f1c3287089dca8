"""One safetensors file per posterior: samples, settings as JSON, a fingerprint of the model."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nullbayes.common.files import atomic_file
from nullbayes.errors import NullBayesWarning, StorageError
from nullbayes.likelihood import Likelihood, likelihood_from_config
from nullbayes.model.fingerprint import fingerprint
from nullbayes.model.parameters import ParameterSpace

FORMAT = "nullbayes-posterior"
VERSION = 1


def write_posterior(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    space: ParameterSpace,
    samples: Tensor,
    settings: dict[str, Any],
) -> None:
    """Write under a temporary name in the same folder, then rename: never half a file."""
    target = Path(path)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "names": list(space.names),
        "shapes": [list(slot.shape) for slot in space.slots],
        "dtype": str(space.dtype),
        "fingerprint": fingerprint(model),
        "settings": settings,
    }
    try:
        text = json.dumps(meta)
    except TypeError as error:
        raise StorageError(
            f"the posterior's settings cannot be written as JSON ({error}); a custom likelihood's "
            "`config()` must return plain numbers, strings and lists."
        ) from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as part:
            tensors = {"samples": samples.detach().cpu().contiguous()}
            save_file(tensors, part, metadata={"nullbayes": text})
    except (OSError, SafetensorError) as error:
        raise StorageError(f"could not write {target}: {error}.") from error


@dataclass(frozen=True)
class Stored:
    """The contents of a posterior file."""

    path: Path
    meta: dict[str, Any]
    tensor: Tensor

    @property
    def names(self) -> list[str]:
        return list(self.meta["names"])

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.meta["settings"])

    def likelihood(self) -> Likelihood:
        return likelihood_from_config(self.settings["likelihood"])

    def check_model(self, model: nn.Module) -> None:
        """Raise :class:`StorageError` unless ``model`` is the one that the file was written for."""
        named = dict(model.named_parameters())
        wanted = dict(zip(self.names, self.meta["shapes"], strict=True))
        missing = sorted(set(wanted) - set(named))
        if missing:
            raise StorageError(
                f"{self.path} belongs to a model with parameters {missing[:4]}, which this "
                f"{type(model).__name__} does not have. Build the same architecture."
            )
        shapes = [n for n, shape in wanted.items() if list(named[n].shape) != shape]
        if shapes:
            n = shapes[0]
            raise StorageError(
                f"{self.path}: parameter {n!r} has shape {tuple(named[n].shape)} here and "
                f"{tuple(wanted[n])} in the file. Build the same architecture."
            )
        ours, theirs = fingerprint(model), self.meta["fingerprint"]
        other = sorted(n for n in set(ours) | set(theirs) if ours.get(n) != theirs.get(n))
        if other:
            raise StorageError(
                f"{self.path} was fitted around other weights: {len(other)} tensors differ, first "
                f"{other[:3]}. Load the checkpoint that the posterior was fitted for "
                "(`model.load_state_dict`), or fit anew."
            )

    def samples(self, space: ParameterSpace) -> Tensor:
        """Samples ``(S, P)`` on the model's device and in its dtype."""
        if str(space.dtype) != self.meta["dtype"]:
            warnings.warn(
                f"{self.path} holds {self.meta['dtype']} samples, the model is {space.dtype}: they are "
                "converted, and the certificate speaks of the original.",
                NullBayesWarning,
                stacklevel=3,
            )
        tensor, shape = self.tensor, tuple(self.tensor.shape)
        if len(shape) != 2 or shape[0] < 1 or shape[1] != space.total:
            raise StorageError(
                f"{self.path} holds samples of shape {shape}, expected (S, {space.total}) with at least "
                "one sample. The file is damaged; save it again."
            )
        if not bool(tensor.isfinite().all()):
            raise StorageError(
                f"{self.path} holds NaN or infinity in its samples. The file is damaged; save it again."
            )
        if self.names != list(space.names):  # the same tensors, registered in another order
            sizes = [math.prod(shape) for shape in self.meta["shapes"]]
            parts = dict(zip(self.names, tensor.split(sizes, dim=1), strict=True))
            tensor = torch.cat([parts[name] for name in space.names], dim=1)
        return tensor.to(device=space.device, dtype=space.dtype)


def read_posterior(path: str | os.PathLike[str]) -> Stored:
    """Read a posterior file whole.

    Raises:
        StorageError: missing, truncated, not a safetensors file, not ours, or of a newer version.
    """
    source = Path(path)
    if not source.is_file():
        raise StorageError(f"there is no file {source}; write one with `posterior.save(path)`.")
    try:
        with safe_open(str(source), framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get("nullbayes")
            if text is None:
                raise StorageError(
                    f"{source} is a safetensors file, but not one that `posterior.save` wrote."
                )
            # Where a file's bytes happen to begin changes the rounding of products: copy them to a
            # place of their own, aligned as those of a fit are.
            tensor = file.get_tensor("samples").clone()
        meta = json.loads(text)
    except (SafetensorError, ValueError, KeyError) as error:
        raise StorageError(
            f"{source} cannot be read: {error}. It is truncated or not a posterior file; save it again."
        ) from error
    if not isinstance(meta, dict) or not {"names", "shapes", "dtype", "settings"} <= set(meta):
        raise StorageError(
            f"{source} is a safetensors file whose description `posterior.save` did not write."
        )
    if meta.get("format") != FORMAT or meta.get("version", 0) > VERSION:
        raise StorageError(
            f"{source} has format {meta.get('format')!r} version {meta.get('version')}; this "
            f"nullbayes reads {FORMAT!r} up to version {VERSION}. Upgrade nullbayes."
        )
    return Stored(source, meta, tensor)
