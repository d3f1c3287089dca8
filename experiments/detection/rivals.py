"""Scores that no package has: nearest neighbours of the inputs, DDU, MDS++ and RMDS++, and two over Jacobian rows."""

from __future__ import annotations

import math
import warnings
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

from experiments.detection.base import Given, Score, room_on, score


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


#: Layers whose rows follow from what they receive and from the derivatives by what they give, each used once.
PLAIN = (nn.Linear, nn.Conv2d, nn.BatchNorm2d)


def by_layers(network: nn.Module) -> bool:
    """Whether every weight is one of a layer in ``PLAIN`` without groups and with padding by zeros."""
    owners = [m for m in network.modules() if list(m.parameters(recurse=False))]
    convolutions = [m for m in owners if isinstance(m, nn.Conv2d)]
    return all(isinstance(m, PLAIN) for m in owners) and all(
        m.groups == 1 and m.padding_mode == "zeros" and not isinstance(m.padding, str)
        for m in convolutions
    )


def rows_by_layers(network: nn.Module, x: Tensor) -> Tensor:
    """The same as by forward and backward passes of each example: one backward pass of the batch for each output.

    Examples do not meet in evaluation mode, so that the derivatives of a sum over examples are those of each.
    """
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    layers = [m for m in network.modules() if isinstance(m, PLAIN)]

    def noted(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        if layer in seen:
            raise ValueError("a layer is used more than once")
        seen[layer] = inputs[0].detach(), out

    handles = [m.register_forward_hook(noted) for m in layers]
    try:
        with torch.enable_grad():
            outputs = network(x)
    finally:
        for handle in handles:
            handle.remove()
    given = [seen[m][1] for m in layers]
    per_output = []
    for k in range(outputs.shape[1]):
        by = torch.autograd.grad(outputs[:, k].sum(), given, retain_graph=True)
        parts: dict[str, Tensor] = {}
        for name, module in network.named_modules():
            if module in seen:
                found = _layer_rows(module, seen[module][0], by[layers.index(module)])
                parts |= {f"{name}.{key}" if name else key: value for key, value in found.items()}
        per_output.append(
            torch.cat([parts[n].flatten(1) for n, _ in network.named_parameters()], 1)
        )
    return torch.stack(per_output, 1)


def _layer_rows(layer: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """By name of the layer's parameters, ``(B, …)``: from its inputs and the derivatives by its outputs."""
    if isinstance(layer, nn.Linear):
        found = {"weight": g[:, :, None] * a[:, None, :], "bias": g}
    elif isinstance(layer, nn.Conv2d):
        size, dilation = layer.kernel_size, layer.dilation
        patches = F.unfold(a, size, dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        weight = g.flatten(2) @ patches.mT
        found = {"weight": weight, "bias": g.flatten(2).sum(2)}
    else:
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        scale = (layer.running_var + layer.eps).rsqrt()
        normed = (a - layer.running_mean[:, None, None]) * scale[:, None, None]
        found = {"weight": (g * normed).sum((2, 3)), "bias": g.sum((2, 3))}
    return {name: found[name] for name, _ in layer.named_parameters(recurse=False)}


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
        room = room_on(given.train.inputs)
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
        if by_layers(self.network):
            return rows_by_layers(self.network, x)

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
        return list(x.split(max(1, room_on(x) // (8 * count))))


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
