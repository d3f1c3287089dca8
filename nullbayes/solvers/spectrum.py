"""Eigenvalues of a Gram matrix: all of them where that is cheap, a quadrature otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nullbayes.common.decompositions import eigh, eigvalsh, solve
from nullbayes.common.processes import Processes
from nullbayes.jacobian.operator import RowOperator
from nullbayes.solvers.base import Settled, Spectrum

EXACT_UP_TO = 2000
PROBES = 4
STEPS = 32
# Where every step is a pass over the data.
OPERATOR_PROBES = 2
OPERATOR_STEPS = 16
# Steps at most, and bytes of the vectors that they leave behind. More are taken until the spectrum is settled.
MOST_STEPS = 256
BASIS_BYTES = 2**30


def shared_spectrum(processes: Processes | None, find: Callable[[], Spectrum]) -> Spectrum:
    """What ``find`` gives; of several processes, what it gives in the first, where alone it runs."""
    return find() if processes is None else processes.shared(find)


def gram_spectrum(gram: Tensor, settled: Settled | None = None) -> Spectrum:
    """Spectrum of a symmetric positive semi-definite ``(M, M)`` float64 matrix."""
    m = len(gram)
    if m <= EXACT_UP_TO:
        found = eigvalsh(gram)
        values, below = found.clamp(min=0), max(0.0, -float(found.min())) if m else 0.0
        return Spectrum(values, torch.ones_like(values), exact=True, rounding=below)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randint(0, 2, (m, PROBES), generator=generator).double().mul_(2).sub_(1)
    # The products run in float32, half the reading, since a quadrature of a few dozen nodes is
    # coarser than that; from the left, which reads the symmetric matrix in half the time (9,000 rows).
    single = gram.float()
    starts = probes.T.to(gram.device)
    return _lanczos(lambda v: (v.float() @ single).double(), starts, STEPS, settled, BASIS_BYTES)


def operator_spectrum(
    operator: RowOperator, settled: Settled | None = None, room: int = BASIS_BYTES
) -> Spectrum:
    """Spectrum of ``AᵀA`` from products alone: each step is one pass over the rows.

    Args:
        room: bytes that it may take. With less than two Gram matrices, a small problem is estimated too.
    """
    m, p = operator.shape
    if m <= EXACT_UP_TO and 16 * m**2 <= room:
        gram = operator.gram()
        return shared_spectrum(operator.processes, lambda: gram_spectrum(gram, settled))
    generator = torch.Generator().manual_seed(0)
    # Rows and columns have the same squared singular values: probe whichever are fewer.
    size = min(m, p)
    probes = torch.randn(OPERATOR_PROBES, size, generator=generator, dtype=torch.float64)

    def product(v: Tensor) -> Tensor:
        v = v.to(operator.dtype)
        if m < p:
            return operator.matvec(operator.rmatvec(v)).double()
        return operator.normal(v)[0].double()

    starts = probes.to(operator.device)
    room -= _product_bytes(m, p)
    found = _lanczos(product, starts, OPERATOR_STEPS, settled, min(room, BASIS_BYTES))
    # Each process took its steps; the numbers are those of one.
    return shared_spectrum(operator.processes, lambda: found)


def spectrum_bytes(rows: int, columns: int) -> int:
    """What the least of :func:`operator_spectrum` takes."""
    return 8 * OPERATOR_PROBES * OPERATOR_STEPS * min(rows, columns) + _product_bytes(rows, columns)


def _product_bytes(rows: int, columns: int) -> int:
    """Of the vectors of weights that a step holds: the probes themselves only where weights are fewer than rows."""
    return 8 * OPERATOR_PROBES * columns * (2 if rows < columns else 6)


def _lanczos(
    product: Callable[[Tensor], Tensor],
    starts: Tensor,
    steps: int,
    settled: Settled | None,
    room: int,
) -> Spectrum:
    """``steps`` of Lanczos for each of the probes ``(probes, n)``, and more until the spectrum is settled.

    All probes go through one product: the matrix is read from memory once a step.

    Args:
        room: bytes of the vectors that all steps leave behind, unless ``steps`` of them take more.
    """
    size = starts.shape[1]
    most = min(size, max(steps, min(MOST_STEPS, room // (8 * starts.numel()))))
    steps = min(steps, size)
    space = _Basis(starts / starts.norm(dim=1, keepdim=True), most)
    alpha, beta = [], []
    while True:
        basis = space.vectors  # (probes, k, n)
        last = basis[:, -1]
        w = product(last)
        alpha.append((last * w).sum(1))
        # Full reorthogonalisation, twice: without it Lanczos returns copies of large eigenvalues.
        for _ in range(2):
            w = w - torch.einsum("pkm,pk->pm", basis, torch.einsum("pkm,pm->pk", basis, w))
        norm = w.norm(dim=1)
        beta.append(norm)
        over = len(alpha) >= most or bool((norm <= 1e-6 * alpha[0].abs()).all())
        if over or len(alpha) % steps == 0:
            found = _quadrature(torch.stack(alpha, 1), torch.stack(beta, 1), size)
            if over or settled is None or settled(found):
                return found
        space.add(w / norm.clamp(min=1e-300)[:, None])


class _Basis:
    """Vectors ``(probes, k, n)`` that are added one at a time, without a copy of all earlier ones.

    Memory of the CPU is only taken once it is written to.
    """

    def __init__(self, first: Tensor, most: int) -> None:
        room = most if first.device.type == "cpu" else 1
        self._held = first.new_empty(len(first), room, first.shape[1])
        self._count = 0
        self.add(first)

    @property
    def vectors(self) -> Tensor:
        return self._held[:, : self._count]

    def add(self, vector: Tensor) -> None:
        if self._count == self._held.shape[1]:
            self._held = torch.cat([self._held, torch.empty_like(vector)[:, None]], dim=1)
        self._held[:, self._count] = vector
        self._count += 1


def _quadrature(alpha: Tensor, beta: Tensor, size: int) -> Spectrum:
    """Nodes and weights of ``Σ f(λ)`` from the coefficients ``(probes, k)`` of Lanczos.

    For ``λ / (λ + shift)`` Gauss' rule is too large and that of Radau, with a node at zero, too small (Golub &
    Meurant 1994, §4): far below the largest eigenvalue, where few nodes are, the first takes what it cannot tell
    apart for determined, and the second for free.
    """
    probes, k = alpha.shape
    tridiagonal = torch.diag_embed(alpha)
    if k > 1:
        off = beta[:, : k - 1]
        tridiagonal = tridiagonal + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    gauss = _rule(tridiagonal, size)
    # A hair below zero, since zero may be an eigenvalue.
    end = -1e-14 * float(alpha.abs().max()) - 1e-300
    last = alpha.new_zeros(probes, k, 1)
    last[:, -1, 0] = beta[:, -1].square()
    eye = torch.eye(k, dtype=alpha.dtype, device=alpha.device)
    corner = end + solve(tridiagonal - end * eye, last)[:, -1, 0]
    longer = alpha.new_zeros(probes, k + 1, k + 1)
    longer[:, :k, :k] = tridiagonal
    longer[:, k, k] = corner
    longer[:, k, k - 1] = longer[:, k - 1, k] = beta[:, -1]
    radau = _rule(longer, size)
    both = torch.cat([radau.values, gauss.values]), torch.cat([radau.weights, gauss.weights]) / 2
    return Spectrum(*both, exact=False, bounds=(radau, gauss))


def _rule(tridiagonal: Tensor, size: int) -> Spectrum:
    values, vectors = eigh(tridiagonal)
    weights = vectors[:, 0].square() * (size / len(values))
    return Spectrum(values.clamp(min=0).flatten(), weights.flatten(), exact=False)
