"""A posterior back from its file, around the model that it was fitted for."""

from __future__ import annotations

import os

import torch
from torch import nn

from nullbayes.errors import InputError, StorageError
from nullbayes.likelihood import Likelihood, LossFunction
from nullbayes.model.adapters import beside_adapter
from nullbayes.model.fingerprint import Watch
from nullbayes.model.functional import Forward, unwrapped
from nullbayes.model.randomness import FrozenRandomness
from nullbayes.posterior.base import LOOKED_AT, Posterior
from nullbayes.posterior.layer_storage import is_layer_file, load_layers
from nullbayes.posterior.layers import LayerNullSpacePosterior
from nullbayes.posterior.posterior import LaplacePosterior, NullSpacePosterior
from nullbayes.posterior.storage import check_function, read_posterior

KINDS: dict[str, type[NullSpacePosterior] | type[LaplacePosterior]] = {
    c.__name__: c for c in (NullSpacePosterior, LaplacePosterior)
}


@torch.inference_mode(mode=False)
def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    likelihood: Likelihood | LossFunction | None = None,
    loss: LossFunction | None = None,
    forward: Forward | None = None,
    mmap: bool = False,
) -> Posterior | LayerNullSpacePosterior:
    """A posterior from :meth:`Posterior.save`, around the same trained model.

    Args:
        path: of the file, or the folder of an adapter that it was saved beside.
        model: the network that the posterior was fitted for; the file's fingerprint is checked.
            Another device or floating-point dtype is fine, other weights or another forward pass are not.
        likelihood, loss: needed for a callable loss, which no file holds, and for a likelihood class that this
            process does not know.
        forward: as it was given to the posterior.
        mmap: leave the samples in the file until they are used: loading takes the time and memory of the description.
            Their checksum is not compared. In another dtype or on another device than the model's they are copied.

    Raises:
        StorageError: the file is missing, truncated, not ours, or for another model.
    """
    path = beside_adapter(path)
    if is_layer_file(path):
        return load_layers(path, model, likelihood or loss, forward)
    whole = unwrapped(model)
    stored = read_posterior(path, mapped=mmap).plain(whole)
    # Looked at first: what changes in between shows at the first use.
    watch = Watch(whole, LOOKED_AT)
    prints = stored.check_model(whole)
    try:
        settings = stored.settings
        frozen = settings.get("randomness")  # files of earlier versions have none
        posterior = KINDS[settings["class"]](
            whole,
            likelihood or loss or stored.likelihood(),
            preserve=settings["preserve"],
            directions=settings["directions"],
            **settings["options"],
            parameters=stored.parameters(),
            prior_precision=settings["prior"],
            prior_mean=stored.prior_mean(),
            forward=forward,
            randomness=frozen and FrozenRandomness(**frozen),
        )
        posterior._restore(stored.samples(posterior.space), settings, prints, watch)
        check_function(stored.path, posterior.functional, settings)
    except InputError as error:  # a likelihood or a preserve mode that this process does not know
        raise StorageError(
            f"{stored.path} holds a setting that cannot be used here: {error} Import the module that "
            "registers it (`@nb.register_likelihood`, `@nb.register_preserve`) before loading."
        ) from error
    except (KeyError, TypeError) as error:
        raise StorageError(
            f"{stored.path} lacks, or does not understand, a setting ({type(error).__name__}: {error}); "
            "it was written by another version of nullbayes or changed since. Fit and save it again."
        ) from error
    return posterior
