"""How a question is to be answered, how a fit is to run, and what it left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from nullbayes.audit.sampling import Drawn
from nullbayes.certificate.certificate import Certificate
from nullbayes.certificate.measure import GuaranteeCheck
from nullbayes.common.arguments import check_positive
from nullbayes.common.crowd import ALONE, Crowd
from nullbayes.common.memory import parse_bytes
from nullbayes.common.processes import Processes
from nullbayes.constraints.problem import Problem
from nullbayes.constraints.training_rows import TrainingRows
from nullbayes.errors import InputError
from nullbayes.fit.target import Target
from nullbayes.jacobian.capture.plan import CapturePlan
from nullbayes.likelihood import Likelihood
from nullbayes.model.parameters import ParameterSpace
from nullbayes.solvers import Size, Solver, State, choose


@dataclass(frozen=True)
class Settings:
    """How a posterior answers its `Problem`.

    Attributes:
        target: which Gaussian is sampled.
        solver: ``"auto"``, a registered name, or an object.
        tolerance, row_drift, memory: see `nullbayes.Posterior`; None: the default.
    """

    target: Target
    solver: str | Solver
    tolerance: float | None
    row_drift: float | None
    memory: int | None

    @classmethod
    def of(
        cls,
        target: Target,
        solver: str | Solver,
        tolerance: float | None,
        row_drift: float | None,
        memory: str | int | None,
    ) -> Settings:
        """From a user's arguments. Raises `InputError` for one that cannot be used."""
        choose(solver, Size(1, 1), 1 << 62)  # a wrong argument is said now, not after the capture
        if tolerance is not None and isinstance(solver, Solver):
            raise InputError(
                f"`tolerance` is {tolerance!r} beside a solver object, which has its own: say it there, "
                f"`{type(solver).__name__}(tolerance=...)`."
            )
        return cls(
            target,
            solver,
            None if tolerance is None else check_positive(tolerance, "tolerance"),
            None if row_drift is None else check_positive(row_drift, "row_drift"),
            None if memory is None else parse_bytes(memory),
        )


# Training examples that are audited at the end of a fit, unless the user asks for other ones.
AUDITED = 16


@dataclass(frozen=True)
class Checkpoint:
    """Where a long fit leaves its state, and how often (seconds)."""

    path: str | os.PathLike[str]
    every: float = 60.0


@dataclass(frozen=True)
class Run:
    """One call of ``fit``: see `nullbayes.Posterior.fit` for what each of these is."""

    num_samples: int
    seed: int
    max_examples: int | None
    progress: bool
    checkpoint: Checkpoint | None = None
    audit: int = AUDITED
    stored: torch.dtype | None = None
    crowd: Crowd = ALONE
    patient: bool = False  # whether all examples of the audit are, however long that takes

    def stored_bytes(self, space: ParameterSpace) -> int:
        """What samples take that are stored in another dtype, beside those in the working one."""
        if self.stored is None or self.stored == space.dtype:
            return 0
        return self.num_samples * space.total * self.stored.itemsize


@dataclass(frozen=True)
class Auditing:
    """What it takes to audit samples of a fit.

    Attributes:
        drawn: examples of all the data; ``spans``: by their numbers, the rows that each has among this process's.
        total, batches: how many examples are constrained, and in how many batches their rows were proved.
        reduced: what is audited less than usual, and why.
        labels: by their numbers, those under which their rows were made.
        processes: those that audit the other examples; ``places``: which of all that are audited these are.
    """

    drawn: list[Drawn]
    spans: dict[int, slice]
    total: int
    batches: int
    reduced: str | None
    labels: dict[int, int]
    places: Sequence[int]
    processes: Processes | None = None


@dataclass(frozen=True)
class Fit:
    """What a fit left: samples at prior precision one, and what more of them would take.

    ``plan`` and all that follows are None for a posterior that was loaded from a file.

    Attributes:
        problem: the question, with observation noise as it was estimated.
        stored: weight changes ``(S, P)`` at prior precision one, in the dtype that was asked for; ``alpha``: the prior
            precision.
        fingerprint: of the model that it was fitted around.
        crowd: those that hold the other samples, where ``stored`` are not all.
    """

    problem: Problem
    stored: Tensor
    alpha: float
    seed: int
    certificate: Certificate
    fingerprint: dict[str, str]
    plan: CapturePlan | None = None
    state: State | None = None
    check: GuaranteeCheck | None = None
    auditing: Auditing | None = None
    rows: TrainingRows | None = None
    solver: Solver | None = None
    crowd: Crowd = ALONE

    def explained_by(self, likelihood: Likelihood) -> Fit:
        """The same samples, read with other observation noise."""
        return replace(self, problem=self.problem.explained_by(likelihood))

    @property
    def num_samples(self) -> int:
        """Those of all processes."""
        return len(self.stored) if self.crowd.processes is None else self.certificate.num_samples

    def check_whole(self, what: str) -> None:
        """Raise `InputError` where ``what`` needs all samples in this process."""
        if self.crowd.processes is not None:
            raise InputError(
                f"`{what}` needs all {self.num_samples} samples, of which this process holds {len(self.stored)}; "
                "they are spread by `device_mesh=`. Fit without it."
            )

    @property
    def unit(self) -> Tensor:
        """Weight changes ``(S, P)`` at prior precision one, in the working precision."""
        return self.stored.to(self.problem.dtype)

    @cached_property
    def natural_precision(self) -> float:
        """``γ / ‖θ̂‖²``: the prior precision by the evidence, whatever it was set to; one where weights have no size."""
        if self.problem.precision_by_name is not None:
            return 1.0
        size = float(self.problem.departure().double().square().sum())
        gamma = self.certificate.rank if self.certificate.gamma is None else self.certificate.gamma
        return max(1, gamma) / size if size else 1.0

    @property
    def samples(self) -> Tensor:
        """Weight changes ``Δ (S, P)`` at the current prior precision."""
        return self.unit * self.alpha**-0.5
