"""Scores that no package has: nearest neighbours of the inputs, DDU, MDS++ and RMDS++, and two over Jacobian rows."""

from __future__ import annotations

import math
import warnings
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from experiments.detection.base import ROWS_BYTES, Given, Score, score


@score
class InputNeighbour(Score):
    """Distance to the nearest training input: no network at all."""

    name = family = "nearest input"
    source = "Cover, Hart, 1967"
    any_output = True

    def fit(self, given: Given) -> None:
        self.train = given.train.inputs.flatten(1)

    def __call__(self, x: Tensor) -> Tensor:
        parts = x.flatten(1).split(100)
        return torch.cat([torch.cdist(part, self.train).amin(1) for part in parts])


class _Gaussian(Score):
    """Gaussians of the features, float64; subclasses say which."""

    normalised: ClassVar[bool] = False

    def fit(self, given: Given) -> None:
        self.given = given
        z, y = self.prepared(given.train_features), given.train.targets
        classes = [z[y == c] for c in y.unique().tolist()]
        self.means = torch.stack([part.mean(0) for part in classes])
        centred = torch.cat([part - part.mean(0) for part in classes])
        self.within = _factor(centred)
        self.mean = z.mean(0)
        self.around = _factor(z - self.mean)
        self.each = [_factor(part - part.mean(0)) for part in classes]
        self.log_share = [math.log(len(part) / len(z)) for part in classes]

    def prepared(self, features: Tensor) -> Tensor:
        z = features.double()
        return z / z.norm(dim=1, keepdim=True).clamp_min(1e-12) if self.normalised else z

    def nearest(self, z: Tensor) -> Tensor:
        """``(B,)`` least squared Mahalanobis distance to a class mean."""
        return torch.stack([_squared(z - mean, self.within) for mean in self.means]).amin(0)


def _factor(centred: Tensor) -> Tensor:
    """Lower Cholesky factor of the covariance; its diagonal is raised by 1e-6 of its mean, so that it exists."""
    covariance = centred.T @ centred / max(1, len(centred) - 1)
    ridge = 1e-6 * float(covariance.diagonal().mean()) + 1e-12
    return torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance)).double())


def _squared(z: Tensor, factor: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, z.T, upper=False).square().sum(0)


@score
class OneGaussian(Score):
    """Squared Mahalanobis distance of the features to their mean, classes or not."""

    name = family = "one Gaussian of features"
    source = "Mahalanobis, 1936"
    any_output = True

    def fit(self, given: Given) -> None:
        self.given = given
        z = given.train_features.double()
        self.mean = z.mean(0)
        self.around = _factor(z - self.mean)

    def __call__(self, x: Tensor) -> Tensor:
        return _squared(self.given.features(x).double() - self.mean, self.around)


@score
class MahalanobisNormalised(_Gaussian):
    name = family = "MDS++"
    source = "Mueller, Hein, ICML 2025"
    normalised = True

    def __call__(self, x: Tensor) -> Tensor:
        return self.nearest(self.prepared(self.given.features(x)))


@score
class RelativeNormalised(_Gaussian):
    name = family = "RMDS++"
    source = "Mueller, Hein, ICML 2025"
    normalised = True

    def __call__(self, x: Tensor) -> Tensor:
        z = self.prepared(self.given.features(x))
        return self.nearest(z) - _squared(z - self.mean, self.around)


@score
class DDU(_Gaussian):
    """Without the spectral normalisation and the residual network of the paper: around a network as it is."""

    name = family = "DDU"
    source = "Mukhoti, Kirsch, van Amersfoort, Torr, Gal, CVPR 2023"

    def __call__(self, x: Tensor) -> Tensor:
        z = self.given.features(x).double()
        log = [
            share - 0.5 * _squared(z - mean, factor) - factor.diagonal().log().sum()
            for mean, factor, share in zip(self.means, self.each, self.log_share, strict=True)
        ]
        return -torch.stack(log).logsumexp(0)


@score
class GaussianProcess(Score):
    """Variance of a Gaussian process of the inputs, for regressions: scikit-learn's, its kernel fitted."""

    name = family = "Gaussian process"
    source = "Rasmussen, Williams, 2006"
    regression_only = True
    any_output = True

    def fit(self, given: Given) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

        x, y = given.train.inputs[:500].double().numpy(), given.train.targets[:500].double().numpy()
        widths = [float(x.shape[1]) ** 0.5] * x.shape[1]
        bounds = (1e-2, 1e3)
        kernel = ConstantKernel() * RBF(widths, bounds) + WhiteKernel(0.1)
        self.process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=given.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a width at its bound is no fault here
            self.process.fit(x, y[:, 0])

    def __call__(self, x: Tensor) -> Tensor:
        _, deviation = self.process.predict(x.double().numpy(), return_std=True)
        return torch.from_numpy(deviation)


class _Rows(Score):
    """Jacobian rows of as many training examples as fit, weighted by the root of the likelihood's Hessian.

    The leading right singular vectors come from the rows themselves, so that no error of a sketch stands against the
    method.
    """

    any_output = False
    directions: ClassVar[int] = 200

    def fit(self, given: Given) -> None:
        self.network = given.network
        self.weights = {n: p.detach() for n, p in given.network.named_parameters()}
        self.buffers = dict(given.network.named_buffers())
        count = sum(w.numel() for w in self.weights.values())
        classes = given.logits(given.train.inputs[:1]).shape[1]
        room = ROWS_BYTES[given.train.inputs.device.type]
        examples = max(1, min(given.preserved, room // (4 * count * classes)))
        some = given.train.inputs[:examples].split(max(1, examples // 4))
        rows = torch.cat([self.weighted(part).flatten(0, 1) for part in some])
        gram = (rows @ rows.T).double()
        values, vectors = torch.linalg.eigh(gram)
        keep = (values > 1e-6 * values[-1]).nonzero().flatten()[-self.directions :]
        self.values = values[keep]
        basis = rows.T @ (vectors[:, keep] / self.values.sqrt()).float()
        self.basis = torch.linalg.qr(basis).Q
        self.examples = examples

    def rows(self, x: Tensor) -> Tensor:
        """``∂f/∂θ (B, C, P)``."""

        def outputs(weights: dict[str, Tensor], one: Tensor) -> Tensor:
            found: Tensor = functional_call(self.network, {**weights, **self.buffers}, (one[None],))
            return found[0]

        made = vmap(jacrev(outputs), (None, 0))(self.weights, x)
        return torch.cat([part.flatten(2) for part in made.values()], 2)

    def weighted(self, x: Tensor) -> Tensor:
        """The same times the root of ``diag(p) - ppᵀ``: ``(diag(√p) - p √pᵀ)ᵀ J``."""
        with torch.no_grad():
            p = self.network(x).softmax(1)
        rows = self.rows(x)
        root = p.sqrt()
        return root[:, :, None] * (rows - (p[:, :, None] * rows).sum(1, keepdim=True))

    def batches(self, x: Tensor) -> list[Tensor]:
        count = sum(w.numel() for w in self.weights.values()) * len(self.network(x[:1])[0])
        return list(x.split(max(1, ROWS_BYTES[x.device.type] // (8 * count))))


@score
class SketchedLanczos(_Rows):
    """``‖J(x)‖² - ‖J(x) U‖²``: what of the input's rows the leading directions of the training rows leave."""

    name = family = "sketched Lanczos"
    source = "Miani, Beretta, Hauberg, NeurIPS 2024"

    def __call__(self, x: Tensor) -> Tensor:
        parts = []
        for part in self.batches(x):
            rows = self.rows(part)
            within = (rows.flatten(0, 1) @ self.basis).square().sum(1).unflatten(0, rows.shape[:2])
            parts.append((rows.square().sum(2) - within).sum(1))
        return torch.cat(parts)


@score
class SCOD(_Rows):
    """``‖L(x)‖² - Σ d/(d+1) ‖L(x) u‖²`` of the input's Fisher rows, at a prior of the evidence's scale."""

    name = family = "SCOD"
    source = "Sharma, Azizan, Pavone, UAI 2021"

    def __call__(self, x: Tensor) -> Tensor:
        shrink = (self.values / (self.values + 1)).sqrt().float()
        parts = []
        for part in self.batches(x):
            rows = self.weighted(part)
            within = ((rows.flatten(0, 1) @ self.basis) * shrink).square().sum(1)
            parts.append((rows.square().sum(2) - within.unflatten(0, rows.shape[:2])).sum(1))
        return torch.cat(parts)
