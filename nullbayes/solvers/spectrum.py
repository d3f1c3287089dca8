"""Eigenvalues of a Gram matrix: all of them where that is cheap, a quadrature otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from nullbayes.solvers.base import Spectrum

EXACT_UP_TO = 2000
PROBES = 4
STEPS = 32


def gram_spectrum(gram: Tensor) -> Spectrum:
    """Spectrum of a symmetric positive semi-definite ``(M, M)`` float64 matrix."""
    m = len(gram)
    if m <= EXACT_UP_TO:
        values = torch.linalg.eigvalsh(gram).clamp(min=0)
        return Spectrum(values, torch.ones_like(values), exact=True)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randint(0, 2, (m, PROBES), generator=generator).double().mul_(2).sub_(1)
    nodes, weights = _lanczos(gram, probes.to(gram.device), min(STEPS, m))
    return Spectrum(nodes.clamp(min=0).flatten(), (weights * m / PROBES).flatten(), exact=False)


def _lanczos(matrix: Tensor, starts: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Gauss nodes and weights ``(probes, steps)`` of ``startᵀ f(matrix) start / ‖start‖²``.

    All probes go through one product with the matrix: it is read from memory once a step. The products
    run in float32, half the reading, since a quadrature of a few dozen nodes is coarser than that.
    """
    single = matrix.float()
    basis = (starts / starts.norm(dim=0)).T[:, None]  # (probes, k, M)
    alpha, beta = [], []
    for _ in range(steps):
        last = basis[:, -1]
        w = (single @ last.T.float()).T.double()
        alpha.append((last * w).sum(1))
        # Full reorthogonalisation, twice: without it Lanczos returns copies of large eigenvalues.
        for _ in range(2):
            w = w - torch.einsum("pkm,pk->pm", basis, torch.einsum("pkm,pm->pk", basis, w))
        norm = w.norm(dim=1)
        if bool((norm <= 1e-6 * alpha[0].abs()).all()):
            break
        beta.append(norm)
        basis = torch.cat([basis, (w / norm.clamp(min=1e-300)[:, None])[:, None]], dim=1)
    k = len(alpha)
    tridiagonal = torch.diag_embed(torch.stack(alpha, dim=1))
    if k > 1:
        off = torch.stack(beta[: k - 1], dim=1)
        tridiagonal = tridiagonal + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values, vectors[:, 0].square()
