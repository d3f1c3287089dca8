"""Eigenvalues of a Gram matrix: all of them where that is cheap, a quadrature otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nullbayes.jacobian.operator import RowOperator
from nullbayes.solvers.base import Spectrum

EXACT_UP_TO = 2000
PROBES = 4
STEPS = 32
# Where every step is a pass over the data.
OPERATOR_PROBES = 2
OPERATOR_STEPS = 16


def gram_spectrum(gram: Tensor) -> Spectrum:
    """Spectrum of a symmetric positive semi-definite ``(M, M)`` float64 matrix."""
    m = len(gram)
    if m <= EXACT_UP_TO:
        values = torch.linalg.eigvalsh(gram).clamp(min=0)
        return Spectrum(values, torch.ones_like(values), exact=True)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randint(0, 2, (m, PROBES), generator=generator).double().mul_(2).sub_(1)
    # The products run in float32, half the reading, since a quadrature of a few dozen nodes is
    # coarser than that.
    single = gram.float()
    starts = probes.T.to(gram.device)
    nodes, weights = _lanczos(lambda v: (single @ v.T.float()).T.double(), starts, min(STEPS, m))
    return Spectrum(nodes.clamp(min=0).flatten(), (weights * m / PROBES).flatten(), exact=False)


def operator_spectrum(operator: RowOperator) -> Spectrum:
    """Spectrum of ``AᵀA`` from products alone: each step is one pass over the rows."""
    m, p = operator.shape
    if m <= EXACT_UP_TO:
        return gram_spectrum(operator.gram())
    generator = torch.Generator().manual_seed(0)
    # Rows and columns have the same squared singular values: probe whichever are fewer.
    size = min(m, p)
    probes = torch.randn(OPERATOR_PROBES, size, generator=generator, dtype=torch.float64)

    def product(v: Tensor) -> Tensor:
        v = v.to(operator.dtype)
        if m < p:
            return operator.matvec(operator.rmatvec(v)).double()
        return operator.normal(v)[0].double()

    nodes, weights = _lanczos(product, probes.to(operator.device), min(OPERATOR_STEPS, size))
    return Spectrum(
        nodes.clamp(min=0).flatten(), (weights * size / OPERATOR_PROBES).flatten(), exact=False
    )


def _lanczos(
    product: Callable[[Tensor], Tensor], starts: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Gauss nodes and weights ``(probes, steps)`` of ``startᵀ f(matrix) start / ‖start‖²``.

    All probes ``(probes, n)`` go through one product: the matrix is read from memory once a step.
    """
    basis = (starts / starts.norm(dim=1, keepdim=True))[:, None]  # (probes, k, n)
    alpha, beta = [], []
    for _ in range(steps):
        last = basis[:, -1]
        w = product(last)
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
