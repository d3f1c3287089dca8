"""What a posterior is made into for serving: a smaller one, or one plain module."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

import torch

from nullbayes.common.arguments import check_count, check_sample_dtype
from nullbayes.fit.compaction import compacted
from nullbayes.model.functional import undisturbed_method

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
                None: what they are in now.

        Raises:
            NotFittedError: not fitted. InputError: fewer samples are stored, or another dtype.
        """
        own = cast("Posterior", self)
        fit = own._fitted()
        count = len(fit.stored) if samples is None else check_count(samples, "samples")
        chosen = None if dtype is None else check_sample_dtype(dtype, own.functional.dtype)
        with own._together("compact"):
            own._take(compacted(fit, count, fit.stored.dtype if dtype is None else chosen or dtype))
        return self
