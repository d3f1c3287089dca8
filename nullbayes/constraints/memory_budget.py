"""How the memory that a fit may take is divided among rows, temporaries and the certificate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nullbayes.jacobian.block_storage import BLOCK_BYTES
from nullbayes.jacobian.capture.batches import CAPTURE_BYTES

# Vectors of P numbers that the most demanding solver holds for a sample, and the share of what is left
# beside them that rows may take.
SOLVER_VECTORS = 9
ROWS_SHARE = 0.6
# Bytes of inputs and sampled outputs that the certificate may hold on to.
CHECK_BYTES = 2**29


@dataclass(frozen=True)
class FitMemory:
    """How a budget is divided, in bytes.

    Attributes:
        rows: rows in memory; ``block``: one block of them.
        temporaries: of the capture of one piece of a batch.
        check: examples with their sampled outputs, for the certificate.
        samples: how many sampled outputs an example has.
    """

    rows: int
    block: int = BLOCK_BYTES
    temporaries: int = CAPTURE_BYTES
    check: int = CHECK_BYTES
    samples: int = 1

    @staticmethod
    def of(budget: int, samples: int, columns: int, dtype: torch.dtype) -> FitMemory:
        """Rows take most of it at first; a solver that needs more sends some of them to disk later."""
        vectors = SOLVER_VECTORS * samples * columns * dtype.itemsize
        return FitMemory(
            rows=max(budget // 8, int(ROWS_SHARE * (budget - vectors))),
            block=min(BLOCK_BYTES, budget // 16),
            temporaries=min(CAPTURE_BYTES, budget // 8),
            check=min(CHECK_BYTES, budget // 16),
            samples=samples,
        )


def default_budget(available: int) -> int:
    """What a fit may take of the memory that is free: leave room for the user's own work."""
    return int(0.7 * available)
