"""The Hessian of a loss by the outputs, from its products with vectors: diagonal, or the leading directions.

A product costs one double-backward pass over the whole batch; the (D, D) matrix of an example is never formed
here. `B` examples, outputs ``(B, *out)``, ``D`` output elements an example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nullbayes.common.decompositions import eigh

# Vectors beyond those asked for in a block of the Krylov space, and vectors that estimate the trace of the rest.
OVERSAMPLING, PROBES = 4, 16


def detached(value: Any) -> Any:
    """Every tensor of nested targets without its graph, in memory of its own."""
    return tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, value)


class OutputHessian:
    """``v -> H_n v_n`` for each example of a batch, where ``H_n`` is the Hessian of ``loss`` by the outputs.

    Args:
        loss: ``(outputs, targets) -> (B,)``; entry n depends on example n alone.
    """

    def __init__(
        self, loss: Callable[[Tensor, Any], Tensor], outputs: Tensor, targets: Any
    ) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self._point = outputs.detach().clone().requires_grad_()
            losses = loss(self._point, detached(targets)).sum()
            (self.gradient,) = torch.autograd.grad(losses, self._point, create_graph=True)
        self.shape = (len(outputs), max(1, outputs[0].numel()))

    def product(self, vectors: Tensor) -> Tensor:
        """``(B, D)`` in the outputs' dtype -> ``(B, D)``."""
        if not self.gradient.requires_grad:  # a loss linear in the outputs
            return torch.zeros_like(vectors)
        (out,) = torch.autograd.grad(
            self.gradient,
            self._point,
            vectors.reshape(self._point.shape),
            retain_graph=True,
            materialize_grads=True,
        )
        return out.detach().reshape(self.shape)

    def diagonal(self) -> Tensor | None:
        """``(B, D)`` where every ``H_n`` is diagonal, as for a sum over elements; otherwise None.

        A diagonal matrix is known from its product with ones; that it is one shows in a random product.
        """
        point = self._point.detach()
        found = self.product(torch.ones_like(point).reshape(self.shape))
        probe = _normal(self.shape, point, _generator())
        error = (self.product(probe) - found * probe).abs()
        allowed = 1e3 * torch.finfo(point.dtype).eps * found.abs().amax(1, keepdim=True)
        return found if bool((error <= allowed * probe.abs().clamp_min(1)).all()) else None

    def leading(self, directions: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """The eigenvectors ``(B, k, D)`` of the largest eigenvalues ``(B, k)``, and the traces ``(B,)``; float64.

        Randomised block Krylov iteration, all examples in step, with full orthogonalisation and a Rayleigh-Ritz
        step (Musco & Musco, *Randomized block Krylov methods*, 2015); blocks of more than ``k`` vectors find
        repeated eigenvalues. Ends when each residual ``‖Hv - λv‖`` is a ten-thousandth of the largest eigenvalue
        (float64: 1e-10), or the sum of the eigenvalues no longer grows: in a spectrum without gaps that comes long
        before the single vectors are found, and loses nothing. What is kept is below ``H`` in any case.
        The trace is exact on the space that was searched and estimated off it (Meyer, Musco, Musco & Woodruff,
        *Hutch++*, 2021).

        Returns None where the search space would be half of the whole: decompose ``H`` itself.
        """
        batch, width = self.shape
        like = self._point.detach()
        tolerance = 1e-10 if like.dtype == torch.float64 else 1e-4
        block, before = directions + OVERSAMPLING, None
        generator = _generator()
        basis = torch.zeros(batch, width, 0, dtype=torch.float64, device=like.device)
        images = basis
        fresh = _normal((batch, width, block), like, generator).double()
        while basis.shape[2] + block <= width // 2:
            fresh = _orthonormal(fresh, basis)
            basis = torch.cat([basis, fresh], dim=2)
            images = torch.cat([images, self._products(fresh, like)], dim=2)
            small = basis.mT @ images
            ritz, inner = eigh((small + small.mT) / 2)
            values, inner = ritz.flip(1)[:, :directions], inner.flip(2)[:, :, :directions]
            vectors = basis @ inner
            residual = torch.linalg.vector_norm(images @ inner - vectors * values[:, None], dim=1)
            largest = ritz.abs().amax(1, keepdim=True)
            total = values.sum(1)
            still = before is not None and bool(
                (total - before <= tolerance * total.abs() / 10).all()
            )
            before = total
            if still or bool((residual <= tolerance * largest).all()):
                trace = ritz.sum(1) + self._rest(basis, like, generator)
                return vectors.mT, values, trace
            fresh = images[:, :, -block:]
        return None

    def _products(self, vectors: Tensor, like: Tensor) -> Tensor:
        """``(B, D, k)`` -> ``(B, D, k)``, float64."""
        columns = vectors.to(like.dtype).unbind(2)
        return torch.stack([self.product(v).double() for v in columns], dim=2)

    def _rest(self, basis: Tensor, like: Tensor, generator: torch.Generator) -> Tensor:
        """Estimate of the trace off the space spanned by ``basis (B, D, m)``: ``(B,)``."""
        probes = _normal((*basis.shape[:2], PROBES), like, generator).double().sign()
        probes = probes - basis @ (basis.mT @ probes)
        return (probes * self._products(probes, like)).sum((1, 2)) / PROBES


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def _orthonormal(vectors: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal columns ``(B, D, k)`` for ``vectors``, off ``basis (B, D, m)``.

    Where they span less than ``k`` directions (a Hessian of low rank), QR fills up with others; three rounds
    bring those off the basis, too: the first finds them, the second may leave rounding, the third removes it.
    """
    for _ in range(3):
        vectors = torch.linalg.qr(vectors - basis @ (basis.mT @ vectors))[0]
    return vectors
