"""From training data to samples and a certificate: what ``fit``, ``draw`` and a new prior precision do.

Everything here returns a new :class:`Fit`; a posterior takes it over in one assignment, so an error or an
interrupt on the way leaves what was there before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nullbayes.audit import Audit
from nullbayes.audit.reading import Rereading
from nullbayes.certificate.certificate import Certificate
from nullbayes.certificate.leave_one_out import held_out, left_out
from nullbayes.certificate.measure import GuaranteeCheck
from nullbayes.certificate.row_changes import known_changes
from nullbayes.common.memory import give_back, peak_bytes
from nullbayes.common.processes import Processes
from nullbayes.common.progress import (
    AUDIT,
    CERTIFICATE,
    COMMUNICATION,
    FACTORISATION,
    GRAM,
    PRIOR,
    PROJECTION,
    ROWS,
    Laps,
    Stages,
    stages,
)
from nullbayes.common.writing import json_digest
from nullbayes.constraints.problem import Problem
from nullbayes.constraints.training_rows import TrainingRows, capture_training, with_fitted_noise
from nullbayes.errors import ModelError
from nullbayes.fit.auditing import audited, auditing_of
from nullbayes.fit.evidence import fixed_point, null_space_precision
from nullbayes.fit.layer_evidence import by_layer, layers_of
from nullbayes.fit.measured_rows import measured_rows, norms_of, residual_of, squared
from nullbayes.fit.observation_noise import with_left_out_noise
from nullbayes.fit.prior_samples import Remembered, standard_normal
from nullbayes.fit.projection import Work, projected, stored_
from nullbayes.fit.remarks import doubts, not_kept, where_kept
from nullbayes.fit.result import Fit, Run, Settings
from nullbayes.fit.room import chosen_solver, divided, within
from nullbayes.fit.target import DELTA
from nullbayes.fit.together import any_of, own_budget, processes_of
from nullbayes.jacobian.linearise import linearised_outputs
from nullbayes.likelihood import Likelihood
from nullbayes.model.adapters import remarks
from nullbayes.model.fingerprint import fingerprint, quick_digest
from nullbayes.model.parameters import standing_notes
from nullbayes.model.probe import Probe
from nullbayes.solvers import Choice, Projection, State

# Seconds that the audit of examples may take beside a fit: a share of it, and at least so many.
AUDIT_SHARE, LEAST_AUDIT = 0.05, 0.5


def build(problem: Problem, settings: Settings, loader: Iterable[Any], run: Run) -> Fit:
    """Capture rows, factorise, draw samples, measure.

    Raises:
        MemoryBudgetError: the plan does not fit the budget, or the machine ran out of memory.
    """
    laps, before = Laps(), quick_digest(problem.functional.model)
    budget = settings.memory or own_budget(problem.device, processes_of(loader))
    memory = divided(settings, problem.space, run.num_samples, budget)
    with within(budget, memory), stages(show=run.progress) as stage:
        # (Of several processes, each reads its own share.)
        reading = Rereading(loader) if processes_of(loader) is None else None
        watched = loader if reading is None else reading
        problem = with_fitted_noise(problem, watched, run.max_examples, stage)
        rows = capture_training(problem, watched, run.max_examples, memory, stage, run.audit)
        laps.lap(ROWS)
        laps.move(rows.plan.checking_seconds, ROWS, AUDIT)
        if problem.by_layer:
            room = budget - memory.beside - rows.operator.resident
            problem, rows = by_layer(problem, rows, room, stage.fraction(PRIOR))
        beside = memory.beside + run.stored_bytes(problem.space)
        choice = chosen_solver(settings, rows.operator, run.num_samples, budget - beside)
        fitting = Fitting(problem, settings, run, rows, choice, stage, laps)
        fitting.factorise()
        fitting.project()
        check, evidence = fitting.check()
        audit = fitting.audit()
        notes = [*fitting.notes, *where_kept(rows.operator)]
        notes += remarks(problem.functional.model, problem.space)
        notes += not_kept(loader, rows, run.max_examples)
        notes += doubts(reading, rows, run.max_examples)
        notes += standing_notes(problem.functional.model, problem.space)
        noise = fitting.left_out_noise(notes)
    check_undisturbed(problem, before)
    fit = fitting.finish(check, evidence, audit, notes)
    return fit if noise is None else fit.explained_by(noise)


def check_undisturbed(problem: Problem, before: int) -> None:
    """Raise `ModelError` where the model's digest is no longer what it was ``before``."""
    if quick_digest(problem.functional.model) != before:
        raise ModelError(
            "the model's weights or buffers changed while it was fitted: something else wrote to them (a training "
            "loop, an averaging hook, another thread). Stop that, then fit again."
        )


class Fitting:
    """One fit under way: what its later stages need of the earlier ones."""

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        run: Run,
        rows: TrainingRows,
        choice: Choice,
        stage: Stages,
        laps: Laps,
    ) -> None:
        self.problem, self.settings, self.run, self.rows = problem, settings, run, rows
        self.crowd = run.crowd
        rows.operator.crowd = run.crowd
        self.solver, self.why, self.room = choice.solver, choice.why, choice.room
        self.stage, self.laps = stage, laps
        self._exchanged = 0.0 if self.processes is None else self.processes.seconds
        self.theta = problem.isotropic(problem.departure())
        self.by_evidence = settings.target.preserves and problem.by_evidence
        self.digest = fingerprint(problem.functional.model)
        #: the solver made ready for these rows, where that was done before
        self.prepared: State | None = None
        #: ``(S, P)``, where the search of a solver that iterates may begin
        self.begin: Tensor | None = None

    @property
    def processes(self) -> Processes | None:
        """Those that hold the rows together."""
        return self.rows.operator.processes

    def _agreed(self, value: float) -> float:
        """The first process's, to the last bit."""
        return value if self.processes is None else self.processes.shared(lambda: value)

    def _lap(self, stage: str) -> None:
        """What passed since the last lap was ``stage``, but for what went by in exchanges with other processes."""
        self.laps.lap(stage)
        if self.settings.memory is not None:
            give_back()
        if self.processes is not None:
            spent, self._exchanged = (
                self.processes.seconds - self._exchanged,
                self.processes.seconds,
            )
            self.laps.move(spent, stage, COMMUNICATION)

    @property
    def identity(self) -> str:
        """Of the network that is fitted around, for checkpoints."""
        return json_digest(self.digest)

    def factorise(self) -> None:
        """A solver ready to project, and the prior precision that it was made ready for."""
        settings, target = self.settings, self.settings.target
        state = self.prepared
        if state is None:
            state = self.solver.prepare(self.rows.operator, self.stage.fraction(GRAM))
        state.room = self.room
        self._lap(GRAM)
        alpha, notes = 1.0, tuple[str, ...]()
        if self.problem.given_precision is not None:
            alpha = self.problem.given_precision
        elif self.problem.by_evidence and target.delta:
            alpha, notes = target.precision(state, self.theta, self.stage.towards(PRIOR))
            alpha = self._agreed(alpha)
        enough = 0.0
        if settings.row_drift is not None:
            expected = alpha
            if self.problem.by_evidence and not target.delta:
                expected = fixed_point(state.spectrum().upper, self.theta, DELTA)
            # row_drift² = mean_n ‖A_n Δ‖² with Δ = x / √α
            enough = settings.row_drift * (self.rows.examples * expected) ** 0.5
        state.factorise(
            target.delta * alpha,
            numerical=target.numerical,
            enough=enough,
            tick=self.stage.fraction(FACTORISATION),
        )
        self.state, self.alpha, self._precision_notes = state, alpha, notes
        self._lap(FACTORISATION)

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self._precision_notes, *self._layer_notes(), *self.state.notes)

    def _layer_notes(self) -> list[str]:
        layers = self.problem.layers
        if layers is None:
            return []
        groups = layers_of(self.problem.space)
        each = [f"{path} {layers[names[0]]:.3g}" for path, names in groups.items()]
        more = f", and {len(each) - 8} more" if len(each) > 8 else ""
        return [
            f"Prior precision of each layer by the evidence: {', '.join(each[:8])}{more}; `prior_precision` is a "
            "factor on all of them."
        ]

    def project(self) -> None:
        """Samples at prior precision one, and the evidence of what they have lost."""
        problem, target, seed = self.problem, self.settings.target, self.run.seed
        m, p = self.rows.operator.shape
        noise_rows = target.noise_rows(m)
        mine = self.crowd.part(self.run.num_samples)
        v, noise = standard_normal(seed, mine, p, noise_rows, self.theta)
        self.problem.space.fix_(v)
        self.prior = Remembered.of(v, self.rows.operator, problem.functional.model)
        work = Work(
            self.state,
            self.rows,
            v,
            self.run.checkpoint,
            f"{target.name}|{seed}|{self.theta.norm():.3e}",
            self.stage.towards(PROJECTION) if self.solver.iterative else None,
            self.identity,
        )
        early = self.by_evidence and self.solver.iterative
        held = held_out(problem, self.rows, v) if early else []

        if self.begin is not None and not any_of(self.processes, held):
            self.state.begin_at(self.begin)

        def changes(x: Tensor) -> list[Tensor]:
            """What projected vectors do to the outputs of the examples that are held out."""
            moved, plan = problem.weight_changes(x), self.rows.plan
            return [linearised_outputs(problem.functional, plan, moved, h.inputs)[1] for h in held]

        done, found = projected(work, noise if noise_rows else None, held, changes)
        if self.processes is not None:  # the samples of one are everyone's, to the last bit
            done = replace(done, value=self.processes.give_(done.value.contiguous()))
        self._lap(PROJECTION)
        self.done, self.held, self.held_changes = done, held, found
        #: what was projected, unless it was written over
        self.projected = None if done.value.data_ptr() == v.data_ptr() else v
        #: squared, of all samples and of what they were projected from
        total = self.crowd.total
        self.sizes = total(squared(done.value)), total(self.prior.squared)
        gone = self.sizes[1] - self.sizes[0]
        passed = target.numerical or self.state.rank is None
        gamma = gone / self.run.num_samples if passed else float(self.state.rank or 0)
        if self.by_evidence:
            self.alpha = self._agreed(null_space_precision(gamma, p, self.theta))
        known = self.state.determined()
        self.gamma = min(max(round(gamma), 0), m, p)
        self.rank = self.gamma if known is None else min(max(round(known), 0), m, p)
        self.rank_estimated = known is None
        self.stored, self.done = stored_(problem, done, self.run.stored)
        if self.run.stored is not None:
            self.sizes = total(squared(done.value)), self.sizes[1]

    def check(self) -> tuple[GuaranteeCheck, float | None]:
        """What samples do to training examples, and the evidence's precision before that bounded it."""
        problem, rows = self.problem, self.rows
        self.effects = rows.operator.mine.matvec(self.done.value)
        known = known_changes(problem, rows, self.stored, self.effects)
        places, _ = rows.checked_places()
        check = GuaranteeCheck(
            problem, rows.plan, rows.checked, self.stored, self.processes, self.crowd, known, places
        )
        if self.settings.target.preserves:
            seen = [
                (problem.functional.outputs(h.inputs), self.crowd.joined(change), h.targets)
                for h, change in zip(self.held, self.held_changes, strict=False)
            ]
            if not any_of(self.processes, seen):
                prior = self.projected, self.prior.image
                seen = left_out(problem, self.state, prior, rows, check)
            check.leave_out(seen)
        evidence = self.alpha if self.by_evidence else None
        if evidence is not None:
            self.alpha = check.bounded_precision(evidence)
        return check, evidence

    def left_out_noise(self, notes: list[str]) -> Likelihood | None:
        """The likelihood with observation noise by leave-one-out residuals, of which the notes say something."""
        if not self.settings.target.preserves:
            return None  # Laplace doubts the training data as well (docs/evaluation/regression.md)
        found, note = with_left_out_noise(self.problem, self.rows, self.state, self.alpha)
        notes += [] if note is None else [note]
        return found

    def audit(self) -> Audit:
        """What samples do to examples of all the data, by someone else than the rows."""
        self._lap(CERTIFICATE)
        self.auditing = auditing_of(self.problem, self.rows, self.run.audit)
        allowed = max(LEAST_AUDIT, AUDIT_SHARE * self.laps.total)
        if self.run.patient:
            allowed = math.inf
        question = self.problem, self.auditing
        found = audited(*question, self.stored, self.prior.few, self.effects, allowed)
        found = functools.reduce(Audit.joined, self.crowd.gather(found))
        self._lap(AUDIT)
        return replace(found, seconds=self.laps.seconds[AUDIT])

    def finish(
        self,
        check: GuaranteeCheck,
        evidence: float | None,
        audit: Audit,
        notes: list[str],
    ) -> Fit:
        """The certificate, and all that a posterior holds from now on."""
        problem, target = self.problem, self.settings.target
        measured = measured_rows(self.rows, self.done, self.prior.image, self.effects, self.alpha)
        measured["prior_share"] = self.sizes[0] / self.sizes[1]
        if self.processes is None and self.rows.checked:
            inputs = self.rows.checked[0][0]
            problem.functional.probe = Probe.taken(problem.functional, inputs)
        measured |= check.measure(self.alpha**-0.5)
        self._lap(CERTIFICATE)
        certificate = Certificate(
            method=target.name,
            preserve=problem.preserve.describe(),
            delta=target.delta,
            solver=self.solver.name,
            reason=self.why,
            tolerance=self.solver.tolerance_for(self.theta.dtype),
            rank=self.rank,
            null_dim=problem.space.free - self.rank,
            rank_estimated=self.rank_estimated,
            gamma=self.gamma,
            prior_precision=self.alpha,
            evidence=evidence,
            **measured,
            natural_units=problem.preserve.natural_units,
            score_name=problem.likelihood.score_name,
            checked_examples=check.examples,
            num_samples=self.run.num_samples,
            notes=tuple(notes),
            audit=audit,
            stages=self.laps.seconds,
            seconds=self.laps.total,
            peak_memory=peak_bytes(problem.device),
        )
        return Fit(
            problem,
            self.stored,
            self.alpha,
            self.run.seed,
            certificate,
            self.digest,
            self.rows.plan,
            self.state,
            check,
            self.auditing,
            self.rows,
            self.solver,
            self.crowd,
        )


def extended(fit: Fit, settings: Settings, count: int) -> Fit:
    """``count`` samples more, continuing the stream of the fit's seed."""
    assert fit.state is not None
    indices = range(len(fit.stored), len(fit.stored) + count)
    operator = fit.state.operator
    m, p = operator.shape
    noise_rows = settings.target.noise_rows(m)
    v, noise = standard_normal(fit.seed, indices, p, noise_rows, fit.unit[:1])
    fit.problem.space.fix_(v)
    prior = Remembered.of(v, operator, fit.problem.functional.model)
    done = fit.state.consume(v, noise if noise_rows else None)
    del v
    if operator.processes is not None:
        done = replace(done, value=operator.processes.give_(done.value.contiguous()))
    kept, done = stored_(fit.problem, done, fit.stored.dtype)
    stored = torch.cat([fit.stored, kept])
    check = fit.check and fit.check.with_more(kept)
    effects = operator.mine.matvec(done.value)
    certificate = fit.certificate.joined(
        new_samples(fit, done, prior, effects),
        None if check is None else check.measure(fit.alpha**-0.5),
    )
    if fit.auditing is not None and certificate.audit is not None:
        audit = audited(fit.problem, fit.auditing, kept, prior.few, effects, math.inf)
        certificate = replace(certificate, audit=certificate.audit.joined(audit))
    return replace(fit, stored=stored, certificate=certificate, check=check)


def new_samples(fit: Fit, done: Projection, prior: Remembered, after: Tensor) -> dict[str, Any]:
    """What a certificate says of samples that were drawn later, by the fit's rows."""
    assert fit.state is not None
    count, operator = len(after) * fit.certificate.examples, fit.state.operator
    norms = norms_of(operator, after)
    return {
        "residual": residual_of(norms, norms_of(operator, prior.image)),
        "row_drift": (float(norms.square().sum()) / count / fit.alpha) ** 0.5,
        "prior_share": squared(done.value) / prior.squared,
        "status": done.status,
        "iterations": done.iterations,
        "num_samples": len(after),
    }


def rescaled(fit: Fit, alpha: float) -> Fit:
    """The same samples at another prior precision, with what the certificate says of it."""
    certificate = fit.certificate
    if fit.check is not None:
        certificate = replace(
            certificate,
            prior_precision=alpha,
            evidence=None,
            row_drift=certificate.row_drift * (fit.alpha / alpha) ** 0.5,
            **fit.check.measure(alpha**-0.5),
        )
    return replace(fit, alpha=alpha, certificate=certificate)
