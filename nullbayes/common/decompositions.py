"""Decompositions of symmetric and other matrices that end with an answer, or with an error that says what to do.

LAPACK's fast routines give up on some matrices that have a perfectly good answer (many equal eigenvalues, entries over
hundreds of orders of magnitude), and torch's error for that is raw. Each function here tries again: in float64, at unit
scale, and with the equal eigenvalues parted by a change below rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

from nullbayes.errors import NonFiniteError, SolverError

T = TypeVar("T")
_NotFound: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
# Relative to the largest entry: the change that parts equal eigenvalues, in float64.
PARTED = 1e-15
# From how many rows on a matrix is factorised in place, and columns of a block.
BLOCKED, PANEL = 4096, 256


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(*, n)``, smallest first, and eigenvectors ``(*, n, n)`` of symmetric matrices ``(*, n, n)``.

    Raises:
        NonFiniteError: an entry is NaN or infinite.
        SolverError: no decomposition was found.
    """

    def once(a: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(a)
        return values, vectors

    def again(a: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(a)
        return (values * scale[..., 0]).to(matrix.dtype), vectors.to(matrix.dtype)

    return _found(matrix, once, again, symmetric=True)


def eigvalsh(matrix: Tensor) -> Tensor:
    """As :func:`eigh`, eigenvalues alone: ``(*, n)``."""

    def again(a: Tensor, scale: Tensor) -> Tensor:
        return (torch.linalg.eigvalsh(a) * scale[..., 0]).to(matrix.dtype)

    return _found(matrix, torch.linalg.eigvalsh, again, symmetric=True)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U (*, m, k)``, singular values ``(*, k)``, largest first, and ``Vᵀ (*, k, n)`` of ``(*, m, n)``.

    Raises:
        NonFiniteError, SolverError: as for :func:`eigh`.
    """

    def once(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vt = torch.linalg.svd(a, full_matrices=False)
        return u, s, vt

    def again(a: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vt = torch.linalg.svd(a, full_matrices=False)
        return u.to(matrix.dtype), (s * scale[..., 0]).to(matrix.dtype), vt.to(matrix.dtype)

    return _found(matrix, once, again, symmetric=False)


def pinv(matrix: Tensor, *, rtol: float | None = None, hermitian: bool = False) -> Tensor:
    """The pseudo-inverse ``(*, n, m)`` of ``(*, m, n)``, as `torch.linalg.pinv` has it.

    Raises:
        NonFiniteError, SolverError: as for :func:`eigh`.
    """

    def once(a: Tensor) -> Tensor:
        inverse: Tensor = torch.linalg.pinv(a, rtol=rtol, hermitian=hermitian)
        return inverse

    def again(a: Tensor, scale: Tensor) -> Tensor:
        return (once(a) / scale).to(matrix.dtype)

    return _found(matrix, once, again, symmetric=hermitian)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix⁻¹ right`` for ``(*, n, n)`` and ``(*, n, k)``; of least norm where ``matrix`` is singular.

    Raises:
        NonFiniteError, SolverError: as for :func:`eigh`.
    """
    try:
        found: Tensor = torch.linalg.solve(matrix, right)
        if bool(found.isfinite().all()):
            return found
    except _NotFound:
        pass
    return pinv(matrix) @ right


def cholesky_(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """As `torch.linalg.cholesky_ex`, of a symmetric matrix ``(n, n)`` that it may overwrite.

    A large matrix of the CPU is factorised in place, by columns of blocks to which all earlier ones are added in one
    product: 65 instead of 56 GFLOP/s (9,000 rows, float64, where a product has 79), and without a second matrix. What
    lies above the diagonal stays until it has succeeded, so that :func:`mirror_upper_` brings the matrix back.
    """
    n = len(matrix)
    if n < BLOCKED or matrix.device.type != "cpu":
        factor, info = torch.linalg.cholesky_ex(matrix)
        return factor, info
    for start in range(0, n, PANEL):
        stop = min(start + PANEL, n)
        square = matrix[start:stop, start:stop]
        above = square.triu(1)
        if start:
            panel = matrix[start:, start:stop]
            panel.addmm_(matrix[start:, :start], matrix[start:stop, :start].mT, alpha=-1)
        corner, info = torch.linalg.cholesky_ex(square)
        square.copy_(corner + above)
        if int(info):
            return matrix, info + start
        eye = torch.eye(stop - start, dtype=matrix.dtype)
        inverse = torch.linalg.solve_triangular(corner, eye, upper=False)
        matrix[stop:, start:stop] = matrix[stop:, start:stop] @ inverse.mT
    return matrix.tril_(), info


def mirror_upper_(matrix: Tensor) -> Tensor:
    """What lies above the diagonal, copied below it."""
    for start in range(0, len(matrix), PANEL):
        stop = min(start + PANEL, len(matrix))
        square = matrix[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return matrix


def solved(lower: Tensor, right: Tensor) -> Tensor:
    """``(L Lᵀ)⁻¹ right`` for a triangular ``L (n, n)`` and ``(n, k)``.

    The bits of `torch.cholesky_solve`, which copies ``L`` each time: with few columns four times as long.
    """
    half = torch.linalg.solve_triangular(lower, right, upper=False)
    out: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return out


def _found(
    matrix: Tensor,
    once: Callable[[Tensor], T],
    again: Callable[[Tensor, Tensor], T],
    *,
    symmetric: bool,
) -> T:
    try:
        return once(matrix)
    except _NotFound as raised:
        error = raised
    if not bool(matrix.isfinite().all()):
        raise NonFiniteError(
            f"a matrix of shape {tuple(matrix.shape)} that has to be decomposed holds NaN or infinity: the scale of "
            "rows or outputs overflows its dtype. Use a float64 model (`model.double()`)."
        ) from error
    a = matrix.double()
    scale = a.abs().amax(dim=(-2, -1), keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    a = a / scale
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(a.shape[-2:], generator=generator, dtype=torch.float64).to(a.device)
    if symmetric:
        a, noise = (a + a.mT) / 2, (noise + noise.T) / 2
    for part in (0.0, PARTED, 100 * PARTED):
        with suppress(_NotFound):
            return again(a + part * noise, scale)
    raise SolverError(
        f"a matrix of shape {tuple(matrix.shape)} could not be decomposed in float64 either. Use a float64 model "
        "(`model.double()`), another solver (`solver=`), or report the network at the project's issue tracker."
    ) from error
