"""What a posterior is made into for serving: a smaller one, or one plain module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from nullbayes.common.arguments import check_count, check_stored_dtype
from nullbayes.errors import InputError
from nullbayes.fit.compaction import compacted
from nullbayes.model.data import as_loader, without_targets
from nullbayes.model.undisturbed import reading_method, undisturbed_method
from nullbayes.posterior.corruptions import JUDGING
from nullbayes.posterior.distilled import Distilled
from nullbayes.posterior.distilling import (
    LEAST_CORRELATION,
    MOST_AUROC_LOST,
    Asked,
    distilled,
)

if TYPE_CHECKING:
    from nullbayes.posterior.base import Posterior

Self = TypeVar("Self", bound="Serves")


class Serves:
    """Mixin of `nullbayes.Posterior`."""

    @undisturbed_method
    def compact(
        self: Self, samples: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Self:
        """Keep what serving needs: samples, not the training rows and their factorisation. Changes this posterior.

        Predictions, sampled scores, `save` and `calibrate` go on; `draw`, `update` and exact novelty end. The
        certificate is measured anew on what is stored, by the rows and by the audit.

        Args:
            samples: the first so many; None: all that are stored.
            dtype: what they are stored in: ``torch.bfloat16`` takes half the room and rounds each by up to 0.4 %;
                ``torch.int8`` takes a quarter and changes each by 1 % of its size (biases and norm layers stay as
                they are); None: what they are in now.

        Raises:
            NotFittedError: not fitted. InputError: fewer samples are stored, or another dtype.
        """
        own = cast("Posterior", self)
        fit = own._fitted()
        count = len(fit.stored) if samples is None else check_count(samples, "samples")
        stored = fit.stored.dtype
        chosen = stored if dtype is None else check_stored_dtype(dtype, own.functional.dtype)
        with own._together("compact", samples=count, dtype=chosen):
            own._take(compacted(fit, count, chosen))
        return self

    @reading_method
    def distil(
        self,
        loader: Any,
        *,
        shifted: Mapping[str, Any] | None = None,
        max_examples: int = 2000,
        seed: int = 0,
        least_correlation: float = LEAST_CORRELATION,
        most_auroc_lost: float = MOST_AUROC_LOST,
    ) -> Distilled:
        """One plain module, ``module(x) -> (outputs, novelty, variance)`` in one forward pass, for deployment.

        A small head on what the network's last layers receive (and of texts, on the mean of the first tokens), fitted
        to the logarithms of this posterior's scores ``"information"`` and ``"variance"``: on three quarters of the
        examples, and on copies shifted in many ways. The rest of the examples, and copies shifted in other ways, say
        how closely it follows (``module.fidelity``).

        Args:
            loader: examples to fit it to: training data, or other data of that kind; targets are left out.
            shifted: ``{name: data}`` of out-of-distribution inputs to judge it by, beside the built-in shifts.
            max_examples: of ``loader``, the first ones; each is scored by the posterior some eight times, texts four.
            seed: of the shifts and the head.
            least_correlation: rank correlation with the posterior's novelty, over all that judges, below which the
                module is refused; on ordinary examples alone it may be 0.3 less.
            most_auroc_lost: likewise, how much less well it may tell any of the shifts from ordinary inputs.

        Raises:
            FidelityError: the module does not follow the posterior so closely; its ``fidelity`` says how closely.
            InputError: too few examples, or inputs that cannot be used. ModelError: a network without a layer to look
                at, or one that cannot be copied.
        """
        own = cast("Posterior", self)
        own._fitted()
        given = dict(shifted or {})
        taken = sorted(set(given) & {*JUDGING, "ordinary", "all"})
        if taken:
            raise InputError(
                f"`shifted` has {taken}, names that the built-in figures have; choose others."
            )
        asked = Asked(
            {
                name: [own._inputs(x, None) for x in _batches(own, data, name)]
                for name, data in given.items()
            },
            check_count(max_examples, "max_examples"),
            check_count(seed, "seed", 0),
            least_correlation,
            most_auroc_lost,
        )
        return distilled(own, _batches(own, loader, "loader"), asked)


def _batches(own: Posterior, data: Any, name: str) -> Iterator[Any]:
    """The inputs of each batch of ``data``, in any form that ``fit`` takes; a mapping is one batch."""
    # A network's library may make inputs of targets: those of a decoder.
    labelled = own.functional.conventions is not None
    if isinstance(data, Mapping):
        return iter([data if labelled else without_targets(data)])
    dtype = own.functional.dtype
    loader = data if isinstance(data, Iterator) else as_loader(data, name, dtype, labelled=False)
    return (
        batch if labelled and isinstance(batch, Mapping) else without_targets(batch)
        for batch in loader
    )
