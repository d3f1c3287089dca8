"""The dense truth about a problem: plain autograd in float64, one example alone, formulas of its own.

Nothing here comes from the library: what judges a result shares no code with what made it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.torture.problems import Problem, Task

Inputs = tuple[Tensor, ...]


class Alone:
    """The network as a function of one example, in float64; ``weights`` are the ones that take part.

    Args:
        dtype: another precision, to see what rounding does to plain derivatives.
    """

    def __init__(
        self, problem: Problem, names: list[str], dtype: torch.dtype = torch.float64
    ) -> None:
        self.problem, self.names, self.dtype = problem, names, dtype
        self.model = copy.deepcopy(problem.model)
        for module in self.model.modules():
            # `eps=None` is a number of the precision that the layer runs in (float32 for half precision).
            if isinstance(module, nn.RMSNorm) and module.eps is None:
                single = problem.dtype != torch.float64
                module.eps = torch.finfo(torch.float32 if single else torch.float64).eps
        self.model = self.model.to(dtype)
        self.weights = {n: self.model.get_parameter(n).detach().clone() for n in names}

    def example(self, inputs: Inputs, n: int) -> Inputs:
        """Example ``n`` of a batch, alone; what is shared stays whole."""
        parts = [t if i in self.problem.shared else t[n : n + 1] for i, t in enumerate(inputs)]
        return tuple(t.to(self.dtype) if t.is_floating_point() else t for t in parts)

    def output(self, one: Inputs, weights: dict[str, Tensor]) -> Tensor:
        """The raw output of one example, ``(*out,)``; a dictionary's entries one after the other."""
        named = dict(zip(self.problem.names, one, strict=True))
        out = functional_call(self.model, weights, (), named)
        if isinstance(out, dict):
            out = torch.cat([v.flatten(1) for v in out.values()], 1)
        if self.problem.task.flat:
            return out.reshape(())
        return out[0]

    def jacobian(self, one: Inputs) -> tuple[Tensor, Tensor]:
        """Output ``(*out,)`` and Jacobian ``(O, P)``, one reverse pass an element."""
        weights = {n: w.clone().requires_grad_() for n, w in self.weights.items()}
        out = self.output(one, weights)
        rows = []
        for value in out.reshape(-1):
            grads = [None] * len(weights)
            if value.requires_grad:
                values = list(weights.values())
                grads = torch.autograd.grad(value, values, retain_graph=True, allow_unused=True)
            pairs = zip(grads, weights.values(), strict=True)
            rows.append(
                torch.cat([(torch.zeros_like(w) if g is None else g).reshape(-1) for g, w in pairs])
            )
        return out.detach(), torch.stack(rows)

    def together(self, inputs: Inputs) -> Tensor:
        """Outputs ``(B, *out)`` of the batch as the user's own network, in its own precision, gives them."""
        with torch.no_grad():
            out = self.problem.model(**dict(zip(self.problem.names, inputs, strict=True)))
        if isinstance(out, dict):
            out = torch.cat([v.flatten(1) for v in out.values()], 1)
        return out.double()


# -- derivatives of the losses, by hand -------------------------------------------------------------


def gradient_and_hessian(
    task: Task, out: Tensor, y: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of one example's loss by its raw output ``(*out,)``, flat: ``(O,)`` and ``(O, O)``."""
    if task.kind in ("classification", "soft"):
        return _softmax(task, out, y)
    flat, y = out.reshape(-1), y.double().reshape(-1)
    if task.kind == "binary":
        p = flat.sigmoid()
        return p - y, torch.diag(p * (1 - p))
    if task.kind == "regression":
        assert noise is not None
        precision = (1 / noise).expand(out.shape).reshape(-1)
        return (flat - y) * precision, torch.diag(precision)
    if task.kind == "squares":
        # |r| < β: r² / 2β, else |r| - β/2
        r, beta = flat - y, 0.5
        inside = r.abs() < beta
        return torch.where(inside, r / beta, r.sign()), torch.diag(inside.double() / beta)
    first, second = flat[: task.outputs], flat[task.outputs :]
    p = second.softmax(0)
    hot = F.one_hot(y.long()[0], 2).double()
    hessian = torch.block_diag(2 * torch.eye(len(first), dtype=torch.float64), _covariance(p))
    return torch.cat([2 * first, p - hot]), hessian


def _covariance(p: Tensor) -> Tensor:
    return torch.diag(p) - torch.outer(p, p)


def _softmax(task: Task, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ_t -Σ_c w_c y_tc log p_tc`` over positions t; an ignored label counts for nothing."""
    classes = out.shape[-1]
    weight = torch.tensor(task.weight or [1.0] * classes, dtype=torch.float64)
    soft = y.double()
    if task.kind == "classification":
        there = (y >= 0).double().unsqueeze(-1)
        soft = F.one_hot(y.clamp_min(0), classes).double() * there
    gradients, hessians = [], []
    for logits, label in zip(out.reshape(-1, classes), soft.reshape(-1, classes), strict=True):
        p, weighed = logits.softmax(0), weight * label
        total = weighed.sum()
        gradients.append(total * p - weighed)
        hessians.append(total * _covariance(p))
    return torch.cat(gradients), torch.block_diag(*hessians)


# -- the constraint matrix, and what a posterior over it is -----------------------------------------------


@dataclass
class Dense:
    """Truth about the training data. ``rows``: one ``(C_n, P)`` an example; ``g``: the Gauss-Newton matrix.

    Attributes:
        together: how far the user's own network, on whole batches, is from itself on one example alone, relative.
        ambiguous: the directions that are asked for are not unique.
    """

    alone: Alone
    rows: list[Tensor]
    noise: Tensor | None
    together: float
    ambiguous: bool

    @property
    def a(self) -> Tensor:
        return torch.cat(self.rows)


def dense(problem: Problem, names: list[str]) -> Dense:
    """Every training example alone."""
    alone = Alone(problem, names)
    found, apart, scale = [], 0.0, 1e-12
    for inputs, targets in problem.batches:
        whole = alone.together(inputs)
        for n in range(len(targets)):
            out, jacobian = alone.jacobian(alone.example(inputs, n))
            found.append((out, jacobian, targets[n]))
            apart = max(
                apart, float((whole.reshape(len(targets), -1)[n] - out.reshape(-1)).abs().max())
            )
            scale = max(scale, float(out.abs().max()))
    noise = _noise(problem.task, found)
    rows, ambiguous = [], False
    for out, jacobian, y in found:
        gradient, hessian = gradient_and_hessian(problem.task, out, y, noise)
        cotangents, unclear = _cotangents(problem.options, jacobian, gradient, hessian)
        rows.append(cotangents @ jacobian)
        ambiguous |= unclear
    return Dense(alone, rows, noise, apart / scale, ambiguous)


def separate(problem: Problem) -> bool:
    """Whether examples of the batches give the same outputs alone: a function of one example."""
    alone = Alone(problem, [])
    for inputs, targets in problem.batches:
        whole = alone.together(inputs).reshape(len(targets), -1)
        for n in range(len(targets)):
            with torch.no_grad():
                out = alone.output(alone.example(inputs, n), {}).reshape(-1)
            if out.shape != whole[n].shape or not torch.allclose(
                out, whole[n], rtol=1e-6, atol=1e-9
            ):
                return False
    return True


def _noise(task: Task, found: list[Any]) -> Tensor | None:
    """Observation variance of regression: the given one, or the mean squared residual of each channel."""
    if task.kind != "regression":
        return None
    if task.noise is not None:
        return torch.tensor(task.noise, dtype=torch.float64)
    squares = [
        (out - y.double()).square().reshape(-1, 1 if task.flat else out.shape[-1])
        for out, _, y in found
    ]
    return torch.cat(squares).mean(0) if not task.flat else torch.cat(squares).mean()


def _cotangents(
    options: dict[str, Any], jacobian: Tensor, gradient: Tensor, hessian: Tensor
) -> tuple[Tensor, bool]:
    """Cotangents ``(C, O)`` of one example, and whether they are a matter of choice."""
    if options["preserve"] == "outputs":
        return torch.eye(len(gradient), dtype=torch.float64), False
    if options["preserve"] == "loss":
        return gradient[None], False
    values, vectors = torch.linalg.eigh(hessian)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    count, wanted = len(values), options["directions"]
    unclear = False
    if wanted is not None and float(values[0]) > 0:
        left = values.sum() - values.cumsum(0)
        edge = 0.001 * values.sum()
        if wanted == "auto":
            count = 1 + int((left > edge).sum())
            unclear = bool(((left - edge).abs() < 1e-4 * values.sum()).any())
        else:
            count = min(wanted, count)
        if count < len(values):
            unclear |= bool(values[count - 1] - values[count] < 1e-4 * values[0])
    return (vectors * values.sqrt()).T[:count], unclear


def prior_variance(
    space: list[tuple[str, int]], precision: dict[str, float] | None, alpha: float
) -> Tensor:
    """``Λ⁻¹`` as ``(P,)``: one precision for all, times one per tensor where there is one."""
    parts = [torch.full((size,), 1 / (precision or {}).get(name, 1.0)) for name, size in space]
    return torch.cat(parts).double() / alpha


def covariance(a: Tensor, prior: Tensor, shift: float, passes: int | None) -> Tensor:
    """Posterior covariance ``(P, P)`` of unit ``alpha`` rows ``a`` under ``prior (P,)``, by eigenvectors.

    Args:
        shift: 0: the projection (singular values below 1e-8 of the largest count as none); else relative to 1.
        passes: of the numerical null space; None: Laplace.
    """
    root = prior.sqrt()
    _, singular, vectors = torch.linalg.svd(a * root, full_matrices=True)
    values = torch.zeros(len(prior), dtype=torch.float64)
    values[: len(singular)] = singular.square()
    if shift == 0:
        free = (values.sqrt() <= 1e-8 * values.max().sqrt()).double()
    else:
        free = shift / (values + shift)
        free = free if passes is None else free ** (2 * passes)
    return (vectors.T * free) @ vectors * root[:, None] * root


def centred(task: Task, jacobian: Tensor) -> Tensor:
    """Rows of outputs without what is common to all classes of a position, on which no prediction depends."""
    if task.kind not in ("classification", "soft"):
        return jacobian
    classes = jacobian.reshape(-1, task.outputs, jacobian.shape[-1])
    return (classes - classes.mean(1, keepdim=True)).reshape(jacobian.shape)


def has_gap(a: Tensor, prior: Tensor) -> bool:
    """Whether the rank of the rows is beyond doubt in float64: no singular value from 1e-11 to 1e-5 of the first."""
    values = torch.linalg.svdvals(a * prior.sqrt())
    relative = values / values.max().clamp_min(1e-300)
    return not bool(((relative > 1e-11) & (relative < 1e-5)).any()) and math.isfinite(
        float(values.max())
    )


def parameters_of(model: nn.Module, names: list[str]) -> list[tuple[str, int]]:
    return [(n, model.get_parameter(n).numel()) for n in names]
