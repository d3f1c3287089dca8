"""A fitted posterior as a BoTorch model: acquisition functions and optimisers work on it as on a Gaussian process.

```python
from nullbayes.botorch import PosteriorModel

model = PosteriorModel(nb.LaplacePosterior(network, "regression").fit((x, y)))
candidate, value = optimize_acqf(qLogExpectedImprovement(model, best), bounds, q=2, num_restarts=4, raw_samples=64)
```
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nullbayes.errors import InputError, MissingExtraError
from nullbayes.likelihood import Regression
from nullbayes.posterior.base import Posterior

try:
    from botorch.models.model import FantasizeMixin, Model
    from botorch.posteriors.gpytorch import GPyTorchPosterior
    from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
    from gpytorch.settings import min_variance
    from linear_operator import to_linear_operator
    from linear_operator.utils.cholesky import psd_safe_cholesky
except ImportError as error:
    raise MissingExtraError(
        "`nullbayes.botorch` needs BoTorch: `pip install nullbayes[botorch]`."
    ) from error

# Rows (points times outputs) of one joint covariance, of which only the blocks on the diagonal are wanted.
ROWS = 256
# Of a variance, in units of the rounding of the network's numbers: what a difference of covariances is wrong by.
JITTER = 10.0


@dataclass(frozen=True)
class Given:
    """Observations that a model is conditioned on.

    Attributes:
        X: ``(*x, n, d)``; ``Y``: ``(*y, n, m)``, with batch axes that can be broadcast together.
        noise: observation variances, broadcastable to ``Y``.
    """

    X: Tensor
    Y: Tensor
    noise: Tensor

    @property
    def batch_shape(self) -> torch.Size:
        return torch.broadcast_shapes(self.X.shape[:-2], self.Y.shape[:-2])


class PosteriorModel(Model, FantasizeMixin):  # type: ignore[misc]
    """The linearised posterior of a network that takes ``(n, d)`` inputs, as a model of BoTorch.

    Values are the network's raw outputs, one by one: those of a regression as it was trained (standardise targets, or
    not, as the network has them). Points of one t-batch are jointly Gaussian, with gradients to ``X``.

    Args:
        posterior: fitted; a `nullbayes.LaplacePosterior`, or a `nullbayes.NullSpacePosterior`, which has no doubt where
            there are training data.
        exact: covariances from the factorisation instead of the samples; None: where there is one.

    Raises:
        InputError: an object of another kind. NotFittedError: a posterior before ``fit``.
    """

    def __init__(self, posterior: Posterior, *, exact: bool | None = None) -> None:
        if not isinstance(posterior, Posterior):
            raise InputError(
                f"`posterior` is {type(posterior).__name__}; expected a fitted `nb.LaplacePosterior` or "
                "`nb.NullSpacePosterior`."
            )
        posterior._fitted()
        super().__init__()
        self.fitted, self.exact = posterior, exact
        self.given: Given | None = None
        self.outputs: list[int] | None = None
        self._total: int | None = None

    # -- what BoTorch asks of a model ----------------------------------------------------------------

    @property
    def num_outputs(self) -> int:
        return len(self.outputs) if self.outputs is not None else self._outputs_of_network()

    @property
    def batch_shape(self) -> torch.Size:
        return torch.Size() if self.given is None else self.given.batch_shape

    @property
    def likelihood(self) -> Any:
        """That of the posterior."""
        return self.fitted.likelihood

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> Any:
        """The joint Gaussian of the outputs at ``X (*b, q, d)``: a `GPyTorchPosterior` with mean ``(*b, q, m)``.

        Args:
            output_indices: which outputs; None: all.
            observation_noise: True adds the likelihood's, a tensor broadcastable to ``(*b, q, m)`` its variances.
            posterior_transform: of BoTorch.

        Raises:
            InputError: inputs that the network does not take; noise of a likelihood that has none.
        """
        X = self.transform_inputs(_points(X, "X"))
        mean, covariance = self._conditioned(X)
        outputs = self._indices(output_indices)
        mean, covariance = _chosen(mean, covariance, outputs)
        if isinstance(observation_noise, Tensor) or observation_noise:
            noise = self._noise(observation_noise, mean, outputs)
            covariance = covariance + torch.diag_embed(noise.flatten(-2))
        made = _gaussian(mean, covariance, self._jitter(covariance))
        return made if posterior_transform is None else posterior_transform(made)

    def subset_output(self, idcs: list[int]) -> PosteriorModel:
        """The same model of fewer outputs."""
        other = self._copy()
        other.outputs = self._indices(list(idcs))
        return other

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> PosteriorModel:
        """The linearised model after the observations ``Y (*b', n, m)`` at ``X (*b, n, d)``; gradients flow to both.

        Its covariance is that of ``posterior.update((X, Y))`` of a Laplace posterior (of a null-space posterior with
        noise zero); beside it the mean moves, as that of a linear model does. No weight of the network changes.

        Args:
            noise: observation variances, broadcastable to ``Y``; None: the likelihood's. Zero: interpolate.
            kwargs: of BoTorch's other models; not used.

        Raises:
            InputError: shapes that do not fit, or noise of a likelihood that has none.
        """
        if self.outputs is not None:
            raise InputError(
                "this model has a subset of the network's outputs; condition the whole one, then take `subset_output`."
            )
        X = self.transform_inputs(_points(X, "X"))
        m = self.num_outputs
        if not isinstance(Y, Tensor) or Y.ndim < 2 or tuple(Y.shape[-2:]) != (X.shape[-2], m):
            found = tuple(Y.shape) if isinstance(Y, Tensor) else type(Y).__name__
            raise InputError(
                f"`Y` is {found}; expected (*batch, {X.shape[-2]}, {m}): one row of {m} outputs for each point of `X`."
            )
        spread = self._noise(True if noise is None else noise, Y, None)
        new = Given(X, Y, spread)
        _broadcast(self.batch_shape, new.batch_shape, "`X` and `Y`")
        other = self._copy()
        other.given = new if self.given is None else _joined(self.given, new)
        return other

    def _set_transformed_inputs(self) -> None:
        """BoTorch would transform training inputs here; the posterior holds none."""

    # -- how -----------------------------------------------------------------------------------------

    def _copy(self) -> PosteriorModel:
        other = PosteriorModel(self.fitted, exact=self.exact)
        other.given, other.outputs, other._total = self.given, self.outputs, self._total
        if hasattr(self, "input_transform"):
            other.input_transform = self.input_transform
        return other

    def _outputs_of_network(self) -> int:
        """Numbers in an output: known from the fit, or (from a file) once inputs have been seen."""
        if self._total is None:
            shape = self.fitted.functional._shape
            if shape is None:
                raise InputError(
                    "a posterior from a file does not know its outputs before it has seen inputs: call "
                    "`model.posterior(X)` once."
                )
            self._total = math.prod(shape.shape)
        return self._total

    def _indices(self, wanted: list[int] | None) -> list[int] | None:
        """``wanted`` of this model's outputs, as numbers of the network's."""
        if wanted is None:
            return self.outputs
        mine = self.outputs if self.outputs is not None else range(self._outputs_of_network())
        if not wanted or any(not -len(mine) <= i < len(mine) for i in wanted):
            raise InputError(f"outputs {wanted} were asked for; the model has {len(mine)}.")
        return [mine[i] for i in wanted]

    def _noise(self, asked: bool | Tensor, like: Tensor, outputs: list[int] | None) -> Tensor:
        """Observation variances of some of the outputs in the shape of ``like (*b, q, m)``."""
        if isinstance(asked, Tensor):
            try:
                return asked.to(like).expand(like.shape)
            except RuntimeError as error:
                raise InputError(
                    f"the observation noise has shape {tuple(asked.shape)}; expected variances that can be expanded to "
                    f"{tuple(like.shape)}."
                ) from error
        likelihood = self.fitted.likelihood
        if not isinstance(likelihood, Regression):
            raise InputError(
                f"observation noise of {likelihood!r}: only a regression has a variance. Pass it as a tensor."
            )
        spread = likelihood.noise_variance
        assert spread is not None  # it is fitted
        spread = spread.to(like).flatten()
        if outputs is not None and len(spread) > 1:
            spread = spread[outputs]
        if len(spread) not in (1, like.shape[-1]):
            raise InputError(
                f"the likelihood has {len(spread)} observation variances, the model {like.shape[-1]} outputs: pass "
                "the noise as a tensor with one for each output."
            )
        return spread.expand(like.shape)

    def _jitter(self, covariance: Tensor) -> Tensor:
        """``(*b, 1)``: what the largest variance of each block may be wrong by."""
        rounding = torch.finfo(self.fitted.functional.dtype).eps
        largest = covariance.detach().diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
        return JITTER * rounding * largest

    def _conditioned(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(*b, q, D)`` and covariance ``(*b, q·D, q·D)`` after the observations that are given."""
        given, q = self.given, X.shape[-2]
        if given is None:
            return self._blocks(X)
        shape = _broadcast(given.batch_shape, X.shape[:-2], "`X`")
        known = given.X.shape[-2]
        both = torch.cat(
            [given.X.to(X).expand(*shape, *given.X.shape[-2:]), X.expand(*shape, *X.shape[-2:])], -2
        )
        mean, covariance = self._blocks(both)
        m = mean.shape[-1]
        cut = known * m
        noise = given.noise.to(X).expand(*shape, known, m).flatten(-2)
        told = covariance[..., :cut, :cut] + torch.diag_embed(noise + self._jitter(covariance))
        root = psd_safe_cholesky(told)
        across = covariance[..., cut:, :cut]
        seen = torch.linalg.solve_triangular(root, across.mT, upper=False)
        off = (given.Y.to(X).expand(*shape, known, m) - mean[..., :known, :]).flatten(-2)
        white = torch.linalg.solve_triangular(root, off[..., None], upper=False)
        moved = (seen.mT @ white)[..., 0].unflatten(-1, (q, m))
        left = covariance[..., cut:, cut:] - seen.mT @ seen
        return mean[..., known:, :] + moved, left

    def _blocks(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(*b, q, D)`` and covariance ``(*b, q·D, q·D)`` of the posterior itself, in the dtype of ``X``."""
        batch, (q, d) = X.shape[:-2], X.shape[-2:]
        if not X.numel():
            raise InputError(f"`X` holds no points: shape {tuple(X.shape)}.")
        flat = X.reshape(-1, q, d)
        m = self._total or 1
        means, covariances = [], []
        for part in flat.split(max(1, ROWS // (q * m))):
            mean, covariance = self._joint(part.reshape(-1, d))
            m = self._total = mean.shape[-1]
            covariance = covariance.reshape(len(part), q * m, len(part), q * m)
            place = torch.arange(len(part), device=covariance.device)
            covariances.append(covariance[place, :, place])
            means.append(mean.reshape(len(part), q, m))
        return (
            torch.cat(means).reshape(*batch, q, m).to(X),
            torch.cat(covariances).reshape(*batch, q * m, q * m).to(X),
        )

    def _joint(self, points: Tensor) -> tuple[Tensor, Tensor]:
        differentiable = points.requires_grad and torch.is_grad_enabled()
        x = points.to(self.fitted.functional.dtype)
        if not differentiable:
            x = x.detach()
        found = self.fitted.joint(x, exact=self.exact, differentiable=differentiable)
        return found.mean.reshape(len(points), -1), found.covariance


def _points(X: Tensor, name: str) -> Tensor:
    if not isinstance(X, Tensor) or X.ndim < 2 or not X.is_floating_point():
        found = f"{tuple(X.shape)} {X.dtype}" if isinstance(X, Tensor) else type(X).__name__
        raise InputError(f"`{name}` is {found}; expected a tensor of numbers, (*batch, q, d).")
    return X


def _broadcast(first: torch.Size, second: torch.Size, what: str) -> torch.Size:
    try:
        return torch.broadcast_shapes(first, second)
    except RuntimeError as error:
        raise InputError(
            f"the batch axes of {what}, {tuple(second)}, do not fit those of the observations, {tuple(first)}."
        ) from error


def _joined(first: Given, second: Given) -> Given:
    """Observations one after the other, in the batch axes of both."""
    shape = _broadcast(first.batch_shape, second.batch_shape, "`X` and `Y`")
    parts = [
        torch.cat([a.to(b).expand(*shape, *a.shape[-2:]), b.expand(*shape, *b.shape[-2:])], -2)
        for a, b in (
            (first.X, second.X),
            (first.Y, second.Y),
            (first.noise.expand(first.Y.shape), second.noise.expand(second.Y.shape)),
        )
    ]
    return Given(*parts)


def _chosen(mean: Tensor, covariance: Tensor, outputs: list[int] | None) -> tuple[Tensor, Tensor]:
    """Mean ``(*b, q, m)`` and covariance ``(*b, q·m, q·m)`` of some of the ``D`` outputs."""
    if outputs is None:
        return mean, covariance
    q, m = mean.shape[-2:]
    index = torch.tensor(outputs, device=mean.device)
    place = (torch.arange(q, device=mean.device)[:, None] * m + index).flatten()
    return mean[..., index], covariance[..., place[:, None], place]


def _gaussian(mean: Tensor, covariance: Tensor, jitter: Tensor) -> Any:
    """The Gaussian for BoTorch, which wants variances above its least one, and a factor of the covariance."""
    least = min_variance.value(covariance.dtype)
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    lazy = to_linear_operator(covariance + torch.diag_embed((least - diagonal).clamp(min=jitter)))
    if mean.shape[-1] == 1:
        return GPyTorchPosterior(MultivariateNormal(mean[..., 0], lazy))
    return GPyTorchPosterior(MultitaskMultivariateNormal(mean, lazy, interleaved=True))
