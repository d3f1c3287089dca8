"""What a computation costs, counted: operations and bytes, and the seconds that they take at usual rates."""

from __future__ import annotations

from dataclasses import dataclass

# Operations and bytes a second of one core of a server's processor, in large products and when reading what no cache
# holds (measured: 100 and 8 to 14 · 10⁹ in single precision, 50 in double). Choices depend on their ratio alone.
FLOPS, DOUBLE_FLOPS, BYTES = 1e11, 5e10, 8e9


@dataclass(frozen=True)
class Work:
    """Floating-point operations in single and in double precision, and bytes read from memory."""

    flops: float = 0.0
    double_flops: float = 0.0
    nbytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.double_flops + other.double_flops,
            self.nbytes + other.nbytes,
        )

    @property
    def seconds(self) -> float:
        return self.flops / FLOPS + self.double_flops / DOUBLE_FLOPS + self.nbytes / BYTES


# Seconds of the calls that capture the rows of one layer, however few.
LAYER_SECONDS = 3e-4
#: what cannot be done at all
ENDLESS = Work(float("inf"))


@dataclass(frozen=True)
class RowWork:
    """Operations for one row of an operator.

    Attributes:
        product: of the product with one of many vectors; ``pair``: of that with another row.
        written: of writing the row out, where products with others begin with that.
        captured: of the passes that it came from, at least.
        read: numbers of a vector that a product with it reads; ``stored``: bytes that the row takes in memory.
        layers: of how many parts it is put together.
    """

    product: float = 0.0
    pair: float = 0.0
    written: float = 0.0
    captured: float = 0.0
    read: float = 0.0
    stored: float = 0.0
    layers: int = 1
