"""How the memory that a fit may take is divided among rows, temporaries and the certificate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nullbayes.common.memory import WORKING_BYTES, times_on
from nullbayes.jacobian.block_storage import BLOCK_BYTES

# Vectors of P numbers that the most demanding solver holds for a sample, and the share of what is left
# beside them that rows may take.
SOLVER_VECTORS = 9
ROWS_SHARE = 0.6
# Bytes of inputs and sampled outputs that the certificate may hold on to.
CHECK_BYTES = 2**29
# What a process grows by beside its tensors: buffers of the linear algebra libraries, code that is read for the first
# time, holes between allocations (measured: 12 to 20 MB). Of small budgets a third.
LIBRARY_BYTES = 20 * 2**20
HOST = torch.device("cpu")


@dataclass(frozen=True)
class FitMemory:
    """How a budget is divided, in bytes.

    Attributes:
        rows: rows in memory; ``block``: one block of them.
        temporaries: of the capture of one piece of a batch, or of one product.
        check: examples with their sampled outputs, for the certificate.
        samples: how many sampled outputs an example has.
        beside: what is held beside rows and solver: temporaries, one block, examples for the certificate and the
            audit, and ``libraries``, what the process grows by beside its tensors.
    """

    rows: int
    block: int = BLOCK_BYTES
    temporaries: int = WORKING_BYTES
    check: int = CHECK_BYTES
    samples: int = 1
    beside: int = 0
    libraries: int = 0

    @staticmethod
    def of(
        budget: int,
        samples: int,
        columns: int,
        dtype: torch.dtype,
        each: int = SOLVER_VECTORS,
        device: torch.device = HOST,
    ) -> FitMemory:
        """Rows take most of it at first; a solver that needs more sends some of them to disk later.

        Args:
            each: vectors of ``columns`` numbers that the solver holds for a sample.
        """
        vectors = each * samples * columns * dtype.itemsize
        times = times_on(device)
        block = min(BLOCK_BYTES * times, budget // 16)
        temporaries = min(WORKING_BYTES * times, budget // 8)
        check = min(CHECK_BYTES, budget // 16)
        libraries = min(LIBRARY_BYTES, budget // 3)
        # A block that is not in memory is there while it is read.
        beside = libraries + temporaries + 2 * check + block
        # Captured pieces lie beside the block that they are merged to, before there is a solver.
        room = budget - beside - max(vectors, block)
        return FitMemory(
            rows=max(budget // 8, min(room, int(ROWS_SHARE * (budget - vectors)))),
            block=block,
            temporaries=temporaries,
            check=check,
            samples=samples,
            beside=beside,
            libraries=libraries,
        )


def default_budget(available: int) -> int:
    """What a fit may take of the memory that is free: leave room for the user's own work."""
    return int(0.7 * available)
