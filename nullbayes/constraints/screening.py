"""The rows of a batch beside one short step of the weights, while they are captured (``audit/screening.py``)."""

from __future__ import annotations

from torch import Tensor

from nullbayes.audit.screening import Step, direction, screened, suspects
from nullbayes.constraints.directions import Cotangents
from nullbayes.constraints.problem import Problem
from nullbayes.jacobian.block import Block
from nullbayes.model.batch import Inputs


class Screening:
    """Takes captured blocks and says which of their examples move otherwise than their rows say.

    Args:
        wanted: whether anything is to be audited.
    """

    def __init__(self, problem: Problem, *, wanted: bool) -> None:
        self.problem, self.wanted = problem, wanted
        self._step: Step | None = None

    def look(self, block: Block, piece: Inputs, made: Cotangents) -> dict[int, float]:
        """Places in ``piece`` of suspects, and by how much they are suspected.

        Args:
            block: their rows, in the solver's coordinates.
        """
        functional = self.problem.functional
        if not self.wanted or not screened(functional):
            return {}
        if self._step is None:
            unit = direction(self.problem.space.total, next(iter(functional.weights().values())))
            self.problem.space.fix_(unit)
            self._step = Step.of(functional, unit[0], self.problem.weight_changes(unit)[0])
        images = [f.matvec(self._step.isotropic[None])[0] for f in block.factors.values()]
        if not images:
            return {}
        rows: Tensor = sum(images[1:], images[0])
        claimed = rows.reshape(block.examples, block.cotangents)
        return suspects(functional, piece, made.values, claimed, self._step)
