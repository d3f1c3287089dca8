"""What every likelihood offers, and what a new one has to write: ``loss`` and ``moments``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from nullbayes.common.decompositions import eigh
from nullbayes.errors import InputError, NullBayesError, StorageError
from nullbayes.likelihood.helpers import (
    check_batch,
    log_mean_exp,
    require_samples,
    to_float64,
    without_rounding,
)
from nullbayes.likelihood.output_hessian import detached
from nullbayes.likelihood.score import Score, score_named
from nullbayes.model.structure import Layouts


@dataclass(frozen=True)
class Moments:
    """What a set of output samples says about a batch of ``B`` examples.

    The shapes of the last three depend on the likelihood: one value per example (or position) for
    classification, one per logit or output for binary and regression.
    """

    mean: Tensor  # (B, *out) predictive mean: probabilities, or the regression mean
    variance: Tensor  # (B, *out) epistemic variance of the raw outputs
    total: Tensor  # entropy in nats, or variance, of the prediction
    aleatoric: Tensor  # the part that more training data would not remove
    epistemic: Tensor  # total - aleatoric: mutual information in nats, or variance


class Likelihood(ABC):
    """How outputs explain targets: the loss, its output-Hessian factors, and the predictive moments.

    ``B`` examples, outputs ``(B, *out)``, ``D`` output elements per example. A subclass has to write
    `loss` and `moments`; all else has a default by automatic differentiation:

    ```python
    @register_likelihood
    class Poisson(Likelihood):
        name = "poisson"                              # outputs are log rates

        def loss(self, outputs, targets):
            nll = outputs.exp() - targets * outputs + torch.lgamma(targets + 1)
            return nll.flatten(1).sum(1)

        def moments(self, samples, point, *, linearised):
            rate = samples.exp()
            variance = epistemic_variance(samples, point, linearised=linearised)
            mean = rate.mean(0)
            epistemic = rate.var(0)
            return Moments(mean, variance, mean + epistemic, mean, epistemic)
    ```
    """

    name: str = "custom"
    #: how a model's several outputs are laid out in one tensor; None: the model returns a lone tensor
    layouts: Layouts | None = None
    #: picks the outputs that are asked about from what the network returned; None: all of them
    reading: Any = None
    score_name: str = "rmse"  # "accuracy", "rmse" or "loss": what `final_score` returns
    #: whether it says how targets spread around a prediction, so that a prediction has an entropy
    describes_targets: bool = True
    #: whether the inputs stand in for targets that a batch does not have
    inputs_are_targets: bool = False

    @property
    def score_kind(self) -> Score:
        """What `score_name` stands for."""
        return score_named(self.score_name)

    @property
    def mean_moves(self) -> bool:
        """Whether a mean prediction depends on how far samples spread (through a nonlinear link)."""
        return self.score_kind.higher_is_better

    # -- the two to write ------------------------------------------------------------------------

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log likelihood per example, ``(B,)``, summed over positions and outputs.

        Differentiable (twice) in ``outputs`` ``(B, *out)``; entry n may depend on example n alone.
        """

    @abstractmethod
    def moments(self, samples: Tensor, point: Tensor, *, linearised: bool) -> Moments:
        """Predictive moments from ``samples`` ``(S, B, *out)`` around ``point`` ``(B, *out)``.

        Linearised samples have the exact mean ``point``; those of the sampled network do not, and their
        variance is taken about their own mean (which needs ``S >= 2``).
        """

    # -- targets ---------------------------------------------------------------------------------

    def validate(self, outputs: Tensor, targets: Tensor, where: str) -> None:
        """Check one batch before anything is computed from it.

        ``where`` opens each message, e.g. ``"train_loader, batch 3"``. Raises `InputError` for a wrong
        type, shape, dtype or value, and `NonFiniteError` for NaN or infinity.
        """
        check_batch(outputs, targets, where)

    def prepare_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets in the device, dtype and shape that the methods here work with (idempotent)."""
        return targets.to(outputs.device)

    def checked_targets(self, outputs: Tensor, targets: Any, where: str) -> Any:
        """The targets of one batch, validated, as the methods here work with them."""
        self.validate(outputs, targets, where)
        return self.prepare_targets(outputs, targets)

    def with_noise(self, factor: float) -> Likelihood | None:
        """The same with its estimated observation variance times ``factor``; None where none was estimated."""
        return None

    # -- what a prediction is --------------------------------------------------------------------

    def inverse_link(self, outputs: Tensor) -> Tensor:
        """What samples ``(S, B, *out)`` predict: probabilities, or (the default) themselves."""
        return outputs

    def centre(self, change: Tensor) -> Tensor:
        """Changes ``(S, B, *out)`` of outputs without the part that no prediction depends on."""
        return change

    def observed(self, change: Tensor) -> Tensor:
        """The same, in standard deviations of the noise with which outputs are observed (logits: one)."""
        return self.centre(change)

    def energy(self, outputs: Tensor) -> Tensor | None:
        """Energy ``(B, …)`` of outputs ``(B, *out)``, one for each place that is classified; larger where less is
        recognised. None where they are not the logits of classes.
        """
        return None

    def structured(self, values: Tensor) -> Any:
        """Outputs ``(*lead, *out)`` in the structure in which the model returns them (default: as they are)."""
        return values

    # -- derivatives -----------------------------------------------------------------------------

    def loss_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Derivative of `loss` by the outputs, ``(B, *out)``, detached. Default: automatic."""
        with torch.inference_mode(False), torch.enable_grad():
            point = outputs.detach().clone().requires_grad_()
            return self._gradient(point, detached(targets)).detach()

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Columns ``l_c`` with ``Σ_c l_c l_cᵀ = H_n``, the Hessian of `loss`: ``(C, B, *out)``.

        Default: D double-backward passes over the whole batch (no ``vmap``, so a loss may use any
        differentiable operation), then an eigendecomposition of each (D, D) Hessian in float64.
        Negative eigenvalues, where the loss is not convex in the outputs, are set to zero: a
        Gauss-Newton factor has to be positive semi-definite. So are those of the size of rounding, whose
        roots would be directions that the loss does not have. ``C = D``.
        """
        with torch.inference_mode(False), torch.enable_grad():
            point = outputs.detach().clone().requires_grad_()
            gradient = self._gradient(point, detached(targets), create_graph=True)
            flat = gradient.reshape(point.shape[0], -1)  # (B, D)
            rows = []
            for element in range(flat.shape[1]):
                # Example n's gradient depends on example n alone: the sum keeps the rows apart.
                row = (
                    torch.autograd.grad(
                        flat[:, element].sum(), point, retain_graph=True, materialize_grads=True
                    )[0]
                    if flat.requires_grad  # a loss linear in the outputs has no second derivative
                    else torch.zeros_like(point)
                )
                rows.append(row.detach().reshape(point.shape[0], -1))
        hessian = to_float64(torch.stack(rows, dim=1))  # (B, D, D)
        values, vectors = eigh((hessian + hessian.mT) / 2)
        values = without_rounding(values, vectors, hessian, outputs.dtype)
        columns = vectors * values.sqrt().unsqueeze(-2)  # (B, D, C)
        return columns.movedim(-1, 0).to(outputs).reshape(-1, *outputs.shape)

    def hessian_rank(self, output_shape: tuple[int, ...]) -> int:
        """The C of `hessian_factor` for outputs of this shape (batch axis left out)."""
        return math.prod(output_shape)

    def leading_factor(
        self, outputs: Tensor, targets: Tensor, directions: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """A shortcut to the ``directions`` leading eigen-directions of each H_n, where one exists.

        Returns them times √eigenvalue and longest first, ``(k, B, *out)``, with the eigenvalues
        ``(B, k)`` and the traces ``(B,)`` of H_n in float64; None (the default): decompose
        `hessian_factor`.
        """
        return None

    def sampled_gradient(self, outputs: Tensor, targets: Tensor, uniform: Tensor) -> Tensor:
        """A random vector ``(B, *out)`` whose covariance is the Hessian of `loss`, detached.

        Where a likelihood says how labels are drawn, the gradient of `loss` at one of those; by default the columns of
        `hessian_factor` with standard normal weights, which has the same covariance.

        Args:
            uniform: ``(B, *out)`` float64, in [0, 1): all the chance that there is.
        """
        columns = self.hessian_factor(outputs, targets)  # (C, B, *out)
        weights = torch.special.ndtri(uniform.flatten(1).clamp(1e-15, 1 - 1e-15))[:, : len(columns)]
        if weights.shape[1] < len(columns):
            raise InputError(
                f"{type(self).__name__}.hessian_factor gives {len(columns)} columns for {weights.shape[1]} outputs; "
                "write `sampled_gradient` for it, or leave `curvature` at 'gauss-newton'."
            )
        weights = weights.T.reshape(*weights.T.shape, *[1] * (outputs.ndim - 1)).to(columns)
        return (columns * weights).sum(0)

    def position_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The terms ``(B, T)`` that `loss` sums over; 0 where a position is ignored."""
        raise self._one_loss()

    def positions(self, output_shape: tuple[int, ...]) -> int:
        """The T of `position_losses`, for outputs of this shape (batch axis left out)."""
        raise self._one_loss()

    def position_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Derivative of each of `position_losses` by the outputs, ``(K, B, *out)`` with K of at most T rows."""
        raise self._one_loss()

    def _one_loss(self) -> InputError:
        return InputError(
            f"{type(self).__name__} has one loss an example, and none for each position. Use preserve='loss', or "
            "likelihood='classification' with outputs (B, T, classes)."
        )

    def _gradient(self, point: Tensor, targets: Tensor, *, create_graph: bool = False) -> Tensor:
        losses = self.loss(point, targets)
        if losses.shape != point.shape[:1]:
            raise InputError(
                f"{type(self).__name__}.loss has to return one value per example, shape "
                f"{tuple(point.shape[:1])}, got {tuple(losses.shape)}. Sum over positions, not over "
                f"the batch, e.g. `loss.flatten(1).sum(1)`."
            )
        return torch.autograd.grad(losses.sum(), point, create_graph=create_graph)[0]

    def check_reach(self, outputs: Tensor, targets: Any) -> None:
        """Raise `ModelError` where no output that the loss uses depends on the weights.

        Asked once, after a forward pass with derivatives; only a loss that may choose its outputs has to.
        """
        return

    # -- observation noise -----------------------------------------------------------------------

    @property
    def needs_noise_fit(self) -> bool:
        """Whether `fit_noise` has something to estimate (also when it was estimated before)."""
        return False

    def fit_noise(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Estimate the observation noise from ``(outputs, targets)`` pairs.

        Does nothing, and leaves the iterable unread, unless `needs_noise_fit`.
        """
        return

    # -- predictions against targets -------------------------------------------------------------

    def log_predictive(self, samples: Tensor, targets: Tensor) -> Tensor:
        """Log predictive density of the targets, ``(B,)``, under ``samples`` ``(S, B, *out)``.

        Default: ``log mean_s exp(-loss_s)``, the joint density of all that one example predicts.
        """
        require_samples(samples, 1)
        return log_mean_exp(torch.stack([-self.loss(sample, targets) for sample in samples]))

    def divergence(self, point: Tensor, samples: Tensor, targets: Tensor) -> Tensor:
        """Kullback-Leibler divergence in nats from the prediction at ``point`` ``(B, *out)`` to that of
        ``samples`` ``(S, B, *out)``, averaged over what one example observes: ``(S, B)``.

        Default: second order, half the change through the loss's Hessian (one double-backward pass a
        sample), over the number of target elements of an example.
        """
        with torch.inference_mode(False), torch.enable_grad():
            at = point.detach().clone().requires_grad_()
            gradient = self._gradient(at, detached(targets), create_graph=True)
            if not gradient.requires_grad:  # a loss linear in the outputs
                return samples.new_zeros(samples.shape[:2])
            values = []
            for change in (samples - point).detach().clone():
                (product,) = torch.autograd.grad(
                    gradient, at, change, retain_graph=True, materialize_grads=True
                )
                values.append((product * change).detach().reshape(len(point), -1).sum(1))
        observed = max(1, targets.numel() // max(1, len(targets)))
        return torch.stack(values).clamp_min(0) / (2 * observed)

    def correct(self, mean: Tensor, targets: Tensor) -> Tensor:
        """What `score` sums: squared errors by default, 0/1 hits for classification and binary."""
        return (mean - self.prepare_targets(mean, targets)).square()

    def confidence(self, mean: Tensor, targets: Tensor) -> Tensor | None:
        """Probability given to the predicted class, entry for entry as `correct`; None: no classes."""
        return None

    def score(self, means: Tensor, targets: Tensor) -> tuple[float, int]:
        """Sum and count of `correct`, to add up over batches; `final_score` turns them into a score."""
        values = to_float64(self.correct(means, targets))
        return float(values.sum()), values.numel()

    def score_draws(
        self, samples: Tensor, point: Tensor, *, linearised: bool, targets: Any
    ) -> tuple[float, int]:
        """`score` of what samples ``(S, B, *out)`` predict together: of their mean prediction."""
        return self.score(self.moments(samples, point, linearised=linearised).mean, targets)

    def final_score(self, total: float, count: int) -> float:
        """The score called `score_name` from summed `score` results; NaN where nothing was counted."""
        if count == 0:
            return math.nan
        return math.sqrt(total / count) if self.score_name == "rmse" else total / count

    # -- storage ---------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """All settings and fitted values, JSON-able; `likelihood_from_config` is its inverse."""
        return {"name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Likelihood:
        """Rebuild from `config`; by default each entry but the name is a constructor argument."""
        return cls(**{key: value for key, value in config.items() if key != "name"})

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.config().items() if k != "name")
        return f"{type(self).__name__}({settings})"


# -- the registry --------------------------------------------------------------------------------

_REGISTRY: dict[str, type[Likelihood]] = {}
_Class = TypeVar("_Class", bound=type[Likelihood])


def register_likelihood(cls: _Class) -> _Class:
    """Class decorator: make a likelihood known by its ``name`` (to `resolve_likelihood` and storage).

    Raises `InputError` if another class holds the name. Defining the same class again, as a notebook
    cell does when it is run twice, replaces it.
    """
    holder = _REGISTRY.get(cls.name)
    if holder is not None and holder.__qualname__ != cls.__qualname__:
        raise InputError(
            f"the likelihood name {cls.name!r} belongs to {holder.__qualname__}; give "
            f"{cls.__qualname__} another `name`."
        )
    _REGISTRY[cls.name] = cls
    return cls


def resolve_likelihood(value: str | Likelihood) -> Likelihood:
    """A likelihood from its name (a fresh object) or from an object (returned as it is).

    Raises `InputError` listing the names for anything else.
    """
    if isinstance(value, Likelihood):
        return value
    if isinstance(value, str) and value in _REGISTRY:
        return _REGISTRY[value]()
    other: object = value  # whatever the caller passed in spite of the annotation
    found = f"the class {other.__name__} (call it)" if isinstance(other, type) else repr(other)
    raise InputError(
        f"likelihood is {found}; expected {_known()} or a nullbayes Likelihood object, e.g. "
        f"`Classification(ignore_index=0)`."
    )


def likelihood_from_config(config: dict[str, Any]) -> Likelihood:
    """The inverse of ``Likelihood.config``. Raises `InputError` for unknown names or settings."""
    name = config.get("name")
    if name == "callable":
        raise StorageError(
            f"this posterior was fitted with the loss `{config.get('function')}`, a callable, and files hold no "
            "code. Pass it again: `nb.load(path, model, loss=...)`."
        )
    if name not in _REGISTRY:
        raise InputError(
            f"the stored likelihood is {name!r}, expected {_known()}. If it is your own class, import "
            f"the module that defines it and decorate it with `@register_likelihood`."
        )
    try:
        return _REGISTRY[name].from_config(config)
    except NullBayesError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"the stored settings of the likelihood {name!r} do not fit its class: {error}. Found {config!r}."
        ) from error


def _known() -> str:
    return ", ".join(repr(name) for name in sorted(_REGISTRY))
