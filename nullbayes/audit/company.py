"""Is each example a function of itself? Asked of some examples, by forward passes alone.

For what needs no gradients (the layer null space); :func:`nullbayes.audit.batches.check_separate` asks with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.audit.batches import _difference, _evaluated, _explained, _parts
from nullbayes.model.batch import Inputs, select
from nullbayes.model.functional import FunctionalModel


def check_company(
    functional: FunctionalModel, inputs: Inputs, outputs: Tensor, where: str, index: int = 0
) -> None:
    """Raise `ModelError` unless examples in other company, in another order, give the same, drawing nothing.

    One forward pass over the examples, in three parts.

    Args:
        outputs: ``(B, *out)`` of ``inputs``, without gradients.
        index: decides which example stands alone.
    """
    weights, size = functional.weights(), len(outputs)
    for part in _parts(range(size), index):
        piece = select(inputs, torch.tensor(part, device=functional.device))
        with torch.no_grad():
            again = _evaluated(functional, weights, piece, part, size, where)
        worst = _difference(again, outputs[part], outputs, functional.rounding)
        if worst is not None:
            raise _explained(functional, inputs, outputs, part, worst, where)
