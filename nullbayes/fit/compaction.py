"""A fit reduced to what serving needs: fewer samples, or narrower ones, without rows and factorisation."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from nullbayes.certificate import Certificate
from nullbayes.common.eight_bits import Packed, packed_in
from nullbayes.errors import InputError
from nullbayes.fit.auditing import audited
from nullbayes.fit.pipeline import new_samples
from nullbayes.fit.prior_samples import Remembered, standard_normal
from nullbayes.fit.result import Fit
from nullbayes.solvers import Projection, Status


def compacted(fit: Fit, samples: int, dtype: torch.dtype) -> Fit:
    """The first ``samples`` of ``fit`` in ``dtype``, with a certificate of those, measured while the rows are there.

    Without them (a posterior that was loaded) the certificate stays that of all samples, and a note says so.

    Raises:
        InputError: fewer samples are stored.
    """
    if samples > len(fit.stored):
        raise InputError(
            f"`samples` is {samples}, and {len(fit.stored)} are stored; pass no more than that, or `draw` more first."
        )
    stored = narrowed(fit, samples, dtype)
    if fit.state is None:
        note = (
            f"Reduced to {samples} of {len(fit.stored)} samples in {str(dtype).removeprefix('torch.')} after the fit's "
            "rows were gone: the certificate is that of the samples before."
        )
        same = samples == len(fit.stored) and dtype == fit.stored.dtype
        notes = fit.certificate.notes if same else (*fit.certificate.notes, note)
        return replace(fit, stored=stored, certificate=replace(fit.certificate, notes=notes))
    certificate = _measured(fit, stored)
    return replace(
        fit,
        stored=stored,
        certificate=certificate,
        state=None,
        check=None,
        auditing=None,
        rows=None,
        solver=None,
    )


def narrowed(fit: Fit, samples: int, dtype: torch.dtype) -> Tensor:
    """The first ``samples`` of ``fit`` in ``dtype``, copied."""
    some = fit.stored[:samples]
    if dtype is not torch.int8:
        return some.to(dtype, copy=True)
    if packed_in(some) is not None:
        return some
    return Packed.of(some, [slot.shape for slot in fit.problem.space.slots]).as_samples


def _measured(fit: Fit, stored: Tensor) -> Certificate:
    """What the fit's rows, and the audit, say of ``stored (S, P)``."""
    state, problem = fit.state, fit.problem
    assert state is not None
    unit, operator = stored.to(problem.dtype), state.operator
    rounded = problem.isotropic(unit)
    effects = operator.mine.matvec(rounded)
    v, _ = standard_normal(fit.seed, range(len(unit)), operator.shape[1], 0, unit[:1])
    prior = Remembered.of(problem.space.fix_(v), operator, problem.functional.model)
    del v
    known = fit.certificate
    status = Status(known.status)
    if stored.dtype != fit.stored.dtype:
        status = status.rounded
    done = Projection(rounded, unit.new_tensor([known.residual]), status, known.iterations)
    changed = new_samples(fit, done, prior, effects)
    changed["status"] = status.value
    if fit.check is not None:
        changed |= fit.check.of(stored).measure(fit.alpha**-0.5)
    audit = known.audit
    if fit.auditing is not None and audit is not None:
        audit = audited(problem, fit.auditing, unit, prior.few, effects, math.inf)
    return replace(known, **changed, audit=audit)
