"""What a network computes with, found out on its first batch: how rows are to be taken of it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from nullbayes.model.aliases import check_aliases
from nullbayes.model.batch import Inputs
from nullbayes.model.parameters import HALF
from nullbayes.model.precision import Watch, alike, in_half

if TYPE_CHECKING:
    from nullbayes.model.functional import FunctionalModel


def settle(functional: FunctionalModel, inputs: Inputs) -> None:
    """Find out what the network computes with, and whether private modules can serve.

    Half precision, in the weights or on the way, is left out where the network without it is the same but for that
    rounding: rows in half precision prove nothing.

    Raises `ModelError` where outputs depend on a second place of weights in memory, see ``aliases.py``.
    """
    functional.rounds_to = in_half(functional.model)
    if functional.rounds_to is not None:
        deployed = functional.model_output(inputs)
        functional.widened = torch.float32
        if not alike(functional.model_output(inputs), deployed):
            functional.widened = None
    watch = _looked_at(functional, inputs)
    if functional.widened is not None and watch.found in HALF:
        functional.widened_whole = True
        watch = _looked_at(functional, inputs)
    # The model reaches its modules in a way that a private copy cannot follow (an object, a global of a global).
    functional.modules.shared = watch.used
    functional.rounding = watch.found
    if watch.found in HALF:
        functional.rounds_to = watch.found
        _unround(functional, inputs)
    check_aliases(functional, inputs)


def _unround(functional: FunctionalModel, inputs: Inputs) -> None:
    deployed = functional.model_output(inputs)
    functional.unrounded = True
    found = _looked_at(functional, inputs).found
    if found not in HALF and alike(functional.model_output(inputs), deployed):
        functional.rounding = found
    else:
        functional.unrounded = False


def _looked_at(functional: FunctionalModel, inputs: Inputs) -> Watch:
    """What one forward pass computes with."""
    originals = dict(functional.model.named_parameters())
    weights, keyed_inputs = functional.weights(), functional.keyed(inputs)
    watch = Watch(functional.space.dtype, (originals[n] for n in weights))
    functional.watch = watch
    try:
        # What the model says to inputs that it does not take is told where outputs are asked for.
        with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), torch.no_grad():
            functional(weights, keyed_inputs)
    finally:
        functional.watch = None
    return watch
