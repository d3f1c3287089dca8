"""Eigenvalues of a Gram matrix: all of them where that is cheap, a quadrature otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.solvers.base import Spectrum

EXACT_UP_TO = 3000
PROBES = 8
STEPS = 80


def gram_spectrum(gram: Tensor) -> Spectrum:
    """Spectrum of a symmetric positive semi-definite ``(M, M)`` float64 matrix."""
    m = len(gram)
    if m <= EXACT_UP_TO:
        values = torch.linalg.eigvalsh(gram).clamp(min=0)
        return Spectrum(values, torch.ones_like(values), exact=True)
    generator = torch.Generator().manual_seed(0)
    nodes, weights = [], []
    for _ in range(PROBES):
        start = torch.randint(0, 2, (m,), generator=generator, dtype=torch.float64).mul_(2).sub_(1)
        values, share = _lanczos(gram, start.to(gram.device), STEPS)
        nodes.append(values.clamp(min=0))
        weights.append(share * m / PROBES)
    return Spectrum(torch.cat(nodes), torch.cat(weights), exact=False)


def _lanczos(matrix: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Gauss nodes and weights of ``startᵀ f(matrix) start / ‖start‖²``."""
    basis = [start / start.norm()]
    alpha: list[Tensor] = []
    beta: list[Tensor] = []
    for _ in range(min(steps, len(matrix))):
        w = matrix @ basis[-1]
        alpha.append(basis[-1] @ w)
        # Full reorthogonalisation, twice: without it Lanczos returns copies of large eigenvalues.
        q = torch.stack(basis)
        for _ in range(2):
            w = w - q.T @ (q @ w)
        norm = w.norm()
        if norm <= 1e-12 * alpha[0].abs():
            break
        beta.append(norm)
        basis.append(w / norm)
    k = len(alpha)
    off = torch.stack(beta[: k - 1]) if k > 1 else start.new_zeros(0)
    tridiagonal = torch.diag(torch.stack(alpha)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values, vectors[0].square()
