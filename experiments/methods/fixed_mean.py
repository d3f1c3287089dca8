"""A sparse Gaussian process whose mean is the trained network, and Gaussian processes in place of its activations.

Both leave the network's outputs as they are and say how far the truth may lie from them, in one pass; they are the
nearest relatives of a posterior that leaves training predictions as they are.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

INDUCING = 50
STEPS, BATCH, LEARNING_RATE = 600, 100, 1e-2
# Of the variational mean that is optimised beside the covariance, as in the authors' code.
JITTER = 1e-3


@dataclass(frozen=True)
class Seen:
    """What a process is fitted to: where its kernel lives ``(N, D)``, outputs of the network ``(N, O)``, targets."""

    inputs: Tensor
    outputs: Tensor
    targets: Tensor
    kind: str = "classification"

    @property
    def classes(self) -> bool:
        return self.kind == "classification"


class FixedMean:
    """FMGP: a variational Gaussian process with the network as its mean, whatever the variance.

    Prior covariance ``k(x, x') B`` of the outputs at two inputs: ``k`` squared exponential with a width a column, ``B``
    positive definite. Posterior, with ``M`` inducing values ``u_m = f_{c_m}(z_m)`` and ``A = L (I + Lᵀ K L)⁻¹ Lᵀ``:
    ``Σ(x, x') = k(x, x') B - K_xz A K_zx'``. Everything but the mean is optimised by Adam for the black-box divergence
    at α = 1 (log of the predictive density; of classes by the probit approximation) minus Kullback-Leibler, plus the
    same of the process that has a mean of its own, which keeps the kernel in place (Ortega, Rodríguez-Santana,
    Hernández-Lobato, *Fixed-Mean Gaussian Processes for Post-hoc Bayesian Deep Learning*, arXiv 2412.04177).

    Columns are standardised; inducing inputs begin at the means of clusters, of each class alike. Float64.
    """

    def __init__(self, seen: Seen, seed: int = 0, *, steps: int = STEPS) -> None:
        x = seen.inputs.double()
        self.shift, self.scale = x.mean(0), x.std(0).clamp_min(1e-6)
        x = self.scaled(x)
        self.outputs = seen.outputs.shape[1]
        self.classes = seen.classes
        z, which = _inducing(x, seen.targets if seen.classes else None, self.outputs, seed)
        self.places, self.which = z.requires_grad_(), which
        self.width = _width(x, seed).log().repeat(x.shape[1]).requires_grad_()
        self.amplitude = torch.zeros((), dtype=torch.float64, requires_grad=True)
        self.between = torch.eye(self.outputs, dtype=torch.float64).requires_grad_()
        self.root = torch.eye(len(z), dtype=torch.float64).requires_grad_()
        self.own_mean = torch.zeros(len(z), dtype=torch.float64, requires_grad=True)
        residual = 1.0
        if not seen.classes:
            residual = float((seen.outputs - seen.targets).double().square().mean().clamp_min(1e-8))
        self.log_noise = torch.tensor(math.log(residual), dtype=torch.float64, requires_grad=True)
        self._fit(x, seen, seed, steps)

    def scaled(self, x: Tensor) -> Tensor:
        return (x.double() - self.shift) / self.scale

    @property
    def noise(self) -> float:
        """Variance of the observation noise of a regression."""
        return float(self.log_noise.exp())

    # -- the prior ---------------------------------------------------------------------------------

    def kernel(self, one: Tensor, two: Tensor) -> Tensor:
        """``k (N, M)``."""
        width = self.width.exp()
        squares = torch.cdist(one / width, two / width).square()
        return (self.amplitude - squares / 2).exp()

    @property
    def joined(self) -> Tensor:
        """``B (O, O)``."""
        lower = self.between.tril()
        return lower @ lower.T

    def _cross(self, x: Tensor) -> Tensor:
        """``K_xz (N, O, M)``."""
        of_classes = self.joined[:, self.which]
        return self.kernel(x, self.places)[:, None] * of_classes

    def _middle(self) -> Tensor:
        """``K (M, M)`` of the inducing values."""
        return self.kernel(self.places, self.places) * self.joined[self.which][:, self.which]

    # -- the posterior -----------------------------------------------------------------------------

    def _reduced(self, middle: Tensor) -> Tensor:
        """``L H^{-½} (M, M)``, whose square is ``A``; ``H = I + Lᵀ K L`` has no eigenvalue below one."""
        lower = self.root.tril()
        h = torch.eye(len(lower), dtype=torch.float64) + lower.T @ middle @ lower
        return torch.linalg.solve_triangular(torch.linalg.cholesky(h), lower.T, upper=False).T

    def _variance(self, cross: Tensor, reduced: Tensor) -> Tensor:
        """``(N, O, O)``."""
        along = cross @ reduced
        return self.amplitude.exp() * self.joined - along @ along.mT

    @torch.no_grad()
    def covariance(self, x: Tensor) -> Tensor:
        """Of the outputs at each of ``x (N, D)``: ``(N, O, O)``, without noise."""
        return self._variance(self._cross(self.scaled(x)), self._reduced(self._middle()))

    @torch.no_grad()
    def samples(self, x: Tensor, count: int, seed: int) -> Tensor:
        """Joint samples of all outputs at ``x``, about the network: ``(S, N, O)``.

        A sample of the prior, corrected by what ``LLᵀ`` says as if it were the precision of observations (Wilson et
        al. 2020): ``f - K_xz L H⁻¹ (Lᵀ f_z + ξ)``.
        """
        x = self.scaled(x)
        generator = torch.Generator().manual_seed(seed)
        every = torch.cat([x, self.places])
        size = len(every)
        k = self.kernel(every, every)
        k += 1e-8 * float(self.amplitude.exp()) * torch.eye(size, dtype=torch.float64)
        factor, lower = torch.linalg.cholesky(k), self.root.tril()
        normal = torch.randn(count, size, self.outputs, generator=generator, dtype=torch.float64)
        prior = factor @ normal @ self.between.tril().T
        at_places = prior[:, len(x) + torch.arange(len(self.places)), self.which]  # (S, M)
        noise = torch.randn(count, len(self.places), generator=generator, dtype=torch.float64)
        h = torch.eye(len(lower), dtype=torch.float64) + lower.T @ self._middle() @ lower
        found = torch.linalg.solve(h, (at_places @ lower + noise).T)
        moved = self._cross(x) @ (lower @ found)  # (N, O, S)
        return prior[:, : len(x)] - moved.movedim(2, 0)

    # -- the fit -----------------------------------------------------------------------------------

    def divergence(self, middle: Tensor) -> Tensor:
        """``KL(q(u) ‖ p(u))`` of the covariance: ``½ log det H - ½ tr K A``."""
        lower = self.root.tril()
        h = torch.eye(len(lower), dtype=torch.float64) + lower.T @ middle @ lower
        reduced = self._reduced(middle)
        return 0.5 * torch.logdet(h) - 0.5 * (middle @ reduced @ reduced.T).diagonal().sum()

    def _log_density(self, mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
        if self.classes:
            spread = variance.diagonal(dim1=1, dim2=2).clamp_min(0)
            scaled = mean / (1 + math.pi / 8 * spread).sqrt()
            return -F.cross_entropy(scaled, targets)
        total = variance.diagonal(dim1=1, dim2=2).clamp_min(0) + self.log_noise.exp()
        found = torch.distributions.Normal(mean, total.sqrt()).log_prob(targets.double())
        return found.sum(1).mean()

    def loss(self, x: Tensor, mean: Tensor, targets: Tensor, count: int) -> Tensor:
        """Of a batch that stands for ``count`` examples."""
        middle, cross = self._middle(), self._cross(x)
        variance = self._variance(cross, self._reduced(middle))
        jittered = middle + JITTER * torch.eye(len(middle), dtype=torch.float64)
        towards = torch.cholesky_solve(self.own_mean[:, None], torch.linalg.cholesky(jittered))
        both = self._log_density(mean, variance, targets)
        both = both + self._log_density((cross @ towards)[:, :, 0], variance, targets)
        own = 0.5 * self.own_mean @ towards[:, 0]
        return -count * both + 2 * self.divergence(middle) + own

    def _fit(self, x: Tensor, seen: Seen, seed: int, steps: int) -> None:
        mean, targets = seen.outputs.detach().double(), seen.targets
        free = [self.places, self.width, self.amplitude, self.between, self.root, self.own_mean]
        if not seen.classes:
            free.append(self.log_noise)
        optimiser = torch.optim.Adam(free, LEARNING_RATE)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            some = torch.randperm(len(x), generator=generator)[:BATCH]
            optimiser.zero_grad()
            with torch.enable_grad():
                self.loss(x[some], mean[some], targets[some], len(x)).backward()
            optimiser.step()
        for value in free:
            value.requires_grad_(False)


def _inducing(x: Tensor, classes: Tensor | None, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Means of clusters ``(M, D)``, and which output each is of ``(M,)``."""
    from scipy.cluster.vq import kmeans2

    parts, which = [], []
    for c in range(1 if classes is None else outputs):
        own = x if classes is None else x[classes == c]
        count = min(len(own), max(1, INDUCING // (1 if classes is None else outputs)))
        if not count:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty cluster keeps where it began
            found = kmeans2(own.numpy(), count, minit="points", seed=seed)[0]
        parts.append(torch.from_numpy(found))
        which += [c] * count
    return torch.cat(parts).contiguous(), torch.tensor(which)


def _width(x: Tensor, seed: int) -> Tensor:
    """Root of half the median squared distance of pairs."""
    generator = torch.Generator().manual_seed(seed)
    one, two = (torch.randint(0, len(x), (2000,), generator=generator) for _ in range(2))
    squares = (x[one] - x[two]).square().sum(1)
    return (squares[squares > 0].median() / 2).sqrt()


class Activations:
    """GAPA: a Gaussian process in place of the activations of one layer, its mean the activations themselves.

    One kernel for all units of the layer, squared exponential over the layer's whole vector, conditioned without noise
    on the training vectors that are nearest to an input: variance ``σ² (1 - k_nᵀ (K_n + jitter)⁻¹ k_n)`` of each unit
    (Bergna et al., *Activation-Space Uncertainty Quantification for Pretrained Networks*, arXiv 2602.14934). Width and
    ``σ²`` are set from the training vectors as in its forerunner without optimisation (arXiv 2502.20966): the first
    quartile of their distances, and the larger of one and their variance. Here the layer is the last before a linear
    head ``W``, so that the covariance of the outputs, ``W diag(v) Wᵀ``, has no approximation of its own.
    """

    NEAREST, KEPT, QUANTILE, JITTER = 50, 5000, 0.25, 1e-6

    def __init__(
        self, vectors: Tensor, head: Tensor, seed: int = 0, nearest: int = NEAREST
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(vectors), generator=generator)[: self.KEPT]
        self.vectors = vectors.detach().double()[order]
        self.nearest = min(nearest, len(self.vectors))
        pairs = torch.pdist(self.vectors[:1000])
        width = float(pairs[pairs > 0].quantile(self.QUANTILE)) if bool((pairs > 0).any()) else 1.0
        self.width, self.variance = width, self.vectors.var(0).clamp_min(1.0)
        self.head = head.detach().double()

    def share(self, x: Tensor) -> Tensor:
        """What is left of the prior's variance at ``x (N, D)``: ``(N,)`` in [0, 1]."""
        return torch.cat([self._share(part) for part in x.double().split(200)])

    def _share(self, x: Tensor) -> Tensor:
        squares, index = torch.cdist(x, self.vectors).square().topk(self.nearest, largest=False)
        near = self.vectors[index]  # (N, K, D)
        among = torch.cdist(near, near).square()
        k = (-squares / (2 * self.width**2)).exp()
        inner = (-among / (2 * self.width**2)).exp()
        inner += self.JITTER * torch.eye(self.nearest, dtype=torch.float64)
        solved = torch.cholesky_solve(k[..., None], torch.linalg.cholesky(inner))[..., 0]
        return (1 - (k * solved).sum(1)).clamp(0, 1)

    def covariance(self, x: Tensor) -> Tensor:
        """Of the outputs at each of ``x``, vectors of the layer: ``(N, O, O)``."""
        along = self.head * self.variance
        return self.share(x)[:, None, None] * (along @ self.head.T)


def total(covariance: Tensor) -> Tensor:
    """Variance of what is not common to all outputs ``(N,)``: no softmax sees the rest. Of one output all of it."""
    variance = covariance.diagonal(dim1=1, dim2=2).sum(1)
    count = covariance.shape[1]
    return variance if count == 1 else variance - covariance.sum((1, 2)) / count
