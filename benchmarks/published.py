"""The two ways that are in use today, written from the papers: rows by `jacrev`, alternating projections.

They share nothing with the library but the trained network, so that they can be slow in their own way.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from nullbayes.demo.running import Clock


def softmax_root(logits: Tensor) -> Tensor:
    """``(B, O, O-1)`` with ``L Lᵀ = diag(p) - ppᵀ``, by eigendecomposition in float64."""
    p = logits.double().softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    values, vectors = torch.linalg.eigh(hessian)
    return (vectors * values.clamp(min=0).sqrt()[:, None, :])[..., 1:].to(logits.dtype)


def flat_function(model: nn.Module, x: Tensor):
    """``f(theta) -> (B, O)`` of one flat weight vector, and that vector."""
    named = {n: p.detach() for n, p in model.named_parameters()}
    sizes = [p.numel() for p in named.values()]

    def function(theta: Tensor, images: Tensor = x) -> Tensor:
        parts = theta.split(sizes)
        weights = {n: t.reshape(p.shape) for (n, p), t in zip(named.items(), parts, strict=True)}
        return functional_call(model, weights, (images,))

    return function, torch.cat([p.reshape(-1) for p in named.values()])


def dense_rows(model: nn.Module, x: Tensor, vectorised: bool, batch: int = 25) -> Tensor:
    """``A (N (O-1), P)`` by ``torch.func.jacrev``: row by row, or vectorised over a batch."""
    function, theta = flat_function(model, x)
    rows = []
    for images in x.split(batch):
        with torch.no_grad():
            root = softmax_root(model(images))
        if vectorised:
            per_example = vmap(lambda image: jacrev(lambda t: function(t, image[None])[0])(theta))
            jacobian = per_example(images)
        else:
            jacobian = torch.stack(
                [
                    jacrev(lambda t, i=i: function(t, i[None])[0], chunk_size=1)(theta)
                    for i in images
                ]
            )
        rows.append((root.mT @ jacobian.detach()).flatten(0, 1))
    return torch.cat(rows)


def jacrev_cholesky(
    model: nn.Module, x: Tensor, noise: Tensor, vectorised: bool, refinements: int
) -> tuple[Tensor, Clock]:
    """Null-space samples from the explicit Jacobian and the same Cholesky factorisation as ours."""
    clock = Clock()
    a = dense_rows(model, x, vectorised)
    clock.lap("rows")
    gram = (a @ a.T).double()
    clock.lap("gram")
    scale = gram.diagonal().rsqrt()
    gram.mul_(scale[:, None]).mul_(scale)
    gram.diagonal().add_(0.1 * torch.finfo(a.dtype).eps * len(a) ** 0.5)
    factor = torch.linalg.cholesky(gram)
    clock.lap("factorisation")
    samples = noise
    for _ in range(refinements):
        z = torch.cholesky_solve(((samples @ a.T).double() * scale).T, factor).T * scale
        samples = samples - z.to(a.dtype) @ a
    clock.lap("samples")
    return samples, clock


def _directional(f, theta: Tensor, v: Tensor) -> Tensor:
    return jvp(f, (theta,), (v,))[1]


def _pullback(f, theta: Tensor):
    pull = vjp(f, theta)[1]
    return lambda w: pull(w)[0]


def alternating_projections(
    model: nn.Module, x: Tensor, noise: Tensor, cycles: int, batch: int = 16
) -> tuple[Tensor, Clock]:
    """Miani, Roy & Hauberg (2025), algorithm 1: cyclic projections onto each mini-batch's null space.

    The inverse of each mini-batch's Gram matrix is computed once; a projection is then one
    Jacobian-vector and one vector-Jacobian product for each sample.
    """
    clock = Clock()
    function, theta = flat_function(model, x)
    pieces = list(x.split(batch))
    inverses, roots = [], []
    for images in pieces:
        with torch.no_grad():
            root = softmax_root(model(images))
        jacobian = jacrev(lambda t, i=images: function(t, i))(theta).detach()
        rows = (root.mT @ jacobian).flatten(0, 1).double()
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        keep = values > 1e-12 * values.max()  # relative: the published absolute 1e-3 drops rows
        inverses.append((vectors[:, keep] / values[keep]) @ vectors[:, keep].T)
        roots.append(root)
    clock.lap("precomputation")

    samples = noise
    for _ in range(cycles):
        for images, root, inverse in zip(pieces, roots, inverses, strict=True):
            f = functools.partial(function, images=images)
            along = functools.partial(_directional, f, theta)
            moved = vmap(along)(samples)  # (S, B, O)
            u = (moved.unsqueeze(2) @ root).squeeze(2).flatten(1).double() @ inverse
            weights = (root @ u.to(root).reshape(len(u), *root.shape[::2], 1)).squeeze(3)
            samples = samples - vmap(_pullback(f, theta))(weights)
    clock.lap(f"{cycles} cycles")
    return samples.detach(), clock
