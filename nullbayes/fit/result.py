"""What a posterior was asked to be, and what a fit left."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nullbayes.certificate.certificate import Certificate
from nullbayes.certificate.measure import GuaranteeCheck
from nullbayes.common.arguments import CheckedPrior
from nullbayes.constraints.directions import Directions
from nullbayes.constraints.preserve import Preserve
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.likelihood import Likelihood
from nullbayes.solvers import Solver, State

NULL_SPACE, LAPLACE = "null-space", "Laplace"


# Edge of the numerical null space, relative to the prior precision. benchmarks/edge.py: on the
# digits NLL is best near 1e-4 and novelty as good as anywhere; towards 1 everything suffers.
DELTA = 1e-4


@dataclass(frozen=True)
class Settings:
    """What a posterior was asked to be."""

    kind: str  # NULL_SPACE or LAPLACE
    preserve: Preserve
    directions: Directions
    prior: CheckedPrior
    delta: float
    solver: str | Solver
    tolerance: float | None
    memory: int | None
    drift: float | None = None

    @property
    def numerical(self) -> bool:
        """Whether the null space has an edge on purpose, and is not exact."""
        return self.kind == NULL_SPACE and self.delta > 0

    @property
    def precision_by_name(self) -> dict[str, float] | None:
        """One precision per tensor, where the prior is that."""
        return self.prior if isinstance(self.prior, dict) else None

    @property
    def scale_by_name(self) -> dict[str, float] | None:
        """Prior standard deviations where there is one precision per tensor."""
        by_name = self.precision_by_name
        return by_name and {name: value**-0.5 for name, value in by_name.items()}


@dataclass(frozen=True)
class Fit:
    """What a fit left: samples at prior precision one, and what more of them would take.

    ``plan``, ``state`` and ``check`` are None for a posterior that was loaded from a file.
    """

    likelihood: Likelihood
    unit: Tensor  # (S, P)
    alpha: float
    seed: int
    certificate: Certificate
    fingerprint: dict[str, str]  # of the model that it was fitted around
    plan: CapturePlan | None = None
    state: State | None = None
    check: GuaranteeCheck | None = None

    @property
    def samples(self) -> Tensor:
        """Weight changes ``Δ (S, P)`` at the current prior precision."""
        return self.unit * self.alpha**-0.5
