"""At the end of a fit: how far do samples really move what is preserved, by plain derivatives of one example alone?

Forward mode, so that not even the backward pass is shared with the rows that are judged; two reverse passes, or rows by
reverse mode, where an operation of the network has no forward mode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nullbayes.audit.audit import Audit
from nullbayes.audit.batches import counter_generator
from nullbayes.audit.sampling import Drawn
from nullbayes.errors import ModelError
from nullbayes.model.functional import FunctionalModel

# Samples that each audited example is moved by, and as many prior directions.
SAMPLES = 3
# By how much of what the prior would do an example's change may differ from what the rows say of it: rounding of
# deep networks in float32 explains 1e-4. Capped, whatever the precision.
AGREE = {torch.float64: 1e-6, torch.float32: 2e-3}
LARGEST = 2e-2
FEWEST = 4

#: cotangents ``(C, 1, *out)`` of one example's rows, from its outputs ``(1, *out)`` and targets
Rows = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Claim:
    """What the fit's own rows say of one example.

    Attributes:
        moved: ``‖A_n Δ_s‖ (s,)`` float64 for the first samples at prior precision one.
    """

    moved: Tensor


@dataclass(frozen=True)
class Question:
    """What is audited.

    Attributes:
        samples, prior: weight changes ``(s, P)``: posterior samples at prior precision one, and what they were
            projected from.
        rows: what turns an example's output changes into what is preserved.
    """

    functional: FunctionalModel
    samples: Tensor
    prior: Tensor
    rows: Rows


def audit_examples(
    question: Question,
    drawn: Sequence[Drawn],
    claims: Sequence[Claim],
    total: int,
    seconds: float = float("inf"),
) -> Audit:
    """Compare what samples do to each example with what the fit's rows claim.

    Args:
        drawn: examples; ``claims``: one for each.
        total: how many examples the data have.
        seconds: stop early once so much time has passed, but not before :data:`FEWEST` examples.
    """
    started = time.perf_counter()
    allowed = agreement(question.functional.rounding)
    ways: list[str] = []
    worst, which, moved, prior, done = 0.0, None, 0.0, 0.0, 0
    for example, claim in zip(drawn, claims, strict=True):
        if done >= FEWEST and time.perf_counter() - started > seconds:
            break
        ours, reach, way = _measured(question, example)
        ways += [way] if way not in ways else []
        # An example whose rows are zero may not be moved at all; rounding is then held against its outputs' reach.
        away = float((ours - claim.moved.to(ours)).abs().max()) / max(reach, 1e-300)
        if not away <= worst or which is None:
            worst, which = away, example.number
        moved += float(ours.square().sum())
        prior += reach**2 * len(ours)
        done += 1
    return Audit(
        examples=done,
        total=total,
        worst=worst,
        worst_example=which,
        allowed=allowed,
        moved=(moved / prior) ** 0.5 if prior > 0 else 0.0,
        methods=tuple(ways),
        seconds=time.perf_counter() - started,
        reduced=_reduced(done, len(drawn)),
    )


def _reduced(done: int, asked: int) -> str | None:
    return f"{done} of {asked} drawn examples, to save time" if done < asked else None


def agreement(dtype: torch.dtype) -> float:
    """Share of the prior's effect by which rounding in ``dtype`` may part rows and reality."""
    return min(AGREE.get(dtype, LARGEST), LARGEST)


def _measured(question: Question, example: Drawn) -> tuple[Tensor, float, str]:
    """``‖A_n Δ_s‖ (s,)`` float64, the RMS of ``‖A_n ε‖`` over prior directions, and by which way."""
    functional = question.functional
    with torch.no_grad():
        outputs = functional(functional.weights(), example.inputs)
    cotangents = question.rows(outputs, example.targets)
    cotangents = cotangents.reshape(len(cotangents), -1).double()  # (C, out)
    both = torch.cat([question.samples, question.prior])
    changes, way = _changes(functional, both, example.inputs)
    values = (changes.reshape(len(both), -1).double() @ cotangents.T).norm(dim=1)
    ours, prior = values[: len(question.samples)], values[len(question.samples) :]
    return ours, float(prior.square().mean().sqrt()), way


def _changes(functional: FunctionalModel, deltas: Tensor, inputs: Any) -> tuple[Tensor, str]:
    """``J(x) δ (s, *out)`` of one example alone."""
    last: Exception | None = None
    for way, run in (
        ("forward mode", _by_forward_mode),
        ("two reverse passes", _by_two_reverse_passes),
        ("reverse mode", _by_reverse_mode),
    ):
        try:
            return run(functional, deltas, inputs), way
        except (NotImplementedError, RuntimeError, ValueError) as error:  # noqa: PERF203 - another way follows
            last = error
    raise ModelError(
        f"the guarantee could not be audited: the network's outputs for one example have no derivative by any way "
        f"({type(last).__name__}: {last})."
    ) from last


def _by_forward_mode(functional: FunctionalModel, deltas: Tensor, inputs: Any) -> Tensor:
    weights, out = functional.weights(), []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for delta in deltas:
            tangent = _by_name(functional, delta, weights)
            change: Tensor = torch.func.jvp(
                lambda w: functional(w, inputs), (weights,), (tangent,)
            )[1]
            out.append(change.detach()[0])
    return torch.stack(out)


def _by_two_reverse_passes(functional: FunctionalModel, deltas: Tensor, inputs: Any) -> Tensor:
    """The derivative of ``wᵀ J δ`` by ``w``."""
    weights = functional.weights(requires_grad=True)
    with (
        torch.enable_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        outputs = functional(weights, inputs)
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(
            outputs, list(weights.values()), dummy, create_graph=True, materialize_grads=True
        )
        out = []
        for delta in deltas:
            tangent = _by_name(functional, delta, weights)
            along = sum(
                ((g * tangent[n]).sum() for n, g in zip(weights, pulled, strict=True)),
                start=outputs.new_zeros(()),
            )
            (change,) = torch.autograd.grad(along, dummy, retain_graph=True)
            out.append(change.detach()[0])
    # An operation that may be differentiated once only drops out of the second pass without a word.
    _confirm(functional, deltas[0], out[0], inputs)
    return torch.stack(out)


def _confirm(functional: FunctionalModel, delta: Tensor, change: Tensor, inputs: Any) -> None:
    """Raise `ValueError` unless ``wᵀ(J δ) = (Jᵀ w)ᵀ δ`` by one plain backward pass, for a random ``w``."""
    weights = functional.weights(requires_grad=True)
    with torch.enable_grad():
        outputs = functional(weights, inputs)
    w = torch.randn(change.shape, generator=counter_generator(0, 2), dtype=torch.float64)
    gradients = torch.autograd.grad(
        outputs, list(weights.values()), w.to(outputs)[None], allow_unused=True
    )
    tangent = _by_name(functional, delta, weights)
    parts = [
        ((g.to_dense() if g.is_sparse else g).double() * tangent[n].double()).reshape(-1)
        for n, g in zip(weights, gradients, strict=True)
        if g is not None
    ]
    there = torch.cat(parts)
    here = (w.to(change.device) * change.double()).sum()
    if not float((there.sum() - here).abs()) <= agreement(functional.rounding) * float(
        there.norm() + here.abs()
    ):
        raise ValueError(
            "two reverse passes disagree with one: an operation has no second derivative"
        )


def _by_reverse_mode(functional: FunctionalModel, deltas: Tensor, inputs: Any) -> Tensor:
    """One backward pass an output."""
    weights = functional.weights(requires_grad=True)
    with torch.enable_grad():
        outputs = functional(weights, inputs)
    tangents = [_by_name(functional, delta, weights) for delta in deltas]
    flat, columns = outputs.reshape(-1), []
    for o in range(flat.numel()):
        gradients = torch.autograd.grad(
            flat[o], list(weights.values()), retain_graph=True, allow_unused=True
        )
        pairs = [(n, g) for n, g in zip(weights, gradients, strict=True) if g is not None]
        dense = [(n, g.to_dense() if g.is_sparse else g) for n, g in pairs]
        columns.append(
            torch.stack(
                [sum((g * t[n]).sum() for n, g in dense) + flat.new_zeros(()) for t in tangents]
            )
        )
    return torch.stack(columns, 1).reshape(len(deltas), *outputs.shape[1:])


def _by_name(
    functional: FunctionalModel, delta: Tensor, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    parts = functional.space.unflatten(delta)
    return {name: parts[name].to(t.dtype) for name, t in weights.items()}
