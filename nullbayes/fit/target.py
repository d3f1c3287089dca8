"""Which Gaussian around the trained weights is sampled: in the null space of the rows, or full Laplace."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nullbayes.fit.evidence import apart, fixed_point, interval
from nullbayes.solvers.base import Spectrum, State

# Edge of the numerical null space, relative to the prior precision. benchmarks/edge.py: on the
# digits NLL is best near 1e-4 and novelty as good as anywhere; towards 1 everything suffers.
DELTA = 1e-4

#: ``(looks at the spectrum so far, how far its bounds are from agreeing)``
Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Target(ABC):
    """A Gaussian that samples are drawn from.

    Attributes:
        name: for the certificate.
        preserves: whether it promises to leave training predictions as they are.
        delta: the shift of the rows' Gram matrix, relative to the prior precision.
    """

    name: ClassVar[str]
    preserves: ClassVar[bool]
    delta: float

    @property
    def numerical(self) -> bool:
        """Whether a null space has an edge on purpose, and is not exact."""
        return self.preserves and self.delta > 0

    @abstractmethod
    def noise_rows(self, rows: int) -> int:
        """How many numbers of Matheron's perturbation a sample takes, of one for each of ``rows``."""

    def options(self) -> dict[str, float]:
        """Constructor arguments of the posterior, for its file."""
        return {}

    @abstractmethod
    def precision(
        self, state: State, theta: Tensor, report: Report | None
    ) -> tuple[float, tuple[str, ...]]:
        """The evidence's prior precision that a solver is made ready for, and notes on it."""


class NullSpace(Target):
    """``N(θ̂, Π Λ⁻¹)``."""

    name = "null-space"
    preserves = True

    def options(self) -> dict[str, float]:
        return {"delta": self.delta}

    def noise_rows(self, rows: int) -> int:
        return 0

    def precision(
        self, state: State, theta: Tensor, report: Report | None
    ) -> tuple[float, tuple[str, ...]]:
        # It only sets the edge of the null space, of which the order of magnitude matters; the default was chosen so.
        return fixed_point(state.spectrum().upper, theta, self.delta), ()


class FullLaplace(Target):
    """``N(θ̂, (Λ + G)⁻¹)``."""

    name = "Laplace"
    preserves = False

    def noise_rows(self, rows: int) -> int:
        return rows

    def precision(
        self, state: State, theta: Tensor, report: Report | None
    ) -> tuple[float, tuple[str, ...]]:
        looks = itertools.count(1)

        def settled(found: Spectrum) -> bool:
            distance = apart(found, theta, self.delta)
            if report is not None:
                report(next(looks), distance)
            return distance <= 1

        spectrum = state.spectrum(settled)
        alpha = fixed_point(spectrum, theta, self.delta)
        if spectrum.exact:
            return alpha, ()
        low, high = interval(spectrum, theta, self.delta)
        return alpha, (
            f"The evidence's prior precision, {alpha:.3g}, comes from an estimated spectrum: between {low:.3g} and "
            f"{high:.3g}, and a few per cent of chance. `solver=nb.solvers.PrimalQR()` computes it exactly.",
        )
