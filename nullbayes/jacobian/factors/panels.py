"""The Gram matrix of a wide layer over tokens, from its rows written out some outputs at a time.

Written out whole, the rows of one layer of an encoder take a gigabyte for 600 rows; in pieces they take what is given,
every piece is written once, and no pair of blocks writes the rows of both again.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nullbayes.jacobian.factors.outer import OuterFactor
from nullbayes.jacobian.factors.products import add_into, product

# Rows of which the products with all rows before them are computed at once: little more than the lower triangle.
STRIPE = 128
# Outputs of a piece at least.
FEWEST = 8


def add_panels(factors: Sequence[OuterFactor], out: Tensor, nbytes: int) -> None:
    """``out (M, M) += A Aᵀ`` in the lower triangle of stripes, for the factors of one layer in the order of the rows.

    Args:
        nbytes: what the written-out rows may take.
    """
    m, first = len(out), factors[0]
    each = m * first.width_in * first.a.element_size()
    span = min(first.width_out, max(FEWEST, nbytes // max(1, each)))
    buffer = first.a.new_empty(m * span * first.width_in)
    for start in range(0, first.width_out, span):
        wide = min(span, first.width_out - start)
        rows = buffer[: m * wide * first.width_in].view(m, -1)
        at = 0
        for factor in factors:
            into = rows[at : at + factor.num_rows].view(-1)
            # The bias is the last of the inputs, with its constant.
            factor.write_panel(factor.a[:, :, 0], start, wide, into)
            at += factor.num_rows
        for i in range(0, m, STRIPE):
            stop = min(i + STRIPE, m)
            add_into(out[i:stop, :stop], product(rows[i:stop], rows[:stop]))
