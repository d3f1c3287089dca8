"""A fit's samples handed to the audit, with what the fit's rows claim of them."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

import torch
from torch import Tensor

from nullbayes.audit import Audit
from nullbayes.audit.examples import (
    Claim,
    Question,
    Together,
    audit_examples,
)
from nullbayes.constraints.problem import Problem
from nullbayes.constraints.training_rows import TrainingRows
from nullbayes.fit.result import AUDITED, Auditing


def auditing_of(problem: Problem, rows: TrainingRows, asked: int) -> Auditing:
    """What it takes to audit samples of this fit, now and when more are drawn."""
    own, processes = rows.operator.own_span, rows.operator.processes
    # Those that short steps moved otherwise than their rows say come before the time is over.
    pairs = zip(rows.audited, rows.chances or [0.0] * len(rows.audited), strict=True)
    drawn = [d for d, _ in sorted(pairs, key=lambda pair: min(pair[1], 0.0))]
    numbers = [d.number for d in drawn]
    everyone = [numbers] if processes is None else processes.gather(numbers)
    ordered = sorted(number for part in everyone for number in part)
    less = asked < min(AUDITED, rows.examples)
    return Auditing(
        drawn,
        {number: own(rows.span(number)) for number in numbers},
        rows.examples,
        rows.batches,
        f"audit={asked} was asked for" if less else _cut(len(ordered), asked, rows.examples),
        {number: rows.label(number) for number in numbers},
        [bisect_left(ordered, number) for number in numbers],
        processes,
    )


def _cut(drawn: int, asked: int, total: int) -> str | None:
    wanted = min(asked, total)
    if drawn == wanted:
        return None
    return f"{drawn} of {wanted} examples, which take the memory that is set aside for that"


def audited(
    problem: Problem,
    auditing: Auditing,
    samples: Tensor,
    prior: Tensor,
    effects: Tensor,
    seconds: float,
) -> Audit:
    """The audit of ``samples (S, P)`` at prior precision one.

    Args:
        samples: in the dtype in which they are stored.
        prior: ``(k, P)``, some of what they were projected from, in the solver's coordinates; as many samples at a
            time move an example.
        effects: ``A Δ (S, M)``, as the rows have it: those of this process.
        seconds: that it may take, once the fewest examples are done.
    """
    question = Question(
        problem.functional,
        samples,
        problem.weight_changes(prior),
        lambda outputs, example: (
            problem.cotangents(
                outputs,
                example.targets,
                torch.full((len(outputs),), auditing.labels[example.number]),
            ).values
        ),
    )
    claims = [
        Claim(effects[:, auditing.spans[d.number]].double().norm(dim=1)) for d in auditing.drawn
    ]
    found = audit_examples(
        question,
        auditing.drawn,
        claims,
        auditing.total,
        seconds,
        Together(auditing.processes, auditing.places),
    )
    less = [text for text in (auditing.reduced, found.reduced) if text]
    return replace(found, batches=auditing.batches, reduced="; ".join(less) or None)
