"""Loaders: batches as inputs and targets, checked and on the model's device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from nullbayes.errors import InputError
from nullbayes.model.batch import (
    Inputs,
    batch_size,
    check_inputs,
    take,
    to_device,
)
from nullbayes.model.functional import FunctionalModel
from nullbayes.model.graphs import is_graph
from nullbayes.model.ragged import Structured, collated


def check_reusable(loader: Iterable[Any], name: str) -> None:
    """Training data is read more than once: refuse what can be read only once."""
    if not isinstance(loader, Iterable):
        raise InputError(
            f"`{name}` is {type(loader).__name__}, expected an iterable of (inputs, targets) batches, "
            "e.g. a DataLoader."
        )
    if isinstance(loader, Iterator):
        raise InputError(
            f"`{name}` is an iterator ({type(loader).__name__}), which can be read only once; pass a "
            "DataLoader or a list of batches."
        )


def limited(
    functional: FunctionalModel, loader: Iterable[Any], name: str, limit: int | None
) -> Iterator[tuple[int, Inputs, Any]]:
    """Batches on the model's device, cut off after ``limit`` examples; with all draws of each."""
    seen = 0
    free = functional.layouts is not None
    for index, inputs, targets in batches(loader, functional, name, free=free):
        known = len(targets) if isinstance(targets, Tensor) and targets.ndim else None
        same = targets is inputs and not isinstance(targets, Tensor)
        inputs = functional.batch(inputs, known)
        # Of a loss that needs no targets: cut as the inputs are.
        targets = inputs if same else targets
        size = batch_size(inputs, f"{name}, batch {index}")
        if limit is not None and seen + size > limit:
            targets = take(targets, 0, limit - seen, size)
            inputs, size = take(inputs, 0, limit - seen), limit - seen
        if size:
            yield index, *functional.stacked(inputs, targets)
        seen += size
        if limit is not None and seen >= limit:
            return
    if not seen:
        raise InputError(f"`{name}` holds no examples: every batch is empty. Pass a filled loader.")


def first_inputs(functional: FunctionalModel, loader: Iterable[Any], name: str) -> Inputs:
    """The inputs of the first batch, to prove rows on."""
    return next(limited(functional, loader, name, None))[1]


TARGET_KEYS = ("labels", "label", "targets", "target", "y")


def split_batch(batch: Any, where: str, *, unlabelled: bool = False) -> tuple[Inputs, Any]:
    """One batch of a loader as ``(inputs, targets)``.

    ``(x, y)`` gives ``x, y``; ``(x1, x2, y)`` gives ``(x1, x2), y``; a mapping gives its entry
    named ``labels`` (or ``label``, ``targets``, ``target``, ``y``) as targets, and the rest.

    Args:
        unlabelled: inputs may come alone, ``x``, ``(x,)``, ``(x, None)`` or a mapping; they are the targets then.
    """
    if is_graph(batch):
        targets = getattr(batch, "y", None)
        if targets is None and not unlabelled:
            raise InputError(
                f"{where} is {type(batch).__name__} without `y`; put the targets there, or name them: "
                "`nb.Batches(loader, targets=...)`."
            )
        return batch, batch if targets is None else targets
    if unlabelled:
        if isinstance(batch, (list, tuple)) and len(batch) == 1:
            return batch[0], batch[0]
        alone = isinstance(batch, (Structured, PackedSequence)) or (
            isinstance(batch, Mapping) and not any(key in batch for key in TARGET_KEYS)
        )
        if isinstance(batch, Tensor) or alone:
            return batch, batch
    if isinstance(batch, Mapping):
        for key in TARGET_KEYS:
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        raise InputError(
            f"{where} is a mapping with keys {sorted(map(str, batch))}; none of {TARGET_KEYS} "
            "holds the targets. Rename one in the collate function."
        )
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)) and len(batch) >= 2:
        *inputs, targets = batch
        return (inputs[0] if len(inputs) == 1 else tuple(inputs)), targets
    found = type(batch).__name__
    if isinstance(batch, (list, tuple)):
        found = f"a {found} of length {len(batch)}"
    raise InputError(
        f"{where} is {found}; expected (inputs, targets), several inputs followed "
        f"by targets, or a mapping with one of {TARGET_KEYS}. Wrap the data set accordingly."
    )


def _split(
    batch: Any, functional: FunctionalModel, where: str, *, free: bool
) -> tuple[Inputs, Any]:
    if functional.conventions is not None and isinstance(batch, Mapping):
        found = functional.conventions.split(batch, free=free)
        if found is not None:
            return found
    return split_batch(batch, where, unlabelled=free)


def _check_cuttable(targets: Any, where: str) -> None:
    """Raise `InputError` where targets are a mapping for each example, as those of detectors."""
    if isinstance(targets, list) and targets and all(isinstance(t, Mapping) for t in targets):
        raise InputError(
            f"{where}: targets are a list of {len(targets)} mappings with keys {sorted(map(str, targets[0]))}, one for "
            "each example; expected tensors with the batch on the first axis. Pad them to one length in the collate "
            "function, as one mapping of tensors, and pass a `loss=` that reads it."
        )


def batches(
    loader: Iterable[Any], functional: FunctionalModel, name: str, *, free: bool = False
) -> Iterator[tuple[int, Inputs, Any]]:
    """``(index, inputs, targets)`` on the model's device; an empty loader is an :class:`InputError`.

    Args:
        functional: the network; it knows what its library does with a batch.
        free: targets may be anything, or missing: then they are the inputs (``loss=`` as a callable).
    """
    index = -1
    for index, batch in enumerate(loader):
        where = f"{name}, batch {index}"
        inputs, targets = _split(batch, functional, where, free=free)
        _check_cuttable(targets, where)
        if free:
            targets = inputs if targets is None else targets
        elif not isinstance(targets, Tensor):
            try:
                targets = torch.as_tensor(targets)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"{where}: targets are {type(targets).__name__}, expected a tensor."
                    f"{collated({'targets': targets})}"
                ) from error
        inputs, targets = (to_device(t, functional.device) for t in (inputs, targets))
        inputs = functional.as_called(inputs, targets if isinstance(targets, Tensor) else None)
        check_inputs(inputs, where)
        if not free:
            inputs, targets = functional.targets_for(inputs, targets, where)
        yield index, inputs, targets
    if index < 0:
        raise InputError(
            f"`{name}` yields no batches. A generator can be read only once: pass a DataLoader or "
            "a list of batches; and mind `drop_last=True` on a set smaller than one batch."
        )
