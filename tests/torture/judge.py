"""Judge one problem: fit, ask everything, and hold every answer against the dense truth."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import nullbayes as nb
from tests.torture.problems import SOLVERS, Problem, likelihood
from tests.torture.reference import (
    Alone,
    Dense,
    centred,
    covariance,
    dense,
    has_gap,
    parameters_of,
    prior_variance,
)
from tests.torture.undisturbed import disturbed, state_of

RIGHT, REFUSED, WRONG, RAW = "right", "refused", "silent wrong", "raw error"
#: an error of the library's own, but of a network and data that it should take
UNEXPLAINED = "unexplained refusal"
# Relative to what samples do to the outputs. Rows are captured in the model's precision.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 0.2}
# What a posterior with an edge, or an iterative one, may leave of the prior's effect and still say "held".
HELD_LEAK, HELD_DRIFT = 0.05, 0.1


@dataclass
class Verdict:
    """What came of a problem; ``faults`` say what was wrong, ``checks`` which comparisons were made."""

    verdict: str
    faults: list[str] = field(default_factory=list)
    checks: dict[str, float] = field(default_factory=dict)
    error: str = ""
    trace: str = ""
    notes: list[str] = field(default_factory=list)


def judge(problem: Problem) -> Verdict:
    """Fit and compare. Nothing raised by the library gets out: it becomes the verdict."""
    before = state_of(problem)
    out = Verdict(RIGHT)
    try:
        with warnings.catch_warnings(), _disk(problem):
            warnings.simplefilter("ignore")
            posterior = _fitted(problem)
            truth = dense(problem, list(posterior.space.names))
            _compare(problem, posterior, truth, out)
    except nb.NullBayesError as error:
        out.verdict, out.error = REFUSED, f"{type(error).__name__}: {error}"
        if type(error).__module__ != "nullbayes.errors":
            out.verdict, out.error = RAW, f"{type(error).__module__}.{out.error}"
    except Exception as error:
        out.verdict, out.error = RAW, f"{type(error).__name__}: {error}"
        out.trace = traceback.format_exc()
        if not any("/nullbayes/" in line for line in out.trace.splitlines()):
            raise  # ours: the judge itself is at fault
    if out.verdict == REFUSED and not _just(problem, out.error):
        out.verdict = UNEXPLAINED
    out.faults += disturbed(problem, before)
    if out.faults:
        out.verdict = WRONG
    return out


def _just(problem: Problem, error: str) -> bool:
    """Whether there is a reason, in the problem itself, for this refusal."""
    o = problem.options
    if problem.hostile or problem.dtype == torch.bfloat16:
        return True
    if o["memory"] is not None and error.startswith("MemoryBudgetError"):
        return True
    if "squeeze()" in problem.words:  # one example alone has another shape than two have
        return True
    if "kronecker" in error and o["solver"] == "cg kronecker" and o["delta"] == 0:
        return True
    if "no gradient path" in error:
        return _unreached(problem)
    return False


def _unreached(problem: Problem) -> bool:
    """Whether some parameter that takes part has no effect on any training output."""
    chosen = problem.options.get("parameters")
    named = [n for n, p in problem.model.named_parameters() if p.requires_grad]
    names = [n for n in named if chosen is None or n in chosen]
    alone = Alone(problem, names)
    total: Tensor | float = 0.0
    for inputs, targets in problem.batches:
        for n in range(len(targets)):
            total = total + alone.jacobian(alone.example(inputs, n))[1].abs().sum(0)
    assert isinstance(total, Tensor)
    sizes = [alone.weights[n].numel() for n in names]
    return any(not bool(part.any()) for part in total.split(sizes))


@contextlib.contextmanager
def _disk(problem: Problem) -> Iterator[None]:
    """Where a problem says so, the disk is full as far as anybody can tell: rows are computed anew instead."""
    if not problem.no_disk:
        yield
        return
    usage = SimpleNamespace(total=1, used=1, free=0)
    with mock.patch.object(shutil, "disk_usage", lambda path: usage):
        yield


def _inputs(problem: Problem, inputs: tuple[Tensor, ...]) -> Any:
    if problem.mapping:
        return dict(zip(problem.names, inputs, strict=True))
    return inputs if len(inputs) > 1 else inputs[0]


def _loader(problem: Problem) -> list[Any]:
    if problem.mapping:
        return [_inputs(problem, x) | {"labels": y} for x, y in problem.batches]
    return [(*x, y) for x, y in problem.batches]


def precision_of(problem: Problem) -> dict[str, float] | None:
    """One prior precision per tensor, where the problem asks for that."""
    if problem.options["prior"] != "by tensor":
        return None
    chosen = problem.options.get("parameters")
    named = [n for n, p in problem.model.named_parameters() if p.requires_grad]
    return {
        n: 0.5 + 0.75 * i for i, n in enumerate(n for n in named if chosen is None or n in chosen)
    }


def _fitted(problem: Problem) -> Any:
    o = problem.options
    prior = {"one": 1.0, "evidence": "evidence"}.get(o["prior"], precision_of(problem))
    options = {
        k: o[k] for k in ("preserve", "directions", "memory", "parameters") if o.get(k) is not None
    }
    kind = nb.LaplacePosterior if problem.kind == "Laplace" else nb.NullSpacePosterior
    if problem.kind != "Laplace":
        options["delta"] = o["delta"]
    solver = SOLVERS[o["solver"]]()
    posterior = kind(
        problem.model, likelihood(problem.task), solver=solver, prior_precision=prior, **options
    )
    posterior.fit(_loader(problem), problem.samples, seed=1, progress=False)
    if problem.more:
        posterior.draw(problem.more)
    if problem.stored:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "posterior.safetensors"
            posterior.save(path)
            given = likelihood(problem.task)
            extra = {} if isinstance(given, nb.Likelihood) else {"loss": given}
            fitted, posterior = posterior, nb.load(path, problem.model, **extra)
            assert posterior.certificate == fitted.certificate
    return posterior


# -- comparisons ---------------------------------------------------------------------------------------


def _compare(problem: Problem, posterior: Any, truth: Dense, out: Verdict) -> None:
    certificate, dtype = posterior.certificate, problem.dtype
    tolerance = TOLERANCE[dtype]
    if problem.hostile:
        for (
            inputs
        ) in problem.queries:  # one that mixes its batch may be refused when it first has one
            posterior.predict(_inputs(problem, inputs))
        if problem.hostile == "batch mean" and not _mixes(problem):
            return  # of units that are zero on all these data
        out.faults.append(f"a network with {problem.hostile} was fitted; only a refusal is right")
        return
    if truth.together > 100 * tolerance:
        out.faults.append(
            f"examples depend on their batch (by {truth.together:.1e}) and the fit went through"
        )
        return
    deltas = _deltas(problem, posterior, out)
    alpha = float(posterior.prior_precision)
    space = parameters_of(problem.model, list(posterior.space.names))
    prior = prior_variance(space, precision_of(problem), alpha)
    if not truth.ambiguous:
        _judge_rows(problem, certificate, truth, deltas, prior, out)
    for inputs in [*(x for x, _ in problem.batches[:2]), *problem.queries]:
        _judge_predictions(problem, posterior, truth, deltas, inputs, out)
    if problem.kind == "Laplace" or problem.options["delta"] == 0:
        _judge_size(problem, certificate, truth, deltas, prior, out)
    _judge_novelty(problem, posterior, truth, deltas, prior, out)


def _mixes(problem: Problem) -> bool:
    """Whether an output, or a derivative, of some example of all these data depends on the others of its batch."""
    for inputs in [*(x for x, _ in problem.batches), *problem.queries]:
        outputs = []
        for way in (inputs, *(tuple(t[n : n + 1] for t in inputs) for n in range(len(inputs[0])))):
            made = problem.model(*way)
            leaves = [v.flatten(1) for v in (made.values() if isinstance(made, dict) else [made])]
            outputs.append(torch.cat(leaves, 1))
        if _apart(outputs[0], torch.cat(outputs[1:])):
            return True
        grads = [
            torch.autograd.grad(out.sum(), list(problem.model.parameters()), allow_unused=True)
            for out in (outputs[0], torch.cat(outputs[1:]))
        ]
        flat = [torch.cat([g.reshape(-1) for g in some if g is not None]) for some in grads]
        if _apart(*flat):
            return True
    return False


def _apart(one: Tensor, other: Tensor) -> bool:
    """By more than rounding."""
    allowed = 1e4 * torch.finfo(one.dtype).eps * float(one.abs().max())
    return len(one) != len(other) or not bool((one - other).abs().max() <= allowed)


def _deltas(problem: Problem, posterior: Any, out: Verdict) -> Tensor:
    """Weight changes ``(S, P)`` from the samples that users get; whatever takes no part has to be untouched."""
    state = {k: v.detach().clone() for k, v in problem.model.state_dict(keep_vars=True).items()}
    names = list(posterior.space.names)
    tied = {id(p): n for n, p in problem.model.named_parameters()}
    same = {k: tied.get(id(v), k) for k, v in problem.model.state_dict(keep_vars=True).items()}
    rows = []
    for sample in posterior.sample():
        rows.append(torch.cat([(sample[n] - state[n]).double().reshape(-1) for n in names]))
        moved = [k for k in state if same[k] not in names and not torch.equal(sample[k], state[k])]
        if moved:
            out.faults.append(f"samples move tensors that take no part: {moved[:3]}")
    for path, module in problem.model.named_modules():
        name = f"{path}.weight"
        if getattr(module, "padding_idx", None) is not None and name in names:
            moved_row = any(
                not torch.equal(s[name][module.padding_idx], state[name][module.padding_idx])
                for s in posterior.sample()
            )
            if moved_row:
                out.faults.append("samples move the row of `padding_idx`")
    if problem.dtype == torch.float64:
        return torch.stack(rows)
    # θ + Δ rounds; what the posterior holds is Δ itself, and predictions use that.
    held = posterior._fitted().unit.double() * float(posterior.prior_precision) ** -0.5
    apart = float((torch.stack(rows) - held).abs().max())
    scale = max(
        float(held.abs().max()),
        max(float(p.detach().abs().max()) for p in problem.model.parameters()),
    )
    if apart > 4 * torch.finfo(problem.dtype).eps * scale:
        out.faults.append(f"sample() and the held samples differ by {apart:.1e}")
    return held


def _judge_rows(
    problem: Problem, certificate: Any, truth: Dense, deltas: Tensor, prior: Tensor, out: Verdict
) -> None:
    """The drift that the certificate tells is the drift there is, and `held` is only said where it is true."""
    tolerance, a = TOLERANCE[problem.dtype], truth.a
    moved = torch.stack([(deltas @ r.T).square().sum(1) for r in truth.rows], 1)  # (S, N)
    expected = torch.stack([(r.square() * prior).sum() for r in truth.rows])  # (N,)
    drift, free = math.sqrt(float(moved.mean())), math.sqrt(float(expected.mean()))
    leak = math.sqrt(float(moved.sum(1).max()) / max(float(expected.sum()), 1e-300))
    out.checks |= {"leak": leak, "drift": drift}
    said = certificate.row_drift
    if problem.more:
        # The certificate's drift is that of the first samples; more of them may be a little further out.
        drift_first = math.sqrt(float(moved[: problem.samples].mean()))
        drift = drift_first if abs(drift_first - said) < abs(drift - said) else drift
    if not abs(drift - said) <= 0.05 * max(drift, said) + tolerance * free:
        out.faults.append(
            f"rows drift by {drift:.3e}, the certificate says {said:.3e} (prior {free:.3e})"
        )
    if not certificate.held:
        return
    allowed = max(2 * certificate.tolerance, tolerance)
    if certificate.delta > 0:
        allowed = max(allowed, 2 * HELD_LEAK)
    small = certificate.natural_units and certificate.delta > 0 and drift <= 1.2 * HELD_DRIFT
    if leak > allowed and not small and float(a.abs().max()) > 0:
        out.faults.append(
            f"`held`, but samples move what is preserved by {leak:.2e} of the prior's effect"
        )
    if certificate.delta == 0:
        known = expected > 1e-4 * expected.max()
        each = (moved.mean(0) / expected.clamp_min(1e-300)).sqrt()[known]
        worst = float(each.max()) if len(each) else 0.0
        if worst > max(100 * allowed, 0.3) or (
            certificate.tolerance < 1e-3 and worst > 30 * allowed
        ):
            out.faults.append(
                f"`held`, but one example's rows move by {worst:.2e} of the prior's effect"
            )


def _judge_predictions(
    problem: Problem, posterior: Any, truth: Dense, deltas: Tensor, inputs: Any, out: Verdict
) -> None:
    """``f + JΔ`` and ``f(θ + Δ)``, one example alone."""
    tolerance, size = TOLERANCE[problem.dtype], len(inputs[0])
    alone = truth.alone
    points, jacobians = zip(
        *(alone.jacobian(alone.example(inputs, n)) for n in range(size)), strict=True
    )
    point = torch.stack(points)
    change = torch.stack([(deltas @ j.T).reshape(-1, *point.shape[1:]) for j in jacobians], 1)
    found = posterior.predict(_inputs(problem, inputs))
    scale = float(change.abs().max()) + 1e-3 * float(point.abs().max()) + 1e-12
    if problem.dtype != torch.float64:
        scale += float(point.abs().max())
    got = (_flat(found.outputs, 2).double() - _flat(found.point, 1).double()).reshape(change.shape)
    off = float((got - change).abs().max()) / scale
    at = float((_flat(found.point, 1).double().reshape(point.shape) - point).abs().max()) / scale
    out.checks["predict"] = max(out.checks.get("predict", 0.0), off)
    if not off <= tolerance and not off <= 10 * _rounding(problem, truth, deltas, inputs) / scale:
        out.faults.append(f"predict of {size}: JΔ is off by {off:.1e} of its size")
    if not at <= tolerance:
        out.faults.append(f"predict of {size}: the network's output is off by {at:.1e}")
    if size != 1 or problem.dtype != torch.float64:
        return
    sampled = posterior.predict(_inputs(problem, inputs), method="sampled")
    one = alone.example(inputs, 0)
    want = torch.stack([alone.output(one, _moved(alone, d)) for d in deltas])
    apart = float((_flat(sampled.outputs, 2).double()[:, 0].reshape(want.shape) - want).abs().max())
    if not apart <= 1e-6 * (1 + float(want.abs().max())):
        out.faults.append(f"predict of one, sampled: off by {apart:.1e}")


def _rounding(problem: Problem, truth: Dense, deltas: Tensor, inputs: Any) -> float:
    """What rounding in the model's precision does to ``J Δ`` by plain differentiation: much, where gradients cancel.

    In float64 it counts for nothing: the judge rounds as much.
    """
    if problem.dtype == torch.float64:
        return 0.0
    exact, rounded = truth.alone, Alone(problem, truth.alone.names, torch.float32)
    away = [
        deltas @ (a.jacobian(a.example(inputs, n))[1].double() * sign).T
        for n in range(len(inputs[0]))
        for a, sign in ((exact, 1), (rounded, -1))
    ]
    pairs = zip(away[::2], away[1::2], strict=True)
    return max(float((x + y).abs().max()) for x, y in pairs)


def _flat(values: Any, lead: int) -> Tensor:
    if isinstance(values, dict):
        return torch.cat([v.flatten(lead) for v in values.values()], -1)
    return values


def _moved(alone: Any, delta: Tensor) -> dict[str, Tensor]:
    parts = delta.split([w.numel() for w in alone.weights.values()])
    return {n: w + d.view(w.shape) for (n, w), d in zip(alone.weights.items(), parts, strict=True)}


def _judge_size(
    problem: Problem, certificate: Any, truth: Dense, deltas: Tensor, prior: Tensor, out: Verdict
) -> None:
    """Samples are as long as the posterior says: ``Δᵀ Σ⁻¹ Δ`` is a chi-square over all samples."""
    if truth.ambiguous or problem.dtype == torch.bfloat16 or certificate.tolerance > 1e-3:
        return
    if problem.kind == "Laplace":
        quadratic = (deltas.square() / prior).sum() + (deltas @ truth.a.T).square().sum()
        freedom = len(prior)
    else:
        if not has_gap(truth.a, prior):
            return
        values = torch.linalg.svdvals(truth.a * prior.sqrt())
        freedom = len(prior) - int((values > 1e-8 * values.max().clamp_min(1e-300)).sum())
        quadratic = (deltas.square() / prior).sum()
    total = freedom * len(deltas)
    z = (float(quadratic) - total) / math.sqrt(2 * max(total, 1))
    out.checks["z"] = z
    if abs(z) > 7 + (0.02 * total if problem.dtype != torch.float64 else 1e-6 * total):
        out.faults.append(
            f"samples are of the wrong length: chi-square is {z:.1f} deviations from {total}"
        )


def _judge_novelty(
    problem: Problem, posterior: Any, truth: Dense, deltas: Tensor, prior: Tensor, out: Verdict
) -> None:
    """Variance from the samples, and exactly from the factorisation, of one query batch."""
    inputs, tolerance = problem.queries[-1], TOLERANCE[problem.dtype]
    alone, size = truth.alone, len(problem.queries[-1][0])
    jacobians = [
        centred(problem.task, alone.jacobian(alone.example(inputs, n))[1]) for n in range(size)
    ]
    sampled = torch.stack([(deltas @ j.T).square().sum(1).mean() for j in jacobians])
    before = torch.stack([(j.square() * prior).sum() for j in jacobians])
    scale = float(before.max()) + 1e-12
    x = _inputs(problem, inputs)
    got = posterior.novelty(x, score="variance", exact=False).double()
    off = float((got - sampled).abs().max()) / (float(sampled.max()) + 1e-3 * scale)
    out.checks["novelty"] = off
    if not off <= 10 * tolerance:
        out.faults.append(f"novelty from samples is off by {off:.1e}")
    tight = posterior.certificate.tolerance <= 1e-3 and not truth.ambiguous
    if problem.stored or not tight or problem.dtype == torch.bfloat16:
        return
    edge = problem.options["delta"] if problem.kind != "Laplace" else 1.0
    if edge and problem.kind != "Laplace" and problem.options["prior"] == "evidence":
        return  # the edge was set at a prior precision that is not told
    if edge == 0 and not has_gap(truth.a, prior):
        return
    got = posterior.novelty(x, score="variance", exact=True).double()
    passes: list[int | None] = (
        [None] if problem.kind == "Laplace" or not edge else list(range(1, 13))
    )
    off = math.inf
    for count in passes:
        sigma = covariance(truth.a, prior, edge, count)
        want = torch.stack([torch.einsum("op,pq,oq->", j, sigma, j) for j in jacobians])
        off = min(off, float((got - want).abs().max()) / scale)
    out.checks["exact"] = off
    if not off <= (1e-5 if problem.dtype == torch.float64 else 2e-2):
        out.faults.append(f"exact novelty is off by {off:.1e} of the prior's")
