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
