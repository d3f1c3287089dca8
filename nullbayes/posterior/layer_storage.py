"""Files of layer posteriors: sums over the data, settings as JSON, a fingerprint of the model; no data, no samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nullbayes.errors import InputError, StorageError
from nullbayes.likelihood import Likelihood, LossFunction
from nullbayes.model.functional import Forward, unwrapped
from nullbayes.model.randomness import FrozenRandomness
from nullbayes.moments.blocks import Blocks, find_blocks
from nullbayes.moments.gather import Gathered
from nullbayes.moments.members import CELLS, Members
from nullbayes.moments.second import BlockMoments, DenseMoments
from nullbayes.moments.sketch import Sketch
from nullbayes.posterior.calibration_path import CalibrationPath
from nullbayes.posterior.description import parsed
from nullbayes.posterior.layer_certificate import LayerCertificate
from nullbayes.posterior.layer_combined import References
from nullbayes.posterior.layer_fit import LayerFit
from nullbayes.posterior.layer_state import LayerState
from nullbayes.posterior.posterior_file import (
    VERSION,
    check_format,
    check_whole,
    description,
    write_file,
)
from nullbayes.posterior.storage import Stored, check_function

if TYPE_CHECKING:
    from nullbayes.posterior.layers import LayerNullSpacePosterior

CLASS = "LayerNullSpacePosterior"


def write_layers(
    path: str | os.PathLike[str], posterior: LayerNullSpacePosterior, fit: LayerFit
) -> None:
    """Write one safetensors file, whole or not at all. Raises `StorageError`."""
    space, state = posterior.space, fit.state
    tensors, ranks = _tensors(fit.gathered)
    references = posterior._references() if state.references or state.gathered.kept else None
    if references is not None:
        tensors["references"] = references.values.cpu().contiguous()
    frozen = posterior.functional.randomness
    settings = {
        "class": CLASS,
        "likelihood": fit.likelihood.config(),
        "delta": state.delta,
        "prior": posterior._prior,
        "prior_precision": fit.alpha,
        "given": posterior._given,
        "randomness": frozen and frozen.config(),
        "left_out": fit.left_out,
        "last": None if references is None else references.last,
        "seed": state.seed,
        "num_samples": state.num_samples,
        "examples": fit.gathered.examples,
        "counts": [sums.count for sums in fit.gathered.sums],
        "ranks": ranks,
        "blocks": [block.name for block in state.blocks.blocks],
        "fixed": state.blocks.fixed,
        "certificate": fit.certificate.as_dict(),
        "calibration": None if posterior.calibration is None else posterior.calibration.as_dict(),
        "probe": state.functional.probe and state.functional.probe.as_dict(),
    }
    meta = description(fit.fingerprint, space, space.dtype, VERSION, settings)
    write_file(Path(path), meta, tensors)


def _tensors(gathered: Gathered) -> tuple[dict[str, Tensor], list[int | None]]:
    out: dict[str, Tensor] = {}
    ranks: list[int | None] = []
    for i, sums in enumerate(gathered.sums):
        ranks.append(sums.inputs.rank if isinstance(sums.inputs, Sketch) else None)
        if isinstance(sums.inputs, DenseMoments):
            out[f"moments.{i}"] = sums.inputs.values
        elif sums.inputs is not None:
            out[f"sketch.{i}"] = sums.inputs.rows
            out[f"cut.{i}"], out[f"total.{i}"] = sums.inputs.cut, sums.inputs.total
        if sums.rows is not None:
            out[f"rows.{i}"] = sums.rows
    cells = gathered.members.counts.nonzero()[:, 0]
    out["members.cells"] = cells.to(torch.int32)
    out["members.counts"] = gathered.members.counts[cells]
    return {name: t.detach().cpu().contiguous() for name, t in out.items()}, ranks


def is_layer_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds a layer posterior; False for anything that cannot be read, which `load` will say."""
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("nullbayes", "")
        # Not parsed here: a description may be made to be more than a parser bears (``description.py``).
        return f'"class": "{CLASS}"' in text
    except (SafetensorError, OSError, ValueError, MemoryError):
        return False


def load_layers(
    path: str | os.PathLike[str],
    model: nn.Module,
    likelihood: Likelihood | LossFunction | None,
    forward: Forward | None,
) -> LayerNullSpacePosterior:
    """The posterior in a file of :func:`write_layers`, around the same trained model.

    Raises:
        StorageError: truncated, or for another model.
    """
    from nullbayes.posterior.layers import LayerNullSpacePosterior

    source = Path(path)
    meta, tensors = read_layers(source)
    stored = Stored(source, meta, torch.empty(0))
    whole = unwrapped(model)
    prints = stored.check_model(whole)
    try:
        settings = stored.settings
        frozen = settings.get("randomness")
        posterior = LayerNullSpacePosterior(
            whole,
            likelihood or stored.likelihood(),
            delta=settings["delta"],
            prior_precision="auto" if settings["prior"] is None else settings["prior"],
            parameters=stored.names,
            forward=forward,
            randomness=frozen and FrozenRandomness(**frozen),
        )
        blocks = find_blocks(posterior.model, posterior.space, settings["fixed"])
        _check_blocks(source, blocks, settings)
        gathered = _gathered(blocks, tensors, settings, posterior.functional.device)
        _restore(posterior, blocks, gathered, settings, prints)
        check_function(source, posterior.functional, settings)
        if settings.get("last") is not None:
            values = tensors["references"].to(posterior.functional.device)
            posterior._fitted().state.references = References(values, int(settings["last"]))
    except InputError as error:  # a likelihood that this process does not know
        raise StorageError(
            f"{source} holds a setting that cannot be used here: {error} Import the module that "
            "registers it (`@nb.register_likelihood`) before loading."
        ) from error
    except (KeyError, TypeError, RuntimeError) as error:
        raise StorageError(
            f"{source} lacks, or does not understand, a setting ({type(error).__name__}: {error}); "
            "it was written by another version of nullbayes or changed since. Fit and save it again."
        ) from error
    return posterior


def read_layers(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a file, as they were written. Raises `StorageError`."""
    try:
        with safe_open(str(source), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        text = metadata["nullbayes"]
        meta = parsed(text)
    except (SafetensorError, OSError, ValueError, KeyError, MemoryError) as error:
        raise StorageError(
            f"{source} cannot be read: {error}. It is truncated or not a posterior file; save it again."
        ) from error
    check_format(source, meta)
    check_whole(source, metadata.get("checksum"), text, tensors)
    return meta, tensors


def _check_blocks(source: Path, blocks: Blocks, settings: dict[str, Any]) -> None:
    here = [block.name for block in blocks.blocks]
    if here != settings["blocks"]:
        other = sorted(set(here) ^ set(settings["blocks"])) or here
        raise StorageError(
            f"{source} holds sums for other layers than this model has a rule for: {other[:4]}. Build the same "
            "architecture, and register the rules that it was fitted with (`nb.moments.register`)."
        )


def _gathered(
    blocks: Blocks, tensors: dict[str, Tensor], settings: dict[str, Any], device: torch.device
) -> Gathered:
    sums = []
    for i, (block, rank) in enumerate(zip(blocks.blocks, settings["ranks"], strict=True)):
        one = BlockMoments.zeros(block, device, rank)
        if isinstance(one.inputs, DenseMoments):
            one.inputs.values += tensors[f"moments.{i}"].to(device)
        elif one.inputs is not None:
            one.inputs.rows = tensors[f"sketch.{i}"].to(device)
            one.inputs.cut = tensors[f"cut.{i}"].to(device)
            one.inputs.total = tensors[f"total.{i}"].to(device)
        if one.rows is not None:
            one.rows += tensors[f"rows.{i}"].to(device)
        one.count = int(settings["counts"][i])
        if not one.finite:
            raise StorageError(
                f"the sums of {block.name!r} hold NaN or infinity. The file is damaged; save it again."
            )
        sums.append(one)
    counts = torch.zeros(CELLS, dtype=torch.int32)
    counts[tensors["members.cells"].long()] = tensors["members.counts"]
    return Gathered(sums, Members(counts), int(settings["examples"]))


def _restore(
    posterior: LayerNullSpacePosterior,
    blocks: Blocks,
    gathered: Gathered,
    settings: dict[str, Any],
    prints: dict[str, str],
) -> None:
    state = LayerState(
        posterior.functional,
        blocks,
        gathered,
        float(settings["delta"]),
        int(settings["seed"]),
        int(settings["num_samples"]),
    )
    posterior._accept(
        LayerFit(
            state,
            posterior.likelihood,
            float(settings["prior_precision"]),
            settings["left_out"],
            LayerCertificate.from_dict(settings["certificate"]),
            prints,
        )
    )
    posterior._given = bool(settings.get("given", False))  # files of version 0.1 do not say
    path = settings["calibration"]
    posterior.calibration = None if path is None else CalibrationPath(**path)
